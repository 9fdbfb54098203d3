"""Encodes the captions of a dataset and keeps their tokens as cache files."""

from collections.abc import Sequence

from utils.caching import cache_text
from utils.cli.cache import parse_cache_text
from utils.cli.command import run


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job that `argv` asks for; None takes the command line's."""
    cache_text(parse_cache_text(argv), print)


if __name__ == "__main__":
    run(main)
