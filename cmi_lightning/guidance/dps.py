"""Diffusion posterior sampling."""

from __future__ import annotations

from dataclasses import dataclass

from cmi_lightning.guidance.base import Guidance, residual_gradient
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DPS(Guidance):
    """x_s ← x_s − ζ ∇_{x_t} ‖y − A x̂₀‖.

    Differs from the reference code: the norm is per sample, not over the batch; y holds measured
    entries only (there, noise on missing pixels enters the norm of inpainting); the gradient is of
    the unclamped x̂₀ (there, clamped pixels have none). The norm is not squared, as in the code and
    in the paper's Alg. 1 with ζ = ζ'/‖y − A x̂₀‖, up to a factor 2.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [DPS(0.5)], num_steps=100)

    Args:
        scale: ζ, the same at every step. The paper's values for 1,000 steps are 0.3 to 1; fewer
            steps need larger ones.

    Source: Chung et al. (2023), Alg. 1.
    """

    scale: float = 1.0

    @property
    def active(self) -> bool:
        """Whether ζ ≠ 0."""
        return self.scale != 0

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        return transition.shift(-self.scale * residual_gradient(step))
