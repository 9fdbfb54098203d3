"""The one error that tells a user what to change."""


class InputError(ValueError):
    """A file, flag or setting that cannot be used; its message is one line: what came, what is allowed, what to do."""
