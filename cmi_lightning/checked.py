"""Options: numbers within their range, names out of a list."""

from __future__ import annotations

import math
from dataclasses import field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cmi_lightning.errors import InputError

T = TypeVar("T")
FINITE = "(-inf, inf)"


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
        options = fields(self)  # type: ignore[arg-type]
        intervals = {f.name: f.metadata.get("interval", FINITE) for f in options}
        _refuse(self, _types(type(self)), intervals)  # type: ignore[arg-type]


def check(owner: object, *names: str, label: str | None = None, **intervals: str) -> None:
    """Check arguments that a constructor kept, by the types of its signature, as :class:`Checked`.

    ``label`` is told in place of the class: "data" for options that are ``--data.…``.

    >>> class Walk:
    ...     def __init__(self, steps: int, gait: Literal["trot", "canter"]) -> None:
    ...         self.steps, self.gait = steps, gait
    ...         check(self, "gait", steps="[1, inf)")
    >>> Walk(1, "crawl")
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: Walk.gait must be one of trot, canter, got 'crawl'.
    """
    types: dict[str, Any] = {}
    for cls in reversed(type(owner).__mro__):
        types |= _types(vars(cls)["__init__"]) if "__init__" in vars(cls) else {}
    _refuse(owner, types, dict.fromkeys(names, FINITE) | intervals, label)


def check_value(name: str, value: Any, kind: Any, interval: str = FINITE) -> None:
    """Check a value that ``name`` tells of, as :class:`Checked`.

    >>> check_value("data.batch_size", 0, int | Literal["auto"], "[1, inf)")
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: data.batch_size must be a whole number, at least 1, or auto, \
got 0.
    """
    if wrong := _wrong(value, kind, interval):
        raise InputError(f"{name} must be {wrong}, got {value!r}.")


def _refuse(
    owner: object, types: dict[str, Any], options: dict[str, str], label: str | None = None
) -> None:
    for name, interval in options.items():
        told = f"{label or type(owner).__name__}.{name}"
        check_value(told, getattr(owner, name), types.get(name), interval)


@cache
def _types(annotated: Any) -> dict[str, Any]:
    try:
        return get_type_hints(annotated)
    except NameError:  # names that are imported for type checkers alone
        return {}


def _wrong(value: Any, kind: Any, interval: str) -> str | None:
    """Return what a value should be; None if all is well."""
    allowed = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,))
    if value is None and NoneType in allowed:
        return None
    named = {one for one in allowed if get_origin(one) is Literal}
    names = [name for one in named for name in get_args(one)]
    numbers = allowed - named - {NoneType}
    if not numbers <= {int, float} or value in names:
        return None
    if not numbers:
        return f"one of {', '.join(map(str, names))}"
    whole = float not in numbers
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if fits and _inside(float(value), interval):
        return None
    words = _words(interval, whole)
    return ", or ".join(
        [f"a {'whole ' * whole}number{', ' * bool(words)}{words}", *map(str, names)]
    )


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
