"""Denoising diffusion null-space model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step


@dataclass(frozen=True)
class DDNM(Guidance):
    """x̂₀ ← x̂₀ + A⁺(y − A x̂₀): the measurement's part of the image is y's, the rest x̂₀'s.

    It trusts the measurement, noise included; with noise take
    :class:`cmi_lightning.solvers.DDNMPlus`. Published with ``Renoise(0.85**2, network=True)`` and
    100 steps. Clamping breaks A x̂₀ = y a little.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import Renoise
    >>> sampler = Sampler(shipped_prior(), Renoise(0.7225, True), [DDNM()], num_steps=100)

    Source: Wang et al. (2023), Alg. 1.
    """

    differentiable = False
    needs_linear = True

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        A = step.linearized
        return x0 + A.pinv(step.problem.y - A(x0))
