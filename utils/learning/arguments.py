"""The key=value arguments of optimizers and schedules, compared with what these take."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence

from wan.errors import InputError
from wan.values import literal, nearest, shown

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parse_arguments(flag: str, pairs: Sequence[str]) -> dict:
    """`key=value` pairs as a dict; InputError names the flag."""
    arguments = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key.strip() in arguments:
            raise InputError(f"{flag} {shown(key.strip())} is given twice: give it once")
        try:
            arguments[key.strip()] = literal(value.strip())
        except ValueError as error:
            raise InputError(f"{flag} {shown(pair)}: {error}") from None
    return arguments


def check_arguments(flag: str, arguments: Mapping, called: Callable, ours: Collection[str]) -> None:
    """InputError for a name that `called` does not take, or a value of another kind than its default.

    `ours` are those that it takes from the program, not from the user.
    """
    parameters = inspect.signature(called).parameters
    takes = {name: own.default for name, own in parameters.items() if own.kind in _NAMED and name not in ours}
    takes_any = any(own.kind is inspect.Parameter.VAR_KEYWORD for own in parameters.values())
    for name, value in arguments.items():
        if name in takes:
            if kind := _other_kind(value, takes[name]):
                raise InputError(f"{flag} {name}={shown(value)}: {name} must be {kind}")
        elif not takes_any or name in ours:
            known = f"it takes {', '.join(takes)}" if takes else "it takes none"
            what = f"{called.__name__.lstrip('_')} has no such argument{nearest(name, takes)}"
            raise InputError(f"{flag} {shown(name)}: {what}; {known}")


def _other_kind(value: object, default: object) -> str | None:
    """What a value should be, if its default is of another kind; None if it may be right."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(default, int | float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number or value is None else f"one number with a decimal point, such as {default}"
    if isinstance(default, tuple):
        fits = isinstance(value, tuple | list) and len(value) == len(default)
        return None if fits or value is None else f"{len(default)} numbers, such as {shown(default).replace(' ', '')}"
    return None
