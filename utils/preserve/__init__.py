"""Keeps what was taught before: old prompts, the reference predictions of the model, their file."""
