"""The list of wan_train_network.py's flags: those it has, those of musubi-tuner that it refuses."""

import argparse
from argparse import ArgumentParser
from pathlib import Path

import torch

from utils.cli.swap_flags import add_swap_flags
from utils.learning.flow_matching import SAMPLINGS, WEIGHTINGS
from utils.learning.lr_schedules import SCHEDULES
from utils.run.save_schedule import KINDS

VAE_DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
}
_ATTENTION = "PyTorch's attention is the one there is, and takes the fastest kernel of the device: use --sdpa"
_LORA = "this script trains a slice of the checkpoint itself, no LoRA: use --ff 0.001 --ffid 1"
_FP8 = "slices train on 16- or 32-bit weights; to save memory use --blocks_to_swap"
_COMPILE = "the model runs uncompiled; leave it out"
_ONE_EXPERT = (
    "each expert trains in a run of its own: give its file as --dit, its range as --min_timestep --max_timestep"
)
_PICTURES = "only text-to-video trains here; leave it out"
_HUB = "nothing is uploaded; upload the files of --output_dir yourself"
_DDP = "no DDP wrapper is used, the slice's gradients are averaged directly; leave it out"

_REFUSED_TOGETHER = {
    _ATTENTION: ("--flash_attn", "--sage_attn", "--xformers", "--flash3", "--split_attn"),
    _LORA: (
        *("--network_module", "--network_dim", "--network_alpha", "--network_dropout", "--network_args"),
        *("--network_weights", "--dim_from_weights", "--scale_weight_norms"),
        *("--base_weights", "--base_weights_multiplier"),
    ),
    _FP8: ("--fp8_base", "--fp8_scaled"),
    _COMPILE: (
        *("--compile", "--compile_backend", "--compile_mode", "--compile_dynamic", "--compile_fullgraph"),
        *("--compile_cache_size_limit", "--dynamo_backend", "--dynamo_mode", "--dynamo_fullgraph", "--dynamo_dynamic"),
    ),
    _ONE_EXPERT: ("--dit_high_noise", "--timestep_boundary", "--offload_inactive_dit"),
    _PICTURES: ("--clip", "--one_frame"),
    _HUB: (
        *("--huggingface_repo_id", "--huggingface_repo_type", "--huggingface_path_in_repo", "--huggingface_token"),
        *("--huggingface_repo_visibility", "--save_state_to_huggingface", "--resume_from_huggingface"),
        "--async_upload",
    ),
    _DDP: ("--ddp_gradient_as_bucket_view", "--ddp_static_graph"),
}
REFUSED = {
    **{flag: reason for reason, flags in _REFUSED_TOGETHER.items() for flag in flags},
    "--img_in_txt_in_offloading": "it is for HunyuanVideo; use --blocks_to_swap",
    "--guidance_scale": "it is for HunyuanVideo; a sample's guidance is --l in its line of --sample_prompts",
    "--disable_numpy_memmap": "checkpoints are always memory-mapped; leave it out",
    "--fp8_t5": "the text encoder computes in bf16 and is freed before the model loads; leave it out",
    "--vae_cache_cpu": "the VAE is on the device only while samples are decoded; leave it out",
    "--wandb_api_key": "a key on the command line is seen by all users of the machine; run `wandb login` before",
}


def add_flags(parser: ArgumentParser) -> None:
    """Adds every flag that the training script has."""
    _add_files(parser)
    _add_slice_and_run(parser)
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_timesteps(parser)
    _add_preservation(parser)
    _add_saving(parser)
    _add_metadata(parser)
    _add_samples(parser)
    _add_logging(parser)


def _add_files(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--config_file", type=Path, help="toml file of flags; the command line wins")
    group.add_argument("--task", default="t2v-14B", help="t2v-A14B, t2v-14B (default), t2v-1.3B or t2i-14B")
    group.add_argument("--dit", type=Path, help="checkpoint to train")
    group.add_argument("--dataset_config", type=Path, help="dataset file, .toml or .json")
    group.add_argument("--vae", type=Path, help="Wan 2.1 VAE, for samples")
    group.add_argument("--t5", type=Path, help="UMT5 text encoder, for samples and --preserve_prompts")
    group.add_argument("--tokenizer", type=Path, help="its tokenizer (default: beside --t5, in it, or the hub)")


def _add_slice_and_run(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("slice")
    group.add_argument("--ff", help="share of every block matrix that trains, for example 0.001")
    group.add_argument("--ffid", type=int, help="which slice of that size, from 1 on: another one for every concept")
    group.add_argument("--slices", type=Path, nargs="+", default=[], metavar="FILE", help="slice files on top of --dit")
    group.add_argument("--continue_slice", action="store_true", help="train the slice that --dit holds further")
    group.add_argument("--allow_overlap", action="store_true", help="train over other slices that --dit holds")
    group = parser.add_argument_group("training")
    group.add_argument("--max_train_steps", type=int, default=1600, help="default 1600")
    group.add_argument("--max_train_epochs", type=int, help="decides instead of --max_train_steps")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches to an optimizer step")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute blocks in backward")
    group.add_argument(
        "--gradient_checkpointing_cpu_offload", action="store_true", help="keep their inputs on the host"
    )
    add_swap_flags(group)
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: the launcher's")
    group.add_argument("--seed", type=int, help="default: random, printed")
    group.add_argument("--max_data_loader_n_workers", type=int, default=8, help="processes that read caches ahead")
    group.add_argument("--persistent_data_loader_workers", action="store_true", help="keep them between epochs")
    group.add_argument("--ddp_timeout", type=int, help="minutes that processes wait for each other")
    group.add_argument("--cuda_allow_tf32", action="store_true", help="faster float32 products, less exact")
    group.add_argument("--cuda_cudnn_benchmark", action="store_true", help="let cuDNN try its kernels (VAE)")
    group.add_argument("--sdpa", action="store_true", help="PyTorch's attention: always so")
    group.add_argument("--force_v2_1_time_embedding", action="store_true", help="one timestep a sample: always so")


def _add_optimizer(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer_type", default="", help="AdamW (default), AdamW8bit, Lion8bit, Adafactor, a path ..."
    )
    group.add_argument("--optimizer_args", nargs="*", default=[], metavar="KEY=VALUE", help="weight_decay=0.1 ...")
    group.add_argument("--learning_rate", type=float, default=2e-6, help="default 2e-6")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clip gradients to it; 0 is off (default 1)")


def _add_schedule(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("learning-rate schedule")
    group.add_argument("--lr_scheduler", default="constant", help=", ".join(SCHEDULES))
    group.add_argument("--lr_warmup_steps", default="0", help="steps, a share below 1, or N%%")
    group.add_argument("--lr_decay_steps", default="0", help="the same, of warmup_stable_decay")
    group.add_argument("--lr_scheduler_num_cycles", type=int, default=1, help="of cosine_with_restarts")
    group.add_argument("--lr_scheduler_power", type=float, default=1.0, help="of polynomial")
    group.add_argument("--lr_scheduler_timescale", type=int, help="of inverse_sqrt (default: the warmup)")
    group.add_argument("--lr_scheduler_min_lr_ratio", type=float, help="of cosine_with_min_lr, rex, ...")
    group.add_argument("--lr_scheduler_type", default="", help="a scheduler class by path, in place of a name")
    group.add_argument("--lr_scheduler_args", nargs="*", default=[], metavar="KEY=VALUE", help="its arguments")


def _add_timesteps(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("timesteps")
    group.add_argument("--timestep_sampling", choices=SAMPLINGS, default="sigma")
    group.add_argument("--discrete_flow_shift", type=float, default=1.0, help="of shift and sigma")
    group.add_argument("--sigmoid_scale", type=float, default=1.0, help="of sigmoid and the shifts")
    group.add_argument("--weighting_scheme", choices=WEIGHTINGS, default="none", help="first two: sigma sampling only")
    group.add_argument("--logit_mean", type=float, default=0.0, help="of logit_normal and logsnr")
    group.add_argument("--logit_std", type=float, default=1.0, help="of logit_normal and logsnr")
    group.add_argument("--mode_scale", type=float, default=1.29, help="of the weighting mode")
    group.add_argument("--min_timestep", type=float, default=0.0, help="0 (default) is without noise")
    group.add_argument("--max_timestep", type=float, default=1000.0, help="1000 (default) is noise alone")
    group.add_argument("--preserve_distribution_shape", action="store_true", help="cut to the range, do not squeeze")
    group.add_argument("--num_timestep_buckets", type=int, help="spread successive samples evenly over so many parts")
    group.add_argument("--show_timesteps", choices=("image", "console"), help="print their histogram, then end")


def _add_preservation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("keeping what was learned")
    group.add_argument(
        "--preserve_prompts",
        nargs="+",
        metavar="FILE|auto",
        help="prompt files whose pictures should stay as they are; auto: the captions of the concepts in --dit",
    )
    group.add_argument(
        "--preserve_answers",
        type=Path,
        metavar="FILE",
        help="the OUTPUT_NAME.answers.safetensors of the run before: what it asked and kept is preserved too",
    )
    group.add_argument("--preserve_levels", type=int, help="noise levels at which an old prompt is asked (default 8)")
    group.add_argument("--preserve_every", type=int, help="on every N-th step (default 4)")
    group.add_argument("--preserve_weight", type=float, help="beside the training loss (default --preserve_every)")


def _add_saving(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("saving")
    group.add_argument("--output_dir", type=Path, help="folder")
    group.add_argument("--output_name", help="file name without .safetensors; the concept's name")
    group.add_argument("--save_as", nargs="+", choices=tuple(KINDS), default=["checkpoint"], help="default checkpoint")
    group.add_argument("--save_every_n_epochs", type=int)
    group.add_argument("--save_every_n_steps", type=int)
    group.add_argument("--save_last_n_epochs", type=int, help="keep so many checkpoints of epochs")
    group.add_argument("--save_last_n_epochs_state", type=int, help="the same for states")
    group.add_argument("--save_last_n_steps", type=int, help="keep checkpoints of so many steps")
    group.add_argument("--save_last_n_steps_state", type=int, help="the same for states")
    group.add_argument("--save_state", action="store_true", help="with each checkpoint, what --resume needs")
    group.add_argument("--save_state_on_train_end", action="store_true", help="at the end only")
    group.add_argument("--resume", type=Path, help="a ...-state folder, or latest: go on exactly where it was saved")
    group.add_argument("--save_precision", choices=("float", "fp32", "fp16", "bf16"), help="only the dtype of --dit")


def _add_metadata(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("metadata")
    group.add_argument("--no_metadata", action="store_true", help="without the run's settings")
    group.add_argument("--training_comment")
    for name in ("title", "author", "description", "license", "tags", "reso", "arch"):
        group.add_argument(f"--metadata_{name}")


def _add_samples(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("samples during training")
    group.add_argument("--sample_prompts", type=Path, help="prompt file: .txt, .toml or .json")
    group.add_argument("--sample_every_n_epochs", type=int)
    group.add_argument("--sample_every_n_steps", type=int)
    group.add_argument("--sample_at_first", action="store_true", help="before the first step too")
    group.add_argument("--vae_dtype", type=_vae_dtype, default=torch.bfloat16, help="default bfloat16")


def _add_logging(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("logging")
    group.add_argument("--logging_dir", type=Path, help="folder for TensorBoard")
    group.add_argument("--log_with", choices=("tensorboard", "wandb", "all"), help="default tensorboard")
    group.add_argument("--log_prefix", default="", help="begins the name of the run's folder")
    group.add_argument("--log_tracker_name", default="network_train", help="of the tracker's project")
    group.add_argument("--log_tracker_config", type=Path, help="toml file with a table of arguments for each tracker")
    group.add_argument("--log_config", action="store_true", help="log the settings too")
    group.add_argument("--wandb_run_name")
    group.add_argument("--training_debug", action="store_true", help="show what moves in each block; check each save")


def _vae_dtype(text: str) -> torch.dtype:
    if text.lower() not in VAE_DTYPES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(VAE_DTYPES)}")
    return VAE_DTYPES[text.lower()]
