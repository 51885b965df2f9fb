"""Hard data consistency and stochastic resampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.linalg import norm, per_sample
from cmi_lightning.step import Step


@dataclass(frozen=True)
class ReSample(Guidance):
    """z_s ← a draw of N(z; α_s ẑ₀ʸ, σ_s²)·N(z; z_s, γβ̃), where ẑ₀ʸ = argmin ‖y − A(D(z))‖ from ẑ₀.

    Every ``interval``-th step of the last ``share`` of the chain, Adam descends ‖y − A(D(z))‖² from
    ẑ₀ until the residual of a sample is the noise's, σ_y√m. Mean and variance of the draw are
    (q α_s ẑ₀ʸ + σ_s² z_s)/(q + σ_s²) and q σ_s²/(q + σ_s²) with q = γ β̃. Elsewhere the chain is
    left to the solver and to other guidances: the published method is [DPS, ReSample] with DDIM(0).

    Works on pixels too, with D the identity. Cost: no derivative of the network; up to
    ``iterations`` evaluations and derivatives of A∘D.

    Differs from the reference code: it stops at the noise's own residual (there, at a mean squared
    error of 10⁻⁶, which fits noise); ẑ₀ is that of the step (there, that of 5 DDIM steps further,
    at indices that do not belong together); all descents are of z (there, of pixels, encoded
    afterwards, in the first of them); no descent follows the last step.

    >>> from cmi_lightning.guidance import DPS
    >>> method = [DPS(0.5), ReSample(interval=5)]

    Args:
        interval: act every ``interval``-th step.
        share: of the chain's steps, counted from its end, in which it acts.
        gamma: γ.
        iterations: the most steps of Adam.
        rate: their size.

    Source: Song et al. (2024), Alg. 1 and Prop. 1; γ = 40, interval 10, share 2/3, rate 5·10⁻³ and
    500 iterations of latents as in its code.
    """

    interval: int = number(10, "[1, inf)")
    share: float = number(2 / 3, "[0, 1]")
    gamma: float = number(40.0, "(0, inf)")
    iterations: int = number(500, "[1, inf)")
    rate: float = number(5e-3, "(0, inf)")
    differentiable = False
    needs_noise = True

    def guide_sample(self, step: Step, x: Tensor) -> Tensor:
        number = round(self.share * step.num_steps)
        if step.index % self.interval or step.index >= number or step.s.sigma == 0:
            return x
        q, noise = self.gamma * step.coefficients.variance, step.s.sigma**2
        mean = (q * step.s.alpha * self.consistent(step) + noise * x) / (q + noise)
        return mean + (q * noise / (q + noise)) ** 0.5 * step.normal("resample")

    def consistent(self, step: Step) -> Tensor:
        """Return ẑ₀ʸ (B, *)."""
        z = step.x0.detach().clone().requires_grad_()
        adam, limit = torch.optim.Adam([z], self.rate), step.problem.noise_norm
        for _ in range(self.iterations):
            with torch.enable_grad():
                residual = step.problem.y - step.problem.operator(z)
                (z.grad,) = torch.autograd.grad(residual.square().sum() / 2, z)
            far = norm(residual.detach()) > limit
            if not bool(far.any()):
                break
            before = z.detach().clone()
            adam.step()
            z.data = torch.where(per_sample(far, z).bool(), z.detach(), before)
        return z.detach()
