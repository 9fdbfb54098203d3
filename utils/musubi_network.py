"""A slice as a --network_module of musubi-tuner: --network_module musubi_network --network_args ff=0.001 ffid=1.

Copied into src/musubi_tuner with selective_finetune.py and slice_saving.py; no line of that trainer changes.
"""

import functools
import glob
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if __package__:
    from . import selective_finetune as finetune
    from . import slice_saving as saving
else:  # as that trainer imports it
    import selective_finetune as finetune
    import slice_saving as saving

prepare_network = True  # a module with this name has network.prepare_network(flags) called
CHOICES = {"save": ("checkpoint", "slice"), "allow_overlap": ("no", "yes")}  # of --network_args; the first by default


def create_arch_network(multiplier, network_dim, network_alpha, vae, text_encoders, unet, neuron_dropout=None, **args):
    """The SliceNetwork that --network_args asks for: `ff`, `ffid`; `save` checkpoint or slice; `allow_overlap` yes."""
    if "guard" in args:
        raise finetune.SliceError("--network_args guard: only wan_train_network.py has the contexts that a guard needs")
    known = {"ff", "ffid"} <= args.keys() <= {"ff", "ffid", *CHOICES} and args.get("ffid", "").isdecimal()
    if not known or any(args.get(key, allowed[0]) not in allowed for key, allowed in CHOICES.items()):
        given = " ".join(f"{key}={value}" for key, value in args.items())
        raise finetune.SliceError(
            f"--network_args {given}: it takes ff=0.001 ffid=1 (a number) and, if wanted, save=slice, allow_overlap=yes"
        )
    if network_dim is not None or neuron_dropout is not None:
        raise finetune.SliceError("a slice has no rank and no dropout: leave out --network_dim and --network_dropout")
    finetune.check_slice(args["ff"], int(args["ffid"]))
    return SliceNetwork(args["ff"], int(args["ffid"]), args.get("save"), args.get("allow_overlap") == "yes")


def create_arch_network_from_weights(*_, **__):
    """What --base_weights and --dim_from_weights call before there is a network."""
    raise finetune.SliceError(
        "--base_weights and --dim_from_weights do not work with a slice, which trains the values of the --dit file: "
        "merge the LoRA into a file first"
    )


class SliceNetwork(nn.Module):
    """A slice that musubi-tuner's trainer drives by the calls that it makes to a LoRA network.

    Each weight is written when it is used, because a block that is swapped may be on the move at any other time. Where
    the trainer uses copies (H2D-only swap) or fp8, the difference is multiplied beside the frozen linears.
    """

    def __init__(self, ff: str, ffid: int, save: str | None, allow_overlap: bool):
        super().__init__()
        self.ff, self.ffid, self.save, self.allow_overlap = ff, ffid, save, allow_overlap
        self.written: set[str] = set()  # weights that hold this step's values
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # in states; the trainer's count is not
        register_optimizer_step_post_hook(self._count_step)

    def prepare_network(self, args) -> None:
        flags = vars(args)
        refused = {
            "dit_high_noise": "train each expert in a run of its own",
            "network_weights": "continue with --resume, or give the checkpoint as --dit",
            "scale_weight_norms": "a slice has no norm to scale",
        }
        for flag, reason in refused.items():
            if flags.get(flag):
                raise finetune.SliceError(f"--{flag} does not work with a slice: {reason}")
        self.name, path = str(args.output_name), Path(args.dit)
        shards = re.sub(r"-\d{5}-of-(\d{5})", r"-*-of-\1", path.name)
        self.base = sorted(path.parent.glob(glob.escape(path.name) if shards == path.name else shards))
        saving.refuse_base(Path(args.output_dir, f"{args.output_name}.safetensors"), self.base)
        if not self.allow_overlap:
            self._refuse_overlap(saving.read_ledger(saving.read_header(self.base)[1]))
        self.beside = bool(flags.get("block_swap_h2d_only") or flags.get("fp8_base"))

    def _refuse_overlap(self, ledger: list[dict]) -> None:
        share = finetune.exact_fraction(self.ff)
        for entry in ledger:
            theirs, number = finetune.exact_fraction(entry["ff"]), entry["ffid"]
            if max((number - 1) * theirs, (self.ffid - 1) * share) < min(number * theirs, self.ffid * share):
                held = f"--dit holds {entry['name']} (ff {entry['ff']} ffid {number}) in the values of"
                raise finetune.SliceError(f"{held} ff {self.ff} ffid {self.ffid}: take another ffid")

    def apply_to(self, text_encoders, unet: nn.Module, apply_text_encoder=False, apply_unet=True) -> None:
        # With block swap some blocks are still on the CPU; what lies around them is on the training device.
        device = next((p.device for p in unet.parameters() if p.device.type != "cpu"), torch.device("cpu"))
        self.trained = finetune.attach_slice(unet, self.ff, self.ffid, device, beside=self.beside)
        saving.snapshot(self.trained, self.base, self.name)  # what cannot be saved is an error before training
        for matrix in () if self.beside else self.trained.matrices.values():
            matrix.linear.forward = functools.partial(self._write_and_forward, matrix)

    def _write_and_forward(self, matrix: finetune.SlicedMatrix, x: Tensor) -> Tensor:
        # No call tells that an optimizer stepped before samples are drawn, so passes without gradients always write.
        if matrix.name not in self.written or not torch.is_grad_enabled():
            matrix.write(matrix.linear.weight)
            self.written.add(matrix.name)
        return finetune.slice_forward(matrix, x)

    def _count_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        first = next(self.parameters(), None)
        if any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
            self.steps += 1

    def on_step_start(self) -> None:
        self.written.clear()

    def prepare_optimizer_params(self, unet_lr: float | None = None, **others) -> tuple[list[dict], list[str]]:
        return [{"params": list(self.parameters()), "lr": unet_lr}], ["slice"]

    get_trainable_params = nn.Module.parameters

    def _has_nothing_to_do(self, *_) -> None:
        pass

    enable_gradient_checkpointing = prepare_grad_etc = on_epoch_start = _has_nothing_to_do

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """A checkpoint (or slice file) in the base's dtypes: the trainer's `dtype` is that of LoRA files."""
        metadata = dict(metadata or {})
        if "modelspec.architecture" in metadata:
            metadata["modelspec.architecture"] = metadata["modelspec.architecture"].removesuffix("/lora")
        save = saving.save_slice if self.save == "slice" else saving.save_checkpoint
        name = metadata.get("ss_output_name", self.name)
        save(self.trained, self.base, file, metadata, concept=name, steps=int(self.steps))
