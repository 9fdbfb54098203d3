"""The flags of wan_train_network.py; those about optimizer, schedule and timesteps are in learning_flags."""

from argparse import ArgumentParser
from pathlib import Path

import torch

from utils.cli.command import DTYPES, add_fp8_t5, dtype, number, task
from utils.cli.expert_flags import add_expert_flags
from utils.cli.learning_flags import add_learning_flags
from utils.cli.sampling_flags import SAMPLE_LORAS, add_batch_flag, add_lora_flags
from utils.cli.swap_flags import add_compile_flag, add_swap_flags
from utils.preserve.answers import MOST_CONTEXTS
from utils.preserve.guard import WEIGHT
from utils.preserve.old_prompts import RANDOM_CONTEXTS
from utils.run.save_schedule import KINDS
from wan.configs import TASKS
from wan.values import COUNT, COUNT_OR_NONE, SEED, STEPS, Number

_ANY_ID = Number(-(10**40), 10**40, whole=True, words="a whole number")
_SHARE = Number(0, 1)
_WEIGHT = Number(0, 1e6, without_a=True)
_GUARD = Number(0, 1e6)
_LEVELS = Number(1, 1000, whole=True)
_CONTEXTS = Number(0, MOST_CONTEXTS, whole=True)
_MINUTES = Number(1, 10**6, whole=True)


def add_flags(parser: ArgumentParser) -> None:
    """Adds every flag of the training script."""
    _add_slice(parser)
    _add_files(parser)
    _add_training(parser)
    add_expert_flags(parser)
    add_swap_flags(parser, "--fp8_base", "the matrices of the blocks, except for the slice,")
    add_learning_flags(parser)
    _add_preservation(parser)
    _add_saving(parser)
    _add_validation(parser)
    _add_samples(parser)
    _add_logging(parser)
    _add_metadata(parser)


def _add_slice(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the slice")
    add = group.add_argument
    add("--ff", metavar="SHARE", help="share of every transformer block's matrices to train, such as 0.001 (required)")
    add(
        "--ffid",
        type=number(_ANY_ID),
        metavar="N",
        help="which slice of that size, counted from 1; give every concept another one (required)",
    )
    add(
        "--slices",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="slice files to apply to --dit first (default: none)",
    )
    add("--continue_slice", action="store_true", help="train on a slice that --dit already holds (default: off)")
    add(
        "--allow_overlap",
        action="store_true",
        help="allow a slice that overlaps others in --dit, whose concepts it damages (default: off)",
    )


def _add_files(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("input files")
    add = group.add_argument
    add(
        "--config_file",
        type=Path,
        metavar="FILE",
        help="toml file of flags, without their dashes; the command line takes precedence (default: none)",
    )
    add(
        "--task",
        type=task,
        default="t2v-14B",
        metavar="TASK",
        help=f"the kind of model: {', '.join(TASKS)} (default: %(default)s)",
    )
    add(
        "--dit",
        type=Path,
        metavar="FILE",
        help="Wan checkpoint to train, .safetensors, of the kind that --task says (required)",
    )
    add("--dataset_config", type=Path, metavar="FILE", help="dataset file, .toml or .json (required)")
    add(
        "--vae",
        type=Path,
        metavar="FILE",
        help="Wan 2.1 VAE, or the Wan 2.2 VAE of ti2v-5B, needed for samples (default: none)",
    )
    add(
        "--t5",
        type=Path,
        metavar="FILE",
        help="UMT5 text encoder, needed for samples and --preserve_prompts (default: none)",
    )
    add_fp8_t5(add)
    add(
        "--clip",
        type=Path,
        metavar="FILE",
        help="CLIP image encoder, needed for samples of i2v-14B and flf2v-14B (default: none)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="the text encoder's tokenizer, a file or folder (default: the one beside --t5, in it, or downloaded)",
    )


def _add_training(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add(
        "--max_train_steps",
        type=number(STEPS),
        default=1600,
        metavar="N",
        help="optimizer steps (default: %(default)s)",
    )
    add(
        "--max_train_epochs",
        type=number(STEPS),
        metavar="N",
        help="epochs, instead of --max_train_steps (default: not set)",
    )
    add(
        "--gradient_accumulation_steps",
        type=number(COUNT),
        default=1,
        metavar="N",
        help="batches per optimizer step (default: %(default)s)",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="compute each block's activations again in the backward pass, to save memory (default: off)",
    )
    add(
        "--gradient_checkpointing_cpu_offload",
        action="store_true",
        help="with --gradient_checkpointing: keep each block's input in RAM until then (default: off)",
    )
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="precision of the computation; no is float32 (default: what accelerate launch was given, else no)",
    )
    add("--seed", type=number(SEED), metavar="N", help="seed of all random numbers (default: random, and printed)")
    add(
        "--max_data_loader_n_workers",
        type=number(COUNT_OR_NONE),
        default=8,
        metavar="N",
        help="processes that read the cached dataset ahead, at most one per core (default: %(default)s)",
    )
    add(
        "--persistent_data_loader_workers",
        action="store_true",
        help="keep these processes from one epoch to the next (default: off)",
    )
    add(
        "--ddp_timeout",
        type=number(_MINUTES),
        metavar="MINUTES",
        help="how long the processes of a run on several GPUs wait for each other (default: one day)",
    )
    add(
        "--i2v_share",
        type=number(_SHARE),
        metavar="SHARE",
        help="of ti2v-5B: the share of the clips, drawn anew in each epoch, that train as image-to-video from their "
        "first frame; the others, and pictures, train as text-to-video (default: 0.5)",
    )
    add_compile_flag(add)
    add("--cuda_allow_tf32", action="store_true", help="faster, less exact float32 products on the GPU (default: off)")
    add("--cuda_cudnn_benchmark", action="store_true", help="let cuDNN time its kernels first (default: off)")
    add("--sdpa", action="store_true", help="accepted for compatibility: attention is always PyTorch's")
    add(
        "--force_v2_1_time_embedding",
        action="store_true",
        help="accepted for compatibility: the time embedding is computed once for each different timestep",
    )


def _add_preservation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("keeping what was learned before")
    add = group.add_argument
    add(
        "--preserve_prompts",
        nargs="*",
        metavar="FILE|auto",
        help="prompt files whose pictures should stay as they are; auto adds the captions of the concepts in --dit; "
        "without a file: the empty prompt and those captions (default: nothing is preserved)",
    )
    add(
        "--preserve_random",
        type=number(_CONTEXTS),
        metavar="N",
        help="random contexts to preserve beside the prompts, for all that nobody lists; 0: none (default: what "
        f"--preserve_answers holds, else {RANDOM_CONTEXTS})",
    )
    add(
        "--preserve_answers",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="reference predictions of an earlier run (OUTPUT_NAME.answers.safetensors) to preserve too; of two "
        "experts a file of each (default: none)",
    )
    add(
        "--preserve_levels",
        type=number(_LEVELS),
        metavar="N",
        help="noise levels at which each prompt's reference predictions are recorded (default: 8)",
    )
    add(
        "--preserve_every",
        type=number(COUNT),
        metavar="N",
        help="use the reference predictions on every N-th step (default: 4)",
    )
    add(
        "--preserve_weight",
        type=number(_WEIGHT),
        metavar="WEIGHT",
        help="weight of their loss beside the training loss (default: the value of --preserve_every)",
    )
    add(
        "--guard",
        type=number(_GUARD),
        nargs="?",
        const=WEIGHT,
        metavar="WEIGHT",
        help="weight of a penalty on how the slice changes predictions that nobody listed; 0: none (default: "
        f"{WEIGHT:g} whenever anything is preserved)",
    )


def _add_saving(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("saving and resuming")
    add = group.add_argument
    add("--output_dir", type=Path, metavar="FOLDER", help="folder for everything that the run writes (required)")
    add(
        "--output_name",
        metavar="NAME",
        help="file name without an ending; also the concept's name in the ledger (required)",
    )
    add(
        "--save_as",
        nargs="+",
        choices=tuple(KINDS),
        default=["checkpoint"],
        metavar="KIND",
        help=f"one or more of {', '.join(KINDS)} (default: checkpoint)",
    )
    for unit in ("epochs", "steps"):
        add(
            f"--save_every_n_{unit}",
            type=number(COUNT),
            metavar="N",
            help=f"save every N {unit}, beside the end (default: only at the end)",
        )
    add(
        "--save_last_n_epochs",
        type=number(COUNT),
        metavar="N",
        help="with --save_every_n_epochs: keep the last N checkpoints (default: all)",
    )
    add(
        "--save_last_n_steps",
        type=number(COUNT),
        metavar="N",
        help="with --save_every_n_steps: keep the checkpoints of the last N steps (default: all)",
    )
    for unit in ("epochs", "steps"):
        add(
            f"--save_last_n_{unit}_state",
            type=number(COUNT),
            metavar="N",
            help=f"with --save_state: the same for states (default: as --save_last_n_{unit})",
        )
    add("--save_state", action="store_true", help="save a state for --resume with every checkpoint (default: off)")
    add("--save_state_on_train_end", action="store_true", help="save a state at the end only (default: off)")
    add(
        "--resume",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folder NAME-state to resume from, of two experts one of each; latest takes the newest in --output_dir "
        "(default: start at step 0)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace an earlier run of this --output_name: its states, numbered saves and best slice are deleted "
        "before the first step (default: stop if there is one)",
    )
    add(
        "--save_precision",
        choices=("float", "fp32", "fp16", "bf16"),
        help="accepted if it is the precision of --dit, which checkpoints keep (default: that of --dit)",
    )


def _add_validation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add(
        "--validation_dataset_config",
        type=Path,
        metavar="FILE",
        help="dataset file of pictures to validate on, cached like those to train on (default: what validation_split "
        "in --dataset_config holds out, if anything)",
    )
    for unit, default in (("epochs", "1 if there are pictures to validate on"), ("steps", "off")):
        add(
            f"--validate_every_n_{unit}",
            type=number(COUNT),
            metavar="N",
            help=f"validate every N {unit} (default: {default})",
        )
    add(
        "--save_best",
        action="store_true",
        help="also save the slice with the lowest validation loss, as NAME-best.slice.safetensors (default: off)",
    )


def _add_samples(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("samples during training")
    add = group.add_argument
    add("--sample_prompts", type=Path, metavar="FILE", help="prompt file: .txt, .toml or .json (default: no samples)")
    for unit in ("epochs", "steps"):
        add(
            f"--sample_every_n_{unit}",
            type=number(COUNT),
            metavar="N",
            help=f"draw samples every N {unit} (default: off)",
        )
    add("--sample_at_first", action="store_true", help="draw samples before the first step too (default: off)")
    add_lora_flags(add, SAMPLE_LORAS)
    add_batch_flag(add, "; also of the reference predictions that a run records")
    add(
        "--vae_dtype",
        type=dtype,
        default=torch.bfloat16,
        metavar="DTYPE",
        help=f"precision in which samples are decoded: {', '.join(DTYPES)} (default: bfloat16)",
    )


def _add_logging(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("logging")
    add = group.add_argument
    add("--logging_dir", type=Path, metavar="FOLDER", help="folder for TensorBoard (default: nothing is logged)")
    add(
        "--log_with",
        choices=("tensorboard", "wandb", "all"),
        help="where to log (default: tensorboard with --logging_dir)",
    )
    add("--log_prefix", default="", metavar="NAME", help="start of the name of the run's log folder (default: none)")
    add(
        "--log_tracker_name",
        default="network_train",
        metavar="NAME",
        help="name of the project in the tracker (default: %(default)s)",
    )
    add(
        "--log_tracker_config",
        type=Path,
        metavar="FILE",
        help="toml file with a table of arguments for each tracker (default: none)",
    )
    add("--log_config", action="store_true", help="log the run's settings too (default: off)")
    add("--wandb_run_name", metavar="NAME", help="name of the run in Weights & Biases (default: chosen by it)")
    add(
        "--training_debug",
        action="store_true",
        help="show how much each block has moved, and check every checkpoint against --dit (default: off)",
    )


def _add_metadata(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("metadata of the checkpoint")
    add = group.add_argument
    add("--no_metadata", action="store_true", help="leave the run's settings out of the metadata (default: off)")
    add("--training_comment", metavar="TEXT", help="a comment (default: none)")
    for name, what in (
        ("title", "the model's title (default: --output_name)"),
        ("author", "its author (default: none)"),
        ("description", "its description (default: none)"),
        ("license", "its license (default: none)"),
        ("tags", "tags, separated by commas (default: none)"),
        ("reso", "resolution that it is for, such as 512x512 (default: that of --task)"),
        ("arch", "architecture to name (default: wan2.1)"),
    ):
        add(f"--metadata_{name}", metavar="TEXT", help=what)
