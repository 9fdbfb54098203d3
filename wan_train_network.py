"""Trains one slice of a Wan checkpoint."""

import sys
from collections.abc import Sequence

from utils.cli.command import INTERRUPTED, run, say


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as `argv` says; None takes the command line."""
    # Here, in this order: a mistake is found before the job is imported, and spawned workers import neither.
    from utils.cli.train import parse_train

    config = parse_train(argv)
    from utils.training import train

    if not train(config, say=say):
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run(main, needs_console=False)
