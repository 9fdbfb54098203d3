"""Tiny models of every task that starts from pictures, what they are given, and single batches, for the tests."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tiny_run import CONFIG
from torch import nn

from utils.learning.flow_matching import TimestepConfig
from wan.configs import TASKS
from wan.model import PICTURE_TOKENS, WanModel

CLIP_WIDTH = 24  # of the oracle's CLIP
MODELS = {
    "i2v-14B": replace(CONFIG, model_type="i2v", in_dim=36, image_dim=CLIP_WIDTH),
    "i2v-A14B": replace(CONFIG, model_type="i2v", in_dim=36),
    "flf2v-14B": replace(CONFIG, model_type="flf2v", in_dim=36, image_dim=CLIP_WIDTH),
    "ti2v-5B": replace(CONFIG, model_type="ti2v", in_dim=48, out_dim=48),
}


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
    save_file(weights, path, {"num_heads": "4", "text_len": "8"})
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


def tiny_step(model, i2v_share=0.0, seed=3, preserved=None, **timesteps):
    """What `backward` reads of a run, around a model."""
    config = SimpleNamespace(timesteps=TimestepConfig("uniform", **timesteps), i2v_share=i2v_share)
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        config=config,
        seed=seed,
        model=model,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        preserved=preserved,
    )
