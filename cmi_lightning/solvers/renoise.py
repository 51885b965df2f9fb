"""Renoising: the estimate of the image, and noise of the next level."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cmi_lightning.checked import number
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class Renoise(Solver):
    """x_s = α_s x̂₀' + √(1 − ζ) σ_s ε̂ + √ζ σ_s z, with x̂₀' the guided x̂₀.

    ζ shares the noise of level s between old and new. It is not DDIM's η, whose noise is η√β̃: in
    directions that the measurement does not see, and in many steps, the variance becomes
    (1 + √(1 − ζ))/2 of the truth on a Gaussian prior. So draws are too narrow for ζ > 0, by √½ at
    ζ = 1. DDNM has ζ = η² and the network's ε̂, DiffPIR the recomputed one, SITCOM ζ = 1.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.guidance import DDNM
    >>> sampler = Sampler(shipped_prior(), Renoise(0.7), [DDNM()], num_steps=100)

    Args:
        zeta: ζ in [0, 1].
        network: ε̂ = (x_t − α_t x̂₀)/σ_t is the network's; else that of x̂₀'.

    Source: Wang et al. (2023), Eq. 12; Zhu et al. (2023), Alg. 1.
    """

    zeta: float = number(1.0, "[0, 1]")
    network: bool = False

    @property
    def stochastic(self) -> bool:
        """Whether ζ > 0."""
        return self.zeta > 0

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        x0 = guided_x0(step)
        base = step.x0.detach() if self.network else x0
        epsilon = (step.x.detach() - step.t.alpha * base) / step.t.sigma
        mean = step.s.alpha * x0 + math.sqrt(1 - self.zeta) * step.s.sigma * epsilon
        return Transition(mean, math.sqrt(self.zeta) * step.s.sigma, step.normal("solver"))
