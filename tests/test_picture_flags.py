"""Training flags of models that start from pictures: the share of image-to-video, CLIP, what each task's data is."""

import json

import pytest
from tiny_pictures import write_picture
from tiny_run import flags

from utils.cli.command import Parser
from utils.cli.train import parse_train
from utils.cli.train_flags import add_flags
from wan.configs import TASKS, WAN_2_2_VAE
from wan.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Dataset files of videos, of pictures, and of single frames of videos; files that flags can name."""
    kinds = {
        "videos": {"video_directory": str(tmp_path), "target_frames": [5]},
        "pictures": {"image_directory": str(tmp_path)},
        "stills": {"video_directory": str(tmp_path), "target_frames": [1]},
    }
    for name, table in kinds.items():
        table |= {"resolution": [64, 32], "caption_extension": ".txt", "cache_directory": str(tmp_path / name)}
        (tmp_path / f"{name}.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    for name in ("vae", "t5", "clip"):
        (tmp_path / name).touch()
    for name in ("a", "b"):
        write_picture(tmp_path / f"{name}.png")
    return tmp_path


def parsed(folder, task, *more, data="videos"):
    return parse_train(flags(folder, "--dataset_config", str(folder / f"{data}.json"), "--task", task, *more))


def sampling(folder, task, *names):
    ends = ["", f"--i {folder / 'a.png'}", f"--i {folder / 'a.png'} --ei {folder / 'b.png'}"]
    line = f"a cat --w 64 --h 32 --f 5 {ends[TASKS[task].conditions.pictures]}"
    (folder / "prompts.txt").write_text(line, encoding="utf-8")
    files = [word for name in names for word in (f"--{name}", str(folder / name))]
    return ("--sample_prompts", str(folder / "prompts.txt"), "--sample_at_first", *files)


@pytest.mark.parametrize("task", list(TASKS))
def test_the_dataset_is_that_of_the_tasks_model(folder, task):
    [dataset] = parsed(folder, task).dataset.datasets
    assert (dataset.latents, dataset.conditions) == (TASKS[task].latents, TASKS[task].conditions)
    assert (dataset.latents == WAN_2_2_VAE) == (task == "ti2v-5B")


@pytest.mark.parametrize("task", list(TASKS))
def test_half_of_the_clips_of_the_5b_model_alone_start_from_their_first_frame(folder, task):
    assert parsed(folder, task).i2v_share == (0.5 if task == "ti2v-5B" else 0.0)
    assert parsed(folder, task, data="pictures").i2v_share == 0.0


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_is_what_was_asked(folder, share):
    assert parsed(folder, "ti2v-5B", "--i2v_share", str(share)).i2v_share == share


@pytest.mark.parametrize(
    ("task", "data", "more", "message"),
    [
        ("i2v-14B", "videos", ("--i2v_share", "0.5"), r"no effect with --task i2v-14B: it is for ti2v-5B"),
        ("t2v-14B", "videos", ("--i2v_share", "0"), r"no effect with --task t2v-14B"),
        ("ti2v-5B", "pictures", ("--i2v_share", "0.5"), r"no effect on pictures, .*pictures\.json has no videos"),
        ("ti2v-5B", "stills", ("--i2v_share", "0.5"), r"no effect on pictures, .*stills\.json has no videos"),
        ("ti2v-5B", "videos", ("--i2v_share", "1.5"), r"--i2v_share must be a number from 0 to 1, not 1\.5"),
        ("ti2v-5B", "videos", ("--i2v_share", "nan"), r"--i2v_share must be a number from 0 to 1"),
        ("t2v-14B", "videos", ("--clip", "x"), r"--clip has no effect: --task t2v-14B"),
        ("i2v-A14B", "videos", ("--clip", "x"), r"--clip has no effect: --task i2v-A14B"),
    ],
)  # fmt: skip
def test_flags_without_an_effect_are_refused(folder, task, data, more, message):
    with pytest.raises(InputError, match=message):
        parsed(folder, task, *more, data=data)


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_samples_of_models_that_read_clip_tokens_need_their_encoder(folder, task):
    with pytest.raises(InputError, match=f"--clip is missing: --task {task} reads"):
        parsed(folder, task, *sampling(folder, task, "vae", "t5"))
    config = parsed(folder, task, *sampling(folder, task, "vae", "t5", "clip"))
    with pytest.raises(InputError, match=r"--clip .*nowhere does not exist"):
        parsed(folder, task, *sampling(folder, task, "vae", "t5"), "--clip", str(folder / "nowhere"))
    assert config.samples.clip == folder / "clip" and folder / "clip" in config.inputs


@pytest.mark.parametrize("task", ["t2v-14B", "i2v-A14B", "ti2v-5B"])
def test_samples_of_other_models_need_none(folder, task):
    assert parsed(folder, task, *sampling(folder, task, "vae", "t5")).samples.clip is None


def test_the_help_lists_every_task():
    parser = Parser()
    add_flags(parser)
    assert all(task in parser.format_help().replace("\n", " ") for task in TASKS)


@pytest.mark.parametrize(("task", "size"), [("ti2v-5B", "1280x704"), ("i2v-14B", "1280x720"), ("t2v-A14B", "1280x720")])
def test_the_metadata_tell_the_tasks_own_resolution_unless_another_is_given(folder, task, size):
    assert parsed(folder, task).metadata.resolution == size
    assert parsed(folder, task, "--metadata_reso", "64x32").metadata.resolution == "64x32"
