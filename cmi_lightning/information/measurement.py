"""Estimators with probes in measurement space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.information.base import (
    Information,
    ProbeEstimator,
    Whitened,
    clipped_inverse,
    clipped_log,
    curvature,
)
from cmi_lightning.linalg import dot, krylov
from cmi_lightning.step import Step


@dataclass(frozen=True)
class Lanczos(ProbeEstimator):
    """One Krylov space of S per probe: value, gradient, and no inverse of anything indefinite.

    A learned network's Σ is neither symmetric nor positive; log det S is then undefined and
    conjugate gradients diverge. We use the symmetric part of S and the spectral function
    f(λ) = log max(λ, 1),

        I = ½ tr f(S),  ∇I = ½ tr(f'(S) ∇S),  f'(λ) = 1/λ for λ > 1, else 0,

    which on an exact prior, where every λ ≥ 1, is the paper's I. For a sign vector v in measurement
    space, the value is ½ vᵀ f(S) v, and with w = f'(S) v, u = Aᵀ Σ_n^{-1/2} w, p = Aᵀ Σ_n^{-1/2} v,

        ∇I ≈ ½ ∇_{x_t} ⟨u, Σ p⟩.

    Cost of a probe: ``krylov`` + 1 vector-Jacobian products and one second-order pass, no forward
    ("autograd"); ``krylov`` + 2 products and 2 forwards ("difference"); ``krylov`` + 1 products and
    1 forward ("forward": Jᵀu is a combination of the Krylov space's products).
    Bias: of the Krylov space alone; none if ``krylov`` reaches m, and small once the space holds
    the large eigenvalues.
    Variance: 2 Σ_{i≠j} G_ij² of the symmetrised m×m matrices G = ½ f'(S) ∂_k S: unlike for image
    probes, what A does not measure adds none. None for m = 1.

    The defaults are an empirical choice (``benchmarks/estimators.py network``; docs/method.md has
    the tables): on a box (m = 828) one probe's cosine to the reference gradient is 0.80 to 0.97 at
    krylov = 6 and 0.5 to 0.6 at 3, where the middle of three Ritz values falls on the noise level,
    where f' jumps; on super-resolution ×4 they are alike. :class:`TraceLimit` has as good a
    direction for a quarter of the passes, and no value in nats.

    >>> from cmi_lightning.guidance import CMI
    >>> guidance = CMI(estimator=Lanczos(krylov=3))

    Args:
        probes: sign vectors per step.
        derivative: "autograd", "difference" or "forward", see :class:`ProbeEstimator`.
        krylov: dimension of the Krylov space.

    Source: Hamidi & Yang (2025), Theorems 1 and 2, for I; the spectral form is ours. Ubaru, Chen &
    Saad (2017) for log det by Lanczos' method.
    """

    krylov: int = number(6, "[1, inf)")
    curved = True

    @property
    def products(self) -> int:
        """Those of the Krylov space."""
        return self.krylov

    def noise_std(self, step: Step) -> Tensor:
        """Return the standard deviations that whiten the measurements, broadcastable to y."""
        return step.problem.std

    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        A, std = step.linearized, self.noise_std(step)
        v = A.sample_noise(draw, step.problem.y)
        S = Whitened(step, std)
        space = krylov(S, v, self.krylov)
        w, residual = space.apply(clipped_inverse)
        value = 0.5 * space.quadratic(clipped_log)
        u, p = A.adjoint(w / std), A.adjoint(v / std)
        gradient = self.contraction(step, u, p, partial(space.combine, clipped_inverse, S.pulled))
        if (change := curvature(step, w / std, v / std, u, p)) is not None:
            gradient = gradient + change
        return Information(value, 0.5 * gradient, residual)


def _ridge_std(step: Step, delta: float) -> Tensor:
    """Return (Σ_n + δ_t²)^{1/2} with δ_t = delta·σ_t/√(α_t² + σ_t²)."""
    alpha, sigma = step.t.alpha, step.t.sigma
    ridge = delta**2 * sigma**2 / (alpha**2 + sigma**2)
    return (step.problem.std**2 + ridge).sqrt()


@dataclass(frozen=True)
class Ridge(Lanczos):
    """:class:`Lanczos` with Σ_n + δ_t² for Σ_n: what a noisier measurement would tell.

    δ_t² = delta² r_t², r_t² = σ_t²/(α_t² + σ_t²) being the variance of x₀ | x_t for a standard
    normal prior (ΠGDM's choice). A ridge lifts S's negative eigenvalues and improves its condition,
    and interpolates between :class:`Lanczos` (delta = 0) and, up to a factor, :class:`TraceLimit`.

    Cost: as :class:`Lanczos`. Bias: I and ∇I are those of the noisier measurement, both smaller in
    size as a rule; of the Krylov space less than at delta = 0. Variance: smaller with the gradient.

    >>> from cmi_lightning.guidance import CMI
    >>> guidance = CMI(estimator=Ridge(delta=0.5))

    Args:
        probes: sign vectors per step.
        derivative: "autograd", "difference" or "forward".
        krylov: dimension of the Krylov space.
        delta: δ_t in units of r_t, ≥ 0.
    """

    delta: float = number(1.0, "[0, inf)")

    def noise_std(self, step: Step) -> Tensor:
        """Return (Σ_n + δ_t²)^{1/2}, broadcastable to y."""
        return _ridge_std(step, self.delta)


@dataclass(frozen=True)
class TraceLimit(ProbeEstimator):
    """The first order of I in Σ, which needs no solve: ½ tr((Σ_n + δ_t²)⁻¹ A Σ Aᵀ).

    log det(1 + M) = tr M + O(M²), so this is I and ∇I where the noise (or the ridge δ_t, as in
    :class:`Ridge`) is large against A Σ Aᵀ. Elsewhere the gradient is too long, because directions
    that are known well already are not discounted, and its direction is that of ∇ tr(A Σ Aᵀ).

    Cost of a probe: one vector-Jacobian product, which also gives the value, and one second-order
    pass ("autograd"); 3 products and 2 forwards ("difference"); 2 products and 1 forward
    ("forward").
    Bias: O(M²), the largest of all estimators where the noise is small. Variance: as
    :class:`Lanczos` with f' = 1.

    >>> from cmi_lightning.guidance import CMI
    >>> guidance = CMI(estimator=TraceLimit(probes=2))

    Args:
        probes: sign vectors per step.
        derivative: "autograd", "difference" or "forward".
        delta: δ_t in units of σ_t/√(α_t² + σ_t²), ≥ 0.
    """

    delta: float = number(1.0, "[0, inf)")
    curved = True

    @property
    def products(self) -> int:
        """The value's, which the second-order pass differentiates."""
        return 0 if self.derivative == "autograd" else 1

    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        A, std = step.linearized, _ridge_std(step, self.delta)
        v = A.sample_noise(draw, step.problem.y) / std
        p = A.adjoint(v)
        graph = self.derivative == "autograd"
        pulled = step.vjp(p, create_graph=graph)
        quadratic = step.covariance_factor * dot(pulled, p)
        gradient = step.grad(quadratic) if graph else self.contraction(step, p, p, lambda: pulled)
        if (change := curvature(step, v, v, p, p)) is not None:
            gradient = gradient + change
        return Information(0.5 * quadratic.detach(), 0.5 * gradient)
