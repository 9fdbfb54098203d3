"""--compile: the compiled functions compute what the plain ones do, in every run; without a compiler it is refused."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_block_swap import Run
from test_generation import files, made, names  # noqa: F401
from test_picture_models import PER_TOKEN, TINY, tiny_inputs, tiny_model
from test_training_checks import refusal
from tiny_run import CONFIG, run, write_inputs
from torch import nn

from wan import compiling
from wan.compiling import check_compiler, compiled_pointwise, pointwise_of
from wan.errors import InputError
from wan.model import use_pointwise
from wan.pointwise import PLAIN, Pointwise

CPU = torch.device("cpu")
BF16 = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_epochs", "1", "--save_as", "slice")


# What --compile computes, without the minutes that compilers take.
TRACED = pointwise_of(lambda function: function)


@pytest.fixture
def quick(monkeypatch):
    """--compile compiles nothing: the functions that it would, and how often each is called."""
    calls = Counter()

    def counted(function):
        calls[function.__name__] = 0

        def call(*inputs):
            calls[function.__name__] += 1
            return function(*inputs)

        return call

    compiled_pointwise.cache_clear()
    monkeypatch.setattr(compiling, "_compiled", counted)
    yield calls
    compiled_pointwise.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile found in the functions, and one entry for each time that it ran."""
    found, ran = [], []

    def backend(graph, _):
        found.append(graph)
        return lambda *inputs: ran.append(graph) or graph.forward(*inputs)

    monkeypatch.setattr(compiling, "BACKEND", backend)
    return found, ran


def trained(folder, name):
    return load_file(folder / "out" / f"{name}.slice.safetensors")


def drawn(dtype, batch, tokens):
    """x and y that need gradients, three float32 rows that two samples share, and which of them a token has."""
    draw = torch.Generator().manual_seed(tokens)
    x, y = (torch.randn(batch, tokens, 32, generator=draw).to(dtype).requires_grad_() for _ in range(2))
    rows = [torch.randn(1, 2, 32, generator=draw).requires_grad_() for _ in range(3)]
    return x, y, rows, torch.randint(2, (batch, tokens), generator=draw)


def chain(pointwise, dtype, batch, tokens):
    """All functions one after another, as in a block, and the gradients of all inputs."""
    x, y, (shift, scale, gate), times = drawn(dtype, batch, tokens)
    freqs = torch.polar(torch.ones(tokens, 1, 4), torch.arange(4.0 * tokens).view(tokens, 1, 4)).to(torch.complex64)
    norm = nn.RMSNorm(32, 1e-6).to(dtype)
    norm.weight.data.copy_(torch.linspace(0.5, 2, 32))
    shifted = pointwise.modulated_norm(x, shift, scale, 1e-6, times, dtype)
    turned = pointwise.apply_rope(pointwise.rms_norm(norm, shifted).unflatten(-1, (4, 8)), freqs).flatten(2)
    out = pointwise.gated_residual(turned, y, gate, times)
    (out.float() * torch.arange(32)).square().mean().backward()
    return [out.detach(), *(one.grad for one in (x, y, shift, scale, gate, norm.weight))]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 5), (2, 9), (3, 4)])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_functions_and_their_gradients_are_those_of_the_plain_ones(dtype, apart, batch, tokens):
    expected, found = (chain(one, dtype, batch, tokens) for one in (PLAIN, TRACED))
    for own, plain in zip(found, expected, strict=True):
        assert own.dtype == plain.dtype and (own - plain).norm() <= apart * plain.norm()


@pytest.mark.parametrize("config", [TINY, PER_TOKEN])
def test_a_model_with_compiled_functions_has_the_gradients_of_a_plain_one_until_it_is_undone(config):
    model = tiny_model(config).requires_grad_(True)
    grads = []
    for pointwise in (PLAIN, TRACED, PLAIN):
        use_pointwise(model, pointwise)
        model.zero_grad()
        model(*tiny_inputs(config)).square().mean().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    plain, compiled, undone = grads
    assert all(torch.equal(grad, undone[name]) for name, grad in plain.items())
    for name, grad in compiled.items():
        assert (grad - plain[name]).norm() <= 1e-4 * plain[name].norm(), name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_streamed_and_checkpointed_blocks_compute_the_bits_of_resident_ones(checkpointed):
    results = []
    for swapped in (0, 5):
        own = Run(swapped=swapped, checkpointed=checkpointed)
        use_pointwise(own.model, TRACED)
        results.append(own.train())
    (losses, values), (streamed_losses, streamed) = results
    assert losses == streamed_losses and all(map(torch.equal, values, streamed))


def test_a_compiled_run_says_so_once_and_trains_the_slice_of_a_plain_one_to_rounding(tmp_path, quick):
    folder, calls = write_inputs(tmp_path), []
    ways = {"plain": (), "compiled": ("--compile",), "streamed": ("--compile", "--blocks_to_swap", "2")}
    for name, more in ways.items():
        lines = run(folder, *BF16, *more, "--output_name", name)
        assert lines.count(compiling.COMPILING) == ("--compile" in more)
        calls.append(quick["gated"])
    # Five steps of two blocks, each computed twice; the warm-up, which both runs share, is one more.
    assert calls == [0, 1 + 5 * 2 * 2 * 2, 1 + 2 * 5 * 2 * 2 * 2]
    plain, compiled, streamed = (trained(folder, name) for name in ways)
    for name, value in compiled.items():
        torch.testing.assert_close(value, plain[name], rtol=0.02, atol=0.02)
        assert torch.equal(value, streamed[name])


def test_generation_with_compiled_functions_draws_the_picture_of_plain_ones(files, tmp_path, quick, capsys):  # noqa: F811
    plain, compiled = (made(files, tmp_path / name, *more) for name, more in (("a", ()), ("b", ("--compile",))))
    assert np.abs(plain.astype(int) - compiled).max() <= 2 and quick["normed"] > 3
    assert capsys.readouterr().out.count(compiling.COMPILING) == 1 and len(names(tmp_path)) == 2


def test_without_a_compiler_training_and_generation_stop_before_a_model_loads(tmp_path, files, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    told = "--compile needs a C++ compiler on the CPU, and none of g++, clang++, c++, cl was found: install one, or "
    assert refusal(write_inputs(tmp_path), monkeypatch, "--compile").startswith(told)
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        made(files, tmp_path / "out", "--compile")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("CXX", "no-such")
    with pytest.raises(InputError, match="the variable CXX names no-such"):
        check_compiler(CPU)


def test_a_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs Triton on cuda:1.*pip install triton .*leave out --compile"):
        check_compiler(torch.device("cuda:1"))
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    check_compiler(torch.device("cuda"))


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("backend='inductor' raised:\n\nthe compiler is broken\nmore of it")

    monkeypatch.setattr(compiling, "_compiled", lambda own: fail)
    compiled_pointwise.cache_clear()
    with pytest.raises(InputError, match=r"^--compile failed on cpu: .* raised: the compiler is broken; leave it out$"):
        compiled_pointwise(CONFIG, torch.float32, CPU)


def test_on_the_cpu_rope_stays_plain_and_the_rest_is_compiled(quick):
    used = compiled_pointwise(CONFIG, torch.bfloat16, CPU)
    assert [field.name for field in fields(Pointwise) if getattr(used, field.name) == getattr(PLAIN, field.name)] == [
        "apply_rope"
    ]


@pytest.mark.slow
def test_other_numbers_of_tokens_compile_nothing_anew(graphs):
    found, _ = graphs
    compiled = pointwise_of(compiling._compiled)
    chain(compiled, torch.bfloat16, 2, 7)
    first = len(found)
    for batch, tokens in ((2, 11), (3, 13), (5, 6)):
        chain(compiled, torch.bfloat16, batch, tokens)
    assert first == len(found) == 8


@pytest.mark.slow
def test_checkpointed_blocks_run_the_compiled_functions_in_both_passes(graphs):
    _, ran = graphs
    own = Run(checkpointed=True)
    use_pointwise(own.model, pointwise_of(compiling._compiled))
    own.step(0)
    # Of a block two modulated norms, two gates, four RMS norms and two turned, each twice.
    assert len(ran) > 5 * 2 * 10 + 5 * 8


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_what_the_compiler_makes_computes_what_the_plain_functions_do(dtype, apart):
    pointwise = pointwise_of(compiling._compiled)
    for batch, tokens in ((2, 9), (1, 1031)):
        for own, plain in zip(*(chain(one, dtype, batch, tokens) for one in (pointwise, PLAIN)), strict=True):
            assert own.dtype == plain.dtype and (own - plain).norm() <= apart * plain.norm()


@pytest.mark.slow
def test_compiled_runs_write_the_same_slice_resident_and_streamed(tmp_path):
    folder = write_inputs(tmp_path)
    for name, more in (("resident", ()), ("streamed", ("--blocks_to_swap", "2"))):
        run(folder, *BF16, "--compile", *more, "--output_name", name)
    resident, streamed = (trained(folder, name) for name in ("resident", "streamed"))
    assert all(torch.equal(value, streamed[name]) for name, value in resident.items())
