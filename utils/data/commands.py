"""The commands that a message tells the user to run."""

from pathlib import Path

from wan.configs import NO_CONDITIONS, TASKS, WAN_2_1_VAE, WAN_2_2_VAE, Conditions, LatentLayout

_TRAINING = (
    "accelerate launch --mixed_precision bf16 wan_train_network.py --config_file examples/train_character1.toml "
    "--dataset_config {config}"
)
_CACHING = {
    "latents": "python wan_cache_latents.py --dataset_config {config} --vae {vae}",
    "text": "python wan_cache_text_encoder_outputs.py --dataset_config {config} --t5 T5",
}


def caching_command(
    cache: str, config: Path, latents: LatentLayout = WAN_2_1_VAE, conditions: Conditions = NO_CONDITIONS
) -> str:
    """What creates the caches of a kind ("latents" or "text") of a dataset file, for the models that need these."""
    command = _CACHING[cache].format(config=_argument(config), vae=_vae(latents))
    if cache == "text" or not conditions.pictures:
        return command
    flag = "--flf2v" if conditions.pictures == 2 else "--i2v"
    return f"{command} {flag}" + (" --clip CLIP" if conditions.clip else "")


def training_command(config: Path, latents: LatentLayout = WAN_2_1_VAE, conditions: Conditions = NO_CONDITIONS) -> str:
    """What trains on a dataset file, with the flags of the example, a model that needs such latents and conditions."""
    command = _TRAINING.format(config=_argument(config))
    if (latents, conditions) == (WAN_2_1_VAE, NO_CONDITIONS):
        return command
    task = next(task for task in TASKS.values() if (task.latents, task.conditions) == (latents, conditions))
    # The example is of text-to-video; it names files for that.
    vae = f" --vae {_vae(latents)}" if latents != WAN_2_1_VAE else ""
    return f"{command} --task {task.name} --dit DIT{vae}"


def _vae(latents: LatentLayout) -> str:
    return "WAN_2.2_VAE" if latents == WAN_2_2_VAE else "VAE"


def _argument(path: Path) -> str:
    # Double quotes are understood by shells on Windows too.
    return f'"{path}"' if set(str(path)) & set(" '&()") else str(path)
