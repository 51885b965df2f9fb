"""The self-check: estimators, guidances and operators against closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cmi_lightning import exact, operators
from cmi_lightning.exact import DenseCovariance, GaussianMixture, GaussianPrior
from cmi_lightning.guidance import MomentMatching, PiGDM
from cmi_lightning.information import Estimator, ImageProbes, Lanczos, Ridge, TraceLimit, TwoTraces
from cmi_lightning.linalg import dot
from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.step import Step
from cmi_lightning.verify.check import Check
from cmi_lightning.verify.operator import operator_checks

SHAPE, SIZE, MEASURED, STD = (1, 2, 3), 6, 3, 0.1
INDICES = (100, 300, 600, 900)  # of the linear DDPM chain: ᾱ from 0.9 to 2·10⁻⁴
PROBES = 4000


def exact_checks() -> Iterator[Check]:
    """Yield the checks; a few seconds. The tests of the package hold many more."""
    yield from _gradient()
    yield from _estimators()
    yield from _posterior_means()
    yield from _operators()


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _covariances(seed: int, count: int) -> DenseCovariance:
    root = 0.5 * _random(seed, count, SIZE, SIZE)
    return DenseCovariance(root @ root.mT + 0.05 * torch.eye(SIZE, dtype=torch.float64))


def _mixture() -> GaussianMixture:
    return GaussianMixture(0.7 * _random(1, 3, *SHAPE), _covariances(2, 3))


def _step(prior: GaussianMixture, index: int, batch: int = 8) -> Step:
    """Return a step of samples of the prior, noised to a level."""
    x0 = prior.sample(batch, torch.Generator().manual_seed(6))
    noise = SampleNoise(0, [str(i) for i in range(batch)])
    t, s = prior.schedule[index], prior.schedule[index - 1]
    problem = Problem.simulate(x0, operators.Dense(_random(5, MEASURED, SIZE)), STD, noise)
    x = t.alpha * x0 + t.sigma * noise.normal("verify", index, x0)
    return Step(index, x, t, s, problem, prior, noise)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _gradient() -> Iterator[Check]:
    prior, matrix, worst, h = _mixture(), _random(5, MEASURED, SIZE), 0.0, 1e-5
    for index in INDICES:
        step = _step(prior, index)
        x, d = step.x.detach(), _random(7, 8, *SHAPE)
        ahead, behind = (
            exact.information(prior, x + s * h * d, step.t, matrix, STD) for s in (1, -1)
        )
        slope = dot(exact.gradient(prior, x, step.t, matrix, STD), d)
        worst = max(worst, _relative(slope, (ahead - behind) / (2 * h)))
    yield Check("∇I(x₀; y | x_t) = finite difference of I", worst, 1e-5)


def _estimators() -> Iterator[Check]:
    estimators: tuple[Estimator, ...] = (
        Lanczos(krylov=MEASURED),
        ImageProbes(krylov=MEASURED),
        TwoTraces(krylov=SIZE, floor=1e-9),
        Ridge(krylov=MEASURED, delta=0.5),
        TraceLimit(delta=0.5),
    )
    noise = SampleNoise(0, [str(i) for i in range(PROBES)])
    for estimator in estimators:
        worst = [0.0, 0.0]
        for index in INDICES[1:3]:
            step = _step(_mixture(), index, 1)
            problem = replace(step.problem, y=step.problem.y.expand(PROBES, -1))
            x = step.x.detach().expand(PROBES, *SHAPE)
            many = estimator(replace(step, x=x, problem=problem, noise=noise, log={}))
            draws = (many.value[:, None], many.gradient.flatten(1))
            for k, truth in enumerate(_truth(estimator, step)):
                error = (draws[k].std(0) / math.sqrt(PROBES)).norm()
                off = float((draws[k].mean(0) - truth.flatten()).norm() / error)
                worst[k] = max(worst[k], off)
        name = type(estimator).__name__
        yield Check(f"{name}: mean of {PROBES} probes to exact I, in standard errors", worst[0], 3)
        yield Check(f"{name}: to exact ∇I, in standard errors", worst[1], 3)


def _truth(estimator: Estimator, step: Step) -> tuple[Tensor, Tensor]:
    """Return what an estimator should give for one sample: I (1,) and ∇I."""
    at = (step.denoiser, step.x.detach(), step.t)
    matrix, std = _random(5, MEASURED, SIZE), STD
    if isinstance(estimator, Ridge | TraceLimit):
        alpha, sigma = step.t.alpha, step.t.sigma
        std = math.sqrt(STD**2 + (estimator.delta * sigma) ** 2 / (alpha**2 + sigma**2))
    if isinstance(estimator, TraceLimit):
        x = at[1].requires_grad_()
        M = 0.5 * matrix.mT @ matrix / std**2
        value = (M * exact.covariance(*at, create_graph=True)[0]).sum()
        return value.detach()[None], torch.autograd.grad(value, x)[0]
    return exact.information(*at, matrix, std), exact.gradient(*at, matrix, std)


def _posterior_means() -> Iterator[Check]:
    for name, covariance, guidance in (
        ("ΠGDM", 0.7, PiGDM(prior_variance=0.7, weight="posterior")),
        ("MomentMatching", _covariances(4, 1), MomentMatching(krylov=MEASURED)),
    ):
        prior, worst = GaussianPrior(_random(3, *SHAPE), covariance), 0.0
        for index in INDICES:
            step = _step(prior, index, 1)
            moved = guidance.guide_denoised(step, step.x0.detach())
            # x_t is one more measurement of x₀.
            both = torch.cat([step.t.alpha * torch.eye(SIZE), _random(5, MEASURED, SIZE)])
            std = torch.tensor([step.t.sigma] * SIZE + [STD] * MEASURED, dtype=torch.float64)
            y = torch.cat([step.x.detach().flatten(), step.problem.y[0]])
            worst = max(worst, _relative(moved[0], prior.condition(both, y, std).mean()))
        yield Check(f"{name} = E[x₀ | x_t, y] on a Gaussian prior", worst, 1e-6)


def _operators() -> Iterator[Check]:
    """Yield every check of operators with its worst figure."""
    worst: dict[str, Check] = {}
    for operator in (
        operators.Identity(),
        operators.RandomMask(0.9),
        operators.BoxMask(6, 2),
        operators.GaussianBlur(9, 1.5),
        operators.MotionBlur(7),
        operators.MotionBlur(7, padding="circular"),
        operators.Downsample(4),
    ):
        for check in operator_checks(operator, (3, 16, 12)):
            known = worst.get(check.name, Check(check.name, -1.0, 0.0))
            if check.bar is not None and not check.figure <= known.figure:
                worst[check.name] = replace(check, remark=f"worst: {operator}")
    yield from worst.values()
