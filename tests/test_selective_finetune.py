"""Training a slice: its gradient, its rounding, its files, against plain autograd on whole weights."""

import copy
import functools
import itertools
from fractions import Fraction
from time import process_time

import bitsandbytes.optim
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from utils import selective_finetune
from utils.selective_finetune import (
    SliceError,
    attach_slice,
    block_linears,
    contract_name,
    moved_values,
    slice_indices,
    slice_units,
)
from utils.slice_saving import read_ledger, save_checkpoint, save_slice
from utils.swap.placement import checkpoint_blocks, place_model
from utils.swap.plan import SwapConfig
from wan.configs import WanConfig
from wan.model import WanModel

TINY = WanConfig("t2v", 48, 96, 4, 3, 4, 4, text_dim=24, freq_dim=32, text_len=7)


def tiny_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = WanModel(TINY).to(dtype).requires_grad_(False)
    nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def loss_of(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, 2, 4, 2, 6, 8, generator=draw)
    context = [torch.randn(n, 24, generator=draw) for n in (3, 7)]
    return (model(x, torch.tensor([300.0, 800.0]), context) - target).square().mean()


def whole_gradients(model):
    whole = copy.deepcopy(model)
    for linear in block_linears(whole).values():
        linear.weight.requires_grad_(True)
    loss_of(whole).backward()
    return {f"{name}.weight": linear.weight.grad for name, linear in block_linears(whole).items()}


def cut(values, name, ff, ffid):
    return values.flatten()[slice_indices(name, values.shape, ff, ffid)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("swapped", [0, 2, 3])
@pytest.mark.parametrize(("ff", "ffid"), [("0.0007", 3), ("0.01", 1), ("0.1", 9), ("0.7", 1), ("1", 1)])
def test_slice_gradients_equal_those_of_whole_weights(ff, ffid, swapped, checkpointed):
    model = tiny_model()
    expected = whole_gradients(model)
    trained = attach_slice(model, ff, ffid)
    if checkpointed:
        checkpoint_blocks(model)
    place_model(model, "cpu", SwapConfig(swapped), trained)
    loss_of(model).backward()
    for name, matrix in trained.matrices.items():
        torch.testing.assert_close(matrix.difference.grad, cut(expected[name], name, ff, ffid), rtol=1e-5, atol=1e-8)


@given(
    st.integers(1, 40),
    st.integers(1, 17),
    st.fractions("1/150", 1, max_denominator=10**18) | st.just(Fraction(1)),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_slice_has_the_gradient_of_the_whole_weight(rows, columns, ff, data):
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(columns, rows)])}).double()
    linear, ffid = model["blocks"][0], data.draw(st.integers(1, int(1 / ff)))
    if not len(slice_indices("blocks.0.weight", linear.weight.shape, ff, ffid)):
        return
    x = torch.randn(2, 5, columns, dtype=torch.float64, requires_grad=True)
    linear(x).square().sum().backward()
    whole, dx = linear.weight.grad.clone(), x.grad.clone()
    x.grad = None
    trained = attach_slice(model, ff, ffid)
    linear(x).square().sum().backward()
    expected = cut(whole, "blocks.0.weight", ff, ffid).float()
    torch.testing.assert_close(next(trained.parameters()).grad, expected)
    torch.testing.assert_close(x.grad, dx)


def test_gradients_accumulate_over_micro_batches():
    model = tiny_model()
    trained = attach_slice(model, "0.05", 2)
    loss_of(model, 1).backward()
    first = [p.grad.clone() for p in trained.parameters()]
    for parameter in trained.parameters():
        parameter.grad = None
    loss_of(model, 2).backward()
    expected = [a + b.grad for a, b in zip(first, trained.parameters(), strict=True)]
    loss_of(model, 1).backward()
    torch.testing.assert_close([p.grad for p in trained.parameters()], expected)


def train(model, trained, steps=3, lr=1e-3, **options):
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, **options)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.write_back()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("swapped", [1, 3])
def test_a_swapped_model_trains_bit_for_bit_like_a_resident_one(swapped):
    runs = []
    for blocks_to_swap in (0, swapped):
        model = tiny_model(torch.bfloat16)
        trained = attach_slice(model, "0.02", 3)
        checkpoint_blocks(model)
        place_model(model, "cpu", SwapConfig(blocks_to_swap), trained)
        runs.append((train(model, trained), [p.detach() for p in trained.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_swapped_weights_keep_their_start_values_on_the_host():
    model = tiny_model(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = attach_slice(model, "0.02", 3)
    place_model(model, "cpu", SwapConfig(3), trained)
    train(model, trained)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_outside_the_slice_moves_and_the_slice_is_start_plus_difference_rounded_once():
    model, base = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16).state_dict()
    trained = attach_slice(model, "0.03", 5)
    train(model, trained)
    for name, tensor in model.state_dict().items():
        expected = base[name].clone()
        if name in trained.matrices:
            flat = slice_indices(name, tensor.shape, "0.03", 5)
            moved = expected.view(-1)[flat].float() + trained.matrices[name].difference.detach()
            assert trained.matrices[name].difference.abs().min() > 0
            expected.view(-1)[flat] = moved.bfloat16()
        assert torch.equal(tensor, expected)


def test_small_steps_on_bf16_weights_add_up_as_in_float32():
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model(torch.bfloat16).to(dtype)
        trained = attach_slice(model, "0.05", 1)
        train(model, trained, steps=20, lr=1e-6, weight_decay=0.0)
        moved.append(torch.cat([p.detach() for p in trained.parameters()]))
    # Rounding of activations turns some small gradients; the rest walk as far as in float32.
    assert (moved[0] - moved[1]).abs().median() < 1e-6
    assert moved[0].abs().mean().item() == pytest.approx(moved[1].abs().mean().item(), rel=0.02)


def test_weight_decay_pulls_to_the_start_values():
    model, base = tiny_model(), tiny_model().state_dict()
    trained = attach_slice(model, "0.05", 1)
    for parameter in trained.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.5, weight_decay=1.0)
    for _ in range(60):
        optimizer.step()
    trained.write_back()
    assert all(torch.equal(base[name], tensor) for name, tensor in model.state_dict().items())


def test_a_later_slice_leaves_the_values_of_an_earlier_one():
    model = tiny_model(torch.bfloat16)
    first = attach_slice(model, "0.1", 1)
    train(model, first)
    kept = {name: cut(model.state_dict()[name], name, "0.1", 1).clone() for name in first.matrices}
    train(model, attach_slice(model, "0.1", 2))
    assert all(torch.equal(kept[name], cut(model.state_dict()[name], name, "0.1", 1)) for name in kept)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_what_trains_stays_on_its_device_while_the_weights_stay_on_another(optimizer_class):
    """The host is `meta`, as a stand-in: a gradient or a state made where the weights lie would have no values."""
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.9", 1, device="cpu")
    for matrix in trained.matrices.values():
        matrix.fetch = functools.partial(linked_copy, matrix, matrix.linear.weight.detach().clone())
        matrix.linear.weight = nn.Parameter(matrix.linear.weight.to("meta"), requires_grad=False)
    optimizer = optimizer_class(trained.parameters(), lr=1e-3)
    losses = [train_step(model, trained, optimizer) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    for parameter in trained.parameters():
        states = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in (parameter, parameter.grad, *states)} == {"cpu"}
        assert len(states) >= 2 and (parameter != 0).any()


def test_compiled_blocks_have_the_gradients_of_plain_ones():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2))
    model, x, found = nn.ModuleDict({"blocks": blocks}), torch.randn(4, 16), []
    trained = attach_slice(model, "0.1", 1)
    for compiled in (False, True):
        for block in blocks if compiled else ():
            block.compile(backend="eager", fullgraph=True)
        blocks[1](blocks[0](x)).square().sum().backward()
        found.append([parameter.grad for parameter in trained.parameters()])
        trained.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def linked_copy(matrix, host):
    staged = host.clone()
    matrix.write(staged)
    return staged


def train_step(model, trained, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    trained.write_back()
    return loss.item()


def test_only_the_columns_of_the_slice_are_kept_for_backward():
    linear = nn.Linear(64, 32)
    model = nn.ModuleDict({"blocks": nn.ModuleList([linear])})
    attach_slice(model, "0.05", 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        linear(torch.randn(10, 64))
    assert kept == [(10, 26)]  # 102.4 values are cut from 26 units of 4 rows


def test_under_autocast_a_slice_has_the_gradients_of_the_plain_linear():
    name, x, results = "blocks.0.ffn.0.weight", torch.randn(3, 48), []
    for sliced in (False, True):
        model, leaf = tiny_model(), x.clone().requires_grad_()
        linear = model.blocks[0].ffn[0].requires_grad_(not sliced)
        trained = attach_slice(model, "0.05", 1) if sliced else None
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(leaf)
        y.float().square().mean().backward()
        grad = trained.matrices[name].difference.grad if sliced else cut(linear.weight.grad, name, "0.05", 1)
        results.append((y.detach(), leaf.grad, grad))
    torch.testing.assert_close(results[0], results[1])


def test_what_is_gathered_of_a_large_slice_is_never_more_than_the_input(monkeypatch):
    model = tiny_model()
    trained = attach_slice(model, "1", 1)
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append((a.numel(), b.numel())) or bmm(a, b))
    linear = model.blocks[0].ffn[2]
    linear(torch.randn(5, 96, requires_grad=True)).sum().backward()
    assert len(sizes) == 8 and all(gathered <= 5 * 96 for gathered, _ in sizes) and trained.count


def test_past_half_of_the_columns_q_k_and_v_keep_the_one_input_that_they_share():
    model = tiny_model()
    attach_slice(model, "0.7", 1)
    attention, x, kept = model.blocks[0].self_attn, torch.randn(1, 6, 48, requires_grad=True), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add((t.data_ptr(), t.shape)) or t, lambda t: t):
        for linear in (attention.q, attention.k, attention.v):
            linear(x)
    assert {pointer for pointer, shape in kept if shape == x.shape} == {x.data_ptr()}


def test_a_negative_zero_that_did_not_move_keeps_its_sign():
    model = tiny_model(torch.bfloat16)
    model.blocks[0].ffn[0].weight.data.fill_(-0.0)
    trained = attach_slice(model, "0.3", 1)
    trained.write_back()
    assert torch.signbit(model.blocks[0].ffn[0].weight).all()


@given(
    st.integers(1, 40),
    st.integers(1, 17),
    st.fractions("1/150", 1, max_denominator=10**18),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_difference_beside_the_frozen_linear_computes_what_it_does_in_the_weight(rows, columns, ff, data):
    ffid = data.draw(st.integers(1, int(1 / ff)))
    if not len(slice_indices("blocks.0.weight", (rows, columns), ff, ffid)):
        return
    x, results = torch.randn(2, 5, columns, dtype=torch.float64), []
    linear = nn.Linear(columns, rows).double()
    for beside in (False, True):
        own = copy.deepcopy(linear)
        model = nn.ModuleDict({"blocks": nn.ModuleList([own])})
        trained = attach_slice(model, ff, ffid, beside=beside)
        (difference,) = trained.parameters()
        difference.data.copy_(torch.arange(difference.numel()) / 7 - 1)
        trained.write_back()
        leaf = x.clone().requires_grad_()
        y = own(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, difference.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.fixture
def base_file(tmp_path):
    state = tiny_model(torch.bfloat16).state_dict()
    wrapped = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    save_file(wrapped, tmp_path / "base.safetensors", metadata={"num_heads": "4", "text_len": "7"})
    return tmp_path / "base.safetensors"


def test_the_checkpoint_is_the_base_with_the_values_in_use(base_file, tmp_path):
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.02", 7)
    train(model, trained)
    save_checkpoint(trained, base_file, tmp_path / "out.safetensors", {"note": "x"}, concept="character1", steps=3)
    saved, base = load_file(tmp_path / "out.safetensors"), load_file(base_file)
    assert list(saved) == list(base)
    assert all(torch.equal(saved[f"model.diffusion_model.{n}"], tensor) for n, tensor in model.state_dict().items())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["num_heads"], metadata["note"]) == ("4", "x")
    (entry,) = read_ledger(metadata)
    assert (entry["ff"], entry["ffid"], entry["name"], entry["steps"]) == ("0.02", 7, "character1", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


def test_a_float32_file_gets_the_differences_that_were_trained_in_bf16(tmp_path):
    save_file(tiny_model().state_dict(), tmp_path / "base.safetensors")
    model = tiny_model().bfloat16()
    trained = attach_slice(model, "0.02", 7)
    train(model, trained)
    save_checkpoint(trained, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    saved, base = load_file(tmp_path / "out.safetensors"), tiny_model().state_dict()
    for name, matrix in trained.matrices.items():
        moved = cut(base[name], name, "0.02", 7) + matrix.difference.detach()
        assert torch.equal(cut(saved[name], name, "0.02", 7), moved)


def test_a_sharded_base_becomes_one_whole_file(tmp_path):
    state = tiny_model(torch.bfloat16).state_dict()
    names = list(state)
    save_file({n: state[n] for n in names[:20]}, tmp_path / "a.safetensors")
    save_file({n: state[n] for n in names[20:]}, tmp_path / "b.safetensors")
    trained = attach_slice(tiny_model(torch.bfloat16), "0.02", 7)
    save_checkpoint(trained, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out.safetensors")
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[n], state[n]) for n in names)


def test_another_base_is_refused_and_leaves_the_old_file(base_file, tmp_path):
    trained = attach_slice(tiny_model(torch.bfloat16, seed=5), "0.02", 7)
    (tmp_path / "out.safetensors").write_bytes(b"old")
    with pytest.raises(SliceError, match="not what this slice was trained on"):
        save_checkpoint(trained, base_file, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("save", [save_checkpoint, save_slice])
def test_the_base_itself_is_never_written(base_file, save):
    trained = attach_slice(tiny_model(torch.bfloat16), "0.02", 7)
    before = base_file.read_bytes()
    with pytest.raises(SliceError, match="is the base itself"):
        save(trained, base_file, base_file)
    assert base_file.read_bytes() == before


PREFIXES = ("", "model.diffusion_model.", "module.", "model.", "transformer.")
WRAPPERS = ("", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_mixture_of_prefixes_and_wrappers_changes_the_name(prefix):
    name = "blocks.0.ffn.0.weight"
    for outer, inner in itertools.product(WRAPPERS, WRAPPERS):
        assert contract_name(f"{outer}{prefix}{inner}{name}") == name
        assert contract_name(f"{outer}{prefix}blocks.0.{inner}ffn.0.weight") == name


def test_matrices_that_never_train_or_have_one_name_are_not_attached():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    assert not [name for name in block_linears(layers) if "out_proj" in name]
    twice = nn.ModuleDict({"model": tiny_model(), "dit": tiny_model()})
    with pytest.raises(SliceError, match="attach each on its own"):
        attach_slice(twice, "0.02", 7)


def test_one_ff_spelled_in_two_ways_is_one_slice():
    state = attach_slice(tiny_model(), "0.10", 2).state_dict()
    for same in ("0.1", "1e-1", Fraction(1, 10), "1/10", 0.1):
        attach_slice(tiny_model(), same, 2).load_state_dict(state)


def test_a_state_goes_on_where_it_was_and_another_slice_is_refused():
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.02", 7)
    train(model, trained)
    fresh = tiny_model(torch.bfloat16)
    resumed = attach_slice(fresh, "0.02", 7)
    resumed.load_state_dict(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    with pytest.raises(SliceError, match=r"ff 0\.02 ffid 7, not 0\.02 and 8"):
        attach_slice(fresh, "0.02", 8).load_state_dict(trained.state_dict())


def test_a_slice_that_is_empty_in_the_whole_model_is_refused():
    with pytest.raises(SliceError, match="holds such a slice; take a larger ff"):
        attach_slice(tiny_model(), "0.0000001", 1)


def test_fp8_weights_are_refused():
    model = tiny_model()
    model.blocks[0].ffn[0].weight.data = model.blocks[0].ffn[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(SliceError, match="bf16, fp16 or fp32"):
        attach_slice(model, "0.02", 7)


def test_choosing_the_slices_of_a_14b_model_takes_under_two_seconds():
    shapes = [(5120, 5120)] * 8 + [(13824, 5120), (5120, 13824)]
    begin = process_time()
    units = [slice_units(f"blocks.{b}.{i}", s, "0.001", 7) for b in range(40) for i, s in enumerate(shapes)]
    assert sum(u.count for u in units) == pytest.approx(14_050_918, abs=400)
    assert process_time() - begin < 2


def test_writing_a_large_slice_takes_no_memory_for_the_whole_of_it(monkeypatch):
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "1", 1)
    largest = max(matrix.units.count for matrix in trained.matrices.values())
    monkeypatch.setattr(selective_finetune, "_TOGETHER", largest)
    with LiveBytes() as counter:
        counter.restart_peak()
        trained.write_back()
    # For one piece: both inputs (2 and 4 bytes a value), what moved_values makes of them, the units read.
    assert counter.peak - counter.live < 32 * largest < 16 * trained.count


@pytest.mark.parametrize("together", [1, 5000, 2**24])
def test_a_slice_is_written_alike_in_however_many_pieces(monkeypatch, together):
    monkeypatch.setattr(selective_finetune, "_TOGETHER", together)
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.3", 2)
    for parameter in trained.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    trained.write_back()
    for name, matrix in trained.matrices.items():
        expected = moved_values(matrix.start, matrix.difference)
        assert torch.equal(cut(matrix.linear.weight, name, "0.3", 2), expected)
