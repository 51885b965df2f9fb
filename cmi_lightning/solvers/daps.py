"""Decoupled annealing posterior sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.spacing import power_grid
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DAPS(Solver):
    """Three parts a level: an image x̂ of x_t, a draw x₀ ~ N(x̂, r²)·p(y | x₀), noise of level s.

    r = ``spread``·ϱ, ϱ = σ_t/α_t. x̂ comes from ``ode_steps`` Euler steps of the probability flow
    from ϱ to ``ode_end``; one step to 0 is x̂₀ itself (``ode_steps=0``). For linear A the draw is
    exact, by one solve; else it takes Langevin steps x₀ ← x₀ + h g + √(2h) z with
    g = A'ᵀ(y − A(x₀))/σ_y² + (x̂ − x₀)/ϱ² and h falling to a hundredth over the chain.

    The paper has r = ϱ (``spread=1``) and 5 Euler steps. On a Gaussian prior x̂₀ then gives the
    right variance where y tells nothing; the flow's end, itself a draw of x₀ | x_t, up to twice it.
    On photographs r = ϱ fills holes with lattices: x₀ | x_t is far narrower than ϱ, and a network
    that is told ϱ_s takes out noise of ϱ_s, not of √(ϱ_s² + ϱ²). What is left stays. The released
    code has ϱ in its formula too. But its 100 short Langevin steps go no further than √(200 h) from
    x̂: 0.14 at the start and 0.014 at the end.

    Differs from the code: the draw for a linear A, with ``spread``; the likelihood is p(y | x₀)
    (there, without ½, and σ_y = 0.01 always). Cost of a step: ``ode_steps`` evaluations,
    at least 1.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), DAPS(ode_steps=0), num_steps=50, clamp=False)

    Args:
        ode_steps: Euler steps a level, at least 0.
        ode_end: σ/α at which they end, not below the prior's smallest.
        high: σ/α of the first level, or the prior's largest if that is less.
        low: σ/α of the last level.
        spread: r/ϱ, of the draw for a linear A.
        langevin_steps: of the draw for a nonlinear A.
        langevin_size: h at the first level.

    Raises:
        InputError: if y has no noise where A is nonlinear.

    Source: Zhang et al. (2024), Alg. 1.
    """

    ode_steps: int = number(5, "[0, inf)")
    ode_end: float = number(0.01, "(0, inf)")
    high: float = number(100.0, "(0, inf]")
    low: float = number(0.1, "(0, inf)")
    spread: float = number(0.3, "(0, inf)")
    langevin_steps: int = number(100, "[1, inf)")
    langevin_size: float = number(1e-4, "(0, inf)")
    stochastic = True  # type: ignore[misc]
    conditional = True
    hooks = ("guide_transition", "guide_sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise InputError(f"DAPS.low must be below DAPS.high, got {self.low} and {self.high}.")

    def levels(self, schedule: Schedule, num_steps: int | str | None) -> Schedule:
        """Return levels from ``high`` to ``low`` whose seventh roots are evenly spaced."""
        low, high = schedule.range
        count = 200 if num_steps is None else len(schedule.respace(num_steps))
        return schedule.at(power_grid(max(self.low, low), min(self.high, high), count))

    def evaluations(self, chain: Schedule, prior: Schedule) -> int:
        """Return those of the flow at every level, at least one."""
        rhos = (t.sigma / t.alpha for _, t, _ in chain.pairs())
        return sum((self._end(prior, rho) < rho and self.ode_steps) or 1 for rho in rhos)

    def _end(self, prior: Schedule, rho: float) -> float:
        """Return σ/α at which the flow from ϱ ends."""
        return min(max(self.ode_end, prior.range[0]), rho)

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        rho = step.t.sigma / step.t.alpha
        x = self._flow(step, rho)
        if isinstance(step.problem.operator, LinearOperator):
            z, n = step.normal("daps"), step.measurement_normal("daps/measurement")
            x = step.problem.draw(x, (self.spread * rho) ** 2, z, n)
        else:
            x = self._langevin(step, x, rho)
        return Transition(step.s.alpha * x, step.s.sigma, step.normal("solver"))

    def _flow(self, step: Step, rho: float) -> Tensor:
        """Return x̂ of x_t."""
        schedule, x = step.denoiser.schedule, step.x.detach() / step.t.alpha
        end = self._end(schedule, rho)
        if self.ode_steps == 0 or end == rho:
            return step.x0.detach()
        grid = power_grid(end, rho, self.ode_steps + 1)[::-1]
        for here, there in pairwise(grid):
            level = schedule.level(here)
            x0 = step.x0 if here == grid[0] else step.at(level.alpha * x, level).x0
            x = x + (there - here) / here * (x - x0.detach())
        return x

    def _langevin(self, step: Step, centre: Tensor, rho: float) -> Tensor:
        """Return a draw of N(centre, ϱ²)·p(y | x₀) for a nonlinear A."""
        problem, x = step.problem, centre
        if not problem.noisy:
            raise InputError("DAPS needs measurement noise: noise.sigma must be above 0.")
        done = 1 - (rho / self.high) ** (1 / 7)
        size = self.langevin_size * (1 - 0.99 * min(max(done, 0.0), 1.0))
        for k in range(self.langevin_steps):
            residual = (problem.y - problem.operator(x)) / problem.std**2
            g = problem.operator.vjp(x, residual) + (centre - x) / rho**2
            x = x + size * g + math.sqrt(2 * size) * step.normal(f"daps/{k}")
        return x
