"""Trains one slice of a Wan checkpoint."""

from collections.abc import Sequence

from utils.cli import run
from utils.cli_train import parse_train
from utils.training import train


def main(argv: Sequence[str] | None = None) -> None:
    train(parse_train(argv), say=print)


if __name__ == "__main__":
    run(main)
