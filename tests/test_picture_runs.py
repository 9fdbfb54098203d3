"""Runs of models that start from pictures, through the scripts: caches, steps, a resumed run, what they refuse."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_guard import check_statistics, noted_passes
from tiny_models import MODELS, run_flags, sample_flags, tiny_model, write_run_files

import wan_train_network
from utils.cli.train import parse_train
from utils.data.cache_files import read_clip, read_condition, read_latents, read_text
from utils.data.dataset import build_training_dataset
from utils.data.given_pictures import starts_clean
from utils.data.origins import without_origin
from utils.learning.flow_matching import TimestepConfig, draw_generator
from utils.preserve import asking
from utils.preserve.answers_file import read_answers
from utils.run.forgetting import Probe, ProbedOn, forgetting_sums, start_probe
from utils.run.inputs import check_dataset
from utils.run.noise_bins import SEED, curves
from utils.run.state import read_state
from utils.run.validation import LEVELS, state_problem, validation_sums
from utils.selective_finetune import slice_indices
from utils.slice_saving import base_identity, read_header
from utils.slices.base_identity import BaseModel
from utils.training import train
from wan.errors import InputError
from wan.loading import load_dit

# One of each way to give a picture in the default suite.
TASKS = [
    pytest.param(task, marks=() if task in ("i2v-14B", "ti2v-5B") else pytest.mark.slow, id=task) for task in MODELS
]


@pytest.fixture(scope="module", params=TASKS)
def task_files(request, tmp_path_factory):
    return request.param, write_run_files(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def files(task_files):
    yield task_files
    shutil.rmtree(task_files[1] / "out", ignore_errors=True)


def run(files, *more):
    task, folder = files
    said = []
    train(parse_train(run_flags(folder, task, *more)), say=said.append)
    return said


def saved(folder, name="one"):
    return load_file(folder / "out" / f"{name}.safetensors")


def check_resumed(files, steps, half):
    task, folder = files
    wan_train_network.main(run_flags(folder, task, *steps, "--save_state", "--save_every_n_steps", str(half)))
    state = folder / "out" / f"one-step{half:08d}-state"
    run(files, *steps, "--output_name", "two", "--resume", str(state), "--save_state")
    assert all(torch.equal(value, saved(folder, "two")[name]) for name, value in saved(folder).items())
    first, second = (read_state(folder / "out" / f"{name}-state") for name in ("one", "two"))
    assert first.losses == second.losses


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(files):
    check_resumed(files, ("--max_train_epochs", "1"), 2)


def test_a_changed_picture_or_share_makes_it_another_run(files):
    task, folder = files
    run(files, "--max_train_epochs", "1", "--save_state")
    resume = ("--resume", str(folder / "out" / "one-state"))
    if task == "ti2v-5B":
        with pytest.raises(InputError, match=r"another run: i2v_share 0\.5 \(now 0\.25\)"):
            run(files, *resume, "--i2v_share", "0.25")
        return
    cache = min(folder.glob("cache/*_wan.safetensors"))
    original = cache.read_bytes()
    with safe_open(cache, "pt") as file:
        metadata = file.metadata()
    changed = {key: value * (0.5 if key.startswith("latents_image") else 1) for key, value in load_file(cache).items()}
    save_file(changed, cache, metadata)
    with pytest.raises(InputError, match="dataset_sha256 is different"):
        run(files, *resume)
    cache.write_bytes(original)


def items_of(files):
    return build_training_dataset(parse_train(run_flags(files[1], files[0])).dataset).items


def given_to(task, item, starts, t, frames):
    """t and what else the model is given with one item, by hand."""
    if task == "ti2v-5B":
        t_L = torch.full((frames, item.latent_shape[-2] * item.latent_shape[-1] // 4), t)
        t_L[: int(starts)] = 0
        return t_L.flatten()[None] if starts else torch.tensor([t]), None, None
    y = read_condition(item.latents).float()[None]
    return torch.tensor([t]), y, read_clip(item.latents).float()[None] if task != "i2v-A14B" else None


def test_validation_is_the_loss_at_each_items_own_pictures_in_plain_arithmetic(files):
    task, _ = files
    items, model, losses, share = items_of(files), tiny_model(files[0]), [], 0.5 if task == "ti2v-5B" else 0.0
    for item in items:
        latents, text = read_latents(item.latents).float(), read_text(item.text)
        for level in range(LEVELS):
            sigma = (level + 0.5) / LEVELS
            noise = torch.randn(latents.shape, generator=draw_generator(SEED, "validation", item.name, level))
            noisy, frames = (1 - sigma) * latents + sigma * noise, latents.shape[1]
            starts = starts_clean(share, frames, SEED, "validation's first frame", item.name, level)
            noisy[:, : int(starts)] = latents[:, : int(starts)]
            t, y, clip = given_to(task, item, starts, 1000 * sigma, frames)
            with torch.no_grad():
                error = model(noisy[None], t, [text], y, clip)[0] - (noise - latents)
            losses.append(error[:, int(starts) :].square().mean().item())
    sums = validation_sums(model, items, TimestepConfig("uniform"), 1500, torch.device("cpu"), share)
    assert curves("loss", sums)["validation/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_forgetting_probe_starts_from_a_clips_own_pictures_and_survives_a_state(files):
    model, cpu = tiny_model(files[0]), torch.device("cpu")
    texts = [torch.randn(3, 48, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    asked = ProbedOn(texts, items_of(files), TimestepConfig("uniform"), 0.5 if files[0] == "ti2v-5B" else 0.0)
    probe = start_probe(asked, model, 10**6, cpu)
    assert not forgetting_sums(model, probe, 10**6, cpu)[0].any()
    model.head.head.bias.data += 0.5
    torch.testing.assert_close(curves("f", forgetting_sums(model, probe, 700, cpu))["validation/f"], 0.25)
    again = Probe.from_state(probe.state())
    assert torch.equal(forgetting_sums(model, again, 700, cpu), forgetting_sums(model, probe, 700, cpu))
    assert state_problem({"best": 1.0, "measured_at": 0, "probe": probe.state()}) is None
    kept = probe.inputs
    assert (kept.y_CFHW is not None) == (files[0] != "ti2v-5B") == (not any(kept.starts_clean))


@pytest.mark.parametrize(
    "damage",
    [
        {"y": torch.zeros(20, 3, 4, 8)},
        {"y": torch.zeros(20, 2, 4, 8).half()},
        {"clip": torch.zeros(257)},
        {"starts_clean": [True]},
        {"starts_clean": None},
        {"more": 1},
    ],
)
def test_a_state_with_other_pictures_than_a_probe_saves_is_refused(damage):
    noisy = torch.zeros(2, 16, 2, 4, 8)
    probe = {"noisy": noisy, "t": torch.zeros(2), "texts": [torch.zeros(3, 48)] * 2, "start": noisy}
    probe |= {"y": torch.zeros(20, 2, 4, 8), "clip": torch.zeros(257, 24), "starts_clean": [False] * 2}
    assert state_problem({"best": 1.0, "measured_at": 0, "probe": probe}) is None
    assert state_problem({"best": 1.0, "measured_at": 0, "probe": {**probe, **damage}})


def test_samples_of_a_run_start_from_the_pictures_of_their_prompts(files):
    run(files, *sample_flags(files[1], files[0]), "--max_train_epochs", "1", "--save_as", "slice")
    drawn = [path for path in sorted((files[1] / "out" / "sample").iterdir()) if path.suffix == ".mp4"]
    assert len(drawn) == 2 and len({path.read_bytes() for path in drawn}) == 2


def preserving(folder, *more):
    (folder / "old.txt").write_text("a red cat\na cat", encoding="utf-8")
    t5 = ("--t5", str(folder / "t5.safetensors"), "--tokenizer", str(folder / "spiece.model"))
    few = ("--preserve_levels", "4", "--preserve_random", "6", "--guard", "0")
    return (*t5, "--preserve_prompts", str(folder / "old.txt"), *more, *few)


def kept_by(files, name):
    base = BaseModel(base_identity(files[1] / "base.safetensors"))
    return read_answers(files[1] / "out" / f"{name}.answers.safetensors", base, MODELS[files[0]])


def is_of(item, answer):
    """Whether a prediction is at an item's noisy latents, its clean first frame, its pictures."""
    latents, sigma, first = read_latents(item.latents).float(), answer.t / 1000, int(answer.starts_clean)
    if latents.shape != answer.noisy_CFHW.shape:
        return False
    noise = ((answer.noisy_CFHW.float() - (1 - sigma) * latents) / sigma)[:, first:]
    same = [torch.equal(answer.noisy_CFHW[:, :first], latents[:, :first].half()), abs(noise.std() - 1) < 0.15]
    if answer.pictures:
        same.append(torch.equal(answer.pictures.y_CFHW, read_condition(item.latents).half()))
        if answer.pictures.clip_PI is not None:
            same.append(torch.equal(answer.pictures.clip_PI, read_clip(item.latents).half()))
    return all(same)


def test_old_prompts_are_asked_at_the_clips_own_pictures_and_kept_for_the_next_run(files):
    task, folder = files
    run(files, *preserving(folder), "--max_train_epochs", "1")
    model, kept = load_dit(folder / "base.safetensors", torch.float32), kept_by(files, "one")
    answers = [(old.text_SD, answer) for old in kept.prompts for answer in old.kept]
    answers += zip(kept.random.texts, kept.random.kept, strict=True)
    assert len(answers) == 2 * 4 + 6
    for text_SD, answer in answers:
        t = torch.full((answer.shape[1], answer.shape[-2] * answer.shape[-1] // 4), answer.t)
        t[: int(answer.starts_clean)] = 0
        given = [None, None] if answer.pictures is None else [answer.pictures.y_CFHW, answer.pictures.clip_PI]
        given = [None if own is None else own[None].float() for own in given]
        predicted = model(answer.noisy_CFHW[None].float(), t.flatten()[None], [text_SD], *given)[0]
        torch.testing.assert_close(predicted.half(), answer.velocity_CFHW, rtol=1e-3, atol=1e-3)
        assert any(is_of(item, answer) for item in items_of(files))
    assert any(answer.starts_clean for _, answer in answers) == (task == "ti2v-5B")
    after = ("--preserve_answers", str(folder / "out" / "one.answers.safetensors"), "--preserve_every", "1")
    said = run(files, *preserving(folder, *after), "--output_name", "two", "--max_train_epochs", "1")
    assert [line for line in said if "needs no new reference predictions: earlier runs have recorded all" in line]
    kept = [kept_by(files, name) for name in ("one", "two")]
    first, second = ([(o.text, a.t, a.starts_clean) for o in own.prompts for a in o.kept] for own in kept)
    assert sorted(first) == sorted(second)
    first, second = ([(a.t, a.starts_clean, a.pictures is None) for a in own.random.kept] for own in kept)
    assert first == second and len({a.pictures for own in kept[1:] for a in own.random.kept}) <= 4


def test_the_guards_statistics_are_those_of_a_dense_kfac_and_leave_out_clean_first_frames(files, monkeypatch):
    task, folder = files
    monkeypatch.setattr(asking, "SAMPLES", 6)
    with noted_passes() as passes:
        more = ("--mixed_precision", "no", "--save_state", "--max_train_steps", "1", "--save_as", "slice", "--guard")
        run(files, *preserving(folder), *more)
    check_statistics(folder / "base.safetensors", read_state(folder / "out" / "one-state"), passes, 6)
    clean = [starts is not None and bool(starts.any()) for starts in (one[3].starts_clean_B for one in passes)]
    assert any(clean) == (task == "ti2v-5B") and not all(clean)
    for (*_, given, noise, values), starts in zip(passes, clean, strict=True):
        assert values == noise[0, :, int(starts) :].numel() and (not starts or not noise[:, :, 0].any())
        assert (given.y_BCFHW is None) == (task == "ti2v-5B")


@pytest.mark.slow
def test_every_other_flag_goes_with_pictures(files):
    """Debugging, validation, checkpointing, swapping, accumulation, dropped captions, masks of timesteps: at once."""
    _, folder = files
    more = ("--training_debug", "--gradient_checkpointing", "--blocks_to_swap", "2", "--mixed_precision", "bf16")
    more += ("--gradient_accumulation_steps", "3", "--validation_dataset_config", str(validated(folder)))
    said = run(files, *preserving(folder), *more, "--save_as=slice", "--validate_every_n_steps=1", "--guard")
    assert [line for line in said if line.startswith("step 1: validation loss")]
    assert (folder / "out" / "one.slice.safetensors").is_file()
    assert run(files, "--show_timesteps", "console")[-1].startswith("timesteps of 100,000 samples")


def validated(folder):
    """A dataset of other clips: their caches, which do not say what they were made of, under other names."""
    for path in (folder / "cache").glob("*.safetensors"):
        (folder / "other").mkdir(exist_ok=True)
        save_file(load_file(path), folder / "other" / f"other_{path.name}", without_origin(read_header(path)[1]))
    table = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    table["datasets"][0] |= {"cache_directory": str(folder / "other"), "video_jsonl_file": str(folder / "gone.jsonl")}
    (folder / "other.json").write_text(json.dumps(table), encoding="utf-8")
    return folder / "other.json"


def test_latents_and_tokens_of_another_width_are_refused(files):
    task, folder = files
    config = parse_train(run_flags(folder, task))
    dataset = build_training_dataset(config.dataset)
    check_dataset(dataset, MODELS[task], config)
    with pytest.raises(InputError, match=r"the latent caches of .* have (16|48) channels, .* reads 8: make them again"):
        check_dataset(dataset, replace(MODELS[task], out_dim=8), config)
    if MODELS[task].image_dim:
        with pytest.raises(InputError, match=r"the CLIP tokens of .* are 24 wide, .* reads 1280: make them again"):
            check_dataset(dataset, replace(MODELS[task], image_dim=1280), config)


@pytest.mark.slow
def test_thirty_steps_from_the_scripts_caches_move_the_slice_alone(files):
    check_resumed(files, ("--max_train_epochs", "8", "--gradient_checkpointing", "--blocks_to_swap", "2"), 15)
    old, new = load_file(files[1] / "base.safetensors"), saved(files[1])
    for name, tensor in new.items():
        changed = (tensor.view(torch.int16) != old[name].view(torch.int16)).flatten()
        if name.startswith("blocks.") and tensor.dim() == 2 and name.endswith(".weight"):
            inside = slice_indices(name, tensor.shape, "0.1", 2)
            assert changed[inside].any(), name
            changed[inside] = False
        assert not changed.any(), name
