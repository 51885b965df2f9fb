"""TMPD: row sums for the covariance of the measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step


@dataclass(frozen=True)
class TMPD(Guidance):
    """x̂₀ ← x̂₀ + Σ Aᵀ d ⊙ (y − A x̂₀), d = 1/(σ_y² + A Σ Aᵀ 1), Σ = (σ_t²/α_t) Jᵀ.

    Row sums stand for A Σ Aᵀ: right where that is diagonal (a mask of independent pixels), too
    large where it is positive, and wrong where signs mix (most blurs are safe, random matrices are
    not). Negative sums count as 0 and their share is logged, "tmpd/negative". The whole solve is
    :class:`MomentMatching`. Cost of a step: 2 vector-Jacobian products. No step size.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [TMPD()], num_steps=100)

    Source: Boys et al. (2023), Tweedie moment projected diffusions, with the row-sum approximation.
    """

    needs_noise = True

    def passes(self, calls: int, chain: Schedule) -> float:
        return 2 * calls

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        A, r, c = step.linearized, step.residual.detach(), step.covariance_factor
        ones = A.zero_padding(torch.ones_like(r))
        sums = c * A(step.vjp(A.adjoint(ones)))
        negative = A.zero_padding((sums < 0).to(r)).flatten(1).sum(1)
        step.log["tmpd/negative"] = negative / ones.flatten(1).sum(1)
        d = 1 / (step.problem.std**2 + sums.clamp_min(0))
        return x0 + c * step.vjp(A.adjoint(d * r))
