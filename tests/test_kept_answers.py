"""Kept answers: what a run leaves of them against the models that gave them, their file, their use along a chain."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_preservation import SGD, logged, t5
from tiny_run import flags, run, write_dataset, write_dit, write_sample_models
from torch.nn import functional as F

from utils.cache_files import read_text
from utils.cli_train import parse_train
from utils.dataset import build_training_dataset
from utils.flow_matching import draw_generator, sigmas_of
from utils.kept_answers import Answer, OldPrompt, read_answers, write_answers
from utils.ledger import CONTRACT, Entry
from utils.preservation import EncodedPrompt, draw_prompts, old_answers, old_prompts
from utils.selective_finetune import base_identity
from utils.slice_list import list_files
from wan.errors import InputError
from wan.loading import load_dit
from wan.text_encoder import load_text_encoder

CONCEPT = Entry(CONTRACT, "0.1", 2, "one", 10, "")
PROMPTS = ("a red cat", "a cat")
BASE = "ab" * 32


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A chain's first run, which keeps three answers to a prompt, and the dataset of a second concept."""
    folder = tmp_path_factory.mktemp("run")
    write_dit(folder / "base.safetensors")
    write_dataset(folder)
    write_dataset(folder / "new", "new")
    write_sample_models(folder)
    (folder / "old.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    run(folder, *first(folder))
    (folder / "out").rename(folder / "first")
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def first(folder):
    return (*t5(folder), "--preserve_prompts", str(folder / "old.txt"), "--save_answers", "3")


def second(folder):
    """The flags of the second concept, held to the answers that the first one left."""
    return (
        *("--dit", str(folder / "first" / "one.safetensors"), "--ffid", "3", "--output_name", "two"),
        *("--dataset_config", str(folder / "new" / "data.toml"), *t5(folder)),
        *("--preserve_answers", str(folder / "first" / "one.answers.safetensors"), "--save_answers", "2"),
    )


def identity(folder):
    return base_identity(folder / "base.safetensors")


def answers_of(path, folder):
    return {old.text: old for old in read_answers(path, identity(folder))}


def test_a_run_leaves_the_answers_of_the_base_to_old_prompts_and_its_own_to_its_captions(folder):
    kept = answers_of(folder / "first" / "one.answers.safetensors", folder)
    base, final = (load_dit(folder / n, torch.float32) for n in ("base.safetensors", "first/one.safetensors"))
    encoder = load_text_encoder(folder / "t5.safetensors", folder / "spiece.model", text_len=8)
    dataset = build_training_dataset(parse_train(flags(folder)).dataset)
    texts = {item.caption: read_text(item.text) for item in dataset.items}
    assert list(kept) == [*PROMPTS, *(item.caption for item in dataset.items)]
    for text, old in kept.items():
        assert (old.concept is None) == (text in PROMPTS)
        model, context = (base, encoder([text])[0]) if old.concept is None else (final, texts[text])
        assert len(old.kept) == 3
        for answer in (one.read() for one in old.kept):
            expected = model(answer.noisy_CFHW[None], torch.tensor([answer.t]), [context])[0]
            torch.testing.assert_close(answer.velocity_CFHW, expected.half().float(), rtol=1e-3, atol=1e-3)
    assert {(old.concept.name, old.concept.ffid, old.concept.steps) for old in kept.values() if old.concept} == {
        ("one", 2, 10)
    }


def test_the_answers_spread_over_the_noise_levels_that_are_trained(folder):
    kept = answers_of(folder / "first" / "one.answers.safetensors", folder)
    timesteps = parse_train(flags(folder)).timesteps
    edges = [1000 * float(sigmas_of(timesteps, torch.tensor([u]).double(), (4, 2))) for u in (1e-9, 1 / 3, 2 / 3, 1)]
    for old in kept.values():
        assert all(low <= answer.t <= high for low, answer, high in zip(edges, old.kept, edges[1:], strict=False))
    assert len({answer.t for old in kept.values() for answer in old.kept}) == 3 * len(kept)


def test_a_concepts_answers_are_at_its_own_pictures_with_that_caption(folder):
    kept = answers_of(folder / "first" / "one.answers.safetensors", folder)
    assert {answer.shape for answer in kept["wide0"].kept} == {(16, 1, 2, 4)}
    assert {answer.shape for answer in kept["high0"].kept} == {(16, 1, 4, 2)}


def test_the_loss_on_kept_answers_is_that_of_plain_autograd(folder):
    found = logged(folder, *SGD, *second(folder), "--learning_rate", "1e-12", "--preserve_every", "1")
    config = parse_train([*flags(folder), *second(folder)])
    dataset = build_training_dataset(config.dataset)
    encoder = load_text_encoder(folder / "t5.safetensors", folder / "spiece.model", text_len=8)
    own = Entry(CONTRACT, "0.1", 3, "two", 0, "")
    sources = [
        [EncodedPrompt(old, encoder([old.text])[0]) for old in source]
        for source in old_prompts(config.preserve, [CONCEPT], own, identity(folder), config.dit, ())
    ]
    model, mixed = load_dit(config.dit, torch.float32), 0
    places = [(epoch, batch) for epoch in range(2) for batch in dataset.epoch_batches(3, epoch)]
    for step, (epoch, batch) in enumerate(places, 1):
        drawn = draw_prompts(sources, [draw_generator(3, "preserve", epoch, entry) for entry in batch])
        pairs = [
            (model(answer.noisy_CFHW[None], torch.tensor([answer.t]), [text])[0], answer.velocity_CFHW)
            for text, answer in drawn
        ]
        expected = sum(F.mse_loss(*pair).item() for pair in pairs) / len(pairs)
        assert found["loss/preserve"][step] == pytest.approx(expected, rel=1e-4)
        mixed += len({answer.noisy_CFHW.shape for _, answer in drawn}) > 1
    assert mixed  # sizes in one batch


def test_answers_of_many_sizes_and_of_the_teacher_weigh_the_same(folder):
    draw = torch.Generator().manual_seed(0)
    kept = [Answer(torch.randn(16, 1, *size, generator=draw), 500.0, torch.zeros(16, 1, *size)) for size in SIZES]
    prompts = [EncodedPrompt(OldPrompt(str(n), None, (own,)), torch.zeros(3, 48)) for n, own in enumerate(kept)]
    sources = [[*prompts, EncodedPrompt(OldPrompt("asked"), torch.ones(3, 48))]]
    noisy, t = torch.randn(60, 16, 1, 2, 4, generator=draw), torch.arange(60.0)
    asked = []

    def teacher(noisy_BCFHW, t_B, context):
        asked.append((noisy_BCFHW, t_B, len(context)))
        return noisy_BCFHW + 1

    batches = old_answers(sources, teacher, noisy, t, [draw_generator(0, n) for n in range(60)])
    assert [batch.share for batch in batches] == [len(batch.t_B) / 60 for batch in batches]
    assert sum(batch.share for batch in batches) == pytest.approx(1)
    ((own_noisy, own_t, count),) = asked
    assert torch.equal(own_noisy, noisy[own_t.long()]) and count == len(own_t) > 9
    assert torch.equal(batches[0].velocity_BCFHW, own_noisy + 1)
    assert {batch.noisy_BCFHW.shape[1:] for batch in batches[1:]} == {(16, 1, *size) for size in SIZES}


SIZES = ((2, 4), (4, 2))


def test_along_a_chain_nothing_that_was_kept_changes(folder):
    told = "\n".join(run(folder, *second(folder), "--max_train_epochs", "1"))
    assert "preserves the answers to 10 prompts (10 of them kept), on one step in 4, with weight 4" in told
    assert "two.answers.safetensors" in told and "16 answers to 8 captions of two, 0 to old prompts, 30" in told
    before, after = (
        answers_of(folder / name, folder) for name in ("first/one.answers.safetensors", "out/two.answers.safetensors")
    )
    assert list(after) == [*before, *(f"new{text}" for text in before if text not in PROMPTS)]
    for text, old in before.items():
        assert after[text].concept == old.concept
        assert [one.t for one in after[text].kept] == [one.t for one in old.kept]
        for one, other in zip(old.kept, after[text].kept, strict=True):
            assert torch.equal(one.read().noisy_CFHW, other.read().noisy_CFHW)
            assert torch.equal(one.read().velocity_CFHW, other.read().velocity_CFHW)


def test_prompts_that_are_not_kept_yet_are_asked_of_the_teacher_and_kept(folder):
    (folder / "more.txt").write_text("a red cat\nred sits", encoding="utf-8")
    told = "\n".join(run(folder, *second(folder), "--preserve_prompts", str(folder / "more.txt"), "auto"))
    assert "preserves the answers to 11 prompts (10 of them kept)" in told
    after = answers_of(folder / "out" / "two.answers.safetensors", folder)
    assert len(after["red sits"].kept) == 2 and after["red sits"].concept is None
    assert len(after["a red cat"].kept) == 3


@pytest.mark.parametrize("more", [(), ("--blocks_to_swap", "1"), ("--gradient_checkpointing", "--blocks_to_swap", "2")])
def test_a_resumed_or_swapped_run_leaves_the_same_file(folder, more):
    common = ("--mixed_precision", "bf16", "--save_state", "--save_every_n_steps", "4")
    run(folder, *second(folder), *common)
    whole = (folder / "out" / "two.answers.safetensors").read_bytes()
    state = ("--resume", str(folder / "out" / "two-step00000004-state")) if not more else ()
    (folder / "out" / "two.answers.safetensors").unlink()
    run(folder, *second(folder), *common, *more, *state)
    assert (folder / "out" / "two.answers.safetensors").read_bytes() == whole


def test_a_state_of_other_answers_is_refused(folder):
    run(folder, *second(folder), "--save_state")
    path = folder / "changed.safetensors"
    tensors, metadata = opened(folder / "first" / "one.answers.safetensors")
    tensors["4.1.velocity"] *= 2
    save_file(tensors, path, metadata)
    state = ("--resume", str(folder / "out" / "two-state"), "--max_train_epochs", "3")
    with pytest.raises(InputError, match="preserve_prompts_sha256"):
        run(folder, *second(folder), "--preserve_answers", str(path), *state)


def test_a_concept_that_was_removed_is_not_taught_again(folder):
    base = ("--dit", str(folder / "base.safetensors"))
    told = "\n".join(run(folder, *second(folder), *base, "--max_train_epochs", "1"))
    assert "preserves the answers to 10 prompts" in told  # no ledger tells what was removed
    other = ("--dit", str(folder / "out" / "two.safetensors"), "--ffid", "4", "--output_name", "three")
    told = "\n".join(run(folder, *second(folder), *other, "--max_train_epochs", "1"))
    assert "preserves the answers to 2 prompts (2 of them kept)" in told
    assert "one" not in {old.concept.name for old in answers_of(
        folder / "out" / "three.answers.safetensors", folder).values() if old.concept}  # fmt: skip


def test_a_slice_that_is_trained_further_is_not_held_to_what_it_was(folder):
    more = ("--dit", str(folder / "first" / "one.safetensors"), "--ffid", "2", "--continue_slice", "--output_name", "b")
    told = "\n".join(run(folder, *second(folder), *more, "--max_train_epochs", "1"))
    assert "preserves the answers to 2 prompts" in told


def test_what_is_trained_now_is_not_preserved(folder):
    again = ("--dataset_config", str(folder / "data.toml"))
    told = "\n".join(run(folder, *second(folder), *again, "--max_train_epochs", "1"))
    assert "preserves the answers to 2 prompts" in told
    kept = answers_of(folder / "out" / "two.answers.safetensors", folder)
    assert {old.concept.name for old in kept.values() if old.concept} == {"two"}
    (folder / "own.txt").write_text("wide0", encoding="utf-8")
    with pytest.raises(InputError, match="nothing to preserve"):
        run(folder, *t5(folder), "--preserve_prompts", str(folder / "own.txt"))


def test_a_first_run_can_leave_answers_without_preserving(folder):
    told = "\n".join(run(folder, "--save_answers", "1", "--max_train_epochs", "1"))
    assert "8 answers to 8 captions of one" in told
    run(folder, "--output_name", "none", "--max_train_epochs", "1")
    assert not (folder / "out" / "none.answers.safetensors").exists()


def test_the_file_that_is_read_is_not_written_over(folder):
    shutil.copytree(folder / "first", folder / "out")
    path = folder / "out" / "one.answers.safetensors"
    with pytest.raises(InputError, match="choose another --output_name, or --save_answers 0"):
        run(folder, *second(folder), "--preserve_answers", str(path), "--output_name", "one")


def written(path):
    draw = torch.Generator().manual_seed(0)
    noisy, velocity = (torch.randn(16, 1, 2, 4, generator=draw).half().float() for _ in range(2))
    own = Answer(noisy, 12.5, velocity)
    prompts = [OldPrompt("a cat"), OldPrompt("a dog", CONCEPT)]
    write_answers(path, BASE, [(prompts[0], [Shape(1.0), Shape(2.0)]), (prompts[1], [Shape(3.0)])], iter([own] * 3))
    return own


class Shape:
    shape = (16, 1, 2, 4)

    def __init__(self, t):
        self.t = t


def opened(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def test_what_is_written_is_read_again(tmp_path):
    own = written(tmp_path / "a.safetensors")
    cat, dog = read_answers(tmp_path / "a.safetensors", BASE)
    assert (cat.text, cat.concept, [one.t for one in cat.kept]) == ("a cat", None, [1.0, 2.0])
    assert (dog.text, dog.concept, [one.t for one in dog.kept]) == ("a dog", CONCEPT, [3.0])
    assert torch.equal(dog.kept[0].read().velocity_CFHW, own.velocity_CFHW)
    assert torch.equal(cat.kept[1].read().noisy_CFHW, own.noisy_CFHW)


def test_the_list_of_files_tells_answers_from_checkpoints(tmp_path):
    written(tmp_path / "a.answers.safetensors")
    assert [file.kind for file in list_files([tmp_path / "a.answers.safetensors"])] == ["answers"]


def test_a_concept_whose_slice_now_holds_another_one_is_not_preserved(folder):
    config = parse_train([*flags(folder), *second(folder)])
    own = Entry(CONTRACT, "0.1", 3, "two", 0, "")
    for name, count in (("one", 8), ("other", 0)):
        ledger = [Entry(CONTRACT, "0.1", 2, name, 0, "")]
        kept = old_prompts(config.preserve, ledger, own, identity(folder), config.dit, ())
        assert [len(source) for source in kept] == [2, *([count] if count else [])]


def broken(change_tensors=None, change_told=None):
    def change(tensors, metadata):
        told = json.loads(metadata["wan_answers"])
        if change_tensors:
            change_tensors(tensors)
        if change_told:
            change_told(told)
        return tensors, {"wan_answers": json.dumps(told)}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: (tensors, {}), "holds no kept answers"),
        (lambda tensors, metadata: (tensors, {"wan_answers": "["}), "is damaged"),
        (lambda tensors, metadata: (tensors, {"wan_answers": "[" * 99999}), "is damaged"),
        (broken(lambda tensors: tensors.pop("0.1.noisy")), "is damaged"),
        (broken(lambda tensors: tensors.update({"0.1.noisy": torch.zeros(16, 1, 4, 2).half()})), "is damaged"),
        (broken(lambda tensors: tensors.update({"0.1.noisy": torch.zeros(16, 1, 2, 4)})), "is damaged"),
        (broken(None, lambda told: told["prompts"][0]["timesteps"].append(1.0)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=[float("nan"), 1.0])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(timesteps=["1", 1.0])), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(concept=7)), "is damaged"),
        (broken(None, lambda told: told["prompts"][0].update(text=7)), "is damaged"),
        (broken(None, lambda told: told.update(concepts="[{}]")), "is damaged"),
        (broken(None, lambda told: told.update(version=9)), "is of version 9"),
        (broken(None, lambda told: told.update(base="cd" * 32)), "another base model"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    written(path)
    tensors, metadata = change(*opened(path))
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=message):
        read_answers(path, BASE)


def test_values_that_are_not_finite_are_refused_before_the_model_loads(folder):
    path = folder / "nan.safetensors"
    tensors, metadata = opened(folder / "first" / "one.answers.safetensors")
    tensors["4.1.velocity"][0] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=r"NaN or infinite values in 4\.1"):
        run(folder, *second(folder), "--preserve_answers", str(path), "--vae", str(folder / "missing"))
