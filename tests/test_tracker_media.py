"""What TensorBoard and wandb show of a run's samples."""

import io

import numpy as np
import pytest
from PIL import Image
from tiny_run import run, write_inputs, write_sample_models

from utils.run.tracker_media import animated_gif, shortened

SAMPLES = ("--vae_dtype", "fp32", "--sample_every_n_epochs", "2", "--max_train_epochs", "2")


@pytest.fixture
def inputs(tmp_path):
    """A run's files with prompts whose characters Markdown reads, for a picture and a clip; the folder and flags."""
    flags = [*write_sample_models(write_inputs(tmp_path)), *SAMPLES, "--logging_dir", str(tmp_path / "logs")]
    prompts = "a *red* cat --w 16 --h 16 --s 2 --l 1\na cat --w 16 --h 16 --f 9 --s 1 --l 1\n"
    (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
    return tmp_path, flags


def logged(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(next((folder / "logs").glob("*/*")))).Reload()


def test_tensorboard_shows_prompts_beside_samples_clips_as_videos_and_the_sheet(inputs):
    folder, flags = inputs
    run(folder, *flags)
    events = logged(folder)
    tags = ["sample/00", "sample/01", "sample/contact_sheet"]
    assert {tag for tag in events.Tags()["tensors"] if not tag.endswith("text_summary")} == set(tags)
    encoded = [events.Tensors(tag)[0].tensor_proto.string_val[2] for tag in tags]
    picture, clip, sheet = (Image.open(io.BytesIO(content)) for content in encoded)
    assert (picture.format, picture.size) == ("PNG", (16, 16))
    assert (clip.format, clip.n_frames) == ("GIF", 9)
    assert sheet.size == (128 + 4 + 132, 18 + 4 + 2 * 132)
    metadata = events.SummaryMetadata("sample/00")
    assert metadata.plugin_data.plugin_name == "images"
    assert (metadata.display_name, metadata.summary_description) == ("a *red* cat", r"a \*red\* cat")
    (text,) = events.Tensors("sample/00/prompt/text_summary")
    assert text.tensor_proto.string_val[0].decode() == r"a \*red\* cat"


def test_a_clip_keeps_its_frames_and_their_time_and_is_made_smaller():
    frames = np.stack([np.full((64, 640, 3), 40 * number, np.uint8) for number in range(6)])
    with Image.open(io.BytesIO(animated_gif(frames, fps=16))) as clip:
        assert (clip.size, clip.n_frames, clip.info["loop"]) == ((320, 32), 6, 0)
        for number in range(6):
            clip.seek(number)
            assert clip.info["duration"] == 60  # a GIF counts in hundredths of a second
            assert clip.convert("RGB").getpixel((9, 9)) == (40 * number,) * 3


def test_a_title_is_one_short_line():
    assert shortened("a cat\n on a  mat", 60) == "a cat on a mat"
    assert shortened("a cat on a mat", 10) == "a cat on…"


def test_wandb_gets_scalars_and_samples_with_their_prompts_offline(inputs, monkeypatch):
    wandb = pytest.importorskip("wandb")
    folder, flags = inputs
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, log = [], wandb.sdk.wandb_run.Run.log

    def record(self, data, **more):
        rows.append(data)
        log(self, data, **more)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", record)
    run(folder, *flags, "--log_with", "wandb", "--wandb_run_name", "a run")
    values = {key: value for row in rows for key, value in row.items()}
    assert {"loss/current", "loss/epoch", "time/step_seconds"} <= values.keys()
    assert (type(values["sample/00"]).__name__, values["sample/00"]._caption) == ("Image", "a *red* cat")
    assert (type(values["sample/01"]).__name__, values["sample/01"]._caption) == ("Video", "a cat")
    assert list((folder / "logs").rglob("*.wandb"))
