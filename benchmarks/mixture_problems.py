"""The mixture benchmark's problems; see mixture.py."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.exact import GaussianMixture
from cmi_lightning.operators import Dense
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Schedule

SPACING = 8.0  # of the components
ETA = {20: 0.6, 100: 0.85}  # share of DDPM's noise, by the number of steps
DIRECTIONS = 100
FENCE = 1e3  # draws that leave this box have diverged; the prior's stay within ±25
CENTRAL = (0.5, 0.9)
PRIOR_VARIANCE = 2 * SPACING**2 + 1  # of a coordinate, with equal weights


RULE = "DPS, scale=0.2"  # MCGdiff's: 0.1/‖r‖ ∇‖r‖²
FIXED = {"c=1": 1.0, "c=-1": -1.0}  # not tuned: ascent, and descent, which tuning never tries


Results = dict[str, Any]  # of a run, as its file holds them


class Cell(NamedTuple):
    """One row of the table: d, m = d_y, and the number of levels."""

    dim: int
    measured: int
    steps: int

    def __str__(self) -> str:
        return f"d={self.dim} m={self.measured} steps={self.steps}"


CELLS = [Cell(d, m, n) for n in (20, 100) for d in (8, 80, 800) for m in (1, 2, 4)]


@dataclass(frozen=True)
class Size:
    """How much is computed: problems per cell (in tuning: per m) and draws per problem.

    The cells of 800 dimensions and 100 steps cost half of it all; there the draws and the
    tuning problems are halved.
    """

    cells: Sequence[Cell] = tuple(CELLS)
    tuning_problems: int = 4
    tuning_draws: int = 250
    problems: int = 20
    draws: Mapping[int, int] = field(default_factory=lambda: {8: 2000, 80: 1000, 800: 500})

    def halved(self, cell: Cell, number: int) -> int:
        """Return the number for a cell."""
        return number // 2 if cell.dim == 800 and cell.steps == 100 else number


QUICK = Size([c for c in CELLS if c.dim == 8 and c.steps == 20], 1, 100, 3, {8: 300})


def generator(*key: object) -> torch.Generator:
    """Return a generator that belongs to a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


# The construction.


def alpha_bars() -> np.ndarray:
    """ᾱ of 1,000 levels: linear βs in *reverse*, 0.02 down to 1e-4, after ᾱ_0 = 1."""
    return np.cumprod(1 - np.concatenate([[0.0], np.linspace(0.02, 1e-4, 999)]))


def time_grid(steps: int, singular_values: Sequence[float], std: float) -> list[int]:
    """Return ``steps`` indices into :func:`alpha_bars`, from 0 (clean) to 999.

    They step down √ᾱ evenly until √ᾱ < 0.01, and the rest of them is spread evenly up to 999. One
    is put where a measured direction of the sample is as noisy as its measurement,
    ᾱ std² = (1 − ᾱ) s².

    Args:
        steps: how many, the clean level included.
        singular_values: s of the operator.
        std: of the measurement noise.
    """
    abar = alpha_bars()
    root, s = np.sqrt(abar), np.asarray(singular_values)
    gap = np.abs(std**2 * abar - (1 - abar) * s[:, None] ** 2).min(0)
    special = int(gap.argmin())
    end = int(np.flatnonzero(root < 1e-2)[0])
    stride = (1 - root[end]) / (steps - 1 - (special > 0))
    grid = [0]
    for i in range(1, end):
        if root[grid[-1]] - root[i] >= stride or i == special:
            grid.append(i)
    rest = np.ceil(np.linspace(grid[-1], len(abar) - 1, steps - len(grid) + 1))
    return grid + [int(i) for i in rest[1:]]


def schedule(grid: Sequence[int]) -> Schedule:
    """Return the noise levels of a grid; the clean one is where every chain ends."""
    abar = alpha_bars()[list(grid[1:])]
    return Schedule(
        np.sqrt(abar).tolist(), np.sqrt(1 - abar).tolist(), [float(i) for i in grid[1:]]
    )


def means(dim: int) -> Tensor:
    """Return (8i, 8j, 8i, 8j, …) for i, j in −2 … 2, (25, dim)."""
    ij = SPACING * torch.cartesian_prod(*[torch.arange(-2, 3, dtype=torch.float64)] * 2)
    return ij.repeat(1, dim // 2)


def weights(dim: int) -> Tensor:
    """Return the components' weights, ∝ χ²₁, drawn once per dimension."""
    w = torch.randn(25, generator=generator("weights", dim), dtype=torch.float64) ** 2
    return w / w.sum()


def measurement(cell: Cell, g: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Return A (m, d), its singular values (sorted uniform draws), and the noise's std.

    std is uniform between 0 and the largest singular value.
    """
    U, _, Vh = torch.linalg.svd(
        torch.randn(cell.measured, cell.dim, generator=g, dtype=torch.float64), full_matrices=False
    )
    s = torch.rand(cell.measured, generator=g, dtype=torch.float64).sort(descending=True).values
    std = float(torch.rand((), generator=g, dtype=torch.float64) * s.max())
    return U * s @ Vh, s, std


@dataclass(frozen=True)
class Instance:
    """One problem with draws of its exact posterior.

    Attributes:
        prior: the mixture, with the problem's noise levels.
        problem: y, A and the noise.
        truth: the x₀ (d,) that was measured.
            reference: its draws (n, d), which samplers are compared with.
        second: as many others, for the floor.
        directions: unit vectors (d, 100) of the metric.
        seed: of the samplers' noise.
    """

    prior: GaussianMixture
    problem: Problem
    truth: Tensor
    posterior: GaussianMixture
    reference: Tensor
    second: Tensor
    directions: Tensor
    seed: int


def instance(cell: Cell, role: str, index: int, count: int) -> Instance:
    """Return a problem; those of different roles or indices are independent.

    Those of 20 and of 100 steps are the same problems.
    """
    g = generator("problem", cell.dim, cell.measured, role, index)
    A, s, std = measurement(cell, g)
    levels = schedule(time_grid(cell.steps, s.tolist(), std))
    prior = GaussianMixture(means(cell.dim), 1.0, weights(cell.dim), levels)
    prior.fast = True  # rows need not be independent to the last bit here
    truth = prior.sample(1, g)
    y = truth @ A.mT + std * torch.randn(1, cell.measured, generator=g, dtype=torch.float64)
    posterior = prior.condition(A, y[0], std)
    directions = torch.randn(cell.dim, DIRECTIONS, generator=g, dtype=torch.float64)
    reference, second = (posterior.sample(count, g) for _ in range(2))
    seed = int(torch.randint(2**31, (), generator=g))
    dtype = torch.float64 if cell.dim == 8 else torch.float32  # single precision is twice as fast
    return Instance(
        prior.to(dtype),
        Problem(y.to(dtype).expand(count, -1), Dense(A.to(dtype)), std),
        truth[0],
        posterior,
        reference,
        second,
        directions / directions.norm(dim=0),
        seed,
    )
