"""DDNM+ with noise, for any linear operator."""

from __future__ import annotations

from dataclasses import dataclass

from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DDNMPlus(Solver):
    """x_s = α_s(x̂₀ + K(y − A x̂₀)) + σ_s n, K = Aᵀ(A Aᵀ + κ)⁻¹ with κ = (α_s σ_y/σ_s)².

    The added noise n makes up for that of y: together they are exactly N(0, 1) in every direction.
    n = z₂ + K(A(z₁ − z₂) − √κ z₃) has the covariance 1 − K κ Kᵀ. Where y is noiseless this is DDNM
    with new noise, and κ/σ_y² is DiffPIR's weight, taken at s.

    Differs from the paper, whose SVD form is ``DDRM(eta_b=1)`` and whose simplified form is right
    for A with equal singular values alone: here K replaces the case distinction, and no singular
    values are needed. From its code: there the simplified form takes √(1 − ᾱ²) for √(1 − ᾱ) and
    counts noise twice. One evaluation a step, no gradient, two solves.

    Draws are too narrow where y tells nothing, by √½, as for every chain that renoises afresh, see
    :class:`Renoise`.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), DDNMPlus(), num_steps=100)

    Source: Wang et al. (2023), Eq. 17 and 19; K and n are ours.
    """

    stochastic = True  # type: ignore[misc]
    conditional = True
    needs_linear = True

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        problem, s, x0 = step.problem, step.s, guided_x0(step)
        A, z = step.linearized, step.normal("solver")
        if s.sigma == 0:  # κ = ∞, or 0 without noise
            x0 = x0 if problem.noisy else x0 + A.pinv(problem.y - A(x0))
            return Transition(x0, 0.0, z)
        root = s.alpha * problem.std / s.sigma
        z1, z3 = step.normal("ddnm"), step.measurement_normal("ddnm/measurement")
        lacking = A(z1 - z) - root * z3
        K_r, K_z = (A.adjoint(A.solve(r, root**2)) for r in (problem.y - A(x0), lacking))
        return Transition(s.alpha * (x0 + K_r), s.sigma, z + K_z)
