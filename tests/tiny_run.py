"""A tiny training run's files and flags, for the tests: random weights in the real formats, caches of noise."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from utils.cli.train import parse_train
from utils.data.cache_files import image_latents_path, text_path, write_latents, write_text
from utils.run.state import State
from utils.training import train
from wan.configs import WanConfig
from wan.model import WanModel

ORACLE = Path(__file__).parent / "oracle"
CONFIG = WanConfig("t2v", 48, 64, 4, 2, 16, 16, text_dim=48, freq_dim=16, text_len=8)
# Two sizes, so that batches of two leave a single one: five batches an epoch.
ITEMS = {**{f"wide{i}": (32, 16) for i in range(3)}, **{f"high{i}": (16, 32) for i in range(5)}}


def write_dit(path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = {name: tensor.to(dtype) for name, tensor in WanModel(CONFIG).state_dict().items()}
    save_file(weights, path, {"num_heads": "4", "text_len": "8"})
    return path


def write_dataset(folder: Path, prefix: str = "") -> Path:
    """Eight pictures, whose captions are their names, with caches of random latents and texts; the toml's path."""
    (folder / "pics").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for stem, size in ((prefix + name, size) for name, size in ITEMS.items()):
        Image.new("RGB", size).save(folder / "pics" / f"{stem}.png")
        (folder / "pics" / f"{stem}.txt").write_text(stem, encoding="utf-8")
        latents = torch.randn(16, 1, size[1] // 8, size[0] // 8, generator=generator).bfloat16()
        write_latents(image_latents_path(folder / "pics", stem, size), latents, size)
        write_text(text_path(folder / "pics", stem), torch.randn(3, 48, generator=generator).bfloat16(), stem)
    table = {"image_directory": (folder / "pics").as_posix(), "caption_extension": ".txt", "batch_size": 2}
    table |= {"resolution": [16, 32], "enable_bucket": True}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    (folder / "data.toml").write_text("\n".join(["[[datasets]]", *lines]), encoding="utf-8")
    return folder / "data.toml"


def write_inputs(folder: Path) -> Path:
    """What every run reads: the base checkpoint, the dataset with its caches; the folder."""
    write_dit(folder / "base.safetensors")
    write_dataset(folder)
    return folder


def write_sample_models(folder: Path) -> list[str]:
    """The oracle's VAE and text encoder as files, a prompt file; the flags that name them."""
    for name, file in (("vae_wan21", "vae.safetensors"), ("umt5_encoder", "t5.safetensors")):
        stored = load_file(ORACLE / f"{name}.safetensors")
        weights = {key.removeprefix("weight."): value for key, value in stored.items() if key.startswith("weight.")}
        save_file(weights, folder / file)
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat sits"]), model_writer=words, vocab_size=290, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(words.getvalue())
    prompts = "a red cat --w 16 --h 16 --s 2 --d 7 --l 1\na cat --w 16 --h 16 --f 5 --s 1 --n red\n"
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    files = {"vae": "vae.safetensors", "t5": "t5.safetensors", "tokenizer": "spiece.model"}
    files |= {"sample_prompts": "prompts.txt"}
    return [f"--{flag}={folder / file}" for flag, file in files.items()]


def flags(folder: Path, *more: str) -> list[str]:
    """A run of 2 epochs of 5 steps in `folder`, which write_dit and write_dataset have filled."""
    return [
        *("--task", "t2v-A14B", "--dit", str(folder / "base.safetensors"), "--ff", "0.1", "--ffid", "2"),
        *("--dataset_config", str(folder / "data.toml"), "--output_dir", str(folder / "out"), "--output_name", "one"),
        *("--max_train_epochs", "2", "--learning_rate", "1e-2", "--seed", "3", "--max_data_loader_n_workers", "0"),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", *more),
    ]


def run(folder: Path, *more: str) -> list[str]:
    """Trains as a user would; the lines that were said."""
    lines = []
    train(parse_train(flags(folder, *more)), say=lines.append)
    return lines


def some_state(name: str = "a", **changes) -> State:
    """A state of a run of one matrix with three values, after step 3; `changes` are fields of it."""
    tables = {"trained": {"a": torch.arange(3.0)}, "optimizer": {}, "scheduler": {}, "scaler": {}}
    fields = {"settings": {}, "saved_at": 5, "epoch": 0, "batch": 3, "step": 3, "losses": [0.5], "planned_steps": 9}
    return State(name=name, **{**fields, **tables, **changes})
