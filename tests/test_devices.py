"""The device of a job: what --device takes, and the line where a job runs on the CPU for want of a GPU."""

import pytest
import torch

from utils.devices import cpu_line, default_device, named_device


def see(monkeypatch, gpus, built_for=None):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.version, "cuda", built_for)


@pytest.mark.parametrize(
    "text",
    [
        "cpu:0",
        "cpu:x",
        "meta",
        "mps",
        "warp",
        "CUDA",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "cuda:\u0661",
        "cuda:" + "9" * 5000,
    ],
)
def test_what_is_not_a_device_is_refused(monkeypatch, text):
    see(monkeypatch, 8)
    with pytest.raises(ValueError, match="is not a device: use cuda, cuda:1 or cpu"):
        named_device(text)


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch):
    see(monkeypatch, 2, "12.8")
    assert named_device("cuda:1") == torch.device("cuda", 1) and default_device().type == "cuda"
    with pytest.raises(ValueError, match="cuda:2 does not exist: PyTorch sees 2 GPUs"):
        named_device("cuda:2")
    see(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"cuda does not exist: PyTorch sees no GPU; .*install a CUDA build"):
        named_device("cuda")
    assert named_device("cpu") == default_device() == torch.device("cpu")


def test_a_job_on_the_cpu_says_what_to_install(monkeypatch):
    cpu = torch.device("cpu")
    see(monkeypatch, 0)
    assert "build for the CPU alone" in cpu_line(cpu) and "pytorch.org/get-started" in cpu_line(cpu)
    see(monkeypatch, 0, "12.8")
    assert "nvidia-smi" in cpu_line(cpu) and "\n" not in cpu_line(cpu)
    see(monkeypatch, 1, "12.8")
    assert cpu_line(cpu) is None and cpu_line(torch.device("cuda")) is None
