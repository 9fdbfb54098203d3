"""The commands that a message tells the user to run."""

from pathlib import Path

_TRAINING = (
    "accelerate launch --mixed_precision bf16 wan_train_network.py --config_file examples/train_character1.toml "
    "--dataset_config {config}"
)
_CACHING = {
    "latents": "python wan_cache_latents.py --dataset_config {config} --vae VAE",
    "text": "python wan_cache_text_encoder_outputs.py --dataset_config {config} --t5 T5",
}


def caching_command(cache: str, config: Path) -> str:
    """What creates the caches of a kind ("latents" or "text") of a dataset file."""
    return _CACHING[cache].format(config=_argument(config))


def training_command(config: Path) -> str:
    """What trains on a dataset file, with the flags of the example."""
    return _TRAINING.format(config=_argument(config))


def _argument(path: Path) -> str:
    # Double quotes are understood by shells on Windows too.
    return f'"{path}"' if set(str(path)) & set(" '&()") else str(path)
