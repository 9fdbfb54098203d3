"""Encodes the captions of a dataset with Wan's text encoder and caches the embeddings."""

from collections.abc import Sequence

from utils.cli.command import run


def main(argv: Sequence[str] | None = None) -> None:
    """Caches text embeddings as `argv` says; None takes the command line."""
    # Here, in this order: a mistake is found before the job is imported.
    from utils.cli.cache import parse_cache_text

    config = parse_cache_text(argv)
    from utils.caching import cache_text

    cache_text(config, print)


if __name__ == "__main__":
    run(main)
