"""Flags of each script, checked into frozen dataclasses: every mistake of a user ends here, in one line."""
