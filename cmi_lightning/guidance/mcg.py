"""Manifold-constrained gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cmi_lightning.guidance.base import Guidance, residual_gradient
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class MCG(Guidance):
    """DPS's step, then a projection onto a measurement noised to the sample's level.

    x_s ← x_s − ζ ∇_{x_t} ‖y − A x̂₀‖, then x_s ← x_s − A⁺(A x_s − y_s) with
    y_s = α_s y + σ_s A z, z ~ N(0, I). The last projection is onto y itself, noise included: MCG
    trusts the measurement.

    Where A⁺ is exact (masks, downsampling) this is the orthogonal projection onto A x = y_s. The A⁺
    of a blur leaves out small singular values, which would magnify noise; there only what is well
    measured is replaced. Where A⁺ is damped instead (motion blur with reflected borders), repeated
    corrections undo the damping and the noise comes back: use circular borders there.

    Differs from the reference codes: the projection is one for every operator, where the DPS
    repository's keeps the wrong part of the image for inpainting and deblurring and upsamples by
    nearest neighbour instead of A⁺; y is noised to the level s of the sample it replaces, where
    both repositories noise it to t; noise is put on measured entries only; norms are per sample.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [MCG(0.5)], num_steps=100)

    Args:
        scale: ζ.
        level: the level that y is noised to, "then" (s) or "now" (t). On a mask, "now" is the
            original repository's inpainting form, (1 − m)⊙(x_s − ζ∇) + m⊙y_t.

    Raises:
        InputError: for an operator that is not linear.

    Source: Chung et al. (2022), Alg. 1.
    """

    scale: float = 1.0
    level: Literal["then", "now"] = "then"
    needs_linear = True

    def passes(self, calls: int, chain: Schedule) -> float:
        """Return the gradients; the projection costs none."""
        return calls * (self.scale != 0)

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        if self.scale == 0:
            return transition
        return transition.shift(-self.scale * residual_gradient(step))

    def guide_sample(self, step: Step, x: Tensor) -> Tensor:
        A, level = step.linearized, {"now": step.t, "then": step.s}[self.level]
        noised = level.alpha * step.problem.y + level.sigma * A(step.normal("mcg"))
        return x - A.pinv(A(x) - noised)
