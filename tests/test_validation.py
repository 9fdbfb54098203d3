"""Validation: the loss on held-out pictures at fixed noise, and how far predictions at general captions have moved."""

import pytest
import torch
from tiny_run import CONFIG, write_dataset

from utils.data.cache_files import read_latents, read_text
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset
from utils.learning.flow_matching import TimestepConfig, draw_generator
from utils.preserve.general_captions import general_captions
from utils.run.validation import LEVELS, Probe, curves, forgetting_sums, predictions, probe_inputs, validation_sums
from wan.errors import InputError
from wan.model import WanModel

CPU = torch.device("cpu")
UNIFORM = TimestepConfig(sampling="uniform")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return WanModel(CONFIG)


@pytest.fixture
def config(tmp_path):
    path = write_dataset(tmp_path)

    def split(share):
        text = path.read_text(encoding="utf-8").split("[general]")[0]
        path.write_text(f"{text}\n[general]\nvalidation_split = {share}\n", encoding="utf-8")
        return read_dataset_config(path)

    return split


@pytest.mark.parametrize(("share", "held_out"), [("0", 0), ("0.01", 1), ("0.25", 2), ("0.99", 7)])
def test_a_share_of_the_sources_is_held_out_and_never_trained(config, share, held_out):
    dataset = build_training_dataset(config(share))
    trained = {dataset.items[entry].name for batch in dataset.epoch_batches(1, 0) for entry in batch}
    assert len(dataset.held_out) == held_out and len(trained) == 8 - held_out
    assert trained.isdisjoint(item.name for item in dataset.held_out)


@pytest.mark.parametrize("share", ["1", "-0.1", "true", '"a"', "nan"])
def test_a_share_that_leaves_nothing_to_train_is_refused(config, share):
    with pytest.raises(InputError, match="validation_split must be a number from 0 up to, but not including, 1"):
        config(share)


@pytest.mark.parametrize("most_values", [1, 700, 10**6])
def test_the_loss_is_that_of_each_picture_at_each_noise_level_in_plain_arithmetic(config, model, most_values):
    items = build_training_dataset(config("0.3")).held_out
    by_bin = {"": []}
    for item in items:
        latents, text = read_latents(item.latents).float(), read_text(item.text)
        for level in range(LEVELS):
            sigma = torch.tensor([(level + 0.5) / LEVELS])
            noise = torch.randn(latents.shape, generator=draw_generator(5, "validation", item.name, level))
            with torch.no_grad():
                predicted = model(((1 - sigma) * latents + sigma * noise)[None], 1000 * sigma, [text])[0]
            loss = (predicted.float() - (noise - latents)).square().mean().item()
            low = 250 * (level // 2)
            for place in ("", f" t {low}-{low + 250}"):
                by_bin.setdefault(place, []).append(loss)
    found = curves("loss", validation_sums(model, items, UNIFORM, 5, most_values, CPU))
    expected = {f"validation/loss{place}": sum(losses) / len(losses) for place, losses in by_bin.items()}
    assert len(items) == 2 and found == pytest.approx(expected, rel=1e-5)


def probe_of(model, items, most_values=10**6):
    texts = [torch.randn(3, 48, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    noisy, t, contexts = probe_inputs(texts, items, UNIFORM, 5)
    return Probe(noisy, t, contexts, predictions(model, noisy, t, contexts, most_values, CPU))


def test_forgetting_is_the_squared_distance_from_the_start(config, model):
    items = build_training_dataset(config("0.3")).items
    probe = probe_of(model, items)
    assert curves("forgetting", forgetting_sums(model, probe, 10**6, CPU))["validation/forgetting"] == 0
    model.head.head.bias.data += 0.5
    moved = curves("forgetting", forgetting_sums(model, probe, 700, CPU))
    assert len(moved) == 5 and all(value == pytest.approx(0.25, rel=1e-4) for value in moved.values())


def test_the_processes_parts_of_the_probe_add_up_to_the_whole(config, model):
    probe = probe_of(model, build_training_dataset(config("0")).items)
    model.head.head.bias.data += torch.arange(64) / 64
    parts = [forgetting_sums(model, probe.share(rank, 3), 700, CPU) for rank in range(3)]
    torch.testing.assert_close(sum(parts), forgetting_sums(model, probe, 700, CPU), rtol=1e-5, atol=0)


def test_a_resumed_run_measures_from_the_same_start(config, model):
    probe = probe_of(model, build_training_dataset(config("0")).items)
    model.head.head.bias.data += 0.5
    again = Probe.from_state(probe.state())
    assert torch.equal(forgetting_sums(model, again, 700, CPU), forgetting_sums(model, probe, 700, CPU))


def test_the_probe_asks_nothing_that_is_trained_or_preserved():
    every = general_captions()
    assert len(every) == len(set(every)) > 50 and not any(line.startswith("#") for line in every)
    assert general_captions(without=[every[3], f" {every[0]} "]) == [every[1], every[2], *every[4:]]
