"""The patch as musubi-tuner's --network_module: a fake trainer makes that trainer's calls in their order."""

import importlib
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import test_picture_models as pictures
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_selective_finetune import loss_of, tiny_model
from torch import nn

from utils.selective_finetune import SliceError, attach_slice, block_linears, slice_indices
from utils.slice_saving import read_ledger
from utils.swap.placement import checkpoint_blocks

UTILS = str(Path(__file__).parents[1] / "utils")
STEPS = 3


def before_each_block(model, prepare):
    """Also when a block is recomputed, so by its forward: hooks run only at the first time."""
    for block in model.blocks:
        block.forward = partial(
            lambda block, forward, *inputs: (prepare(block), forward(*inputs))[1], block, block.forward
        )


def swap_by_exchange(model):
    """Classic block swap: one block's worth of device storages, contents exchanged with it before a block is used."""
    here = {"block": model.blocks[0]}

    def bring(block):
        for there, mine in zip(block_weights(block), block_weights(here["block"]), strict=True):
            if block is not here["block"]:
                device, host = mine.data, there.data
                kept = device.clone()
                device.copy_(host)
                host.copy_(kept)
                mine.data, there.data = host, device
        here["block"] = block

    before_each_block(model, bring)


def swap_by_copies(model):
    """H2D-only swap: the linears' weights are rebound to a ring that is filled from masters; nothing is copied back."""
    masters = {block: [weight.detach().clone() for weight in block_weights(block)] for block in model.blocks}
    ring = [nn.Parameter(torch.empty_like(weight), requires_grad=False) for weight in masters[model.blocks[0]]]

    def fill(block):
        for linear, master, slot in zip(linears_of(block), masters[block], ring, strict=True):
            slot.data.copy_(master)
            linear.weight = slot

    before_each_block(model, fill)


def quantise(model):
    """A scaled fp8 base: weights in float8, each linear's forward multiplies its scale back in."""
    for linear in block_linears(model).values():
        scale = linear.weight.abs().max().float() / 448
        weight = (linear.weight.float() / scale).to(torch.float8_e4m3fn)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.forward = partial(
            lambda lin, s, x: F.linear(x, (lin.weight.float() * s).to(x.dtype), lin.bias), linear, scale
        )


def linears_of(block):
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def block_weights(block):
    return [linear.weight for linear in linears_of(block)]


BASES = {"resident": lambda model: None, "classic": swap_by_exchange, "h2d": swap_by_copies, "fp8": quantise}


def fake_trainer(folder, base="resident", steps=STEPS, resume=None, **more):
    """Losses of the run, then that of one pass without gradients, as a sample would see it."""
    flags = {"dit": str(folder / "base.safetensors"), "block_swap_h2d_only": base == "h2d", "fp8_base": base == "fp8"}
    flags |= {"network_args": {"ff": "0.05", "ffid": "2"}, "network_dim": None, "dit_high_noise": None}
    flags |= {"output_dir": str(folder), "output_name": "out", "base_weights": None, "dim_from_weights": None}
    flags |= {"accumulation": 1, "no_metadata": False, **more}
    args = Namespace(**flags)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=args.accumulation)
    model = tiny_model(torch.bfloat16)
    model.load_state_dict(load_file(args.dit))
    model.eval().requires_grad_(False)
    BASES[base](model)
    sys.path.insert(0, UTILS)
    module = importlib.import_module("musubi_network")
    for given in (args.base_weights, args.dim_from_weights):
        if given:
            module.create_arch_network_from_weights(1, {}, unet=model)
    network = module.create_arch_network(
        1.0, args.network_dim, 1, None, None, model, neuron_dropout=None, **args.network_args
    )
    if hasattr(module, "prepare_network"):
        network.prepare_network(args)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    checkpoint_blocks(model)
    network.enable_gradient_checkpointing()
    groups, _ = network.prepare_optimizer_params(unet_lr=1e-3)
    optimizer = torch.optim.AdamW(groups)
    model = accelerator.prepare(model)
    network, optimizer = accelerator.prepare(network, optimizer)
    model.train()
    accelerator.unwrap_model(network).prepare_grad_etc(model)
    if resume:
        accelerator.load_state(resume)
    accelerator.unwrap_model(network).on_epoch_start(model)
    losses = []
    for step in range(steps):
        with accelerator.accumulate(network):
            accelerator.unwrap_model(network).on_step_start()
            with accelerator.autocast():
                loss = loss_of(model, step)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(accelerator.unwrap_model(network).get_trainable_params(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    with torch.no_grad(), accelerator.autocast():
        losses.append(loss_of(model, 99).item())
    accelerator.save_state(folder / "state")
    metadata = {"ss_output_name": "one", "ss_steps": str(steps), "modelspec.architecture": "wan2.1/lora"}
    metadata = {} if args.no_metadata else metadata
    accelerator.unwrap_model(network).save_weights(str(folder / "out.safetensors"), torch.float32, metadata)
    return losses


@pytest.fixture
def folder(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    save_file(tiny_model(torch.bfloat16).state_dict(), tmp_path / "base.safetensors")
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def our_run(beside=False):
    """The same steps by the five lines of README; the losses, and the weights at the end."""
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.05", 2, beside=beside)
    checkpoint_blocks(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained.write_back()
        losses.append(loss.item())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return [*losses, loss_of(model, 99).item()], model.state_dict()


@pytest.mark.parametrize("base", ["resident", "classic"])
def test_written_weights_train_and_save_bit_for_bit_like_the_five_lines(folder, base):
    expected_losses, expected = our_run()
    assert fake_trainer(folder, base) == expected_losses
    saved = load_file(folder / "out.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_weight_that_is_a_copy_trains_bit_for_bit_like_one_with_the_difference_beside_it(folder):
    assert fake_trainer(folder, "h2d") == our_run(beside=True)[0]


@pytest.mark.parametrize("base", ["h2d", "fp8"])
def test_where_weights_cannot_be_written_the_difference_trains_beside_them(folder, base):
    expected_losses, expected = our_run()
    losses = fake_trainer(folder, base)
    assert losses == pytest.approx(expected_losses, rel=0.03) and losses[-1] != losses[0]
    saved, original = load_file(folder / "out.safetensors"), load_file(folder / "base.safetensors")
    moved, close = 0, 0
    for name, tensor in saved.items():
        inside = torch.zeros(tensor.numel(), dtype=torch.bool)
        if name.startswith("blocks.") and tensor.dim() == 2:
            inside[slice_indices(name, tensor.shape, "0.05", 2)] = True
        assert torch.equal(tensor.flatten()[~inside], original[name].flatten()[~inside]), name
        values, start = tensor.flatten()[inside].float(), original[name].flatten()[inside].float()
        moved += (values != start).sum().item()
        # Adam's first steps are signs of gradients: only those near zero may turn.
        close += ((values - start).sign() == (expected[name].flatten()[inside].float() - start).sign()).sum().item()
    count = attach_slice(tiny_model(), "0.05", 2).count
    assert moved > 0.9 * count and close > 0.9 * count


def test_the_checkpoint_has_its_ledger_the_dtypes_of_the_base_and_is_no_lora(folder):
    fake_trainer(folder)
    with safe_open(folder / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    (entry,) = read_ledger(metadata)
    assert (entry["ff"], entry["ffid"], entry["name"], entry["steps"]) == ("0.05", 2, "one", STEPS)
    assert metadata["modelspec.architecture"] == "wan2.1"


def test_a_state_resumes_the_differences_and_refuses_another_slice(folder):
    fake_trainer(folder)
    first = load_file(folder / "out.safetensors")
    (folder / "state").rename(folder / "kept")
    fake_trainer(folder, steps=0, resume=folder / "kept")
    assert all(torch.equal(first[name], tensor) for name, tensor in load_file(folder / "out.safetensors").items())
    with pytest.raises(Exception, match=r"ff 0\.05 ffid 2, not 0\.05 and 3"):
        fake_trainer(folder, resume=folder / "kept", network_args={"ff": "0.05", "ffid": "3"})


def recorded(folder):
    """The name and the steps in the ledger of what the trainer saved."""
    with safe_open(folder / "out.safetensors", "pt") as file:
        (entry,) = read_ledger(file.metadata())
    return entry["name"], entry["steps"]


def test_the_ledger_counts_the_steps_of_a_resumed_run_too(folder):
    fake_trainer(folder, steps=2)
    (folder / "state").rename(folder / "kept")
    fake_trainer(folder, steps=3, resume=folder / "kept")
    assert recorded(folder) == ("one", 5)


@pytest.mark.parametrize(("more", "steps"), [({"no_metadata": True}, 4), ({"accumulation": 2}, 2)])
def test_the_ledger_counts_optimizer_steps_whatever_the_trainer_says(folder, more, steps):
    fake_trainer(folder, steps=4, **more)
    assert recorded(folder) == ("out" if "no_metadata" in more else "one", steps)


def test_another_optimizers_steps_are_not_counted(folder, monkeypatch):
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    inner = loss_of
    monkeypatch.setattr(sys.modules[__name__], "loss_of", lambda *given: (other.step(), inner(*given))[1])
    fake_trainer(folder, steps=2)
    assert recorded(folder)[1] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"network_args": {"ff": "0.05"}}, r"ff=0\.05: it takes ff=0\.001 ffid=1"),
        ({"network_args": {"ff": "0.05", "ffid": "one"}}, r"ffid=one: it takes ff=0\.001 ffid=1 \(a number\)"),
        ({"network_args": {"ff": "0.05", "ffid": "21"}}, "from 1 to 20"),
        ({"network_args": {"ff": "0.05", "ffid": "1", "rank": "4"}}, "rank=4"),
        ({"network_args": {"ff": "0.05", "ffid": "1", "guard": "1"}}, r"guard: only wan_train_network\.py has"),
        ({"network_dim": 32}, "leave out --network_dim"),
        ({"dit_high_noise": "high.safetensors"}, "each expert in a run of its own"),
        ({"base_weights": ["lora.safetensors"]}, "merge the LoRA"),
        ({"dim_from_weights": "lora.safetensors"}, "merge the LoRA"),
        ({"output_name": "base"}, "is the base itself"),
        ({"output_name": "a\x1b[2J"}, r"a concept cannot be named 'a\\x1b\[2J'"),
        ({"network_args": {"ff": "1_0e-2", "ffid": "1"}}, "ff is 1_0e-2"),
        ({"scale_weight_norms": 1.0}, "no norm"),
        ({"network_weights": "a.safetensors"}, "--resume"),
    ],
)
def test_what_does_not_go_with_a_slice_is_refused_in_one_line(folder, more, message):
    with pytest.raises(ValueError, match=message) as error:
        fake_trainer(folder, **more)
    assert "\n" not in str(error.value) and type(error.value).__name__ == SliceError.__name__


@pytest.mark.parametrize("base", ["resident", "fp8"])
def test_a_file_that_takes_no_slice_is_told_before_training(folder, base):
    weights = load_file(folder / "base.safetensors")
    stored = {name: w.to(torch.float8_e4m3fn) if ".ffn." in name and w.dim() == 2 else w for name, w in weights.items()}
    save_file(stored, folder / "base.safetensors")
    with pytest.raises(ValueError, match=r"ffn\.0\.weight is F8_E4M3 in the base file: slices are saved into"):
        fake_trainer(folder, base, steps=1)


def test_a_slice_over_an_earlier_one_is_refused_unless_it_is_meant(folder):
    fake_trainer(folder, steps=1)
    (folder / "out.safetensors").replace(folder / "base.safetensors")
    with pytest.raises(
        ValueError, match=r"holds one \(ff 0\.05 ffid 2\) in the values of ff 0\.1 ffid 1: take another"
    ):
        fake_trainer(folder, network_args={"ff": "0.1", "ffid": "1"})
    fake_trainer(folder, steps=1, network_args={"ff": "0.05", "ffid": "3"})
    fake_trainer(folder, steps=1, network_args={"ff": "0.05", "ffid": "2", "allow_overlap": "yes"})


def test_a_slice_file_is_saved_where_it_is_asked_for(folder):
    fake_trainer(folder, network_args={"ff": "0.05", "ffid": "2", "save": "slice"})
    saved, (_, expected) = load_file(folder / "out.safetensors"), our_run()
    for name, values in saved.items():
        assert torch.equal(values, expected[name].flatten()[slice_indices(name, expected[name].shape, "0.05", 2)])
    assert len(saved) == 30


@pytest.fixture(params=[pictures.TINY, pictures.PAIR], ids=["i2v", "flf2v"])
def picture_model(request, monkeypatch):
    """The trainer's model is one that reads pictures, as CLIP tokens too."""
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "tiny_model", lambda dtype=torch.float32: pictures.tiny_model(request.param).to(dtype))
    inputs = pictures.tiny_inputs(request.param)
    monkeypatch.setattr(here, "loss_of", lambda model, step: (model(*inputs).float() - step).square().mean())


@pytest.mark.parametrize("base", ["resident", "classic"])
def test_a_model_that_reads_pictures_trains_its_own_matrices_too(picture_model, folder, base):
    expected_losses, expected = our_run()
    assert fake_trainer(folder, base) == expected_losses
    saved, original = load_file(folder / "out.safetensors"), load_file(folder / "base.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    moved = {name for name, tensor in saved.items() if not torch.equal(tensor, original[name])}
    assert len(moved) == 36 and sum("_img.weight" in name for name in moved) == 6


@pytest.mark.parametrize("base", ["h2d", "fp8"])
def test_of_a_model_that_reads_pictures_the_difference_trains_beside_copies(picture_model, folder, base):
    losses = fake_trainer(folder, base, network_args={"ff": "0.05", "ffid": "2", "save": "slice"})
    assert losses == pytest.approx(our_run(beside=base == "h2d")[0], rel=0.03 if base == "fp8" else 0)
    assert len(load_file(folder / "out.safetensors")) == 36
