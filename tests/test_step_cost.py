"""The benchmark of a step's cost: it runs, and its counter of live bytes counts exactly."""

from importlib.util import find_spec

import attach_cost
import pytest
import step_cost
import step_methods
import step_models
import torch
from live_bytes import LiveBytes

from wan.configs import WanConfig

# As wide a feed-forward as Wan 1.3B's, so that the peak is where it is there.
CONFIG = WanConfig("t2v", 96, 560, 4, 3, 4, 4)
TINY = step_models.Size(CONFIG, side=16, text_len=32)


def test_live_bytes_count_a_storage_once_until_its_last_view_dies():
    with LiveBytes() as counter:
        older = torch.empty(3, dtype=torch.float64)
        first = torch.zeros(1000)
        view = first.view(10, 100).T
        second = first * 2
        assert counter.live == 24 + 4000 + 4000
        del first, second
        assert (counter.live, counter.peak) == (24 + 4000, 8024)
        del view, older
        counter.restart_peak()
        assert (counter.live, counter.peak) == (0, 0)


def test_live_bytes_see_what_autograd_keeps_and_what_is_added():
    x, y = torch.randn(50, 20, requires_grad=True), torch.randn(50, 20)
    with LiveBytes() as counter:
        counter.add(x, y, y[:10])
        loss = (x * y).exp().sum()  # keeps exp's result, not the product
        assert counter.live == 3 * 4000 + 4
        assert counter.peak == 4 * 4000
        loss.backward()
        del loss
        assert counter.live == 3 * 4000  # x, y and x.grad


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_slice_costs_the_bytes_that_are_predicted(checkpointed):
    method = step_methods.Method("ours", lambda model: step_methods.train_slice(model, "0.02"), ff="0.02")
    floor = step_methods.Method("floor", step_methods.reach_every_matrix)
    peaks = []
    for each in (floor, method):
        model = step_models.Blocks(step_models.QUICK, torch.float32, checkpointed)
        peaks.append(step_cost.count_bytes(model, each)[1])
    assert peaks[1] - peaks[0] == pytest.approx(step_cost.predicted_bytes(model, "0.02"), rel=0.03)


@pytest.mark.slow
def test_every_method_is_measured_and_has_its_row():
    methods = step_methods.all_methods(["0.01", "0.1"])
    costs = {("bf16", True): step_cost.measure(TINY, torch.bfloat16, True, methods, rounds=2)}
    rows = step_cost.step_table(costs, methods)[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {method.name}" for method in methods]
    ours, everything = costs["bf16", True]["ours, ff 0.01"], costs["bf16", True]["everything trainable"]
    assert len(ours.ratios) == 2 and min(ours.ratios) > 0
    assert 0 < ours.values < everything.values
    assert 0 < ours.bytes_beyond_floor < everything.bytes_beyond_floor


def test_choosing_and_attaching_have_their_rows():
    shapes = attach_cost.matrix_shapes(CONFIG)
    assert len(shapes) == 30
    every_position = attach_cost.choose(shapes, "0.01", attach_cost.slice_indices)
    assert attach_cost.choose(shapes, "0.01").values == every_position.values
    attached = attach_cost.attach(CONFIG, "0.1")
    assert attached.predicted <= attached.grown < attached.model_bytes
    assert len(attach_cost.choice_table(CONFIG, ["0.01"])) == 5


def test_the_blocks_of_diffusers_compute_the_step_of_ours():
    ours, theirs = (kind(TINY, torch.float32, True) for kind in (step_models.Blocks, step_models.DiffusersBlocks))
    renamed = {"self_attn.": "attn1.", "cross_attn.": "attn2.", ".o.": ".to_out.0.", "modulation": "scale_shift_table"}
    renamed |= {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    renamed |= {f".{name}.": f".to_{name}." for name in "qkv"}
    weights = ours.blocks.state_dict()
    for own, other in renamed.items():
        weights = {name.replace(own, other): value for name, value in weights.items()}
    theirs.blocks.load_state_dict(weights)
    assert torch.equal(ours.x_BLD, theirs.x_BLD)
    for model in (ours, theirs):
        model.forward_backward()
    torch.testing.assert_close(theirs.x_BLD.grad, ours.x_BLD.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(find_spec("diffsynth") is None, reason="needs diffsynth")
def test_the_blocks_of_diffsynth_compute_the_step_of_ours():
    ours, theirs = (kind(TINY, torch.float32, True) for kind in (step_models.Blocks, step_models.DiffSynthBlocks))
    theirs.blocks.load_state_dict(ours.blocks.state_dict())
    for model in (ours, theirs):
        model.forward_backward()
    torch.testing.assert_close(theirs.x_BLD.grad, ours.x_BLD.grad, rtol=1e-4, atol=1e-5)


def test_only_the_rows_that_are_asked_for_are_measured(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(step_cost, "measure", lambda *rest: asked.append(rest[3]) or {})
    monkeypatch.setattr(step_cost, "step_table", lambda *_: [])
    monkeypatch.setattr(step_cost, "choice_table", lambda *_: [])
    step_cost.main(["--quick", "--dtype", "fp32", "--compile", "--only", "LoRA", "0.001, --"])
    names = ["frozen floor", "ours, ff 0.001, --compile", "PEFT LoRA, rank 16", "diffusers' model, PEFT LoRA, rank 16"]
    names += ["DiffSynth's model, PEFT LoRA, rank 16"] if find_spec("diffsynth") else []
    assert [[method.name for method in methods] for methods in asked] == 2 * [names]
