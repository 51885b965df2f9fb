"""The sampling loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cmi_lightning.denoisers.base import Denoiser
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import HOOKS, Guidance, refuse_unfit
from cmi_lightning.linalg import norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, Schedule, reverse_coefficients
from cmi_lightning.solvers.base import Solver
from cmi_lightning.step import Cost, Record, Step

# A residual this many times the first one, or ‖y‖ if that is larger; and more where it is noisy: it
# is that of x̂₀, in which an error of x_t is √(α² + σ²)/α times as large, a hundredfold at the first
# steps. DPS with long steps makes and mends such errors there.
DIVERGED = 1e3


class Sampler:
    """Draws x₀ given y: a prior, a solver and any number of guidances.

    >>> from cmi_lightning.exact import GaussianPrior
    >>> from cmi_lightning.guidance import PiGDM
    >>> from cmi_lightning.operators import BoxMask
    >>> from cmi_lightning.solvers import DDPM
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> problem = Problem.simulate(x, BoxMask(4, margin=1), 0.05, noise)
    >>> sampler = Sampler(GaussianPrior(x[0]), DDPM(), [PiGDM()], num_steps=10)
    >>> sampler.run(problem, noise, x).shape
    torch.Size([2, 1, 8, 8])

    Args:
        denoiser: the prior.
        solver: the discretisation.
        guidances: folded in order at each hook; those with nothing to do are dropped.
        num_steps: steps of the respaced chain; None for all levels of the schedule.
        clamp: clamp the x̂₀ that the solver uses to the prior's value range.

    Raises:
        InputError: if a guidance needs noise that the solver does not inject, or edits what the
            solver does not have; or if one of them needs a variance or a derivative that the
            network does not give.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        guidances: Sequence[Guidance] = (),
        num_steps: int | str | None = None,
        clamp: bool = True,
    ) -> None:
        for guidance in guidances:
            if guidance.stochastic and not solver.stochastic:
                raise InputError(
                    f"{type(guidance).__name__} steers the solver's noise, and {solver} injects "
                    "none; use DDPM, or DDIM with eta > 0."
                )
        for guidance in guidances:
            if guidance.active and (lost := guidance.hooks - set(solver.hooks)):
                raise InputError(
                    f"{type(guidance).__name__} moves {HOOKS[min(lost)]}, and "
                    f"{type(solver).__name__} takes no such move: leave it out, or take another "
                    "solver."
                )
            if guidance.active and guidance.needs_latent and not denoiser.latent:
                raise InputError(
                    f"{type(guidance).__name__} compares latents with those of their images: it "
                    "needs a LatentPrior; use DPS on pixels."
                )
        if solver.needs_variance and not denoiser.learns_variance:
            raise InputError(
                f"{solver} needs a network with learned variance (2C output channels); use "
                "variance small or large."
            )
        self.denoiser, self.solver, self.clamp = denoiser, solver, clamp
        self.schedule: Schedule = solver.levels(denoiser.schedule, num_steps)
        active = [g for g in guidances if g.active]
        asked, steps = solver.evaluations(self.schedule, denoiser.schedule), len(self.schedule)
        passes = [
            g.passes(asked if "guide_denoised" in g.hooks else steps, self.schedule) for g in active
        ]
        self.guidances = tuple(
            g.for_chain(self.schedule, asked + sum(passes) - own)
            for g, own in zip(active, passes, strict=True)
        )

    @property
    def differentiable(self) -> bool:
        """Whether some guidance asks for gradients."""
        return any(g.differentiable for g in self.guidances)

    def guided_x0(self, step: Step) -> Tensor:
        """Return x̂₀ after every guidance, clamped, without graph: what solvers call."""
        x0 = step.x0
        for guidance in self.guidances:
            x0, before = guidance.guide_denoised(step, x0), x0
            _log_change(step, "denoised", guidance, before, x0)
        x0 = x0.detach()
        if self.clamp and self.denoiser.value_range is not None:
            x0 = x0.clamp(*self.denoiser.value_range)
        return x0

    def advance(self, step: Step) -> Tensor:
        """Return x_s (B, *) of a step, without graph; the caller's gradient mode is kept."""
        with torch.set_grad_enabled(self.differentiable):
            transition = self.solver.transition(step, self.guided_x0)
            for k, guidance in enumerate(self.guidances):
                step.last = not any(later.differentiable for later in self.guidances[k + 1 :])
                edited = guidance.guide_transition(step, transition)
                if edited is not transition:
                    _log_change(step, "step", guidance, transition.sample(), edited.sample())
                transition = edited
            x = transition.sample()
            for guidance in self.guidances:
                x, before = guidance.guide_sample(step, x), x
                _log_change(step, "sample", guidance, before, x)
            return x.detach()

    def _walk(self) -> Iterator[tuple[int, int, Level, Level]]:
        """Yield (visit, index, t, s): blocks of levels, each walked ``solver.repeats`` times."""
        pairs, jump = list(self.schedule.pairs()), self.solver.jump
        for first in range(0, len(pairs), jump):
            for visit in range(self.solver.repeats):
                for pair in pairs[first : first + jump]:
                    yield visit, *pair

    def iterate(self, problem: Problem, noise: SampleNoise, like: Tensor) -> Iterator[Record]:
        """Yield a record after every step; the last one's ``x`` is the restored batch.

        A sample whose x_s is not finite, or whose residual ‖y − A x̂₀‖ is ``DIVERGED``·√(α² + σ²)/α
        times its first value (or ‖y‖), stops: it keeps its last state. The others go on as if
        nothing had happened, bit for bit.

        Args:
            problem: the batch's measurement, operator and noise level.
            noise: the batch's random numbers.
            like: any tensor of the images' shape (B, C, H, W), dtype and device.

        Raises:
            InputError: if the operator does not fit the images, or a guidance needs a linear one,
                or noise.
        """
        with noise.ahead(like.device) as drawn:
            yield from self._records(problem, drawn, like)

    def _records(self, problem: Problem, noise: SampleNoise, like: Tensor) -> Iterator[Record]:
        problem, like = self.denoiser.state(problem.bind(noise, like), like)
        parts: tuple[Any, ...] = (self.solver, *self.guidances)
        noisy = not any(part.needs_noise for part in parts) or problem.noisy  # waits for a GPU
        refuse_unfit(parts, problem.operator, noisy)
        at = self.schedule[len(self.schedule) - 1]  # the level of x
        x, cost = self.solver.start(at, problem, noise, like), Cost()
        memory: dict[str, Tensor] = {}
        previous: Level | None = None
        stopped = torch.zeros(len(x), dtype=torch.long, device=x.device)
        limit: Tensor | None = None
        for visit, index, t, s in self._walk():
            if at != t:  # up again, to the first level of the block
                z = noise.normal(f"up~{visit}", index, x)
                x, previous = _noised(x, at, t, z), None
            step = Step(index, x, t, s, problem, self.denoiser, noise, self.differentiable, cost)
            step.memory, step.previous, step.visit = memory, previous, visit
            step.num_steps = len(self.schedule)
            proposed = self.advance(step)
            at, previous = s, t
            with torch.no_grad():
                _ = step.residual  # its norm is logged, at the price of one A
            x0, log = step.x0.detach(), step.log
            del step  # else its graph outlives it while the next one is built
            number, residual = len(self.schedule) - index, log["residual"]
            magnified = math.sqrt(t.alpha**2 + t.sigma**2) / t.alpha
            if limit is None:
                limit = DIVERGED * norm(problem.y).maximum(residual)
            far = residual > limit * magnified
            stopped = torch.where((stopped == 0) & far, -number, stopped)
            lost = ~(torch.isfinite(proposed).flatten(1).all(1) & torch.isfinite(residual))
            stopped = torch.where((stopped == 0) & lost, number, stopped)
            well = stopped == 0  # no "if any": it would make a GPU wait at every step
            x = torch.where(per_sample(well, x).bool(), proposed, x)
            log = {name: torch.where(well, value, torch.nan) for name, value in log.items()}
            if visit < self.solver.repeats - 1:
                continue
            yield Record(
                index,
                len(self.schedule),
                noise.ids,
                t,
                s,
                x if index else self.denoiser.image(x),
                x0,
                log,
                cost.forwards,
                cost.vjps,
                cost.second_order,
                stopped,
                self.denoiser.image,
            )

    def run(self, problem: Problem, noise: SampleNoise, like: Tensor) -> Tensor:
        """Return restored images (B, *); see :meth:`iterate`."""
        x = like
        for record in self.iterate(problem, noise, like):
            x = record.x
        return x


def _noised(x: Tensor, at: Level, t: Level, z: Tensor) -> Tensor:
    """Return x (B, *) of level ``at`` taken up to the noisier level t, by the forward chain."""
    return t.alpha / at.alpha * x + math.sqrt(reverse_coefficients(t, at).beta) * z


def _log_change(step: Step, hook: str, guidance: Guidance, before: Tensor, after: Tensor) -> None:
    """Log ‖change‖ per sample that a guidance made at a hook, as "<hook>/<guidance>"."""
    if after is not before:
        step.log[f"{hook}/{type(guidance).__name__}"] = norm((after - before).detach())
