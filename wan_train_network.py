"""Trains one slice of a Wan checkpoint."""

from collections.abc import Sequence

from utils.cli.command import run, say
from utils.cli.train import parse_train
from utils.training import train


def main(argv: Sequence[str] | None = None) -> None:
    train(parse_train(argv), say=say)


if __name__ == "__main__":
    run(main)
