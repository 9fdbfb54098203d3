"""Encodes the pictures and videos of a dataset and keeps their latents as cache files."""

from collections.abc import Sequence

from utils.caching import cache_latents
from utils.cli.cache import parse_cache_latents
from utils.cli.command import run


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job that `argv` asks for; None takes the command line's."""
    cache_latents(parse_cache_latents(argv), print)


if __name__ == "__main__":
    run(main)
