"""From a prompt to a file: prompt files, denoising, writing pictures and clips."""
