"""Saved samples: what is read back, and that nothing half-written stays."""

import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_chain import LEFT

from utils.sampling.writers import load_latent, remove_unfinished, save_frames, save_latent, save_sample, to_frames
from utils.selective_finetune import SliceError
from utils.slice_saving import UNFINISHED, this_process
from wan.errors import InputError


def smooth_video(frames: int, height: int, width: int) -> torch.Tensor:
    """A gradient that moves, so that a codec keeps it."""
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    moving = [
        torch.stack([rows + 0 * columns, 0 * rows + columns, (rows + columns) / 2 - t / 20]) for t in range(frames)
    ]
    return torch.stack(moving, dim=1).clamp(-1, 1)


def test_all_256_levels_come_back_and_the_rest_is_clamped():
    levels = torch.arange(256)
    video_3THW = (levels.float() / 127.5 - 1).reshape(1, 1, 16, 16).expand(3, 1, 16, 16)
    assert np.array_equal(to_frames(video_3THW)[0, :, :, 0].ravel(), levels.numpy())
    assert (
        to_frames(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(3, 1, 1, 2)).ravel().tolist()
        == [0] * 3 + [255] * 3
    )


def test_one_frame_is_saved_as_png(tmp_path):
    video_3THW = smooth_video(1, 32, 48)
    path = save_sample(tmp_path / "new", "a", video_3THW, fps=16)
    assert path == tmp_path / "new" / "a_000.png"
    assert np.array_equal(np.asarray(Image.open(path)), to_frames(video_3THW)[0])


def test_several_frames_are_saved_as_mp4(tmp_path):
    video_3THW = smooth_video(9, 32, 48)
    path = save_sample(tmp_path, "a", video_3THW, fps=16)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == (9, 32, 48, 3)
    assert np.abs(frames.astype(int) - to_frames(video_3THW)).mean() < 3


def test_the_same_frames_become_the_same_bytes_while_the_cpu_is_busy(tmp_path):
    video_3THW = torch.rand(3, 5, 160, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    busy = [subprocess.Popen([sys.executable, "-Sc", "while True: pass"]) for _ in range(2)]
    try:
        files = {save_sample(tmp_path, "a", video_3THW, fps=16).read_bytes() for _ in range(4)}
    finally:
        for process in busy:
            process.kill()
            process.wait()
    # x264 writes its settings into the file; with threads, other bytes come up too rarely for a test of four.
    assert len(files) == 1 and b" threads=1 " in files.pop()


@pytest.mark.slow
def test_the_same_frames_become_the_same_bytes_in_a_heap_full_of_others(tmp_path):
    video_3THW, files = torch.rand(3, 5, 160, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, set()
    for _ in range(400):  # with x264's algorithms for this CPU one in 60 differed
        used = [os.urandom(1000 + int.from_bytes(os.urandom(2), "little") * 3) for _ in range(40)]
        del used
        files.add(save_sample(tmp_path, "a", video_3THW, fps=16).read_bytes())
    assert len(files) == 1


def test_frames_are_numbered_in_a_folder_of_their_own(tmp_path):
    video_3THW = smooth_video(5, 16, 16)
    assert save_frames(tmp_path, "a", video_3THW) == tmp_path / "a"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"a_{i:03d}.png" for i in range(5)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "a_003.png")), to_frames(video_3THW)[3])
    assert save_frames(tmp_path, "b", video_3THW[:, :1]) == tmp_path / "b_000.png"


def test_a_latent_comes_back_with_its_metadata(tmp_path):
    latent = torch.randn(16, 2, 4, 6).bfloat16()
    path = save_latent(tmp_path / "a_latent.safetensors", latent, {"seeds": "7"})
    assert load_file(path)["latent"].dtype == torch.float32
    loaded, metadata = load_latent(path)
    assert torch.equal(loaded, latent.float()) and metadata["seeds"] == "7"


def test_a_latent_with_a_batch_axis_is_read(tmp_path):
    latent = torch.randn(1, 16, 1, 4, 6)
    save_file({"latent": latent}, tmp_path / "a.safetensors")
    assert torch.equal(load_latent(tmp_path / "a.safetensors")[0], latent[0])


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(16, 1, 2, 2)},
        {"latent": torch.zeros(32, 1, 2, 2)},
        {"latent": torch.zeros(2, 16, 1, 2, 2)},
        {"latent": torch.zeros(16, 0, 2, 2)},
    ],
)
def test_what_is_no_latent_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match=r"a.safetensors: `latent` of \[16, frames, height, width\] expected .48 channels"
    ):
        load_latent(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.float64])
def test_a_latent_of_another_dtype_is_refused(tmp_path, dtype):
    save_file({"latent": torch.zeros(16, 1, 2, 2).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"`latent` is {dtype}, not float32, float16 or bfloat16"):
        load_latent(tmp_path / "a.safetensors")


def test_a_latent_that_is_not_finite_is_refused(tmp_path):
    save_file({"latent": torch.full((16, 1, 2, 2), torch.nan)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors contains NaN or infinity"):
        load_latent(tmp_path / "a.safetensors")


def test_a_failed_save_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError("disk full")

    (tmp_path / "a.mp4").write_bytes(b"old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(SliceError, match="disk full"):
        save_sample(tmp_path, "a", smooth_video(5, 32, 48), fps=16)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_half_written_outputs_of_writers_that_are_gone_are_removed(tmp_path):
    gone = f"20260102-030405-006_7_000.png{LEFT}"
    alive = f"20260102-030405-007_7.mp4.{this_process()}{UNFINISHED}"
    others = {f"notes.png{LEFT}", "20260102-030405-006_7_000.png.tmp"}
    for name in (gone, alive, *others):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive, *others}
