"""The paper's estimators: probes in image space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.information.base import (
    Information,
    ProbeEstimator,
    Whitened,
    clipped_inverse,
    clipped_log,
)
from cmi_lightning.linalg import dot, krylov
from cmi_lightning.step import Step


def _log_quotient(values: Tensor) -> Tensor:
    """Return log(λ)/(λ − 1) for λ > 1, else 0: log det(1 + M) = tr(M · log(1 + M)/M)."""
    excess = (values - 1).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(values > 1, clipped_log(values) / excess, 0.0)


@dataclass(frozen=True)
class ImageProbes(ProbeEstimator):
    """∇I = ½ tr(M ∇Σ), M = Aᵀ (A Σ Aᵀ + Σ_n)⁻¹ A, with sign vectors v in image space.

    By Woodbury's identity the two traces of the paper's Theorem 2 are one, because
    Σ⁻¹ − Σ⁻¹ Σ_y Σ⁻¹ = M: Σ⁻¹, which the paper asks for, cancels. With u = M v held fixed,

        ∇I ≈ ½ ∇_{x_t} ⟨u, Σ v⟩,  I ≈ ½ ⟨Ã v, φ(S) Ã Σ v⟩,

    where Ã = Σ_n^{-1/2} A and φ(λ) = log(λ)/(λ − 1). S is treated as by
    :class:`~cmi_lightning.information.Lanczos`.

    Cost of a probe: one vector-Jacobian product more than Lanczos', for the value.
    Bias: of the Krylov space alone. Variance: that of the n×n matrices ½ M ∂_k Σ where Lanczos has
    m×m ones of the same trace: what v holds outside the range of Aᵀ adds noise and no signal.

    >>> from cmi_lightning.guidance import CMI
    >>> guidance = CMI(estimator=ImageProbes(krylov=3))

    Args:
        probes: sign vectors per step.
        derivative: "autograd", "difference" or "forward".
        krylov: dimension of the Krylov space.

    Source: Hamidi & Yang (2025), Theorem 2 and Eq. 20 to 22, rearranged.
    """

    krylov: int = number(6, "[1, inf)")

    @property
    def products(self) -> int:
        """Those of the Krylov space, and the value's."""
        return self.krylov + 1

    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        A, std = step.linearized, step.problem.std
        v = draw(step.x.detach())
        measured = A(v) / std
        S = Whitened(step, std)
        space = krylov(S, measured, self.krylov)
        w, residual = space.apply(clipped_inverse)
        weight, _ = space.apply(_log_quotient)
        value = 0.5 * dot(A(step.covariance_factor * step.vjp(v)) / std, weight)
        here = partial(space.combine, clipped_inverse, S.pulled)
        gradient = self.contraction(step, A.adjoint(w / std), v, here)
        return Information(value, 0.5 * gradient, residual)


@dataclass(frozen=True)
class TwoTraces(ProbeEstimator):
    """The paper's Eq. 21 and 22 as printed, read so that they are unbiased.

    Both traces of Theorem 2 with one sign vector v in image space,

        ∇_k I ≈ ½ [vᵀ Σ⁻¹ (∂_k Σ) v − vᵀ Σ_y⁻¹ (∂_k Σ_y) v] = ½ ⟨Σ⁻¹ v, (∂_k Σ) M Σ v⟩,

    as Σ_y⁻¹ ∂Σ_y = Σ⁻¹ (∂Σ) Σ⁻¹ Σ_y (Eq. 14b) and 1 − Σ⁻¹ Σ_y = M Σ. Read literally, the paper's
    "differentiate the Hessian-vector product in direction v once more" is another, biased quantity;
    what has to be differentiated is the contraction ⟨Σ⁻¹ v, Σ p⟩ with p = M Σ v.

    Σ is nearly singular wherever the data lie near a surface, and on a learned network indefinite,
    so Σ⁻¹ magnifies the probe: it is applied as a spectral function that drops eigenvalues below
    ``floor``. This estimator exists to be compared with; :class:`ImageProbes` has the same mean
    and needs no Σ⁻¹.

    Cost of a probe: 2·``krylov`` + 2 products and one second-order pass ("autograd").
    Bias: of two Krylov spaces and of ``floor``. Variance: of ½ Σ⁻¹ (∂_k Σ) M Σ, which grows with
    the condition of Σ.

    >>> from cmi_lightning.guidance import CMI
    >>> guidance = CMI(estimator=TwoTraces(floor=0.01))

    Args:
        probes: sign vectors per step.
        derivative: "autograd", "difference" or "forward".
        krylov: dimension of each Krylov space.
        floor: smallest eigenvalue of Σ that is inverted, in units of σ_t²/α_t², > 0.

    Source: Hamidi & Yang (2025), Theorem 2 and Eq. 20 to 22.
    """

    krylov: int = number(6, "[1, inf)")
    floor: float = number(1e-3, "(0, inf)")

    @property
    def products(self) -> int:
        """Those of two Krylov spaces, and the second one's start."""
        return 2 * self.krylov + 1

    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        A, std, c = step.linearized, step.problem.std, step.covariance_factor
        lowest = self.floor * (step.t.sigma / step.t.alpha) ** 2

        def inverse(values: Tensor) -> Tensor:
            return torch.where(values > lowest, 1 / values.clamp_min(lowest), 0.0)

        pulled: list[Tensor] = []

        def covariance(x: Tensor) -> Tensor:
            pulled.append(step.vjp(x))
            return c * pulled[-1]

        v = draw(step.x.detach())
        image = krylov(covariance, v, self.krylov)
        u, _ = image.apply(inverse)
        space = krylov(Whitened(step, std), A(c * step.vjp(v)) / std, self.krylov)
        w, residual = space.apply(clipped_inverse)
        weight, _ = space.apply(_log_quotient)
        value = 0.5 * dot(A(v) / std, weight)
        here = partial(image.combine, inverse, pulled)
        gradient = self.contraction(step, u, A.adjoint(w / std), here)
        return Information(value, 0.5 * gradient, residual)
