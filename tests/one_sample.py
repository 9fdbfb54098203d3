"""One sample drawn alone, for the tests."""

from utils.sampling.batches import advance
from utils.sampling.denoising import NOISE_ALONE, Denoising


def sample_prompt(model, sample, texts, device="cpu", start=NOISE_ALONE, batch=1):
    """The latent [C, F, H, W] of a sample, by default with its prompt and without it in passes of their own."""
    denoising = Denoising(sample, start)
    advance([denoising], model, None, texts, device, batch)
    return denoising.latent_CFHW
