"""Diffusion with spherical Gaussian constraint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance, residual_gradient
from cmi_lightning.linalg import unit
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DSG(Guidance):
    """The noise is turned towards −∇_{x_t} ‖y − A x̂₀‖ and put on the sphere of radius √n.

    z ← √n · unit(z + rate·(d − z)) with d = −√n · unit(∇_{x_t} ‖y − A x̂₀‖), x_s = mean + std·z.
    There is no step size: a step always has the length √n·std of typical noise.

    Differs from the reference code: gradient and norms are per sample (there, one norm is broadcast
    wrongly for batches); with learned variance each pixel keeps its own std (there, the first
    pixel's serves all); the last step, which adds no noise, is not moved (there, it is moved by the
    first pixel's clipped std).

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [DSG(rate=0.1)], num_steps=100)

    Args:
        rate: guidance rate in [0, 1]: 0 only normalises the noise, 1 follows the gradient alone.
        interval: guide every ``interval``-th step of the respaced chain.

    Source: Yang et al. (2024), Alg. 1.
    """

    rate: float = number(0.2, "[0, 1]")
    interval: int = number(1, "[1, inf)")
    stochastic = True

    def passes(self, calls: int, chain: Schedule) -> float:
        """Return one product at every ``interval``-th step but the last, which is index 0."""
        return (calls - 1) // self.interval

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        if step.index % self.interval or step.s.sigma == 0:
            return transition
        z, radius = transition.noise, math.sqrt(transition.noise[0].numel())
        d = -radius * unit(residual_gradient(step))
        return replace(transition, noise=radius * unit(z + self.rate * (d - z)))
