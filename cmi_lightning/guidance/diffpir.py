"""DiffPIR: a proximal data step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step


@dataclass(frozen=True)
class DiffPIR(Guidance):
    """x̂₀ ← the mean of N(x₀; x̂₀, r²)·p(y | x₀) = x̂₀ + Aᵀ(A Aᵀ + Σ_n/r²)⁻¹(y − A x̂₀).

    r² = σ_t²/(λ α_t² + σ_t²/v) with v = ``prior_variance``; v = ∞ is the paper's ϱ²/λ, and λ = 1
    Bayes' rule. With a finite v the width of x₀ | x_t is right where the prior is N(·, v), and the
    guidance equals ΠGDM (weight "posterior") and MomentMatching there. No gradient of the network.

    Published with ``Renoise(0.3)``. The paper's λ is 4 times ours, on images in [0, 1]: 7 for
    deblurring, 1 for inpainting, 2 to 12 for super-resolution. Differs from the code: the last step
    counts as any other (there, neither its x̂₀ nor its data step is used). A nonlinear A enters by
    its derivative at x̂₀ (a Gauss–Newton step).

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import Renoise
    >>> sampler = Sampler(shipped_prior(), Renoise(0.3), [DiffPIR()], num_steps=100)

    Args:
        weight: λ, of the prior against the measurement.
        prior_variance: v.

    Source: Zhu et al. (2023), Alg. 1.
    """

    weight: float = number(1.0, "(0, inf)")
    prior_variance: float = number(math.inf, "(0, inf]")
    differentiable = False

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        precision = self.weight * step.t.alpha**2 + step.t.sigma**2 / self.prior_variance
        return step.problem.prox(x0, step.t.sigma**2 / precision)
