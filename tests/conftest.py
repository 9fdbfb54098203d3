"""What every test process is like: one thread to compute on, and children that collect no garbage of their parent's."""

import gc
import os

import pytest

# Before anything imports torch. Pytest runs several processes, and threads that share cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if hasattr(os, "register_at_fork"):
    # A child that freed a video decoder of an earlier test would wait for threads that it does not have.
    os.register_at_fork(after_in_child=gc.disable)


@pytest.fixture
def one_thread():
    """A busy machine gives a product fewer threads now and then, which adds it up in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flag_files(tmp_path_factory):
    """A folder with the files that typed commands of the training script name, empty where only flags are read."""
    from tiny_run import write_dataset

    folder = tmp_path_factory.mktemp("files")
    write_dataset(folder)
    for name in ("vae.safetensors", "models_t5.pth"):
        (folder / name).touch()
    (folder / "random_prompt.txt").write_text("a cat --w 512 --h 512 --f 1\n", encoding="utf-8")
    return folder


@pytest.fixture
def in_flag_files(flag_files, monkeypatch):
    monkeypatch.chdir(flag_files)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
