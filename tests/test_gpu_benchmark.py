"""The GPU benchmark's dry run: every placing and optimizer is measured, and found equal, on the CPU."""

import importlib.util
import shutil
from concurrent.futures import Future

import gpu
import pytest
import torch
from test_swap_backend import DEVICE, cuda  # noqa: F401

BLOCK = 2 * (8 * 48 * 48 + 2 * 48 * 96)  # of the tiny model


@pytest.mark.slow
def test_the_dry_run_measures_every_placing(capsys):
    rows = gpu.main(["--dry-run"])
    assert [(row.placing, row.optimizer) for row in rows] == [
        (placing.name, optimizer) for placing in gpu.PLACINGS for optimizer in ("AdamW", "AdamW8bit")
    ]
    others = [note for kind in ("fp8", "--compile") for note in ("reproducible", f"equal to S = 0, {kind}")]
    assert [row.note for row in rows[::2]] == ["reproducible", *4 * ["equal to S = 0"], *others]
    copied = {row.placing: row.copied for row in rows[::2]}
    assert copied["S = 0"] == 0 and copied["S = 24"] == 2 * (4 - 2) * BLOCK
    assert copied["S = 40"] < copied["S = 40, one buffer"] < 2.5 * 4 * BLOCK
    assert copied["S = 40"] / 2 < copied["S = 40, fp8"] < copied["S = 40"]
    assert capsys.readouterr().out.count("\n| S = ") == len(rows)


@pytest.fixture
def only_adamw(monkeypatch):
    monkeypatch.setattr(gpu, "cases_of", lambda *_: [(gpu.SMALL, "AdamW")])


def test_without_bitsandbytes_its_row_says_so(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(gpu, "PLACINGS", gpu.PLACINGS[:1])
    rows = gpu.main(["--dry-run"])
    assert {row.note for row in rows if row.optimizer == "AdamW8bit"} == {"bitsandbytes is not installed"}
    assert "| AdamW8bit | - | - |" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out(capsys):
    assert gpu.main(["--dry-run", "--minutes", "0"]) == []
    assert capsys.readouterr().out.count("skipped, no time left") == len(gpu.PLACINGS)


def test_it_runs_without_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu.heading(torch.device("cpu")).endswith("commit unknown")


def test_a_placing_that_fails_is_said_and_the_others_are_measured(capsys, monkeypatch, only_adamw):
    place = gpu.place_model

    def fail_once(model, device, swap, *args):
        if swap.blocks_to_swap == 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nmore")
        return place(model, device, swap, *args)

    monkeypatch.setattr(gpu, "place_model", fail_once)
    monkeypatch.setattr(gpu, "PLACINGS", gpu.PLACINGS[:3])
    assert [row.placing for row in gpu.main(["--dry-run"])] == ["S = 0", "S = 40"]
    assert "# S = 24: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\n#" in (
        capsys.readouterr().out
    )


def test_what_was_measured_is_shown_after_an_interrupt(capsys, monkeypatch, only_adamw):
    measure = gpu.measure

    def interrupted(placing, *args):
        if placing is gpu.PLACINGS[1]:
            raise KeyboardInterrupt
        return measure(placing, *args)

    monkeypatch.setattr(gpu, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run"])
    assert capsys.readouterr().out.count("\n| S = 0 ") == 1


def test_a_stall_begins_before_the_host_waits_for_the_copying_thread(cuda, monkeypatch):  # noqa: F811
    backend, of_event = gpu.TimedBackend(DEVICE), torch.cuda.Event
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: of_event())

    class Promise(Future):
        def result(self):
            cuda.calls.append("the host waits")
            return copied

    copied = backend.copy(torch.zeros(1), torch.ones(1), backend.mark())
    cuda.calls.clear()
    backend.wait(Promise())
    assert cuda.calls == [
        ("compute", "records"),
        "the host waits",
        ("compute", "waits for", "copy"),
        ("compute", "records"),
    ]
