"""Makes pictures, videos and latents from prompts with a Wan checkpoint."""

from collections.abc import Sequence

from utils.cli.command import run
from utils.cli.generate import parse_generate
from utils.generation import generate


def main(argv: Sequence[str] | None = None) -> None:
    generate(parse_generate(argv), say=print)


if __name__ == "__main__":
    run(main)
