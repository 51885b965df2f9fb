"""Options of guidances, solvers and estimators: numbers within their range, names out of a list."""

from __future__ import annotations

import math
from dataclasses import Field, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cmi_lightning.errors import InputError

T = TypeVar("T")


def number(default: T, interval: str) -> T:
    """Return a dataclass' field with a default, whose value has to lie in an interval."""
    return field(default=default, metadata={"interval": interval})  # type: ignore[no-any-return]


class Checked:
    """A dataclass whose options are checked when it is made.

    An ``int`` is a whole number, a ``float`` a number and finite unless :func:`number` gives it
    another interval, and a ``Literal`` one of its names. A class with a ``__post_init__`` of its
    own calls this one first.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Walk(Checked):
    ...     length: float = number(1.0, "(0, inf]")
    ...     steps: int = number(1, "[1, inf)")
    >>> Walk(length=float("nan"))
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: Walk.length must be a number, above 0, got nan.
    >>> Walk(steps=2.5)
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: Walk.steps must be a whole number, at least 1, got 2.5.

    Raises:
        InputError: for an option that is none of these.
    """

    def __post_init__(self) -> None:
        """Check every option."""
        types = _types(type(self))  # type: ignore[arg-type]
        for option in fields(self):  # type: ignore[arg-type]
            if option.name in types and (
                wrong := _wrong(getattr(self, option.name), types[option.name], option)
            ):
                raise InputError(f"{type(self).__name__}.{option.name} must be {wrong}.")


@cache
def _types(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # names that are imported for type checkers alone
        return {}


def _wrong(value: Any, kind: Any, option: Field[Any]) -> str | None:
    """Return what a value should be, and what it is; None if all is well."""
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return None if value in names else f"one of {', '.join(names)}, got {value!r}"
    allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if (value is None and NoneType in allowed) or not {int, float, NoneType}.issuperset(allowed):
        return None
    interval = option.metadata.get("interval", "(-inf, inf)")
    whole = float not in allowed
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if fits and _inside(float(value), interval):
        return None
    words = _words(interval, whole)
    return f"a {'whole ' * whole}number{', ' * bool(words)}{words}, got {value!r}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high


def _inside(value: float, interval: str) -> bool:
    low, high = _ends(interval)
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _words(interval: str, whole: bool) -> str:
    """Return an interval in words: "[0, 1)" is "at least 0 and below 1"."""
    low, high = _ends(interval)
    if interval[0] + interval[-1] == "[]" and high < math.inf:
        return f"between {low:g} and {high:g}"
    words = []
    if low > -math.inf:
        words.append(f"{'at least' if interval[0] == '[' else 'above'} {low:g}")
    if high < math.inf:
        words.append(f"{'at most' if interval[-1] == ']' else 'below'} {high:g}")
    elif interval[-1] == ")" and not whole:
        words.append("finite")
    return " and ".join(words)
