"""Preservation: its gradient against plain autograd, exact resuming, its prompts."""

import json
import multiprocessing
import os
import shutil
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import CONFIG, flags, run, write_dataset, write_dit, write_sample_models
from torch.nn import functional as F

from utils.cli_train import parse_train
from utils.dataset import build_training_dataset
from utils.flow_matching import draw_generator, draw_uniforms, sigmas_of
from utils.kept_answers import Answer, OldPrompt, read_answers
from utils.preservation import CAPTIONS_KEPT, EncodedPrompt, Preservation, most_frequent
from utils.selective_finetune import base_identity, read_ledger, slice_indices
from wan.errors import InputError
from wan.loading import load_dit
from wan.text_encoder import load_text_encoder

PROMPTS = ("a red cat", "a cat", "red sits")
SGD = ("--mixed_precision", "no", "--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_grad_norm", "0")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_dit(folder / "base.safetensors")
    write_dataset(folder)
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
    return (*t5(folder), "--preserve_prompts", str(folder / "old.txt"), *told)


def kept_by(path, folder, every=2, weight=3, most_values=10**9):
    """What a run preserves that keeps its answers in this file."""
    kept = read_answers(path, base_identity(folder / "base.safetensors"), CONFIG)
    encoder = load_text_encoder(folder / "t5.safetensors", folder / "spiece.model", text_len=8)
    encoded = [EncodedPrompt(old, encoder([old.text])[0]) for old in kept]
    general, of_concepts = (tuple(p for p in encoded if bool(p.old.concept) == which) for which in (False, True))
    return Preservation(general, of_concepts, every, weight, most_values)


def logged(folder, *more):
    shutil.rmtree(folder / "logs", ignore_errors=True)
    run(folder, "--logging_dir", str(folder / "logs"), *more)
    return scalars(folder)


def scalars(folder):
    events = EventAccumulator(str(next((folder / "logs").glob("*/*")))).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


class Reference:
    """Plain autograd on whole weights, masked to the slice, held to what the run's file keeps: SGD at 0.1."""

    def __init__(self, folder, every=2, weight=3, window=1, ranks=1):
        self.model = load_dit(folder / "base.safetensors", torch.float32)
        named = self.model.named_parameters()
        self.sliced = {n: p.requires_grad_() for n, p in named if n.startswith("blocks.") and p.dim() == 2}
        config = parse_train(flags(folder))
        self.dataset, self.timesteps = build_training_dataset(config.dataset), config.timesteps
        self.preserved = kept_by(folder / "out" / "one.answers.safetensors", folder, every, weight)
        self.every, self.weight, self.window, self.ranks = every, weight, window, ranks

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
            self.step(loss + self.weight * kept)
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
        loss = F.mse_loss(self.model(noisy, t, batch["t5"]), noise - latents)
        if not preserves:
            return loss, torch.zeros(())
        generators = [draw_generator(3, "preserve", epoch, entry) for entry in batch["entries"]]
        kept = 0
        for old in self.preserved.draw(generators, "cpu"):
            error = self.model(old.noisy_BCFHW, old.t_B, old.context) - old.velocity_BCFHW
            kept = kept + error.square().flatten(1).mean(1).sum() / len(generators)
        return loss, kept

    def step(self, loss):
        grads = torch.autograd.grad(loss, list(self.sliced.values()))
        for (name, weight), grad in zip(self.sliced.items(), grads, strict=True):
            at = slice_indices(name, weight.shape, "0.1", 2)
            weight.data.view(-1)[at] -= 0.1 * grad.reshape(-1)[at]


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ((), 1),
        (("--gradient_checkpointing", "--blocks_to_swap", "1"), 1),
        (("--gradient_checkpointing", "--blocks_to_swap", "2", "--gradient_accumulation_steps", "3"), 3),
    ],
    ids=["plain", "checkpointed and swapped", "accumulated"],
)
def test_both_losses_are_those_of_plain_autograd(folder, more, window):
    found = logged(folder, *SGD, *preserving(folder), *more)
    check_losses(found, Reference(folder, window=window).losses({1: 10, 3: 4}[window]))


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
    run(folder, *SGD, *preserving(folder), "--logging_dir", str(folder / "logs"))


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
    check_losses(scalars(folder), Reference(folder, ranks=2).losses(6))


def test_concepts_and_general_prompts_are_asked_equally_often_and_all_their_answers():
    def prompt(number):
        answers = (Answer(torch.full((1, 1, 1, 1), number + part), 0.0, torch.zeros(1, 1, 1, 1)) for part in (0, 0.5))
        return EncodedPrompt(OldPrompt(str(number), kept=tuple(answers)), torch.zeros(1))

    few, many = range(3), range(100, 130)
    preserved = Preservation(tuple(map(prompt, many)), tuple(map(prompt, few)), 1, 1.0, 10**9)
    (drawn,) = preserved.draw([draw_generator(0, "preserve", entry) for entry in range(1800)], "cpu")
    asked = drawn.noisy_BCFHW.flatten().tolist()
    assert set(asked) == {number + part for number in (*few, *many) for part in (0, 0.5)}
    assert 800 < sum(number < 3 for number in asked) < 1000
    assert all(110 < asked.count(number + part) < 190 for number in few for part in (0, 0.5))


@pytest.mark.parametrize("step", [3, 4, 6])
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
    assert "was taught one;" in told and "--preserve_prompts auto" in told
    kept = (*t5(folder), "--preserve_prompts", str(folder / "old.txt"), "auto", "--max_train_epochs", "1")
    told = "\n".join(run(folder, *second, *kept))
    assert "preserves the answers to 3 general prompts and 8 of concepts, on one step in 4, with weight 4" in told
    assert "was taught" not in told


def test_without_metadata_no_captions_are_written_and_auto_says_so(folder):
    run(folder, "--max_train_epochs", "1", "--no_metadata")
    assert "captions" not in entry_of(folder / "out" / "one.safetensors")
    second = ("--dit", str(folder / "out" / "one.safetensors"), "--ffid", "3", "--output_name", "two")
    with pytest.raises(InputError, match=r"nothing to preserve.*one .*: the ledger tells no captions of it"):
        run(folder, *second, *t5(folder), "--preserve_prompts", "auto")


def test_the_ledger_keeps_the_most_frequent_captions():
    captions = [f"picture {n}" for n in range(20)] + ["character1"] * 3
    assert most_frequent(captions) == ["character1", *captions[: CAPTIONS_KEPT - 1]]
    assert json.loads(json.dumps(most_frequent(["é"]))) == ["é"]
