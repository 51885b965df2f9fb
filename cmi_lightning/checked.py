"""Options: numbers within their range, names out of a list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    another interval, a ``Literal`` one of its names, and a list or tuple of numbers holds such
    numbers. A class with a ``__post_init__`` of its own calls this one first.

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


def check_value(name: str, value: Any, kind: Any, interval: str = FINITE, remedy: str = "") -> None:
    """Check a value that ``name`` tells of, as :class:`Checked`; ``remedy`` ends the sentence.

    >>> check_value("batch_size", 0, int | Literal["auto"], "[1, inf)")
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: batch_size must be a whole number, at least 1, or auto, got 0.
    """
    if wrong := _wrong(value, kind, interval):
        raise InputError(f"{name} must be {wrong}, got {value!r}{remedy}.")


def check_arguments(function: Any, values: Mapping[str, Any], **intervals: str) -> None:
    """Check a function's arguments, by the types of its signature, as :class:`Checked`.

    >>> def walk(steps: int = 1) -> None:
    ...     check_arguments(walk, locals(), steps="[1, inf)")
    >>> walk(0)
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: walk.steps must be a whole number, at least 1, got 0.
    """
    owner = function.__qualname__.removesuffix(".__init__")
    for name, kind in _types(function).items():
        if name in values:
            check_value(f"{owner}.{name}", values[name], kind, intervals.get(name, FINITE))


def as_python(value: float | Real) -> float:
    """Return a number, such as one of NumPy, as Python's ``int`` or ``float``."""
    return int(value) if isinstance(value, Integral) else float(value)


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
    """Return what a value should be; None if all is well, or the kind is none of numbers."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    words, others = [], []
    if numbers := {int, float}.intersection(kinds):
        whole = float not in numbers
        fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if fits and _inside(value if whole else float(value), interval):
            return None
        words.append(f"a {_number(whole, interval)}")
    for one in kinds:
        origin, inner = get_origin(one), get_args(one)
        if origin is Literal:
            if value in inner:
                return None
            words.append(f"one of {', '.join(map(str, inner))}" if inner[1:] else str(inner[0]))
        elif origin in (list, tuple, Sequence):
            if (told := _wrong_row(value, origin, inner, interval)) is None:
                return None
            words.append(told)
        elif one not in (int, float, NoneType):
            if not isinstance(one, type) or isinstance(value, one):
                return None
            others.append(one.__name__)
    return ", or ".join([*words, *others]) if words else None


def _wrong_row(value: Any, origin: Any, inner: tuple[Any, ...], interval: str) -> str | None:
    """Return what a list or tuple should be, as :func:`_wrong`."""
    each = inner[0]
    nested = get_origin(each) is list
    kinds = set(get_args(each) or (each,)) - {NoneType}
    if not kinds <= {int, float}:
        return None
    words = "lists of " * nested + _number(float not in kinds, interval, "s")
    count = len(inner) if origin is tuple and inner[-1] is not ... else None
    row = isinstance(value, Sequence) and not isinstance(value, str)
    if row and count in (None, len(value)) and not any(_wrong(v, each, interval) for v in value):
        return None
    return f"{count or 'a list of'} {words}"


def _number(whole: bool, interval: str, plural: str = "") -> str:
    """Return an interval of numbers in words."""
    words = _words(interval, whole)
    return f"{'whole ' * whole}number{plural}{', ' * bool(words)}{words}"


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
