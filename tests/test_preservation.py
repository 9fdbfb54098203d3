"""Preservation: its gradient against plain autograd, exact resuming, its prompts."""

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import CONFIG, flags, run, write_dataset, write_dit, write_inputs, write_sample_models

from utils.cli.train import parse_train
from utils.data.cache_files import image_latents_path, read_latents, write_latents
from utils.data.dataset import build_training_dataset
from utils.learning.flow_matching import draw_generator, draw_uniforms, sigmas_of
from utils.preserve.answers_file import Answer, OldPrompt, read_answers
from utils.preserve.old_prompts import CAPTIONS_KEPT, Preservation, most_frequent, old_prompts, preserve_lines
from utils.run import inputs, preparing
from utils.run.state import read_state
from utils.selective_finetune import slice_indices, slice_units
from utils.slice_saving import base_identity, read_ledger
from utils.slices.base_identity import BaseModel
from utils.slices.ledger import CONTRACT, Entry
from wan.errors import InputError
from wan.loading import load_dit

PROMPTS = ("a red cat", "a cat", "red sits")
SGD = ("--mixed_precision", "no", "--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_grad_norm", "0")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    write_sample_models(folder)
    (folder / "old.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def t5(folder):
    return ("--t5", str(folder / "t5.safetensors"), "--tokenizer", str(folder / "spiece.model"))


def preserving(folder, every=2, weight=3):
    told = ("--preserve_every", str(every), "--preserve_weight", str(weight))
    return (*t5(folder), "--preserve_prompts", str(folder / "old.txt"), *told, "--preserve_random", "0", "--guard", "0")


def kept_by(path, folder, every=2, weight=3, most_values=10**9):
    """What a run preserves that keeps its answers in this file."""
    kept = read_answers(path, BaseModel(base_identity(folder / "base.safetensors")), CONFIG)
    general, of_concepts = (tuple(old for old in kept.prompts if bool(old.concept) == which) for which in (False, True))
    return Preservation(general, of_concepts, every, weight, most_values, kept.random)


def logged(folder, *more):
    shutil.rmtree(folder / "logs", ignore_errors=True)
    run(folder, "--logging_dir", str(folder / "logs"), *more)
    return scalars(folder)


def scalars(folder):
    events = EventAccumulator(str(next((folder / "logs").glob("*/*")))).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


class Reference:
    """Plain autograd on whole weights, masked to the slice, held to what the run's file keeps: SGD at 0.1."""

    def __init__(self, folder, every=2, weight=3, window=1, ranks=1, weighed=False, guard=0):
        self.model = load_dit(folder / "base.safetensors", torch.float32)
        named = self.model.named_parameters()
        self.sliced = {n: p.requires_grad_() for n, p in named if n.startswith("blocks.") and p.dim() == 2}
        config = parse_train(flags(folder))
        self.dataset, self.timesteps = build_training_dataset(config.dataset), config.timesteps
        self.preserved = kept_by(folder / "out" / "one.answers.safetensors", folder, every, weight)
        self.every, self.weight, self.window, self.ranks = every, weight, window, ranks
        self.weigh = self.cosmap if weighed else torch.ones_like
        self.start = {name: weight.detach().clone() for name, weight in self.sliced.items()}
        self.guard, self.statistics = guard, read_state(folder / "out" / "one-state").guard if guard else {}

    def losses(self, steps):
        """[(loss, preservation loss, 0 where it is not due)] of every step."""
        batches = [(n, b) for epoch in range(9) for n, b in enumerate(self.epoch(epoch))]
        found, done = [], 0
        while len(found) < steps:
            size = min(self.window, len(self.epoch(0)) - batches[done][0])
            preserves = (len(found) + 1) % self.every == 0
            pairs = [
                self.batch(batches[done + i][1][rank], done + i, preserves)
                for i in range(size)
                for rank in range(self.ranks)
            ]
            loss, kept = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            self.step(loss + self.weight * kept + self.guard * self.penalty())
            found.append((loss.item(), kept.item()))
            done += size
        return found

    def epoch(self, epoch):
        """Per process, the batches of the epoch; they wrap around where they do not come out even."""
        batches = self.dataset.epoch_batches(3, epoch)
        count = -(-len(batches) // self.ranks)
        return [[batches[(i * self.ranks + r) % len(batches)] for r in range(self.ranks)] for i in range(count)]

    def batch(self, items, place, preserves):
        batch = self.dataset[items]
        epoch = place // len(self.epoch(0))
        generators = [draw_generator(3, epoch, entry) for entry in batch["entries"]]
        latents = batch["latents"]
        u = draw_uniforms(self.timesteps, generators, 3, 0)
        sigma = sigmas_of(self.timesteps, u, tuple(latents.shape[-2:]))
        noise = torch.stack([torch.randn(latents.shape[1:], generator=own) for own in generators])
        at = sigma.view(-1, 1, 1, 1, 1)
        noisy, t = (1 - at) * latents + at * noise, 1000 * sigma
        error = self.model(noisy, t, batch["t5"]) - (noise - latents)
        mask = torch.ones(1) if batch["mask"] is None else batch["mask"]
        weights = mask.expand_as(error).flatten(1)
        loss = (self.weigh(sigma) * (weights * error.square().flatten(1)).sum(1) / weights.sum(1)).mean()
        if not preserves:
            return loss, torch.zeros(())
        generators = [draw_generator(3, "preserve", epoch, entry) for entry in batch["entries"]]
        kept = 0
        order = self.dataset.epoch_batches(3, epoch)
        first_item = 8 * epoch + sum(map(len, order[: order.index(items)]))
        for old in self.preserved.draw(generators, "cpu", first_item):
            error = self.model(old.noisy_BCFHW, old.t_B, old.context) - old.velocity_BCFHW
            error = self.weigh(old.t_B / 1000) * error.square().flatten(1).mean(1)
            kept = kept + error.sum() / len(generators)
        return loss, kept

    @staticmethod
    def cosmap(sigma):
        return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))

    def penalty(self):
        """What the guard makes of the statistics that the run gathered."""
        total = 0
        for name, own in self.statistics.items():
            weight, units = self.sliced[name], slice_units(name, self.start[name].shape, "0.1", 2)
            moved = (weight - self.start[name]).view(-1, units.rows, weight.shape[1])
            for g, rows_LI in enumerate(moved):
                D_LM = rows_LI[:, units.columns_U[units.groups_U == g]]
                C = own["inputs"][g, : D_LM.shape[1], : D_LM.shape[1]]
                total = total + torch.trace(own["outputs"][g].diag() @ D_LM @ C @ D_LM.T)
        return total

    def step(self, loss):
        grads = torch.autograd.grad(loss, list(self.sliced.values()))
        for (name, weight), grad in zip(self.sliced.items(), grads, strict=True):
            at = slice_indices(name, weight.shape, "0.1", 2)
            weight.data.view(-1)[at] -= 0.1 * grad.reshape(-1)[at]


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ((), 1),
        (("--weighting_scheme", "cosmap"), 1),
        (("--preserve_random", "12"), 1),
        (("--gradient_checkpointing", "--blocks_to_swap", "1"), 1),
        (("--gradient_checkpointing", "--blocks_to_swap", "2", "--gradient_accumulation_steps", "3"), 3),
        (("--guard", "30", "--gradient_accumulation_steps", "3", "--save_state"), 3),
    ],
    ids=["plain", "weighed", "random contexts", "checkpointed and swapped", "accumulated", "guarded"],
)
def test_both_losses_are_those_of_plain_autograd(folder, more, window):
    found = logged(folder, *SGD, *preserving(folder), *more)
    weighed, guard = "--weighting_scheme" in more, 30 * ("--guard" in more)
    reference = Reference(folder, window=window, weighed=weighed, guard=guard)
    check_losses(found, reference.losses({1: 10, 3: 4}[window]))


def test_masks_weight_the_loss_of_pictures_and_not_that_of_reference_predictions(folder):
    (folder / "masks").mkdir()
    text = (folder / "data.toml").read_text(encoding="utf-8")
    for number, path in enumerate(sorted((folder / "pics").glob("*.png"))):
        size = Image.open(path).size
        Image.new("L", size, 255).save(folder / "masks" / path.name)
        cache = image_latents_path(folder / "pics", path.stem, size)
        latents = read_latents(cache)
        mask = torch.rand(latents.shape[-2:], generator=torch.Generator().manual_seed(number))
        write_latents(cache, latents, size, mask_HW=mask)
    (folder / "data.toml").write_text(f'{text}\nmask_directory = "{(folder / "masks").as_posix()}"', encoding="utf-8")
    try:
        check_losses(logged(folder, *SGD, *preserving(folder)), Reference(folder).losses(10))
    finally:
        (folder / "data.toml").write_text(text, encoding="utf-8")


def check_losses(found, expected):
    loss, kept = zip(*expected, strict=True)
    torch.testing.assert_close(torch.tensor(list(found["loss/current"].values())), torch.tensor(loss))
    assert list(found["loss/preserve"]) == list(range(2, len(loss) + 1, 2))
    torch.testing.assert_close(
        torch.tensor(list(found["loss/preserve"].values())), torch.tensor(kept[1::2]), rtol=1e-4, atol=0
    )


def train_rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    guarded = ("--preserve_random", "12", "--guard", "30", "--save_state")
    run(folder, *SGD, *preserving(folder), *guarded, "--logging_dir", str(folder / "logs"))


@pytest.mark.slow
def test_two_processes_preserve_what_their_joint_batch_would(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.rmtree(folder / "logs", ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=train_rank, args=(rank, folder, port)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    check_losses(scalars(folder), Reference(folder, ranks=2, guard=30).losses(6))
    together = read_state(folder / "out" / "one-state").guard
    alone = ("--preserve_random", "12", "--guard", "30", "--save_state", "--output_name", "alone")
    run(folder, *SGD, *preserving(folder), *alone, "--max_train_steps", "2")
    torch.testing.assert_close(together, dict(read_state(folder / "out" / "alone-state").guard))


def test_concepts_and_general_prompts_are_drawn_equally_often_and_all_their_predictions():
    """Each concept as often as the next, though one has five prompts and the others one."""

    def prompt(number, concept=None):
        answers = (Answer(torch.full((1, 1, 1, 1), number + part), 0.0, torch.zeros(1, 1, 1, 1)) for part in (0, 0.5))
        return OldPrompt(str(number), concept, tuple(answers), torch.zeros(1))

    many, concepts = range(100, 130), [concept("a", 1), concept("b", 2), concept("c", 3)]
    few = [prompt(0, concepts[0]), prompt(1, concepts[1]), *(prompt(number, concepts[2]) for number in range(2, 7))]
    preserved = Preservation(tuple(map(prompt, many)), tuple(few), 1, 1.0, 10**9)
    (drawn,) = preserved.draw([draw_generator(0, "preserve", entry) for entry in range(1800)], "cpu")
    asked = drawn.noisy_BCFHW.flatten().tolist()
    assert set(asked) == {number + part for number in (*range(7), *many) for part in (0, 0.5)}
    assert 800 < sum(number < 7 for number in asked) < 1000
    assert all(110 < asked.count(number + part) < 190 for number in (0, 1) for part in (0, 0.5))
    assert 240 < sum(2 <= number < 7 for number in asked) < 360


def concept(name, ffid, *captions):
    return Entry(CONTRACT, "0.1", ffid, name, 10, f"2026-01-0{ffid}", captions=captions)


OWN = concept("own", 9)


def chosen(ledger, kept=(), prompts=(), auto=True, captions=()):
    """{text: (the concept's name, is kept)} of what is preserved, and the notes."""
    config = SimpleNamespace(prompts=prompts, from_ledger=auto, answers="a.safetensors", random=0)
    found = old_prompts(config, ledger, OWN, kept, captions)
    return {old.text: (old.concept and old.concept.name, old in kept) for old in found.all}, "\n".join(found.notes)


def test_a_caption_belongs_to_the_newest_concept_that_was_trained_with_it():
    """Earlier reference predictions would pull it back."""
    a, b = concept("a", 1, "both", "of a"), concept("b", 2, "both", "listed")
    kept = [OldPrompt("listed"), OldPrompt("both", a), OldPrompt("of a", a), OldPrompt("other")]
    found, notes = chosen([a, b], kept)
    expected = {"both": ("b", False), "listed": ("b", False), "of a": ("a", True), "other": (None, True)}
    assert found == expected
    assert "not used from a.safetensors: both, listed, the caption of a concept that was trained since" in notes
    again = [OldPrompt("both", b), OldPrompt("listed", b), *kept[2:]]
    assert chosen([a, b], again)[0] == {text: (name, True) for text, (name, _) in expected.items()}
    assert chosen([a, b], [OldPrompt("listed")], prompts=["listed"], auto=False)[0] == {"listed": ("b", False)}


def test_prompts_that_are_the_same_to_the_tokenizer_are_one():
    found, notes = chosen([], prompts=["a cat", "a  cat", "a&nbsp;cat", "a dog"], captions=["a   dog"])
    assert list(found.values()) == [(None, False)] and "this run trains it: a dog" in notes


@pytest.mark.parametrize(
    ("captions", "auto", "reason"),
    [
        (("x",), True, "this run trains its captions"),
        (("y",), False, "to use its captions, add auto to --preserve_prompts"),
        ((), True, "the ledger has no captions of it"),
        ((), False, "the ledger has no captions of it"),
    ],
)
def test_a_concept_without_an_old_prompt_is_named_with_the_reason(captions, auto, reason):
    _, notes = chosen([concept("a", 1, *captions)], prompts=["other"], auto=auto, captions=["x"])
    assert f"nothing is preserved of a (ff 0.1 ffid 1): {reason}" in notes


def test_auto_without_another_concept_says_that_there_is_none():
    with pytest.raises(InputError, match=r"--dit contains no concept except ff 0\.1 ffid 9, which this run trains"):
        chosen([concept("own before", 9, "x")], captions=["z"])


def test_a_run_that_preserves_nothing_says_what_that_means_for_other_concepts():
    a, silent, under = concept("a", 1, "x"), concept("silent", 2), Entry(CONTRACT, "0.3", 3, "under", 1, "")
    (line,) = preserve_lines(None, [a, silent, under], OWN)
    assert "the model has learned a, silent; this run does not change their slices" in line
    assert "a file of prompts" not in line and "a file of prompts" in preserve_lines(None, [silent], OWN)[0]
    assert preserve_lines(None, [OWN, under], OWN) == []


def test_preserving_on_no_step_of_the_run_is_refused(folder):
    with pytest.raises(InputError, match=r"--preserve_every 11: the run has 10 steps, so none would preserve"):
        run(folder, *preserving(folder, every=11))


def test_a_prompt_that_is_too_long_is_named(folder):
    told = "\n".join(run(folder, *preserving(folder), "--max_train_epochs", "1"))
    assert "note: 'a red cat' has 11 tokens; the model reads the first 8" in told


def test_a_text_encoder_of_another_width_is_refused_before_the_model_loads(folder, monkeypatch):
    monkeypatch.setattr(preparing, "load_with_slices", None)
    (folder / "narrow").mkdir()
    monkeypatch.setattr("tiny_run.CONFIG", replace(CONFIG, text_dim=24))
    write_dit(folder / "narrow" / "base.safetensors")
    narrow = ("--dit", str(folder / "narrow" / "base.safetensors"))
    monkeypatch.setattr(inputs, "check_dataset", lambda *_: None)  # whose caches are of another width, too
    for more in (preserving(folder), [*write_sample_models(folder), "--sample_at_first"]):
        with pytest.raises(InputError, match=r"t5.safetensors gives embeddings of width 48, the transformer"):
            run(folder, *narrow, *more)


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 6))])
def test_a_resumed_run_that_preserves_is_the_uninterrupted_one_bit_for_bit(folder, step):
    common = ["--mixed_precision", "bf16", *preserving(folder), "--save_state", "--save_every_n_steps", str(step)]
    whole = logged(folder, *common)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    (folder / "out").rename(folder / "whole")
    resumed = logged(folder, *common, "--resume", str(folder / "whole" / f"one-step{step:08d}-state"))
    for name in ("loss/current", "loss/preserve", "grad_norm"):
        assert resumed[name] == {at: value for at, value in whole[name].items() if at > step}
    one, other = (load_file(folder / name / "one.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_with_other_old_prompts_is_another_run(folder):
    run(folder, *preserving(folder), "--save_state")
    state = ("--resume", str(folder / "out" / "one-state"), "--max_train_epochs", "3")
    (folder / "fewer.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(InputError, match="preserve_prompts_sha256"):
        run(folder, *preserving(folder), "--preserve_prompts", str(folder / "fewer.txt"), *state)
    with pytest.raises(InputError, match=r"preserve_weight 3.0 \(now 5.0\)"):
        run(folder, *preserving(folder, weight=5), *state)
    with pytest.raises(InputError, match=r"preserve_every 2 \(now None\)"):
        run(folder, *state)


def entry_of(path):
    with safe_open(path, "pt") as file:
        return read_ledger(file.metadata())[-1]


def test_captions_go_from_the_ledger_into_a_later_run(folder):
    run(folder, "--max_train_epochs", "1")
    captions = entry_of(folder / "out" / "one.safetensors")["captions"]
    assert sorted(captions) == sorted(f"{name}{i}" for name, count in (("wide", 3), ("high", 5)) for i in range(count))
    second = ("--dit", str(folder / "out" / "one.safetensors"), "--ffid", "3", "--output_name", "two")
    second += ("--dataset_config", str(write_dataset(folder / "new", "new")))
    told = "\n".join(run(folder, *second))
    assert "has learned one;" in told and "--preserve_prompts preserves that" in told
    kept = (*t5(folder), "--preserve_prompts", str(folder / "old.txt"), "auto", "--preserve_random", "0")
    kept += ("--max_train_epochs", "1", "--guard", "0")
    told = "\n".join(run(folder, *second, *kept, "--overwrite"))
    assert "preserves 3 general prompts and 8 prompts of concepts, on one step in 4, with weight 4" in told
    assert "has learned" not in told


def test_without_metadata_no_captions_are_written_and_auto_says_so(folder):
    run(folder, "--max_train_epochs", "1", "--no_metadata")
    assert "captions" not in entry_of(folder / "out" / "one.safetensors")
    second = ("--dit", str(folder / "out" / "one.safetensors"), "--ffid", "3", "--output_name", "two")
    kept = (*t5(folder), "--preserve_prompts", "--preserve_random", "0", "--max_train_epochs", "1", "--guard", "0")
    assert "nothing is preserved of one (ff 0.1 ffid 2): the ledger has no captions" in "\n".join(
        run(folder, *second, *kept)
    )


def test_the_ledger_keeps_the_most_frequent_captions():
    captions = [f"picture {n}" for n in range(20)] + ["character1"] * 3
    assert most_frequent(captions) == ["character1", *captions[: CAPTIONS_KEPT - 1]]
    assert json.loads(json.dumps(most_frequent(["é"]))) == ["é"]
