"""What decides a run's results, option by option, so that two runs can be compared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmi_lightning.predict.source import source

LONGEST = 16  # items of a list that are compared one by one; longer ones by a checksum
SHOWN, LONG = 5, 60  # differences, and characters of a value, that a message shows


# Options that leave a finished sample's result as it is.
FREE = (
    "model.overwrite",
    "model.precision",
    "model.denoiser.network.checkpoint",
    "data.batch_size",
    "data.num_workers",
    "data.limit",
    "data.val_count",
    "data.strict",
)


def of_run(module: Any, trainer: Any, data: Any) -> dict[str, str]:
    """Return every option that decides a run's results, by name, with checksums of weights."""
    found = dict(options("model", module, weights=False))
    found.update(options("model.denoiser", module.denoiser))
    noise = module.measurement_noise
    found.update({"model.noise": str(getattr(noise, "level", noise))})
    found.update(options("data", data))
    found["trainer.precision"] = module.chosen.precision or str(trainer.precision)
    return {name: value for name, value in found.items() if name not in FREE}


def digest(*parts: Any) -> str:
    """Return a checksum of tensors (shape, type and bytes) and anything else by its ``repr``."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
        else:
            total.update(repr(part).encode())
    return total.hexdigest()


def options(name: str, value: Any, weights: bool = True) -> Iterator[tuple[str, str]]:
    """Yield ("name.option", value as text) for everything an object was made from.

    Options are the constructor's arguments that the object kept; modules add a checksum of their
    weights, and the user's own classes and functions one of their source. Custom classes need to do
    nothing, as long as they keep arguments by their names.

    >>> dict(options("scale", 0.5))
    {'scale': '0.5'}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, complex, str, Path)):
        yield name, str(value)
    elif isinstance(value, (Tensor, np.ndarray)):
        yield name, f"array {tuple(value.shape)} {digest(torch.as_tensor(value))}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from options(f"{name}.{key}", item)
    elif isinstance(value, Sequence) and len(value) <= LONGEST:
        for i, item in enumerate(value):
            yield from options(f"{name}.{i}", item)
    elif isinstance(value, Sequence):
        yield name, f"{len(value)} entries {digest(value)}"
    elif isinstance(value, Set):
        yield name, str(sorted(map(_text, value)))
    elif isinstance(value, functools.partial):
        yield from options(name, value.func)
        yield from options(f"{name}.args", value.args)
        yield from options(f"{name}.keywords", value.keywords)
    elif inspect.isroutine(value) or inspect.isclass(value):
        yield name, f"{value.__module__}.{value.__qualname__}"
        yield from source(value)
        if inspect.ismethod(value) and not inspect.isclass(value.__self__):
            yield from options(f"{name}.self", value.__self__)
    else:
        yield name, f"{type(value).__module__}.{type(value).__qualname__}"
        yield from source(type(value))
        if weights and isinstance(value, nn.Module):
            state = [part for pair in value.state_dict().items() for part in pair]
            yield f"{name}.checksum", digest(*state)
            kinds = {type(part) for part in value.modules()}
            for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
                yield from source(kind)
            if isinstance(value, nn.Sequential):  # what a function made of a library's parts
                yield f"{name}.parts", digest(_text(value))
            weights = False
        kept = _arguments(value)
        for key, item in kept.items():
            yield from options(f"{name}.{key}", item, weights)
        ours = isinstance(value, nn.Module) or dataclasses.is_dataclass(value)
        if not (kept or ours or type(value).__repr__ is object.__repr__):  # an Enum, a dtype, …
            yield f"{name}.text", _text(value)


def _text(value: Any) -> str:
    """Return what an object says of itself, without its address."""
    return re.sub(r"0x[0-9a-fA-F]+", "", repr(value))


def _arguments(value: Any) -> dict[str, Any]:
    """Return the constructor's arguments that an object kept."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    try:
        names = _parameters(type(value))
    except (TypeError, ValueError):
        return {}
    # Not getattr: what computes or warns is no plain attribute.
    kept = {**getattr(value, "__dict__", {})}
    if isinstance(value, nn.Module):
        kept |= {**value._modules, **value._buffers}
    return {name: kept[name] for name in names if kept.get(name) is not None}


def _parameters(kind: type) -> list[str]:
    """Return the names of a constructor's arguments, with those that it hands on by ``**``."""
    names: list[str] = []
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
            names += [p.name for p in own]
            if not any(p.kind is p.VAR_KEYWORD for p in own):
                break
    return names


def inputs(data: Any) -> dict[str, Path]:
    """Return the files and folders that a data module was told to read, by option."""
    found = {}
    for name, value in _arguments(data).items():
        if isinstance(value, (str, Path)):
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                if (path := Path(value).expanduser()).exists():
                    found[f"data.{name}"] = path
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Say how two sets of options differ, "a was 1 and is 2; …"; None where they agree."""
    names = [n for n in dict.fromkeys([*before, *now]) if before.get(n) != now.get(n)]
    # Another class has other options, which need not be told.
    names = [n for n in names if not any(n.startswith(f"{m}.") for m in names)]
    if not names:
        return None
    told = [
        f"{n} differs"
        if n.startswith("source of ")
        else f"{n} was {_short(before.get(n, 'absent'))} and is {_short(now.get(n, 'absent'))}"
        for n in names[:SHOWN]
    ]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "; ".join(told + more)


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}…"
