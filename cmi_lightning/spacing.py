"""Grids of noise levels, and the choice of a few out of many."""

from __future__ import annotations

import numpy as np

from cmi_lightning.errors import InputError, counted


def grid(low: float, high: float, count: int) -> np.ndarray:
    """Return evenly spaced numbers from low to high; one is the high end, the noisiest."""
    if count < 1:
        raise InputError(f"A schedule needs at least 1 level, got num_levels={count}.")
    return np.linspace(low, high, count) if count > 1 else np.array([high])


def power_grid(low: float, high: float, count: int, rho: float = 7.0) -> list[float]:
    """Return ``count`` numbers from low to high whose 1/ρ-th powers are evenly spaced.

    >>> power_grid(1.0, 9.0, 3, rho=2.0)
    [1.0, 4.0, 9.0]

    Source: Karras et al. (2022), Eq. 5.
    """
    ramp = grid(low ** (1 / rho), high ** (1 / rho), count)
    values: list[float] = (ramp**rho).tolist()
    return values


def spaced(total: int, spec: int | str) -> list[int]:
    """Indices kept by guided-diffusion's ``space_timesteps`` rule, ascending."""
    text = str(spec)
    try:
        if text.startswith("ddim"):
            wanted = int(text.removeprefix("ddim"))
            strides = [s for s in range(1, total + 1) if len(range(0, total, s)) == wanted]
            if not strides:
                raise InputError(f"num_steps={text}: no integer stride leaves {wanted} of {total}.")
            return list(range(0, total, strides[0]))
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"num_steps must be a count, 'a,b,c' or 'ddimK', got {spec!r}.") from error
    size, extra = divmod(total, len(counts))
    keep: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise InputError(
                f"num_steps={text}: a section of {length} levels cannot give "
                f"{counted(count, 'step')}; choose "
                f"between 1 and {length}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0 if count > 1 or section < len(counts) - 1 else length - 1.0
        for _ in range(count):  # the float is accumulated, as the published code does
            keep.append(start + round(position))
            position += stride
        start += length
    return keep
