"""Validation: the loss on held-out pictures at fixed noise, and how far predictions at general captions have moved."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import CONFIG, run, write_dataset, write_inputs, write_sample_models

from utils.data import origins
from utils.data.cache_files import image_latents_path, read_latents, read_text, text_path, write_latents
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset
from utils.data.held_out import held_out
from utils.data.items import Item
from utils.data.origins import Origin, read_origin
from utils.learning.flow_matching import TimestepConfig, draw_generator
from utils.preserve.general_captions import caption_samples, general_captions
from utils.run.forgetting import Probe, ProbedOn, forgetting_sums, start_probe
from utils.run.noise_bins import SEED, curves
from utils.run.validation import LEVELS, validation_sums
from utils.slice_saving import read_header, read_ledger
from wan.errors import InputError
from wan.model import WanModel
from wan.safetensors_header import read_file_header

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


def items_of(folder, names, content=None):
    """Items with caches in a folder of their own, made of a file of that content."""
    made = []
    for name in names:
        path, size = image_latents_path(folder, name, (16, 16)), (16, 16)
        origin = content and Origin("", content[name], {"vae": "v"})
        write_latents(path, torch.zeros(16, 1, 2, 2), size, origin=origin)
        made.append(Item(f"{name}.png", path, text_path(folder, name), size, 1, (16, 1, 2, 2), (3, 48), ("a",)))
    return made


@pytest.mark.parametrize("order", [1, -1])
def test_a_held_out_picture_is_trained_in_no_other_dataset(tmp_path, order):
    """The second dataset lists some of the same files, the third has copies of them under other names."""
    contents = [f"{number}" for number in range(9)]
    first = items_of(tmp_path / "a", [f"a{number}" for number in contents], {f"a{n}": n for n in contents})
    first = [replace(item, source=tmp_path / item.name) for item in first]
    again = items_of(tmp_path / "b", [f"a{number}" for number in contents[3:]])
    again = [replace(item, source=tmp_path / item.name) for item in again]
    copies = items_of(tmp_path / "c", [f"c{number}" for number in contents], {f"c{n}": n for n in contents})
    chosen = held_out([first, again, copies][::order], 0.3)
    numbers = {item.name[1] for item in chosen}
    assert len(numbers) >= 3
    assert {item.latents for item in chosen} == {
        item.latents for item in (*first, *again, *copies) if item.name[1] in numbers
    }


def test_pictures_of_one_name_in_subfolders_are_held_out_by_their_paths(tmp_path):
    names = [f"{folder}/IMG_0001" for folder in "hgfedcba"]
    assert [item.text.parent.name for item in held_out([items_of(tmp_path, names)], 0.2)] == ["b", "a"]


def test_copies_of_one_picture_leave_nothing_to_train_on(config):
    dataset = config("0.5")
    for item in build_training_dataset(config("0")).items:  # two black pictures, each several times
        origin = read_origin(item.source, {"vae": "v"})
        write_latents(item.latents, read_latents(item.latents), item.bucket, origin=origin)
    with pytest.raises(InputError, match="leaves nothing to train on, because all files are copies of one another"):
        build_training_dataset(dataset)


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
            noise = torch.randn(latents.shape, generator=draw_generator(SEED, "validation", item.name, level))
            with torch.no_grad():
                predicted = model(((1 - sigma) * latents + sigma * noise)[None], 1000 * sigma, [text])[0]
            loss = (predicted.float() - (noise - latents)).square().mean().item()
            low = 250 * (level // 2)
            for place in ("", f" t {low}-{low + 250}"):
                by_bin.setdefault(place, []).append(loss)
    found = curves("loss", validation_sums(model, items, UNIFORM, most_values, CPU))
    expected = {f"validation/loss{place}": sum(losses) / len(losses) for place, losses in by_bin.items()}
    assert len(items) == 2 and found == pytest.approx(expected, rel=1e-5)


def probe_of(model, items, most_values=10**6):
    texts = [torch.randn(3, 48, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    return start_probe(ProbedOn(texts, items, UNIFORM), model, most_values, CPU)


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
    assert len(caption_samples()) > 50 and set(every).isdisjoint(caption_samples())


@pytest.fixture
def folder(tmp_path):
    write_inputs(tmp_path)
    flags = write_sample_models(tmp_path)
    data = tmp_path / "data.toml"
    data.write_text(data.read_text(encoding="utf-8") + "\n[general]\nvalidation_split = 0.25\n", encoding="utf-8")
    return tmp_path, [flag for flag in flags if flag.startswith(("--t5", "--tokenizer"))]


def validated(lines):
    """Step -> its validation loss and forgetting, as a run printed them."""
    pattern = r"step (\d+): validation loss (\S+) \(.*\); forgetting (\S+) \("
    found = (re.match(pattern, line) for line in lines)
    return {int(match[1]): (float(match[2]), float(match[3])) for match in found if match}


def test_a_run_is_validated_from_its_start_to_its_end(folder):
    folder, t5 = folder
    told = validated(run(folder, *t5, "--validate_every_n_steps", "3"))
    assert list(told) == [0, 3, 6] and told[0][1] == 0 < told[3][1] < told[6][1]
    assert len({loss for loss, _ in told.values()}) == 3


def test_a_resumed_run_is_validated_as_the_uninterrupted_one(folder):
    folder, t5 = folder
    flags = (*t5, "--validate_every_n_steps", "1", "--save_every_n_steps", "3", "--save_state", "--save_best")
    whole = validated(run(folder, *flags))
    best = (folder / "out" / "one-best.slice.safetensors").read_bytes()
    (folder / "out" / "one.safetensors").unlink()
    resumed = run(folder, *flags, "--resume", str(folder / "out" / "one-step00000003-state"))
    assert validated(resumed) == {step: values for step, values in whole.items() if step > 3}
    assert read_ledger(read_header(folder / "out" / "one-best.slice.safetensors")[1])[0]["steps"] == min(
        range(1, 7), key=lambda step: whole[step][0]
    )
    assert len((folder / "out" / "one-best.slice.safetensors").read_bytes()) == len(best)


def test_every_run_starts_from_the_same_numbers_whatever_its_seed_and_batches(folder):
    folder, t5 = folder
    starts = []
    for more in (("--seed", "3"), ("--seed", "4"), ("--seed", "4", "--gradient_accumulation_steps", "2")):
        told = run(folder, *t5, *more, "--validate_every_n_steps", "99", "--max_train_epochs", "1", "--overwrite")
        starts.append(validated(told)[0])
    assert len(set(starts)) == 1


def test_a_resumed_run_may_be_the_first_to_measure_forgetting(folder):
    folder, t5 = folder
    flags = ("--save_state", "--max_train_epochs", "1")
    whole = validated(run(folder, *t5, *flags, "--max_train_epochs", "2", "--output_name", "whole"))
    run(folder, *flags)
    resumed = validated(run(folder, *t5, *flags, "--max_train_epochs", "2", "--resume", "latest"))
    assert list(resumed) == [6] and resumed[6] == whole[6] and resumed[6][1] > 0


def test_where_every_general_caption_is_preserved_forgetting_is_not_measured_and_that_is_said(folder):
    folder, t5 = folder
    (folder / "all.txt").write_text("\n".join(general_captions()), encoding="utf-8")
    preserve = ("--preserve_prompts", str(folder / "all.txt"), "--preserve_levels", "1", "--preserve_every", "1")
    preserve += ("--preserve_random", "0", "--guard", "0")
    told = run(folder, *t5, *preserve, "--max_train_epochs", "1")
    assert [line for line in told if line.startswith("note: forgetting is not measured, because the run trains or")]
    assert not validated(told) and [line for line in told if line.startswith("step 3: validation loss")]


def test_without_a_text_encoder_or_pictures_the_other_is_measured(folder, tmp_path):
    folder, t5 = folder
    told = run(folder, "--validate_every_n_epochs", "2")
    assert [line for line in told if line.startswith("step 6: validation loss") and "forgetting" not in line]
    data = (folder / "data.toml").read_text(encoding="utf-8").split("[general]")[0]
    (folder / "data.toml").write_text(data, encoding="utf-8")
    told = run(folder, *t5, "--validate_every_n_epochs", "1", "--overwrite")
    assert [line for line in told if line.startswith("step 10: forgetting")]


def test_a_dataset_of_its_own_is_validated_on_unless_it_is_trained(folder):
    folder, _ = folder
    (folder / "data.toml").write_text((folder / "data.toml").read_text(encoding="utf-8").split("[general]")[0])
    with pytest.raises(InputError, match="and 7 more files are in --dataset_config and in --validation_dataset_config"):
        run(folder, "--validation_dataset_config", str(folder / "data.toml"))
    other = write_dataset(folder / "other", "other")
    whole = other.read_text(encoding="utf-8")
    other.write_text(f"{whole}\n[general]\nvalidation_split = 0.5\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"validation_split is for --dataset_config: leave it out of .*data.toml"):
        run(folder, "--validation_dataset_config", str(other))
    other.write_text(whole, encoding="utf-8")
    told = run(folder, "--validation_dataset_config", str(other), "--max_train_epochs", "1")
    assert [line.partition(" (")[0].rpartition(" ")[0] for line in told if line.startswith("step")] == [
        "step 0: validation loss", "step 5: validation loss"
    ]  # fmt: skip


def _made_by(folder, vae, text_encoder, content=str):
    """Lets the caches of a dataset say what they were made of and by; `content` gives a picture's hash by its stem."""
    for path in sorted((folder / "pics").glob("*_wan*.safetensors")):
        made_by, is_text = {"vae": vae, "text_encoder": text_encoder}, path.name.endswith("_te.safetensors")
        stem = path.name.split("_")[0]
        state = origins.file_state(folder / "pics" / f"{stem}.png")
        origin = origins.Origin(state, content(stem), made_by)
        tensors, metadata = load_file(path), read_file_header(path)[1]
        save_file(tensors, path, {**metadata, **(origins.made_by_metadata(made_by) if is_text else origin.metadata())})


def test_datasets_that_were_cached_with_different_vaes_are_told(tmp_path):
    tables = [write_dataset(tmp_path / name, name).read_text(encoding="utf-8") for name in "ab"]
    (tmp_path / "both.toml").write_text("\n".join(tables), encoding="utf-8")
    _made_by(tmp_path / "a", "one", "one", content=str)
    _made_by(tmp_path / "b", "two", "one")
    told = build_training_dataset(read_dataset_config(tmp_path / "both.toml")).describe()
    line = (
        "latent caches made with another VAE than the others (cache them again to make them alike): 8, such as bhigh0"
    )
    assert [found[: len(line)] for found in told if "made with" in found] == [line]


def test_what_is_validated_on_is_told_and_compared_with_what_trains(folder, tmp_path):
    shutil.copytree(folder[0], tmp_path / "run")
    data, other = write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b", "other")
    _made_by(tmp_path / "a", "one", "one")
    _made_by(tmp_path / "b", "two", "two")
    flags = ["--dataset_config", str(data), "--validation_dataset_config", str(other), "--max_train_steps", "1"]
    told = [line for line in run(tmp_path / "run", *flags) if line.startswith("validation")]
    assert told[0].startswith("validation dataset 1: 8 pictures (16x32x1: 5, 32x16x1: 3)")
    assert told[1].startswith("validation: latent caches made with another VAE than those that are trained on")
    assert told[2].startswith("validation: text caches made with another text encoder than those that are trained on")
    _made_by(tmp_path / "b", "one", "one", content=lambda stem: stem.removeprefix("other"))
    with pytest.raises(InputError, match=r"otherhigh0\.png and 7 more files are in --dataset_config and"):
        run(tmp_path / "run", *flags, "--overwrite")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--save_best",), "--save_best needs pictures to validate on: --validation_dataset_config FILE, or"),
        (("--validate_every_n_steps", "2"), "there is nothing to validate: .*, or --t5, which measures forgetting"),
        (("--validate_every_n_epochs", "0"), "must be a whole number from 1"),
        (("--validation_dataset_config", "nowhere.toml"), "nowhere.toml does not exist"),
    ],
)
def test_what_cannot_be_validated_is_refused(folder, flags, message):
    folder, _ = folder
    (folder / "data.toml").write_text((folder / "data.toml").read_text(encoding="utf-8").split("[general]")[0])
    with pytest.raises(InputError, match=message):
        run(folder, *flags)


def test_a_share_of_a_single_picture_is_refused(config):
    dataset = config("0.5")
    for path in sorted(dataset.datasets[0].image_directory.glob("*.txt"))[1:]:
        path.unlink()
    with pytest.raises(InputError, match="validation_split holds out nothing, because no dataset has two files"):
        build_training_dataset(dataset)
