"""Slices as files: the ledger, what is done with them, how they go on top of a base."""
