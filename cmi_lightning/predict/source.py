"""The source of a user's own classes and functions, so that changed code is another run."""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
LIBRARIES = ("cmi_lightning", "torch", "lightning", *sys.stdlib_module_names)
Plain = (bool, int, float, complex, str, bytes, tuple)


def source(thing: Any) -> Iterator[tuple[str, str]]:
    """Yield ("source of name", checksum) for a class or function of the user's own.

    The checksum covers what the code refers to as well: base classes, functions, constants and
    closures. Code of libraries is left out. A note tells where there is no Python code to read.

    >>> list(source(print))
    []
    """
    if not _own(thing):
        return
    name = f"{thing.__module__}.{thing.__qualname__}"
    parts = list(_parts(thing, set()))
    if not parts:
        log.warning("Cannot tell whether the code of %s changes: it has no Python source.", name)
        return
    yield f"source of {name}", hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()


def _own(thing: Any) -> bool:
    """Whether a class, function or module is the user's: of no library that was installed."""
    name = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    root = str(name).partition(".")[0]
    if root == "__main__":
        return True
    file = Path(getattr(sys.modules.get(str(name)), "__file__", None) or "")
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return root not in LIBRARIES and not installed


def _parts(thing: Any, seen: set[int]) -> Iterator[str]:
    """Yield the source of a class or function, and of what it refers to."""
    thing = inspect.unwrap(thing.__func__ if inspect.ismethod(thing) else thing)
    if id(thing) in seen or not _own(thing):
        return
    seen.add(id(thing))
    readable = True
    try:
        yield inspect.getsource(thing)
    except (OSError, TypeError):  # typed at a prompt, or compiled
        readable = False
        if isinstance(thing, types.FunctionType):
            yield _compiled(thing.__code__)
    functions = [thing] if isinstance(thing, types.FunctionType) else []
    if inspect.isclass(thing):
        for base in thing.__bases__:
            yield from _parts(base, seen)
        for member in vars(thing).values():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(member, types.FunctionType) and _own(member):
                functions.append(member)
                if not readable and id(member) not in seen:
                    yield _compiled(member.__code__)
    for function in functions:
        for cell in function.__closure__ or ():
            try:
                yield from _value("", cell.cell_contents, (), seen)
            except ValueError:  # not filled
                continue
        names = tuple(dict.fromkeys(_names(function.__code__)))
        for name in names:
            if name in function.__globals__:
                yield from _value(name, function.__globals__[name], names, seen)


def _value(name: str, value: Any, names: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """Yield what a name of the user's code stands for."""
    if isinstance(value, Plain):
        yield f"{name}={value!r}"
    elif isinstance(value, types.ModuleType):
        if _own(value):
            for inner in names:
                yield from _value(inner, vars(value).get(inner), (), seen)
    elif inspect.isclass(value) or isinstance(value, (types.FunctionType, types.MethodType)):
        yield from _parts(value, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code and the functions inside it refer to."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _compiled(code: types.CodeType) -> str:
    """Return compiled code as text."""
    inner = [_compiled(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {inner}"
