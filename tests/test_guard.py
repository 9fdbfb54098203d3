"""The guard: its statistics against a dense K-FAC, its gradient against plain autograd, runs that have one."""

import itertools
import shutil
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from test_preservation import kept_by, t5
from test_processes import in_two_processes, needs_fork
from tiny_run import run, write_inputs, write_sample_models
from torch import nn

from utils.files import readable
from utils.learning.conditions import predict
from utils.preserve import asking, gathering
from utils.preserve.guard import WEIGHT, Gathering, Guard, MatrixStatistics, guard_bytes
from utils.run import checks
from utils.run.state import read_state
from utils.selective_finetune import attach_slice, slice_indices, slice_units
from wan.errors import InputError
from wan.loading import load_dit

# Rows that 8, 4, 2 and nothing divide; slices with short row groups, cut units, and more than half of the columns.
SHAPES = ((12, 16), (7, 12), (9, 10), (5, 9))
SLICES = (("0.1", 2), ("0.03", 30), ("0.37", 2), ("0.9", 1), ("1", 1))
GATHERED = 5  # predictions, in these tests


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    write_sample_models(folder)
    (folder / "old.txt").write_text("a red cat\na cat", encoding="utf-8")
    return folder


@pytest.fixture
def folder(files, monkeypatch):
    monkeypatch.setattr(asking, "SAMPLES", GATHERED)
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def preserving(folder, *more):
    """A run of five steps whose last state is kept, and which preserves the prompts of old.txt alone."""
    told = ("--preserve_prompts", str(folder / "old.txt"), "--preserve_levels", "1", "--preserve_random", "0")
    return (*t5(folder), *told, "--save_state", "--save_as", "slice", "--max_train_epochs", "1", *more)


def state_of(folder, name="one"):
    return read_state(folder / "out" / f"{name}-state")


def dense(matrix, values, ff, ffid):
    """The values of a slice as a whole matrix, 0 elsewhere."""
    at = slice_indices(matrix.name, matrix.units.shape, ff, ffid)
    return torch.zeros(matrix.units.shape).flatten().index_put((at,), values).view(matrix.units.shape)


def one_linear(shape, ff, ffid, seed=0):
    """A linear with a slice whose differences are not 0, its input, and its statistics: outputs are predictions."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(*shape)])})
    trained = attach_slice(model, ff, ffid)
    x_BTI, gathered = torch.randn(3, 4, shape[0]), Gathering(trained)
    signs = torch.randn(3, 4, shape[1]).sign()  # of unit variance, and so even that squares are exact
    with gathered.of_passes():
        for x, noise in ((x_BTI[:2], signs[:2]), (x_BTI[2:], signs[2:])):
            gathered.backward(model["blocks"][0](x), noise, signs[0].numel())
    (matrix,) = trained.matrices.values()
    assert matrix.difference.grad is None
    with torch.no_grad():
        matrix.difference.normal_()
    return trained, matrix, x_BTI, gathered.statistics()


@pytest.mark.parametrize(("shape", "own"), [*itertools.product(SHAPES, SLICES)])
def test_for_one_linear_the_penalty_is_the_mean_squared_change(shape, own):
    trained, matrix, x_BTI, statistics = one_linear(shape, *own)
    penalty = 3 * (x_BTI @ dense(matrix, matrix.difference, *own).T).square().mean()
    (expected,) = torch.autograd.grad(penalty, matrix.difference)
    Guard(3, statistics).add_gradient(trained)
    torch.testing.assert_close(matrix.difference.grad, expected)
    Guard(6, statistics).add_gradient(trained)  # beside what other losses gave
    torch.testing.assert_close(matrix.difference.grad, 3 * expected)


@pytest.mark.parametrize(("shape", "own"), [*itertools.product(SHAPES, SLICES)])
def test_the_gradient_is_that_of_the_traces_by_row_group(shape, own):
    """weight * sum over g of tr(D_g^T C_g D_g diag(r)), with outputs that matter differently."""
    trained, matrix, x_BTI, statistics = one_linear(shape, *own)
    inputs, r_GL = statistics[matrix.name].inputs_GMM, torch.rand_like(statistics[matrix.name].outputs_GL)
    x_TI, loss = x_BTI.flatten(0, 1), 0
    D_OI, units = dense(matrix, matrix.difference, *own), slice_units(matrix.name, matrix.units.shape, *own)
    for g, rows in enumerate(torch.arange(shape[1]).split(units.rows)):
        columns = units.columns_U[units.groups_U == g]
        C, D_ML = x_TI[:, columns].T @ x_TI[:, columns] / len(x_TI), D_OI[rows][:, columns].T
        loss = loss + 2 * torch.trace(D_ML.T @ C @ D_ML @ r_GL[g].diag())
    (expected,) = torch.autograd.grad(loss, matrix.difference)
    Guard(2, {matrix.name: MatrixStatistics(inputs, r_GL)}).add_gradient(trained)
    torch.testing.assert_close(matrix.difference.grad, expected)


def test_pieces_of_tokens_give_the_statistics_of_all(monkeypatch):
    whole, parts = {}, {}
    for found, together in ((whole, 10**9), (parts, 40)):  # of 12 x 16: two tokens at a time
        monkeypatch.setattr("utils.preserve.guard._TOGETHER", together)
        for own in SLICES:
            found |= {own: next(iter(one_linear((12, 16), *own)[3].values())).tensors()}
    for own in SLICES:
        torch.testing.assert_close(parts[own], whole[own])


def test_the_statistics_take_what_is_told():
    for shape, own in itertools.product(SHAPES, SLICES):
        _, matrix, _, statistics = one_linear(shape, *own)
        assert Guard(1, statistics).nbytes == guard_bytes([slice_units(matrix.name, matrix.units.shape, *own)])


def share(rank, _):
    """The statistics of two processes, of which the second one has nothing to predict."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(12, 16)])})
    gathered = Gathering(attach_slice(model, "0.37", 2))
    with gathered.of_passes():
        for n in () if rank else range(2):
            gathered.backward(model["blocks"][0](torch.full((1, 3, 12), n + 1.0)), torch.ones(1, 3, 16), 48)
    return [tensor.tolist() for tensor in next(iter(gathered.statistics(2).values())).tensors()]


@needs_fork
def test_processes_share_their_statistics_even_with_one_that_has_no_predictions(tmp_path):
    one, two = (found for _, found in in_two_processes(share, tmp_path))
    assert one == two
    inputs, outputs = map(torch.tensor, one)
    assert inputs.unique().tolist() == [0, 2.5] and outputs.unique().tolist() == [3 / 48]  # (1 + 4) / 2; 2 * 3 / 2 / 48


@contextmanager
def noted_passes():
    """[(model's inputs, noise, values that count)] of every pass of the gathering."""
    asked, passes = [], []
    predictions, backward = gathering.predictions, Gathering.backward

    def note_inputs(together, model, device):
        asked.append(([text for text, _ in together], predictions(together, model, device)))
        return asked[-1][1]

    def note_noise(own, predicted, noise, values):
        texts, made = asked[-1]
        passes.append((made.noisy_BCFHW.float(), made.t_B, texts, made.given, noise, values))
        backward(own, predicted, noise, values)

    with patch.object(gathering, "predictions", note_inputs), patch.object(Gathering, "backward", note_noise):
        yield passes


def dense_kfac(model, passes):
    """{matrix: (C, r)} of whole matrices by plain autograd: a pass for every sample."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
    C, r, tokens, samples, seen = {}, {}, dict.fromkeys(linears, 0), 0, {}
    for name, linear in linears.items():
        linear.weight.requires_grad_()
        linear.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0].detach(), out)}))
    for noisy, t, texts, given, noise, values in passes:
        predicted = predict(model, noisy, t, [text.float() for text in texts], given)
        grads = torch.autograd.grad((predicted * noise).sum(), [out for _, out in seen.values()])
        for (name, (x, _)), grad in zip(seen.items(), grads, strict=True):
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
            C[name], r[name] = C.get(name, 0) + x.T @ x, r.get(name, 0) + grad.square().sum(0) / values
            tokens[name] += len(x)
        samples += len(noisy)
    return {f"{name}.weight": (C[name] / tokens[name], r[name] / samples) for name in linears}


def check_statistics(dit, state, passes, count):
    """The statistics in a state are those of a dense K-FAC of the model in `dit`, cut to the slice."""
    assert sum(len(one[0]) for one in passes) == count
    ff, ffid = state.settings["ff"], int(state.settings["ffid"])
    expected = dense_kfac(load_dit(dit, torch.float32), passes)
    assert state.guard.keys() == expected.keys()
    for name, (C_II, r_O) in expected.items():
        units, found = slice_units(name, (len(r_O), len(C_II)), ff, ffid), state.guard[name]
        cut = torch.zeros_like(found["inputs"])
        for g in range(len(cut)):
            columns = units.columns_U[units.groups_U == g]
            cut[g, : len(columns), : len(columns)] = C_II[columns][:, columns]
        torch.testing.assert_close(found["inputs"], cut, rtol=1e-3, atol=1e-5 * float(C_II.abs().max()))
        torch.testing.assert_close(found["outputs"].flatten(), r_O, rtol=1e-3, atol=1e-5 * float(r_O.max()))


@pytest.mark.parametrize("random", ["0", "6"], ids=["listed prompts", "random contexts"])
def test_the_statistics_are_those_of_a_dense_kfac(folder, random):
    with noted_passes() as passes:
        told = run(folder, *preserving(folder), "--mixed_precision", "no", "--preserve_random", random)
    check_statistics(folder / "base.safetensors", state_of(folder), passes, GATHERED)
    kept = kept_by(folder / "out" / "one.answers.safetensors", folder)
    texts = [text.tolist() for one in passes for text in one[2]]
    allowed = kept.random.texts if kept.random else [old.text_SD for old in kept.general]
    assert all(text in [own.tolist() for own in allowed] for text in texts) and len({str(t) for t in texts}) > 1
    assert {one[4].shape[0] for one in passes} == {1, 2} and len({one[4].shape for one in passes}) > 2
    batches = f"predictions, forward and backward, which take about as long as {len(passes)} training batches"
    assert any(f"{GATHERED} {batches}" in line for line in told)


def test_a_chain_and_a_continued_slice_have_the_statistics_of_what_they_start_from(folder):
    run(folder, *preserving(folder), "--save_as", "checkpoint", "--max_train_steps", "1")
    dit = folder / "out" / "one.safetensors"
    later = ("--dit", str(dit), "--preserve_answers", str(folder / "out" / "one.answers.safetensors"))
    later += ("--mixed_precision", "no", "--max_train_steps", "1")
    for name, own in (("two", ("--ffid", "3")), ("again", ("--continue_slice",))):
        with noted_passes() as passes:
            run(folder, *preserving(folder), *later, *own, "--output_name", name)
        check_statistics(dit, state_of(folder, name), passes, GATHERED)


def penalty(state, statistics):
    """The guard's penalty of weight 1 on what a run has trained."""
    total = 0
    for name, own in statistics.items():
        C, r_GL = own["inputs"], own["outputs"]
        trained = attached[name].table(state.trained[name.replace(".", "/")])
        total += torch.einsum("gml,gmn,gnl,gl->", trained, C, trained, r_GL).item()
    return total


attached = {}


def test_a_larger_weight_leaves_a_smaller_penalty_and_0_adds_nothing(folder):
    attached.update(attach_slice(load_dit(folder / "base.safetensors", torch.float32), "0.1", 2).matrices)
    common, states = (*preserving(folder), "--max_train_epochs", "2"), {}
    for weight in ("20", "1000"):
        run(folder, *common, "--output_name", f"w{weight}", "--guard", weight)
        states[weight] = state_of(folder, f"w{weight}")
    with patch.object(gathering, "Gathering", None):
        told = run(folder, *common, "--output_name", "w0", "--guard", "0")
    none, few, many = state_of(folder, "w0"), states["20"], states["1000"]
    assert penalty(many, few.guard) < 0.5 * penalty(few, few.guard) < 0.25 * penalty(none, few.guard)
    assert none.guard is None and "guard" not in none.settings and "guard" not in "\n".join(told)
    assert all(torch.equal(own["inputs"], many.guard[name]["inputs"]) for name, own in few.guard.items())


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_does_not_gather_again(folder, step):
    common = (*preserving(folder, "--guard", "30"), "--mixed_precision", "bf16")
    run(folder, *common, "--save_every_n_steps", str(step))
    whole = state_of(folder)
    between = folder / "out" / f"one-step{step:08d}-state"
    with patch.object(gathering, "Gathering", None):
        told = run(folder, *common, "--resume", str(between))
    resumed = state_of(folder)
    assert all(torch.equal(value, resumed.trained[name]) for name, value in whole.trained.items())
    for name, own in whole.guard.items():
        for saved in (resumed.guard[name], read_state(between).guard[name]):
            assert torch.equal(saved["inputs"], own["inputs"]) and torch.equal(saved["outputs"], own["outputs"])
    told, size = "\n".join(told), sum(tensor.nbytes for own in whole.guard.values() for tensor in own.values())
    assert "for the guard" not in told and "guards the model's other predictions, on every step, with weight 30" in told
    assert f"there, its guard {readable(size)} and AdamW's state" in told


WAYS = {
    "checkpointed": ("--gradient_checkpointing",),
    "streamed": ("--gradient_checkpointing", "--blocks_to_swap", "2", "--block_swap_ring_size", "1"),
    "not checkpointed": ("--blocks_to_swap", "1"),
}


@pytest.mark.parametrize("base", [(), pytest.param(("--fp8_base", "--fp8_scaled"), marks=pytest.mark.slow)])
def test_streamed_and_checkpointed_runs_are_the_resident_one_bit_for_bit(folder, base):
    common = (*preserving(folder), "--mixed_precision", "bf16", "--max_train_steps", "3", *base)
    run(folder, *common)
    plain = state_of(folder)
    for name, way in WAYS.items():
        run(folder, *common, *way, "--output_name", name.replace(" ", "_"))
        found = state_of(folder, name.replace(" ", "_"))
        assert all(torch.equal(value, found.trained[key]) for key, value in plain.trained.items()), name
        for key, own in plain.guard.items():
            assert torch.equal(found.guard[key]["inputs"], own["inputs"]), name
            assert torch.equal(found.guard[key]["outputs"], own["outputs"]), name


def test_statistics_that_would_be_too_large_are_left_out_with_a_note_and_the_run_resumes(folder, monkeypatch):
    monkeypatch.setattr(checks, "MOST_BYTES", 1000)
    common = (*preserving(folder), "--max_train_steps", "2", "--save_every_n_steps", "1")
    told = run(folder, *common)
    (note,) = (line for line in told if "has no guard" in line)
    assert "kB at ff 0.1, and 1.0 kB at most are kept" in note and not any("guards the model" in line for line in told)
    whole = state_of(folder)
    assert whole.guard is None and "guard" not in whole.settings
    run(folder, *common, "--resume", str(folder / "out" / "one-step00000001-state"))
    assert all(torch.equal(value, state_of(folder).trained[name]) for name, value in whole.trained.items())


def test_a_guard_that_was_asked_for_and_cannot_be_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "MOST_BYTES", 0)
    asked = SimpleNamespace(preserve=SimpleNamespace(guard=2.0), ff="0.5", expert="")
    with pytest.raises(InputError, match=r"^--guard 2: its statistics would take .* leave it out"):
        checks._guard_weight(asked, [slice_units("blocks.0.weight", (16, 16), "0.5", 1)], None)


def test_of_two_experts_the_note_names_each(monkeypatch):
    monkeypatch.setattr(checks, "MOST_BYTES", 0)
    said, units = [], [slice_units("blocks.0.weight", (16, 16), "0.5", 1)]
    for expert in ("", "low_noise"):
        asked = SimpleNamespace(preserve=SimpleNamespace(guard=None), ff="0.5", expert=expert)
        assert checks._guard_weight(asked, units, said.append) == 0
    assert [line.split(", because")[0] for line in said] == [
        "note: the run has no guard", "note: the low_noise expert has no guard"
    ]  # fmt: skip


def test_statistics_that_are_not_finite_stop_the_run_before_its_first_step(folder):
    draw = gathering._noise

    def overflowing(*given):
        noise, values = draw(*given)
        return noise * torch.inf, values

    with patch.object(gathering, "_noise", overflowing), pytest.raises(InputError, match="not damaged") as error:
        run(folder, *preserving(folder))
    assert "the guard's statistics of blocks.0." in str(error.value) and "--guard 0" in str(error.value)
    assert not list((folder / "out").glob("*-state")) and "\n" not in str(error.value)
    (line,) = (own for own in run(folder, *preserving(folder), "--guard", "0") if "answers.safetensors already" in own)
    assert line.endswith("has the reference predictions of a run with the same settings")


def test_in_fp16_the_advice_is_another_precision():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})
    statistics = {"blocks.0.weight": MatrixStatistics(torch.full((4, 1, 1), torch.nan), torch.ones(4, 1))}
    model.dtype = torch.float16
    with pytest.raises(InputError, match="fp16 overflows easily: try --mixed_precision bf16; --guard 0 trains without"):
        gathering._check_is_finite(statistics, model)


def test_a_run_without_a_guard_is_not_continued_with_one(folder):
    common = (*preserving(folder), "--max_train_steps", "2", "--save_every_n_steps", "1")
    run(folder, *common, "--guard", "0")
    resume = ("--resume", str(folder / "out" / "one-step00000001-state"))
    with pytest.raises(InputError, match=rf"another run: guard 0 \(now {WEIGHT}\); give the same settings"):
        run(folder, *common, *resume)
    with pytest.raises(InputError, match=r"another run: guard 0 \(now 5.0\)"):
        run(folder, *common, *resume, "--guard", "5")
