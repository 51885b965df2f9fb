"""The mixture benchmark's samplers, and the metrics of their draws; see mixture.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from mixture_problems import CENTRAL, FENCE, Instance
from torch import Tensor

from cmi_lightning.guidance import Guidance
from cmi_lightning.noise import SampleNoise
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition

# The metrics.


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Return the mean over directions (d, k) of the Wasserstein-1 distance of the projections.

    For as many draws a (n, d) as b (n, d) it is the mean distance of the sorted ones.
    """
    a, b = (_sorted(x @ directions) for x in (a, b))
    return float((a - b).abs().mean())


def _sorted(x: Tensor) -> Tensor:
    """Return the columns in order; many times faster than torch.sort, which tracks indices."""
    return torch.from_numpy(np.sort(x.T.contiguous().numpy(), axis=1)).T


def coverage(draws: Tensor, truths: Tensor) -> list[float]:
    """Return the share of truths (k, d) in the central intervals of the draws (n, d).

    The mean over coordinates, for each of ``CENTRAL``.
    """
    ordered = _sorted(draws)
    shares = []
    for level in CENTRAL:
        low, high = (round(q * (len(draws) - 1)) for q in ((1 - level) / 2, (1 + level) / 2))
        inside = (truths >= ordered[low]) & (truths <= ordered[high])
        shares.append(float(inside.double().mean()))
    return shares


# The samplers.


class BatchNoise(SampleNoise):
    """Noise of a whole batch from one generator per stream and step.

    The draws of one problem need not stay the same in another batch, and 2,000 generators a step
    would take most of the time.
    """

    def normal(self, stream: str, step: int, like: Tensor) -> Tensor:
        g = self.generator(0, stream, step)
        return torch.randn(like.shape, generator=g, dtype=torch.float32).to(like)

    def signs(self, stream: str, step: int, like: Tensor) -> Tensor:
        g = self.generator(0, stream, step)
        return torch.randint(0, 2, like.shape, generator=g).to(like) * 2 - 1


@dataclass(frozen=True)
class ScaledDDPM(Solver):
    """DDPM's mean with η times its noise: the solver of MCGdiff's DPS.

    Unlike DDIM's, its marginals are narrower than the chain's for η < 1.
    """

    eta: float
    stochastic = True  # type: ignore[assignment]

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        chain = step.coefficients
        mean = chain.from_x * step.x.detach() + chain.from_x0 * guided_x0(step)
        return Transition(mean, self.eta * math.sqrt(chain.variance), step.normal("solver"))


class Fence(Guidance):
    """Keeps diverging draws in a large box, so that they count as far off and not as missing."""

    differentiable = False

    def guide_sample(self, step: Step | None, x: Tensor) -> Tensor:
        if float(x.abs().max()) <= FENCE:  # false for NaN
            return x
        return x.nan_to_num(nan=FENCE).clamp(-FENCE, FENCE)


def draw(
    task: Instance, guidances: Sequence[Guidance], eta: float, solver: Solver | None = None
) -> Tensor:
    """Return a sampler's draws (n, d), float64; by :class:`ScaledDDPM` or a solver of its own."""
    solver = solver or ScaledDDPM(eta)
    fence = [Fence()] if "guide_sample" in solver.hooks else []
    steps = len(task.prior.schedule)
    sampler = Sampler(task.prior, solver, [*guidances, *fence], steps, clamp=False)
    like = task.reference.to(task.problem.y)
    draws = sampler.run(task.problem, BatchNoise(task.seed, ["batch"]), like).double()
    return draws if fence else Fence().guide_sample(None, draws)


class Scores(NamedTuple):
    """One sampler on one problem."""

    distance: float
    inside: list[float]  # shares of exact posterior draws in the central intervals
    truth: list[float]  # the same of the truth
    diverged: float  # share of draws at the fence


def score(draws: Tensor, task: Instance) -> Scores:
    """Compare draws (n, d) with the exact posterior."""
    return Scores(
        round(sliced_wasserstein(draws, task.reference, task.directions), 4),
        [round(c, 4) for c in coverage(draws, task.reference)],
        [round(c, 4) for c in coverage(draws, task.truth[None])],
        round(float((draws.abs().amax(1) >= FENCE).double().mean()), 4),
    )
