"""Writes sampling settings into the metadata of a checkpoint, whose tensors keep their bytes.

python suggest_settings.py tiny_wan_t2v.safetensors sample_steps=20 sample_flow_shift=3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's utils/ and wan/

from utils.cli.command import run
from utils.sampling.defaults import KEYS, read_sample_defaults
from utils.slice_saving import read_header, stream, write_safetensors
from wan.errors import InputError

# What the tiny Wan draws best with: it has never seen Wan's own negative prompt.
TINY_WAN = {
    "sample_steps": "20",
    "sample_guidance_scale": "2",
    "sample_flow_shift": "3",
    "sample_negative_prompt": "",
}


def suggest(path: Path, settings: dict[str, str]) -> None:
    """Replaces the file by one with these keys of its metadata set; InputError if a value cannot be used."""
    if unknown := settings.keys() - KEYS.keys():
        raise InputError(f"unknown key {', '.join(sorted(unknown))}; allowed: {', '.join(KEYS)}")
    read_sample_defaults(settings, path)
    tensors, metadata = read_header(path)
    write_safetensors(path, tensors, {**metadata, **settings}, stream(tensors.values()))


def main(argv: list[str] | None) -> None:
    file, *pairs = sys.argv[1:] or [Path(__file__).with_name("tiny_wan_t2v.safetensors")]
    suggest(Path(file), dict(pair.partition("=")[::2] for pair in pairs) or TINY_WAN)


if __name__ == "__main__":
    run(main)
