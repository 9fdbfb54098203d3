"""Generates pictures, videos and latents from prompts with a Wan checkpoint."""

from collections.abc import Sequence

from utils.cli.command import run


def main(argv: Sequence[str] | None = None) -> None:
    """Generates what `argv` asks for; None takes the command line."""
    # Here, in this order: a mistake is found before the job is imported.
    from utils.cli.generate import parse_generate

    config = parse_generate(argv)
    from utils.generation import generate

    generate(config, say=print)


if __name__ == "__main__":
    run(main)
