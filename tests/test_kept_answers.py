"""Kept answers: what a run asks and keeps against the model that it began with, their file, their use along a chain."""

import json
import math
import re
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_preservation import SGD, kept_by, logged, t5
from tiny_run import CONFIG, flags, run, write_dataset, write_dit, write_sample_models
from torch.nn import functional as F

from utils.cli.train import parse_train
from utils.data.dataset import build_training_dataset
from utils.learning.flow_matching import draw_generator, sigmas_of
from utils.preserve.answers_file import Answer, OldPrompt, read_answers, write_answers
from utils.preserve.old_prompts import Preservation
from utils.run.state import read_state
from utils.selective_finetune import slice_indices
from utils.slice_saving import base_identity
from utils.slices.base_identity import BaseModel
from utils.slices.commands import apply, remove, scale
from utils.slices.ledger import CONTRACT, Entry
from utils.slices.listing import list_files, table
from wan.errors import InputError
from wan.loading import load_dit
from wan.model import WanModel

PROMPTS = ("a red cat", "a cat")
BASE = BaseModel("ab" * 32, ("00", "01", None, "03"))
RUN = "run"
CONCEPT = Entry(CONTRACT, "0.1", 2, "one", 10, "2026-01-01")
SHAPE = (16, 1, 2, 4)
THREE = "out/three.answers.safetensors"
SEED = 5  # of a run in which one batch draws answers of two sizes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A chain's first two runs, each asking at three noise levels, in `chain`; the dataset of a third concept."""
    folder = tmp_path_factory.mktemp("run")
    write_dit(folder / "base.safetensors")
    write_dataset(folder)
    for name in ("new", "other"):
        write_dataset(folder / name, name)
    write_sample_models(folder)
    (folder / "old.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    told = run(folder, *asking(folder), "--save_as", "checkpoint", "slice")
    (folder / "out").rename(folder / "chain")
    told += run(folder, *second(folder))
    (folder / "first.log").write_text("\n".join(told), encoding="utf-8")
    for name in ("two.safetensors", "two.answers.safetensors"):
        (folder / "out" / name).rename(folder / "chain" / name)
    shutil.rmtree(folder / "out")
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def asking(folder, *more):
    few = ("--preserve_levels", "3", "--preserve_random", "0", "--guard", "0")
    return (*t5(folder), "--preserve_prompts", str(folder / "old.txt"), *more, *few)


def after(folder, dit, answers, ffid, name, data):
    """The flags of a later run in a chain."""
    return (
        *("--dit", str(folder / dit), "--ffid", str(ffid), "--output_name", name, *asking(folder, "auto")),
        *("--dataset_config", str(folder / data / "data.toml"), "--preserve_answers", str(folder / answers)),
    )


def second(folder):
    return after(folder, "chain/one.safetensors", "chain/one.answers.safetensors", 3, "two", "new")


def third(folder):
    return after(folder, "chain/two.safetensors", "chain/two.answers.safetensors", 4, "three", "other")


def identity(folder):
    return BaseModel(base_identity(folder / "base.safetensors"))


def answers_of(path, folder):
    return {old.text: old for old in read_answers(path, identity(folder), CONFIG).prompts}


def test_a_run_records_the_model_that_it_starts_with(folder):
    first, then = (kept_by(folder / "chain" / f"{name}.answers.safetensors", folder) for name in ("one", "two"))
    base, one = (load_dit(folder / name, torch.float32) for name in ("base.safetensors", "chain/one.safetensors"))
    assert [p.text for p in first.general] == list(PROMPTS) and not first.of_concepts
    assert len(then.of_concepts) == 8 and {p.concept.name for p in then.of_concepts} == {"one"}
    for model, prompts in ((base, first.general), (one, then.of_concepts)):
        for prompt in prompts:
            assert len(prompt.kept) == 3
            for answer in prompt.kept:
                expected = model(answer.noisy_CFHW[None].float(), torch.tensor([answer.t]), [prompt.text_SD])[0]
                torch.testing.assert_close(answer.velocity_CFHW, expected.half(), rtol=1e-3, atol=1e-3)


def test_what_is_recorded_is_what_the_file_holds(folder):
    """The rounded latents, not those that were rounded for the file."""
    asked, forward = [], WanModel.forward

    def recorded(model, noisy, t_B, context, *given):
        if not torch.is_grad_enabled():
            asked.extend(zip(noisy, t_B.tolist(), context, strict=True))
        return forward(model, noisy, t_B, context, *given)

    with patch.object(WanModel, "forward", recorded):
        run(folder, *asking(folder), "--max_train_epochs", "1")
    kept = answers_of(folder / "out" / "one.answers.safetensors", folder).values()
    pairs = [(old, answer) for old in kept for answer in old.kept]
    for (noisy, t, text_SD), (old, answer) in zip(asked, pairs, strict=True):
        assert torch.equal(noisy, answer.noisy_CFHW.float()) and t == answer.t
        assert torch.equal(text_SD, old.text_SD)


def test_questions_spread_over_the_noise_levels_and_pictures_that_are_trained(folder):
    kept = answers_of(folder / "chain" / "two.answers.safetensors", folder)
    timesteps = parse_train(flags(folder)).timesteps
    edges = [1000 * float(sigmas_of(timesteps, torch.tensor([u]).double(), (4, 2))) for u in (1e-9, 1 / 3, 2 / 3, 1)]
    for old in kept.values():
        times = sorted(answer.t for answer in old.kept)
        assert all(low <= t <= high for low, t, high in zip(edges, times, edges[1:], strict=False))
    answers = [answer for old in kept.values() for answer in old.kept]
    assert len({answer.t for answer in answers}) == len(answers)
    assert {answer.shape for answer in answers} == {(16, 1, 2, 4), (16, 1, 4, 2)}


def test_along_a_chain_no_recorded_prediction_changes_and_none_is_recorded_twice(folder):
    told = "\n".join(run(folder, *third(folder), "--max_train_epochs", "1"))
    assert "records 24 predictions of the model, for the 8 of 18 listed prompts that have none" in told
    size = (folder / "out" / "three.answers.safetensors").stat().st_size
    told_size = re.search(r"three.answers.safetensors \(up to ([0-9.]+) kB\), the --preserve_answers of the next", told)
    assert 0.6 * size < 1000 * float(told_size[1]) < 1.1 * size  # its header is not counted, too many tokens are
    assert "preserves 2 general prompts and 16 prompts of concepts, on one step in 4, with weight 4" in told
    files = ("chain/one", "chain/two", "out/three")
    one, two, three = (answers_of(folder / f"{name}.answers.safetensors", folder) for name in files)
    assert (len(one), len(two), len(three)) == (2, 10, 18)
    for earlier, later in ((one, two), (two, three)):
        for text, old in earlier.items():
            assert later[text].concept == old.concept
            assert [kept.t for kept in later[text].kept] == [kept.t for kept in old.kept]
            for kept, again in zip(old.kept, later[text].kept, strict=True):
                assert torch.equal(kept.noisy_CFHW, again.noisy_CFHW)
                assert torch.equal(kept.velocity_CFHW, again.velocity_CFHW)


@pytest.mark.parametrize(("every", "window"), [(1, 1), (2, 3)])
def test_a_chains_run_takes_the_steps_of_plain_autograd(folder, every, window):
    more = ("--preserve_every", str(every), "--preserve_weight", "3", "--max_train_epochs", "1", "--save_state")
    more += ("--seed", str(SEED))
    run(folder, *third(folder), *SGD, *more, "--gradient_accumulation_steps", str(window))
    config = parse_train([*flags(folder), *third(folder)])
    dataset = build_training_dataset(config.dataset)
    preserved = kept_by(folder / "out" / "three.answers.safetensors", folder)
    model, start = (load_dit(folder / "chain" / "two.safetensors", torch.float32) for _ in range(2))
    weights = {n: p.requires_grad_() for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    batches, mixed = dataset.epoch_batches(SEED, 0), 0
    for step in range(-(-len(batches) // window)):
        loss, own = 0, batches[step * window : step * window + window]
        for entries in own:
            loss = loss + training_loss(model, dataset[entries], config.timesteps) / len(own)
            if (step + 1) % every == 0:
                drawn = preserved.draw([draw_generator(SEED, "preserve", 0, entry) for entry in entries], "cpu")
                errors = [(model(old.noisy_BCFHW, old.t_B, old.context) - old.velocity_BCFHW) ** 2 for old in drawn]
                loss = loss + 3 * sum(error.flatten(1).mean(1).sum() for error in errors) / len(entries) / len(own)
                mixed += len(drawn) > 1
        for (name, weight), grad in zip(
            weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            at = slice_indices(name, weight.shape, "0.1", 4)
            weight.data.view(-1)[at] -= 0.1 * grad.reshape(-1)[at]
    assert mixed  # sizes in one batch
    trained = read_state(folder / "out" / "three-state").trained
    for name, weight in weights.items():
        at = slice_indices(name, weight.shape, "0.1", 4)
        moved = (weight - start.get_parameter(name)).flatten()[at]
        torch.testing.assert_close(trained[name.replace(".", "/")], moved, rtol=1e-3, atol=1e-7)


def training_loss(model, batch, timesteps):
    generators = [draw_generator(SEED, 0, entry) for entry in batch["entries"]]
    latents, u = batch["latents"], torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    sigma = sigmas_of(timesteps, u, tuple(latents.shape[-2:]))
    noise = torch.stack([torch.randn(latents.shape[1:], generator=own) for own in generators])
    at = sigma.view(-1, 1, 1, 1, 1)
    predicted = model((1 - at) * latents + at * noise, 1000 * sigma, batch["t5"])
    return F.mse_loss(predicted, noise - latents)


def test_batches_of_kept_answers_are_no_larger_than_those_of_the_run():
    small, large = (answer((16, 1, *size)) for size in ((2, 2), (8, 8)))
    prompts = tuple(OldPrompt("", kept=(own,), text_SD=torch.zeros(3, 48)) for own in (small, large))
    preserved = Preservation(prompts, (), 1, 1.0, most_values=3 * math.prod(small.shape))
    drawn = preserved.draw([draw_generator(0, n) for n in range(40)], "cpu")
    assert {len(old.t_B) for old in drawn if old.noisy_BCFHW.shape[1:] == large.shape} == {1}
    assert max(len(old.t_B) for old in drawn if old.noisy_BCFHW.shape[1:] == small.shape) == 3
    assert [old.share for old in drawn] == [len(old.t_B) / 40 for old in drawn]
    assert sum(old.share for old in drawn) == pytest.approx(1)


def answer(shape, t=500.0):
    draw = torch.Generator().manual_seed(math.prod(shape))
    return Answer(*(torch.randn(shape, generator=draw).half().float() for _ in range(1)), t, torch.zeros(shape))


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--blocks_to_swap", "1"), marks=pytest.mark.slow),
        ("--gradient_checkpointing", "--blocks_to_swap", "2"),
    ],
    ids=["resumed", "swapped", "swapped and checkpointed"],
)
def test_a_resumed_or_swapped_run_keeps_the_same_answers(folder, more):
    common = (*third(folder), "--mixed_precision", "bf16", "--save_state", "--save_every_n_steps", "4")
    run(folder, *common)
    path = folder / "out" / "three.answers.safetensors"
    whole = path.read_bytes()
    state = ("--overwrite",) if more else ("--resume", str(folder / "out" / "three-step00000004-state"))
    path.unlink()
    run(folder, *common, *more, *state)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_run_that_is_started_again_does_not_record_again(folder):
    common = (*third(folder), "--max_train_epochs", "1")
    run(folder, *common)
    (folder / "out" / "three.safetensors").unlink()
    with patch("utils.preserve.asking.write_answers") as writing:
        run(folder, *common)
        assert not writing.called
        (folder / "out" / "three.safetensors").unlink()
        with pytest.raises(InputError, match="holds the reference predictions of a run with other settings"):
            run(folder, *common, "--seed", "4")
        writing.side_effect = lambda path, *_: path.write_bytes(b"")
        with pytest.raises(InputError, match=r"three\.answers\.safetensors"):
            run(folder, *common, "--seed", "4", "--overwrite")
    assert writing.called


def test_a_run_that_was_started_before_says_that_it_records_nothing(folder):
    common = (*asking(folder), "--max_train_epochs", "1")
    for said, unsaid in (("records 6 predictions", "already"), ("already has the reference predictions", "records")):
        told = "\n".join(run(folder, *common, "--overwrite"))
        assert said in told and unsaid not in told


def test_a_file_that_takes_the_name_of_the_answers_changes_nothing(tmp_path):
    own = written(tmp_path / "a.safetensors")
    cat, _ = read_answers(tmp_path / "a.safetensors", BASE, CONFIG).prompts
    (tmp_path / "b").write_bytes(b"x" * 9)
    (tmp_path / "b").replace(tmp_path / "a.safetensors")
    assert torch.equal(cat.kept[0].noisy_CFHW, own.noisy_CFHW.half())


def other_encoder(folder, name, change):
    path = folder / f"{name}.safetensors"
    save_file({key: change(value) for key, value in load_file(folder / "t5.safetensors").items()}, path)
    return ("--t5", str(path))


def test_answers_of_another_text_encoder_are_refused_and_its_rounding_is_not(folder):
    torch.manual_seed(0)
    another = other_encoder(folder, "another", lambda value: torch.randn_like(value.float()))
    with pytest.raises(InputError, match=r"two.answers.safetensors was recorded with another text encoder than --t5"):
        run(folder, *third(folder), *another)
    rounded = other_encoder(folder, "rounded", lambda value: value.to(torch.float8_e4m3fn).float())
    run(folder, *third(folder), *rounded, "--max_train_epochs", "1")
    one, other = (answers_of(folder / name, folder) for name in ("chain/two.answers.safetensors", THREE))
    assert all(torch.equal(old.text_SD, other[text].text_SD) for text, old in one.items())


def test_answers_are_refused_on_a_merged_base_and_taken_on_one_whose_ledger_was_lost(folder):
    """All block matrices differ in the one; in the other, a slice that no metadata tells of."""
    merged = {
        name: value * 1.1 if value.dim() == 2 else value
        for name, value in load_file(folder / "base.safetensors").items()
    }
    told = {"num_heads": "4", "text_len": "8"}
    save_file(merged, folder / "merged.safetensors", told)
    save_file(load_file(folder / "chain" / "two.safetensors"), folder / "bare.safetensors", told)
    with pytest.raises(InputError, match=r"holds reference predictions of another base model than --dit's \(merged"):
        run(folder, *third(folder), "--dit", str(folder / "merged.safetensors"))
    run(folder, *third(folder), "--dit", str(folder / "bare.safetensors"), "--max_train_epochs", "1")


def test_a_state_of_other_answers_is_refused(folder):
    run(folder, *third(folder), "--save_state")
    path = folder / "changed.safetensors"
    tensors, metadata = opened(folder / "chain" / "two.answers.safetensors")
    tensors["4.1.velocity"] *= 2
    save_file(tensors, path, metadata)
    state = ("--resume", str(folder / "out" / "three-state"), "--max_train_epochs", "3")
    with pytest.raises(InputError, match="preserve_prompts_sha256"):
        run(folder, *third(folder), "--preserve_answers", str(path), *state)


def test_with_slices_on_top_the_answers_are_those_of_the_checkpoint(folder):
    on_top = ("--dit", str(folder / "base.safetensors"), "--slices", str(folder / "chain" / "one.slice.safetensors"))
    run(folder, *second(folder), *on_top)
    alone = answers_of(folder / "out" / "two.answers.safetensors", folder)
    chained = answers_of(folder / "chain" / "two.answers.safetensors", folder)
    for text, old in chained.items():
        for one, other in zip(old.kept, alone[text].kept, strict=True):
            assert torch.equal(one.velocity_CFHW, other.velocity_CFHW)


@pytest.mark.parametrize("how", ["removed", "another run", "weaker", "the base"])
def test_a_concept_that_is_no_longer_there_as_it_was_is_left_out_with_a_line(folder, how):
    dit = folder / f"{how.replace(' ', '')}.safetensors"
    if how == "removed":
        remove(folder / "chain" / "one.safetensors", "one", folder / "base.safetensors", dit)
    elif how == "another run":
        run(folder, "--max_train_epochs", "1", "--seed", "8")
        shutil.copy(folder / "out" / "one.safetensors", dit)
    elif how == "weaker":
        weak = folder / "weak.slice.safetensors"
        scale(folder / "chain" / "one.slice.safetensors", folder / "base.safetensors", 0.3, weak)
        apply(folder / "base.safetensors", [weak], [1.0], dit)
    else:
        shutil.copy(folder / "base.safetensors", dit)
    others = ("--preserve_prompts", str(folder / "old.txt"), "--max_train_epochs", "1", "--ffid", "5")
    told = "\n".join(run(folder, *third(folder), "--dit", str(dit), *others))
    assert "not used from" in told and "one (ff 0.1 ffid 2), no longer in --dit, or changed since" in told
    assert "preserves 2 general prompts and 0 prompts of concepts" in told


def test_a_concept_without_old_prompts_is_named(folder):
    only_first = ("--preserve_answers", str(folder / "chain" / "one.answers.safetensors"))
    told = "\n".join(run(folder, *third(folder), *only_first, "--preserve_prompts", str(folder / "old.txt")))
    assert "nothing is preserved of one (ff 0.1 ffid 2), two (ff 0.1 ffid 3): to use its captions, add auto" in told


def test_a_slice_that_is_trained_further_is_not_held_to_what_it_was(folder):
    further = ("--ffid", "3", "--continue_slice", "--output_name", "b", "--max_train_epochs", "1")
    told = "\n".join(run(folder, *third(folder), *further))
    assert "preserves 2 general prompts and 8 prompts of concepts" in told


def test_what_is_trained_now_is_not_preserved(folder):
    again = ("--dataset_config", str(folder / "data.toml"), "--max_train_epochs", "1")
    told = "\n".join(run(folder, *second(folder), *again))
    assert "not preserved, because this run trains it: high0, high1" in told
    assert "preserves 2 general prompts and 0 prompts of concepts" in told
    (folder / "own.txt").write_text("wide0", encoding="utf-8")
    with pytest.raises(InputError, match=r"nothing to preserve.*this run trains it: wide0"):
        run(folder, *t5(folder), "--preserve_prompts", str(folder / "own.txt"), "--preserve_random", "0")


def test_clips_and_pictures_may_follow_each_other(folder):
    tensors, metadata = opened(folder / "chain" / "two.answers.safetensors")
    for key, tensor in tensors.items():
        if key.startswith("3.") and not key.endswith("text"):
            tensors[key] = tensor.repeat(1, 3, 2, 2)
    path = folder / "clips.safetensors"
    save_file(tensors, path, metadata)
    found = logged(folder, *third(folder), "--preserve_answers", str(path), "--preserve_every", "1")
    assert all(math.isfinite(value) for value in found["loss/preserve"].values())


def test_predictions_that_are_larger_than_the_batches_are_named(folder):
    tensors, metadata = opened(folder / "chain" / "two.answers.safetensors")
    own = [key for key in tensors if key.startswith("3.") and not key.endswith("text")]
    tensors |= {key: tensors[key].repeat(1, 3, 2, 2) for key in own}
    save_file(tensors, folder / "clips.safetensors", metadata)
    told = run(
        folder, *third(folder), "--preserve_answers", str(folder / "clips.safetensors"), "--max_train_epochs", "1"
    )
    assert "larger than any batch of this run" in "\n".join(told)


def test_what_the_run_reads_is_not_written_over(folder):
    shutil.copytree(folder / "chain", folder / "out")
    path = str(folder / "out" / "two.answers.safetensors")
    for name in ("two", "two.answers"):
        with pytest.raises(InputError, match=r"over .*two.answers.safetensors, which it reads: choose another"):
            run(folder, *third(folder), "--preserve_answers", path, "--output_name", name)


def test_a_disk_without_room_for_the_predictions_is_found_before_the_model_loads(folder):
    free = SimpleNamespace(free=(folder / "base.safetensors").stat().st_size + 1000)
    with (
        patch("utils.run.save_schedule.shutil.disk_usage", return_value=free),
        patch("utils.run.preparing.load_with_slices") as loading,
    ):
        with pytest.raises(InputError, match=r"one save \(checkpoint, three.answers.safetensors\) needs"):
            run(folder, *third(folder))
        assert not loading.called


def question(t):
    return SimpleNamespace(t=t, shape=SHAPE, pictures=None, starts_clean=False)


def written(path, run=RUN):
    own = answer(SHAPE)
    text_SD = torch.randn(3, CONFIG.text_dim, generator=torch.Generator().manual_seed(5)).bfloat16()
    prompts = [OldPrompt("a cat", text_SD=text_SD), OldPrompt("a dog", CONCEPT, text_SD=text_SD + 1)]
    asked = [(prompts[0], [question(t) for t in (1.0, 2.0)])]
    asked.append((prompts[1], [question(3.0)]))
    write_answers(path, BASE, run, asked, iter([own] * 3))
    return own


def opened(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def test_what_is_written_is_read_again(tmp_path):
    own = written(tmp_path / "a.safetensors")
    cat, dog = read_answers(tmp_path / "a.safetensors", BASE, CONFIG).prompts
    assert (cat.text, cat.concept, [one.t for one in cat.kept]) == ("a cat", None, [1.0, 2.0])
    assert (dog.text, dog.concept, [one.t for one in dog.kept]) == ("a dog", CONCEPT, [3.0])
    assert torch.equal(dog.kept[0].velocity_CFHW, own.velocity_CFHW.half())
    assert torch.equal(cat.kept[1].noisy_CFHW, own.noisy_CFHW.half())
    assert cat.text_SD.shape == (3, 48) and torch.equal(dog.text_SD, cat.text_SD + 1)


def test_an_answer_that_is_not_finite_leaves_the_old_file(tmp_path):
    written(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    bad = Answer(torch.zeros(SHAPE), 1.0, torch.full(SHAPE, torch.inf))
    with pytest.raises(InputError, match="NaN or infinite values in the prediction at timestep 1"):
        asked = [(OldPrompt("a", text_SD=torch.zeros(1, 48)), [question(1.0)])]
        write_answers(tmp_path / "a.safetensors", BASE, RUN, asked, iter([bad]))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_list_of_files_tells_answers_from_checkpoints(tmp_path):
    written(tmp_path / "a.answers.safetensors")
    files = list_files([tmp_path / "a.answers.safetensors"])
    assert [file.kind for file in files] == ["answers"]
    assert "no ledger" not in "\n".join(table(files))


def broken(change_tensors=None, change_told=None):
    def change(tensors, metadata):
        told = json.loads(metadata["wan_answers"])
        if change_tensors:
            change_tensors(tensors)
        if change_told:
            change_told(told)
        return tensors, {"wan_answers": json.dumps(told)}

    return change


def resized(*shape):
    """The same file at latents of another shape, in every answer."""
    return broken(
        lambda tensors: tensors.update({key: torch.zeros(shape).half() for key in tensors if not key.endswith("text")})
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: (tensors, {}), "holds no reference predictions"),
        (lambda tensors, metadata: (tensors, {"wan_answers": "["}), "is damaged"),
        (lambda tensors, metadata: (tensors, {"wan_answers": "[" * 99999}), "is damaged"),
        (lambda tensors, metadata: (tensors, {"wan_answers": "[]"}), "is damaged"),
        (broken(lambda tensors: tensors.pop("0.1.noisy")), "is damaged"),
        (broken(lambda tensors: tensors.update({"0.1.noisy": torch.zeros(16, 1, 4, 2).half()})), "is damaged"),
        (broken(lambda tensors: tensors.update({"0.1.noisy": torch.zeros(16, 1, 2, 4)})), "is damaged"),
        (broken(lambda tensors: tensors.pop("1.text")), "is damaged"),
        (broken(lambda tensors: tensors.update({"1.text": torch.zeros(3, 48)})), "is damaged"),
        (broken(lambda tensors: tensors.update({"1.text": torch.zeros(48).bfloat16()})), "is damaged"),
        (broken(lambda tensors: tensors.update({"1.text": torch.zeros(3, 40).bfloat16()})), "another base model"),
        (broken(lambda tensors: tensors.update({"1.text": torch.zeros(9, 48).bfloat16()})), "another base model"),
        (broken(lambda tensors: tensors["1.text"].fill_(torch.nan)), "NaN or infinite values in 1.text"),
        (broken(None, lambda told: told["prompts"][0]["timesteps"].append(1.0)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=[])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=[float("nan"), 1.0])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=["1", 1.0])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=[True, 1.0])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=[10**400, 1.0])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(concept=7)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(concept=-1)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(concept=False)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(text=7)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(text="\ud800")), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(text="a dog")), "lists a prompt twice"),
        (broken(None, lambda told: told.update(concepts="[{}]")), "is damaged"),
        (broken(None, lambda told: told.update(version=4, prompts=None)), "has version 4"),
        (broken(None, lambda told: told.update(version=True)), "has version True"),
        (broken(None, lambda told: told.update(base="cd" * 32)), "another base model"),
        (broken(None, lambda told: told.update(base_values=["00", "02", "02", "03"])), "another base model"),
        (broken(None, lambda told: told.update(base_values=7)), "is damaged"),
        (resized(3, 1, 2, 4), "another base model"),
        (resized(16, 1, 3, 5), "another base model"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    written(path)
    tensors, metadata = change(*opened(path))
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=message):
        read_answers(path, BASE, CONFIG)


def test_values_that_are_not_finite_are_refused_before_the_model_loads(folder):
    path = folder / "nan.safetensors"
    tensors, metadata = opened(folder / "chain" / "two.answers.safetensors")
    tensors["4.1.velocity"][0] = torch.nan
    save_file(tensors, path, metadata)
    with patch("utils.run.preparing.load_with_slices") as loading:
        with pytest.raises(InputError, match=r"NaN or infinite values in 4\.1\.velocity"):
            run(folder, *third(folder), "--preserve_answers", str(path))
        assert not loading.called
