"""DDPM and DDIM: one network evaluation per step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling: x_s ~ N(a x_t + b x̂₀, v), the exact posterior q(x_s | x_t, x₀ = x̂₀).

    With β the variance that the chain adds from s to t and β̃ = β σ_s²/σ_t²:
    v = β̃ ("small"), v = β ("large"), or log v = f log β + (1 − f) log β̃ ("learned") with the
    network's fraction f per pixel. The last step adds no noise.

    >>> DDPM("large").stochastic
    True

    Args:
        variance: which variance.

    Raises:
        InputError: for "learned" with a network that has no variance output.

    Source: Ho et al. (2020), Alg. 2; Nichol & Dhariwal (2021), Eq. 15.
    """

    variance: Literal["small", "large", "learned"] = "small"
    stochastic = True  # type: ignore[misc]

    @property
    def needs_variance(self) -> bool:  # type: ignore[override]
        """Whether the variance comes from the network."""
        return self.variance == "learned"

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        chain = step.coefficients
        mean = chain.from_x * step.x.detach() + chain.from_x0 * guided_x0(step)
        return Transition(mean, self._std(step), step.normal("solver"))

    def _std(self, step: Step) -> float | Tensor:
        chain = step.coefficients
        if step.s.sigma == 0 or chain.beta == 0:  # the end, or equal levels
            return 0.0
        if self.variance == "small":
            return math.sqrt(chain.variance)
        if self.variance == "large":
            return math.sqrt(chain.beta)
        fraction = step.prediction.variance_fraction
        if fraction is None:
            raise InputError(
                "solver.variance=learned needs a network with learned variance (2C output "
                "channels); use small or large."
            )
        low, high = math.log(chain.variance), math.log(chain.beta)
        return torch.exp(0.5 * (low + fraction.detach() * (high - low)))


@dataclass(frozen=True)
class DDIM(Solver):
    """x_s = α_s x̂₀ + √(σ_s² − v) ε̂ + √v z, with ε̂ = (x_t − α_t x̂₀)/σ_t and v = η² β̃.

    η = 0 is deterministic; η = 1 has DDPM's posterior variance, and the same law.

    >>> DDIM().stochastic, DDIM(eta=1.0).stochastic
    (False, True)

    Args:
        eta: share of DDPM's noise, in [0, 1].

    Source: Song et al. (2021), Eq. 12 and 16.
    """

    eta: float = number(0.0, "[0, 1]")

    @property
    def stochastic(self) -> bool:
        """Whether η > 0."""
        return self.eta > 0

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        x0 = guided_x0(step)
        epsilon = (step.x.detach() - step.t.alpha * x0) / step.t.sigma
        variance = self.eta**2 * step.coefficients.variance
        direction = math.sqrt(max(step.s.sigma**2 - variance, 0.0))
        mean = step.s.alpha * x0 + direction * epsilon
        return Transition(mean, math.sqrt(variance), step.normal("solver"))
