"""Trains the tiny Wan of this folder: python train_tiny_wan.py vae|model|evaluate [--minutes M]."""

import argparse
from pathlib import Path

from emoji_pictures import read_emoji, split

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "model", "evaluate"])
    parser.add_argument("--minutes", type=float, default=35, help="how long a stage trains, on the wall clock")
    parser.add_argument("--compile", action="store_true", help="train the VAE 3 times as fast, after 3 minutes of C++")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are read and written")
    args = parser.parse_args()
    known, held_out = split(read_emoji())
    print(f"{len(known.names)} known emoji, {len(held_out.names)} held out", flush=True)
    if args.stage == "vae":
        from train_vae import train_vae

        train_vae(known, held_out, args.folder / "tiny_wan_vae.safetensors", args.minutes, args.compile)


if __name__ == "__main__":
    main()
