"""Filtering posterior sampling: particles that follow a noised measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.cdps import noised_measurement
from cmi_lightning.linalg import dot
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class FPS(Solver):
    """A particle filter for p(x_s | x_t, y_s), with y_s a diffusion of the measurement.

    y_s = α_s y + √(1 − c) (σ_s/σ_t)(y_t − α_t y) + √c σ_s A z. Given the chain's x_s ~ N(m, β̃) and
    y_s = A x_s + α_s n, a particle moves to an exact draw of N(m, β̃)·N(y_s; A ·, α_s² Σ_n), and
    its weight is N(y_s; A m, β̃ A Aᵀ + α_s² Σ_n), the locally optimal one: so particles are chosen
    before they move. Every sample has particles of its own, and ends as one of them, drawn by the
    likelihood. Cost of a step: ``particles`` evaluations and as many solves, no gradient.

    With one particle it is :class:`cmi_lightning.guidance.CDPS`. Every y_s counts anew, so that
    particles are surer than y is. Differs from other codes: x and y_s are of one level.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), FPS(particles=2), num_steps=50)

    Args:
        particles: M.
        fresh: c, the share of new noise in y_s, in [0, 1].

    Raises:
        InputError: if y has no noise.

    Source: Dou & Song (2024), Alg. 1; the weights are derived here.
    """

    particles: int = number(5, "[1, inf)")
    fresh: float = number(0.95, "[0, 1]")
    stochastic = True  # type: ignore[misc]
    conditional = True
    hooks = ()
    needs_noise = True
    needs_linear = True

    def evaluations(self, chain: Schedule, prior: Schedule) -> int:
        return self.particles * len(chain)

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        """Choose and move the particles; the first is x_s."""
        t, s, q = step.t, step.s, step.coefficients
        x = step.memory.get("fps")
        if x is None:
            scale, others = (t.alpha**2 + t.sigma**2) ** 0.5, range(1, self.particles)
            drawn = [scale * step.noise.normal(f"start/{k}", 0, step.x) for k in others]
            x = torch.stack([step.x.detach(), *drawn], 1)  # (B, M, *)
        x0 = [(step.at(p, t) if k else step).x0.detach() for k, p in enumerate(x.unbind(1))]
        means = q.from_x * x + q.from_x0 * torch.stack(x0, 1)
        y_s = noised_measurement(step, "fps", self.fresh)
        problem = replace(step.problem, y=y_s, noise_std=s.alpha * step.problem.noise_std)
        logits = torch.stack([_log_weight(problem, m, q.variance) for m in means.unbind(1)], 1)
        u = torch.special.ndtr(step.normal("fps/uniform", step.x.flatten(1)[:, 0]))
        chosen = _systematic(logits, u, self.particles if s.sigma > 0 else 1)
        means = means[torch.arange(len(means), device=chosen.device)[:, None], chosen]
        if q.variance > 0:
            moved = []
            for k, mean in enumerate(means.unbind(1)):
                z, n = step.normal(f"fps/x/{k}", mean), step.measurement_normal(f"fps/y/{k}")
                moved.append(problem.draw(mean, q.variance, z, n))
            means = step.memory["fps"] = torch.stack(moved, 1)
        return Transition(means[:, 0], 0.0, torch.zeros_like(means[:, 0]))


def _log_weight(problem: Problem, mean: Tensor, variance: float) -> Tensor:
    """Return log N(y; A mean, v A Aᵀ + Σ_n) (B,), but for a constant."""
    A = problem.operator.linearize(mean)
    e = problem.y - A(mean)
    if variance > 0:
        solved = A.solve(e, problem.std**2 / variance) / variance
    else:
        solved = e / problem.std**2
    return -0.5 * dot(e, solved)


def _systematic(logits: Tensor, u: Tensor, count: int) -> Tensor:
    """Return indices (B, count) by systematic resampling, from one uniform u (B,) a sample."""
    total = torch.softmax(logits, 1).cumsum(1)
    places = ((torch.arange(count, device=u.device) + u[:, None]) / count).to(total)
    return torch.searchsorted(total, places).clamp_max(logits.shape[1] - 1)
