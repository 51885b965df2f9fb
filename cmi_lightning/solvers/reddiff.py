"""RED-diff: variational inference by regularised optimisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition

FIRST, SECOND, TINY = 0.9, 0.99, 1e-8  # of Adam, as in the code


@dataclass(frozen=True)
class REDDiff(Solver):
    """One image μ is optimised by Adam along the chain; x_t = α_t μ + σ_t z is only a probe of it.

    The gradient is (1/m) Aᵀ(A μ − y) + (w/n)(ε̂ − z) with w = λ σ_t/α_t, m measurements and n
    pixels. It ends near a mode and is no sampler: draws differ by the probes' noise alone. As w → 0
    at the end, the measurement's noise is fitted. One evaluation a step, no gradient of the
    network. Start: A⁺y, where A is linear.

    The weights are means, as in the code: λ scales with m/n.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), REDDiff(), num_steps=100)

    Args:
        weight: λ.
        rate: Adam's step, about the change of a pixel a step.

    Source: Mardani et al. (2023), Alg. 1.
    """

    weight: float = number(0.25, "(0, inf)")
    rate: float = number(0.1, "(0, inf)")
    stochastic = True  # type: ignore[misc]
    conditional = True
    hooks = ()

    def start(self, level: Level, problem: Problem, noise: SampleNoise, like: Tensor) -> Tensor:
        """Return the first probe of A⁺y."""
        z = noise.normal("start", 0, like)
        return level.alpha * _first(problem, like) + level.sigma * z

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        problem, x, t, kept = step.problem, step.x.detach(), step.t, step.memory
        mean = kept["reddiff/mean"] if "reddiff/mean" in kept else _first(problem, x)
        zero = torch.zeros_like(x)
        count = kept.get("reddiff/count", torch.zeros_like(x.flatten(1)[:, 0])) + 1
        A, y = problem.operator, problem.y
        measured = A.zero_padding(torch.ones_like(y)).flatten(1).sum(1)
        data = -A.vjp(mean, (y - A(mean)) / measured.reshape(-1, *(1,) * (y.ndim - 1)))
        z, epsilon = ((x - t.alpha * m) / t.sigma for m in (mean, step.x0.detach()))
        g = data + self.weight * t.sigma / t.alpha / x[0].numel() * (epsilon - z)
        first = FIRST * kept.get("reddiff/first", zero) + (1 - FIRST) * g
        second = SECOND * kept.get("reddiff/second", zero) + (1 - SECOND) * g**2
        k = count.reshape(-1, *(1,) * (x.ndim - 1))
        unbiased = (second / (1 - SECOND**k)).sqrt() + TINY
        mean = mean - self.rate * first / (1 - FIRST**k) / unbiased
        kept.update({"reddiff/mean": mean, "reddiff/first": first, "reddiff/second": second})
        kept["reddiff/count"] = count
        return Transition(step.s.alpha * mean, step.s.sigma, step.normal("solver"))


def _first(problem: Problem, like: Tensor) -> Tensor:
    """Return A⁺y, or 0 (grey) for a nonlinear A."""
    A = problem.operator
    return A.pinv(problem.y) if isinstance(A, LinearOperator) else torch.zeros_like(like)
