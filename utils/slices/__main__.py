"""Lists, extracts, applies, removes and scales slices on disk: python -m utils.slices COMMAND."""

from utils.cli.command import run
from utils.cli.slices import main

if __name__ == "__main__":
    run(main)
