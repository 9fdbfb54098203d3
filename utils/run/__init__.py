"""One training run: what it was asked for, where it is, what it leaves on disk."""
