"""Plug-and-play diffusion models: a split Gibbs sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Schedule, reverse_coefficients
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.spacing import power_grid
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class PnPDM(Solver):
    """Two draws in turn: x ~ p(x₀ | x₀ + ρ ε = z) by the prior, and z ~ N(x, ρ²)·p(y | z).

    The first is an ancestral chain from σ/α = ρ to 0, the second exact, by one solve. ρ falls by
    ``decay`` an iteration to ``low`` and stays there. At a fixed ρ the law of x is
    p(x₀) N(y; A x₀, Σ_n + ρ² A Aᵀ): the posterior as ρ → 0, at the price of slow mixing. The state
    x_t is z. Cost of an iteration: ``inner`` evaluations at most, no gradient.

    On photographs the published ``low=0.3`` leaves stripes in holes: z is y where y is known, less
    noisy than ρ, and noise of ρ elsewhere. 0.1 is that of later benchmarks (InverseBench, 2025).
    ``inner=20`` does as well as the published 100, at a fifth of the cost.

    Differs from the code: the prior's chain starts at z's own level (there, at the next one of its
    grid, which understates the noise); the result is the last x, not a mean of the run's samples.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), PnPDM(inner=10), num_steps=20, clamp=False)

    Args:
        high: ρ of the first iteration, or the prior's largest σ/α if that is less.
        low: the least ρ.
        decay: factor on ρ an iteration, below 1.
        inner: levels of the chain from the prior's largest σ/α to its smallest, with 1/7-th powers
            evenly spaced; those below ρ are used.

    Raises:
        InputError: if an option is out of range.

    Source: Wu et al. (2024), Alg. 1.
    """

    high: float = 10.0
    low: float = 0.1
    decay: float = 0.9
    inner: int = 20
    stochastic = True  # type: ignore[misc]
    conditional = True
    hooks = ()
    needs_linear = True

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high or not 0 < self.decay < 1 or self.inner < 1:
            raise InputError(f"{self}: 0 < low < high, 0 < decay < 1 and inner ≥ 1 are needed.")

    def levels(self, schedule: Schedule, num_steps: int | str | None) -> Schedule:
        """Return the levels of ρ, one an iteration."""
        low, high = schedule.range
        count = 100 if num_steps is None else len(schedule.respace(num_steps))
        first, last = min(self.high, high), max(self.low, low)
        return schedule.at([max(first * self.decay**i, last) for i in reversed(range(count))])

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        """Return z of the next level; at the end, x."""
        x, s, problem = self._prior(step), step.s, step.problem
        if s.sigma == 0:
            return Transition(x, 0.0, step.normal("solver"))
        rho = s.sigma / s.alpha
        n = step.measurement_normal("pnpdm/measurement")
        z = problem.draw(x, rho**2, step.normal("solver"), n)
        return Transition(s.alpha * z, 0.0, step.normal("solver"))

    def _prior(self, step: Step) -> Tensor:
        """Return a draw of x₀ given x_t, by an ancestral chain."""
        schedule, x = step.denoiser.schedule, step.x.detach()
        rho = step.t.sigma / step.t.alpha
        grid = [r for r in power_grid(*schedule.range, self.inner) if r < rho * (1 - 1e-9)]
        chain = schedule.at([*grid, rho])
        for index, t, s in chain.pairs():
            x0 = (step if index == len(grid) else step.at(x, t)).x0.detach()
            q = reverse_coefficients(t, s)
            x = q.from_x * x + q.from_x0 * x0 + q.variance**0.5 * step.normal(f"prior/{index}")
        return x
