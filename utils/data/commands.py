"""The commands that a message tells the user to run."""

from pathlib import Path

from wan.configs import NO_CONDITIONS, TASKS, WAN_2_1_VAE, WAN_2_2_VAE, Conditions, LatentLayout

_TRAINING = "accelerate launch --mixed_precision bf16 wan_train_network.py {flags} --dataset_config {config}"
_EXAMPLE = "--config_file examples/train_character1.toml"
# The flags of docs/tasks.md: the example is of text-to-video, with samples that start from no picture.
_FLAGS = (
    "--task {task} --dit DIT --ff 0.001 --ffid 1 --gradient_checkpointing --blocks_to_swap {blocks} --learning_rate "
    "1e-4 --timestep_sampling shift --discrete_flow_shift {shift:g} --max_train_epochs 100 --save_every_n_epochs 10 "
    "--save_as slice --save_state --output_dir saves --output_name character1"
)
_SHIFT = 5.0
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
    """What trains a model that needs such latents and conditions on a dataset file."""
    flags = _EXAMPLE
    if (latents, conditions) != (WAN_2_1_VAE, NO_CONDITIONS):
        task = next(task for task in TASKS.values() if (task.latents, task.conditions) == (latents, conditions))
        shift, blocks = task.flow_shift_480p or _SHIFT, task.config.num_layers * 3 // 5
        flags = _FLAGS.format(task=task.name, blocks=blocks, shift=shift)
    return _TRAINING.format(flags=flags, config=_argument(config))


def _vae(latents: LatentLayout) -> str:
    return "WAN_2.2_VAE" if latents == WAN_2_2_VAE else "VAE"


def _argument(path: Path) -> str:
    # Double quotes are understood by shells on Windows too.
    return f'"{path}"' if set(str(path)) & set(" '&()") else str(path)
