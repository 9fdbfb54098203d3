"""The GPU benchmark's dry run: every placing and optimizer is measured, and found equal, on the CPU."""

import importlib.util

import gpu

BLOCK = 2 * (8 * 48 * 48 + 2 * 48 * 96)  # of the tiny model


def test_the_dry_run_measures_every_placing(capsys):
    rows = gpu.main(["--dry-run"])
    assert [(row.placing, row.optimizer) for row in rows] == [
        (placing.name, optimizer) for placing in gpu.PLACINGS for optimizer in ("AdamW", "AdamW8bit")
    ]
    assert [row.note for row in rows[::2]] == ["repeats itself"] + 4 * ["equal to S = 0"]
    copied = {row.placing: row.copied for row in rows[::2]}
    assert copied["S = 0"] == 0 and copied["S = 24"] == 2 * (4 - 2) * BLOCK
    assert copied["S = 40"] < copied["S = 40, one buffer"] < 2.5 * 4 * BLOCK
    assert capsys.readouterr().out.count("\n| S = ") == len(rows)


def test_without_bitsandbytes_its_row_says_so(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(gpu, "PLACINGS", gpu.PLACINGS[:1])
    rows = gpu.main(["--dry-run"])
    assert {row.note for row in rows if row.optimizer == "AdamW8bit"} == {"bitsandbytes is not installed"}
    assert "| AdamW8bit | - | - |" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out(capsys):
    assert gpu.main(["--dry-run", "--minutes", "0"]) == []
    assert capsys.readouterr().out.count("left out, no time") == len(gpu.PLACINGS)
