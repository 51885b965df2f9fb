"""Plug-and-play diffusion models: a split Gibbs sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.checked import number
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

    Source: Wu et al. (2024), Alg. 1.
    """

    high: float = number(10.0, "(0, inf]")
    low: float = number(0.1, "(0, inf)")
    decay: float = number(0.9, "(0, 1)")
    inner: int = number(20, "[1, inf)")
    stochastic = True  # type: ignore[misc]
    conditional = True
    hooks = ()
    needs_linear = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise InputError(f"PnPDM.low must be below PnPDM.high, got {self.low} and {self.high}.")

    def levels(self, schedule: Schedule, num_steps: int | str | None) -> Schedule:
        """Return the levels of ρ, one an iteration."""
        low, high = schedule.range
        count = 100 if num_steps is None else len(schedule.respace(num_steps))
        first, last = min(self.high, high), max(self.low, low)
        return schedule.at([max(first * self.decay**i, last) for i in reversed(range(count))])

    def evaluations(self, chain: Schedule, prior: Schedule) -> int:
        """Return one for every level of the prior's chains."""
        return sum(len(self._grid(prior, t.sigma / t.alpha)) for _, t, _ in chain.pairs())

    def _grid(self, prior: Schedule, rho: float) -> list[float]:
        """Return σ/α of the chain from ρ down, ascending."""
        return [*(r for r in power_grid(*prior.range, self.inner) if r < rho * (1 - 1e-9)), rho]

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
        chain = schedule.at(self._grid(schedule, step.t.sigma / step.t.alpha))
        for index, t, s in chain.pairs():
            x0 = (step if index == len(chain) - 1 else step.at(x, t)).x0.detach()
            q = reverse_coefficients(t, s)
            x = q.from_x * x + q.from_x0 * x0 + q.variance**0.5 * step.normal(f"prior/{index}")
        return x
