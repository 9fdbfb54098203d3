"""The device that a job runs on: named by a user or chosen, with a line where that is the CPU for want of a GPU."""

import torch

from wan.values import shown


def named_device(text: str) -> torch.device:
    """The device that is meant by cpu, cuda or cuda:NUMBER; ValueError says why there is none."""
    kind, colon, index = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdigit() and len(index) < 4)):
        raise ValueError(f"{shown(text)} is not a device: use cuda, cuda:1 or cpu")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        seen = f"{count} GPU{'s' * (count > 1)}" if count else f"no GPU; {_remedy()}"
        raise ValueError(f"{text} does not exist: PyTorch sees {seen}")
    return torch.device(text)


def default_device() -> torch.device:
    """The first GPU if PyTorch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_line(device: torch.device) -> str | None:
    """What to install where a job runs on the CPU because PyTorch sees no GPU; None where that is not so."""
    if device.type != "cpu" or torch.cuda.is_available():
        return None
    return f"WARNING: this runs on the CPU, hundreds of times slower than a GPU, because PyTorch sees none; {_remedy()}"


def _remedy() -> str:
    if torch.version.cuda or torch.version.hip:
        return "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    return (
        f"the installed PyTorch {torch.__version__} is a build for the CPU alone (on Windows `pip install torch` gives "
        "that one): for an NVIDIA GPU install a CUDA build with the command from pytorch.org/get-started/locally"
    )
