"""Makes the tiny Wan of this folder: python train_tiny_wan.py pictures|vae|model|evaluate."""

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]  # this folder's files, and the repository's wan/

from atlas import write_atlas  # noqa: E402
from emoji_pictures import read_emoji, split  # noqa: E402
from evaluate import evaluate  # noqa: E402
from train_model import train_model  # noqa: E402
from train_vae import train_vae  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["pictures", "vae", "model", "evaluate"])
    parser.add_argument("--minutes", type=float, default=35, help="how long vae or model trains, on the wall clock")
    parser.add_argument("--compile", action="store_true", help="vae: 3 times as fast after 3 minutes of C++")
    parser.add_argument("--go_on", action="store_true", help="model: start from the files that are there")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are read and written")
    args = parser.parse_args()
    known, held_out = split(read_emoji())
    print(f"{len(known.names)} known emoji, {len(held_out.names)} held out", flush=True)
    if args.stage == "pictures":
        write_atlas(known, held_out, args.folder)
    elif args.stage == "vae":
        train_vae(known, held_out, args.folder / "tiny_wan_vae.safetensors", args.minutes, args.compile)
    elif args.stage == "model":
        train_model(known, args.folder, args.minutes, args.go_on)
    else:
        evaluate(known, held_out, args.folder)


if __name__ == "__main__":
    main()
