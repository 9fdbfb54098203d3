"""The flags about the maths of a step: optimizer, learning-rate schedule, timesteps."""

from argparse import Namespace

from utils.cli.command import number
from utils.learning.flow_matching import MODE_SCALES, SAMPLINGS, WEIGHTINGS, TimestepConfig
from utils.learning.lr_schedules import MIN_LR_RATIO, POWER, SCHEDULES, ScheduleConfig, check_schedule_flags
from utils.learning.optimizers import LEARNING_RATE, OptimizerConfig, check_optimizer_flags
from wan.errors import InputError
from wan.values import COUNT, SHIFT, Number

_TIMESTEP = Number(0, 1000)
_SPREAD = Number(0, 1000, without_a=True)
_MEAN = Number(-1000, 1000)
_BUCKETS = Number(2, 10**5, whole=True)
_NORM = Number(0, 1e30)
_HAS_SHIFT = ("shift", "sigma")
_HAS_SIGMOID = ("sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "qinglong_flux")
_HAS_SIGMOID += ("qinglong_qwen",)


def add_learning_flags(parser) -> None:
    """Adds the flags, in groups of their own."""
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_timesteps(parser)


def _add_optimizer(parser) -> None:
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add(
        "--optimizer_type",
        default="",
        metavar="NAME",
        help="AdamW, AdamW8bit, Lion8bit, Adafactor, any other of torch.optim, or a dotted path (default: AdamW)",
    )
    add(
        "--optimizer_args",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of the optimizer, such as weight_decay=0.1 (default: none)",
    )
    add(
        "--learning_rate",
        type=number(LEARNING_RATE),
        default=2e-6,
        metavar="RATE",
        help="highest learning rate of the schedule (default: %(default)s)",
    )
    add(
        "--max_grad_norm",
        type=number(_NORM),
        default=1.0,
        metavar="NORM",
        help="gradients are scaled down to this norm; 0 turns clipping off (default: %(default)s)",
    )


def _add_schedule(parser) -> None:
    group = parser.add_argument_group("learning-rate schedule")
    add = group.add_argument
    add("--lr_scheduler", default="constant", metavar="NAME", help=f"{', '.join(SCHEDULES)} (default: %(default)s)")
    add(
        "--lr_warmup_steps",
        default="0",
        metavar="N",
        help="warmup: a number of steps, a share of all steps below 1, or a percentage such as 5%% (default: 0)",
    )
    add(
        "--lr_decay_steps",
        default="0",
        metavar="N",
        help="decay at the end of warmup_stable_decay, given like --lr_warmup_steps (default: 0)",
    )
    add(
        "--lr_scheduler_num_cycles",
        type=number(COUNT),
        default=1,
        metavar="N",
        help="cycles of cosine_with_restarts (default: %(default)s)",
    )
    add(
        "--lr_scheduler_power",
        type=number(POWER),
        default=1.0,
        metavar="POWER",
        help="power of polynomial (default: %(default)s)",
    )
    add(
        "--lr_scheduler_timescale",
        type=number(COUNT),
        metavar="N",
        help="steps after which inverse_sqrt starts to fall (default: the warmup, else 10000)",
    )
    add(
        "--lr_scheduler_min_lr_ratio",
        type=number(MIN_LR_RATIO),
        metavar="RATIO",
        help="lowest rate of cosine_with_min_lr, warmup_stable_decay and rex, as a share of the highest (default: 0)",
    )
    add(
        "--lr_scheduler_type",
        default="",
        metavar="PATH",
        help="a class of torch.optim.lr_scheduler, or a dotted path, in place of --lr_scheduler (default: none)",
    )
    add(
        "--lr_scheduler_args",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of the schedule (default: none)",
    )


def _add_timesteps(parser) -> None:
    group = parser.add_argument_group("timesteps (0 is without noise, 1000 is pure noise)")
    add = group.add_argument
    add(
        "--timestep_sampling",
        choices=SAMPLINGS,
        default="sigma",
        metavar="NAME",
        help=f"how timesteps are drawn: {', '.join(SAMPLINGS)} (default: %(default)s)",
    )
    add(
        "--discrete_flow_shift",
        type=number(SHIFT),
        default=1.0,
        metavar="SHIFT",
        help="above 1 draws noisier timesteps; used by the samplings shift and sigma (default: %(default)s)",
    )
    add(
        "--sigmoid_scale",
        type=number(_SPREAD),
        default=1.0,
        metavar="SCALE",
        help="spread of the timesteps; used by sigmoid and the *shift samplings (default: %(default)s)",
    )
    add(
        "--weighting_scheme",
        choices=WEIGHTINGS,
        default="none",
        metavar="NAME",
        help=f"how the noise level weights the loss: {', '.join(WEIGHTINGS)}; logit_normal and mode need "
        "--timestep_sampling sigma (default: %(default)s)",
    )
    add(
        "--logit_mean",
        type=number(_MEAN),
        default=0.0,
        metavar="MEAN",
        help="mean of logit_normal and logsnr (default: %(default)s)",
    )
    add(
        "--logit_std",
        type=number(_SPREAD),
        default=1.0,
        metavar="STD",
        help="standard deviation of logit_normal and logsnr (default: %(default)s)",
    )
    add(
        "--mode_scale",
        type=number(MODE_SCALES),
        default=1.29,
        metavar="SCALE",
        help="scale of --weighting_scheme mode (default: %(default)s)",
    )
    add(
        "--min_timestep",
        type=number(_TIMESTEP),
        default=0.0,
        metavar="T",
        help="lowest timestep to train (default: 0)",
    )
    add(
        "--max_timestep",
        type=number(_TIMESTEP),
        default=1000.0,
        metavar="T",
        help="highest timestep to train (default: 1000)",
    )
    add(
        "--preserve_distribution_shape",
        action="store_true",
        help="cut the distribution off at --min_timestep and --max_timestep instead of squeezing it in (default: off)",
    )
    add(
        "--num_timestep_buckets",
        type=number(_BUCKETS),
        metavar="N",
        help="spread consecutive samples evenly over N ranges of timesteps (default: off)",
    )
    add(
        "--show_timesteps",
        choices=("image", "console"),
        help="console: print a histogram of the timesteps and exit; image is not supported (default: off)",
    )


def read_optimizer(flags: Namespace) -> OptimizerConfig:
    """Which optimizer, with which arguments; InputError if there is none of that name."""
    config = OptimizerConfig(
        flags.optimizer_type, flags.learning_rate, tuple(flags.optimizer_args), flags.max_grad_norm
    )
    check_optimizer_flags(config)
    return config


def read_schedule(flags: Namespace) -> ScheduleConfig:
    """Which learning-rate schedule, with its settings; InputError if there is none of that name."""
    config = ScheduleConfig(
        name=flags.lr_scheduler,
        warmup=flags.lr_warmup_steps,
        decay=flags.lr_decay_steps,
        cycles=flags.lr_scheduler_num_cycles,
        power=flags.lr_scheduler_power,
        timescale=flags.lr_scheduler_timescale,
        min_lr_ratio=flags.lr_scheduler_min_lr_ratio,
        class_path=flags.lr_scheduler_type,
        args=tuple(flags.lr_scheduler_args),
    )
    check_schedule_flags(config)
    return config


def read_timesteps(flags: Namespace) -> TimestepConfig:
    """How timesteps are drawn; InputError where a flag would have no effect."""
    low, high = flags.min_timestep, flags.max_timestep
    if low >= high:
        raise InputError(f"--min_timestep {low:g} must be below --max_timestep {high:g}")
    _refuse_unread_timestep_settings(flags)
    return TimestepConfig(
        sampling=flags.timestep_sampling,
        shift=flags.discrete_flow_shift,
        sigmoid_scale=flags.sigmoid_scale,
        weighting=flags.weighting_scheme,
        logit_mean=flags.logit_mean,
        logit_std=flags.logit_std,
        mode_scale=flags.mode_scale,
        min_timestep=low,
        max_timestep=high,
        preserve_shape=flags.preserve_distribution_shape,
        buckets=flags.num_timestep_buckets,
    )


def _refuse_unread_timestep_settings(flags: Namespace) -> None:
    sampling, weighting = flags.timestep_sampling, flags.weighting_scheme
    of_sigma = weighting if sampling == "sigma" else ""
    reads_logit = of_sigma == "logit_normal" or sampling in ("logsnr", "qinglong_flux")
    reads_it = "--timestep_sampling {}".format
    logit = f"{reads_it('logsnr')}, or with {reads_it('sigma')} --weighting_scheme logit_normal"
    # What would read each flag, because advice to use a sampling that does not either would lead in a circle.
    unread = {
        f"--weighting_scheme {weighting}": (
            weighting in ("logit_normal", "mode") and sampling != "sigma",
            reads_it("sigma"),
        ),
        "--discrete_flow_shift": (flags.discrete_flow_shift != 1 and sampling not in _HAS_SHIFT, reads_it("shift")),
        "--sigmoid_scale": (flags.sigmoid_scale != 1 and sampling not in _HAS_SIGMOID, reads_it("shift")),
        "--logit_mean": (flags.logit_mean != 0 and not reads_logit, logit),
        "--logit_std": (flags.logit_std != 1 and not reads_logit, logit),
        "--mode_scale": (
            flags.mode_scale != 1.29 and of_sigma != "mode",
            f"{reads_it('sigma')} --weighting_scheme mode",
        ),
    }
    for flag, (is_unread, reader) in unread.items():
        if is_unread:
            with_weighting = f" --weighting_scheme {weighting}" if sampling == "sigma" else ""
            raise InputError(
                f"{flag} has no effect with --timestep_sampling {sampling}{with_weighting}: leave it out, or use it "
                f"with {reader}"
            )
