"""Tiny runs of every task that starts from pictures: their files, and single batches and steps, for the tests."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from caching_jobs import videos, write_vae
from safetensors.torch import load_file, save_file
from tiny_pictures import CONFIGS, PICTURE_TASKS, write_picture
from tiny_run import ORACLE, flags, write_sample_models
from torch import nn

import wan_cache_latents
import wan_cache_text_encoder_outputs
from utils.learning.flow_matching import TimestepConfig
from wan.configs import TASKS
from wan.model import PICTURE_TOKENS, WanModel

CLIP_WIDTH = 24  # of the oracle's CLIP
MODELS = {task: replace(CONFIGS[task], text_len=16) for task in PICTURE_TASKS}


def tiny_model(task, seed=0):
    """The model in float32, frozen; its head is large enough that inputs matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WanModel(MODELS[task]).eval().requires_grad_(False)
        nn.init.normal_(model.head.head.weight, std=0.1)
        if model.img_emb is not None and model.img_emb.emb_pos is not None:
            nn.init.normal_(model.img_emb.emb_pos)
    return model


def write_model(path, task, dtype=torch.bfloat16, seed=0):
    weights = {name: tensor.to(dtype) for name, tensor in tiny_model(task, seed).state_dict().items()}
    save_file(weights, path, {"num_heads": "4", "text_len": "16"})
    return path


def tiny_batch(task, frames=2, seed=1, entries=(0, 5)):
    """A batch as the dataset gives it: two clips of random latents, and what the task's caches hold of pictures."""
    model, draw = MODELS[task], torch.Generator().manual_seed(seed)
    count, conditions = len(entries), TASKS[task].conditions
    shape = (frames, 2, 4)
    y = torch.randn(count, 20, *shape, generator=draw) if conditions.pictures else None
    tokens = PICTURE_TOKENS * conditions.pictures
    clip = torch.randn(count, tokens, CLIP_WIDTH, generator=draw) if conditions.clip else None
    return {
        "latents": torch.randn(count, model.out_dim, *shape, generator=draw),
        "t5": [torch.randn(3 + number, model.text_dim, generator=draw) for number in range(count)],
        "entries": list(entries),
        "mask": None,
        "y": y,
        "clip": clip,
    }


def tiny_step(model, i2v_share=0.0, seed=3, preserved=None, device="cpu"):
    """What `backward` reads of a run, around a model."""
    config = SimpleNamespace(timesteps=TimestepConfig("uniform"), i2v_share=i2v_share)
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device(device)),
        config=config,
        seed=seed,
        model=model,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        preserved=preserved,
    )


def write_run_files(folder, task):
    """The files of a run: model, VAE, text encoder, CLIP, clips of nine frames with all their caches; the folder.

    The caches are made by the scripts.
    """
    write_model(folder / "base.safetensors", task)
    write_sample_models(folder)
    write_vae(folder, "vae_wan22" if task == "ti2v-5B" else "vae_wan21")
    oracle = load_file(ORACLE / "clip_vision.safetensors")
    weights = {key.removeprefix("weight."): value for key, value in oracle.items() if key.startswith("weight.")}
    save_file(weights, folder / "clip.safetensors", {"num_heads": "2"})
    settings = {"resolution": [64, 32], "target_frames": [5, 9], "batch_size": 2, "source_fps": TASKS[task].fps}
    config = videos(folder, dict.fromkeys(("one", "two", "three"), 9), **settings)
    for seed, frame in enumerate(sorted(folder.glob("*/*.png"))):  # each another one, unlike those of `videos`
        write_picture(frame, (32, 32), seed)
    conditions = TASKS[task].conditions
    given = ["--i2v", *(["--flf2v"] if conditions.pictures == 2 else [])] if conditions.pictures else []
    given += ["--clip", str(folder / "clip.safetensors")] if conditions.clip else []
    shared = ["--dataset_config", str(config), "--device", "cpu", "--num_workers", "1"]
    wan_cache_latents.main([*shared, "--vae", str(folder / "vae.safetensors"), *given])
    t5 = ["--t5", str(folder / "t5.safetensors"), "--tokenizer", str(folder / "spiece.model")]
    wan_cache_text_encoder_outputs.main([*shared, *t5])
    return folder


def sample_flags(folder, task):
    """Two samples of one seed, which differ in the picture that they start from; drawn before the first step."""
    line, pair = "a cat --w 64 --h 32 --f 5 --s 2 --d 7 --l 1 --i ", TASKS[task].conditions.pictures == 2
    a, b = (write_picture(folder / f"{name}.png", seed=seed) for seed, name in enumerate("ab"))
    lines = [line + str(first) + (f" --ei {last}" if pair else "") for first, last in ((a, b), (b, a))]
    (folder / "starts.txt").write_text("\n".join(lines), encoding="utf-8")
    files = {
        "vae": "vae.safetensors",
        "t5": "t5.safetensors",
        "tokenizer": "spiece.model",
        "sample_prompts": "starts.txt",
    }
    files |= {"clip": "clip.safetensors"} if TASKS[task].conditions.clip else {}
    return [*(f"--{flag}={folder / name}" for flag, name in files.items()), "--sample_at_first"]


def run_flags(folder, task, *more):
    """Four epochs of four batches of two, with the files of write_run_files."""
    own = ("--task", task, "--dataset_config", str(folder / "data.json"), "--max_train_epochs", "4", *more)
    return flags(folder, *own)
