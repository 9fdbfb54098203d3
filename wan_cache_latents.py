"""Encodes the pictures and videos of a dataset with the Wan VAE and caches their latents."""

from collections.abc import Sequence

from utils.cli.command import run


def main(argv: Sequence[str] | None = None) -> None:
    """Caches latents as `argv` says; None takes the command line."""
    # Here, in this order: a mistake is found before the job is imported.
    from utils.cli.cache import parse_cache_latents

    config = parse_cache_latents(argv)
    from utils.caching import cache_latents

    cache_latents(config, print)


if __name__ == "__main__":
    run(main)
