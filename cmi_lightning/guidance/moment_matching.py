"""Moment matching: the posterior mean under the denoiser's own covariance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.information.base import Whitened, clipped_inverse
from cmi_lightning.linalg import krylov
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.step import Step

NOISY = 6.0  # σ/α above which one Krylov vector does as well as three, see docs/speed.md


@dataclass(frozen=True)
class MomentMatching(Guidance):
    """x̂₀ ← E[x₀ | x_t, y] = x̂₀ + Σ Aᵀ (A Σ Aᵀ + Σ_n)⁻¹ (y − A x̂₀), Σ = (σ_t²/α_t) ∂x̂₀/∂x_t.

    This is the exact posterior mean where x₀ | x_t is Gaussian, as it is for every Gaussian prior,
    and what ΠGDM approximates by an isotropic Σ. The solve is the clipped spectral function of
    :class:`~cmi_lightning.information.Lanczos` on the Krylov space of the whitened residual: for a
    symmetric positive Σ these are conjugate gradients, and on a learned network, where Σ is neither
    and those diverge, directions in which it claims a negative variance are left alone.

    A nonlinear A enters by its derivative at x̂₀ (a Gauss–Newton step).

    Cost of a step: ``krylov`` vector-Jacobian products, no second derivative: the last product,
    with the solution, is a combination of those that built the space. By itself the space has one
    vector while σ_t/α_t > 6 and three from there on: 2.2 products a step of the linear schedule.
    At high noise more vectors bring nothing on learned networks (docs/speed.md); on exact priors
    set ``krylov``.

    Differs from the reference codes: they solve A J Aᵀ u = r by conjugate gradients or GMRES
    without a guard (azula, one iteration by default), or with diagonal approximations of Σ (TMPD).

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [MomentMatching(krylov=2)], num_steps=100)

    Args:
        krylov: dimension of the Krylov space, conjugate gradients' number of iterations, at all
            levels; by itself 1, then 3.
        scale: factor on the change of x̂₀; 1 is the posterior mean, 0 switches the guidance off.

    Raises:
        InputError: if the measurement has no noise.

    Source: Boys et al. (2023); Rozet et al. (2024), Alg. 3 (MMPS).
    """

    krylov: int | None = number(None, "[1, inf)")
    scale: float = 1.0
    needs_noise = True

    def passes(self, calls: int, chain: Schedule) -> float:
        """Return the products of the Krylov spaces."""
        dimensions = [self.dimension(t) for _, t, _ in chain.pairs()]
        return calls * sum(dimensions) / len(dimensions)

    def dimension(self, t: Level) -> int:
        """Return that of the Krylov space at a level."""
        return self.krylov or (1 if t.sigma > NOISY * t.alpha else 3)

    @property
    def active(self) -> bool:
        """Whether the scale ≠ 0."""
        return self.scale != 0

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        std = step.problem.std
        S = Whitened(step, std)
        space = krylov(S, step.residual.detach() / std, self.dimension(step.t))
        _, step.log["moments/residual"] = space.apply(clipped_inverse)
        pulled = space.combine(clipped_inverse, S.pulled)  # Jᵀ Aᵀ Σ_n^{-1/2} w
        return x0 + self.scale * step.covariance_factor * pulled
