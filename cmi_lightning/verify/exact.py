"""Checks of the mathematics on priors whose posteriors have closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmi_lightning import exact
from cmi_lightning.exact import DenseCovariance, GaussianMixture, GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, Guidance, MomentMatching, PiGDM
from cmi_lightning.information import (
    Estimator,
    ImageProbes,
    Lanczos,
    Ridge,
    TraceLimit,
    TwoTraces,
)
from cmi_lightning.linalg import dot, norm, unit
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    BoxMask,
    Dense,
    Downsample,
    GaussianBlur,
    Identity,
    LinearOperator,
    MotionBlur,
    RandomMask,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import CLEAN, Level
from cmi_lightning.solvers import DDIM, DDPM, Solver
from cmi_lightning.step import Step
from cmi_lightning.verify.check import Check

SHAPE = (1, 2, 3)
SIZE, MEASURED, STD = 6, 3, 0.1
INDICES = (100, 300, 600, 900)  # of the linear DDPM chain: ᾱ from 0.9 to 2·10⁻⁴
PROBES = 4000


def exact_checks() -> Iterator[Check]:
    """Yield the checks of estimators, samplers, guidances and operators; about a minute."""
    yield from _information()
    yield from _gaussian()
    yield from _estimators()
    yield from _laws()
    yield from _posterior_means()
    yield from _operators()
    yield from _independence()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _covariances(seed: int, count: int) -> Tensor:
    """Random symmetric positive matrices (K, n, n)."""
    root = 0.5 * _random(seed, count, SIZE, SIZE)
    return root @ root.mT + 0.05 * torch.eye(SIZE, dtype=torch.float64)


def _mixture() -> GaussianMixture:
    """Three components in six dimensions, with covariances of their own."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = 0.7 * _random(1, 3, *SHAPE)
    return GaussianMixture(means, DenseCovariance(_covariances(2, 3)), weights)


def _gaussian_prior() -> GaussianPrior:
    return GaussianPrior(_random(3, *SHAPE), DenseCovariance(_covariances(4, 1)))


def _operator() -> Dense:
    return Dense(_random(5, MEASURED, SIZE), SHAPE)


def _step(
    prior: GaussianMixture, index: int, batch: int = 8, operator: LinearOperator | None = None
) -> Step:
    """A step of samples of the prior, noised to a level."""
    operator = operator or _operator()
    x0 = prior.sample(batch, _generator(6))
    noise = SampleNoise(0, [str(i) for i in range(batch)])
    t = prior.schedule[index]
    x = t.alpha * x0 + t.sigma * noise.normal("verify", index, x0)
    problem = Problem.simulate(x0, operator, STD, noise)
    s = prior.schedule[index - 1] if index else CLEAN
    return Step(index, x, t, s, problem, prior, noise)


def _relative(a: Tensor, b: Tensor) -> float:
    """Return max |a − b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())


def _information() -> Iterator[Check]:
    prior, A = _mixture(), _operator().matrix
    steps = [_step(prior, index) for index in INDICES]
    at = [(prior, s.x.detach(), s.t, A) for s in steps]
    values = [exact.information(*a, STD) for a in at]
    yield Check("I(x₀; y | x_t) ≥ 0: −min I", -min(float(v.min()) for v in values), 0.0)
    nothing = [exact.information(*a[:3], torch.zeros_like(A), STD) for a in at]
    yield Check("A = 0 ⇒ I = 0: max |I|", max(float(v.abs().max()) for v in nothing), 1e-12)
    sigmas = (0.02, 0.1, 0.5, 2.0)
    by_sigma = torch.stack(
        [torch.cat([exact.information(*a, sigma) for a in at]) for sigma in sigmas]
    )
    yield Check("I falls as σ grows: largest rise", float(by_sigma.diff(dim=0).max()), 0.0)
    theorem = [exact.information_theorem_1(*a, STD) for a in at]
    yield Check(
        "Theorem 1 (d×d) = m×m form",
        max(_relative(a, b) for a, b in zip(theorem, values, strict=True)),
        1e-9,
    )
    forms = [
        [f(*a, STD) for f in (exact.gradient, exact.gradient_theorem_2, exact.gradient_autograd)]
        for a in at
    ]
    yield Check(
        "∇I: Theorem 2 (third-order tensor) = ½ tr AᵀS⁻¹A∇Σ",
        max(_relative(second, first) for first, second, _ in forms),
        1e-9,
    )
    yield Check(
        "∇I: automatic differentiation = ½ tr AᵀS⁻¹A∇Σ",
        max(_relative(third, first) for first, _, third in forms),
        1e-9,
    )
    h, direction = 1e-5, _random(7, 8, *SHAPE)
    slopes = [
        (exact.information(p, x + h * direction, level, a, STD)
         - exact.information(p, x - h * direction, level, a, STD)) / (2 * h)
        for p, x, level, a in at
    ]  # fmt: skip
    yield Check(
        "∇I = finite difference of I",
        max(_relative(dot(f[0], direction), s) for f, s in zip(forms, slopes, strict=True)),
        1e-5,
    )
    tweedie = [_relative(p.tweedie_covariance(x, t), p.covariance(x, t)) for p, x, t, _ in at]
    yield Check("Σ: Tweedie = law of total covariance", max(tweedie), 1e-9)


def _gaussian() -> Iterator[Check]:
    prior, A = _gaussian_prior(), _operator().matrix
    steps = [_step(prior, index) for index in INDICES]
    largest = [exact.gradient(prior, s.x.detach(), s.t, A, STD).abs().max() for s in steps]
    yield Check("Gaussian prior ⇒ exact ∇I = 0: max |∇I|", float(max(largest)), 1e-12)
    estimates = [Lanczos(krylov=3)(s).gradient.abs().max() for s in steps]
    yield Check("Gaussian prior ⇒ estimated ∇I = 0: max |∇I|", float(max(estimates)), 1e-9)
    pushing = CMI(scale=1.0, max_step=math.inf, min_signal=0.0, max_signal=1.0)
    bases: tuple[Guidance, ...] = (DPS(), PiGDM(), MCG(), DSG(), MomentMatching())
    worst = 0.0
    for guidance in bases:
        alone, both = (_restored(prior, DDPM(), g) for g in ([guidance], [pushing, guidance]))
        worst = max(worst, _relative(both, alone))
    yield Check("Gaussian prior ⇒ CMI + X = X, for five X", worst, 1e-9)


def _restored(prior: GaussianMixture, solver: Solver, guidances: Sequence[Guidance]) -> Tensor:
    step = _step(prior, 300, batch=4)
    sampler = Sampler(prior, solver, guidances, num_steps=10)
    return sampler.run(step.problem, step.noise, step.x.detach())


def _repeated(step: Step, count: int) -> Step:
    """The first sample of a step, ``count`` times, each with probes of its own."""
    y = step.problem.y[:1].expand(count, -1)
    noise = SampleNoise(0, [str(i) for i in range(count)])
    problem = replace(step.problem, y=y)
    x = step.x.detach()[:1].expand(count, *SHAPE).clone()
    return replace(step, x=x, problem=problem, noise=noise, log={})


def _estimators() -> Iterator[Check]:
    prior, A = _mixture(), _operator().matrix
    estimators: tuple[Estimator, ...] = (
        Lanczos(krylov=MEASURED),
        ImageProbes(krylov=MEASURED),
        TwoTraces(krylov=SIZE, floor=1e-9),
        Ridge(krylov=MEASURED, delta=0.5),
        TraceLimit(delta=0.5),
    )
    for estimator in estimators:
        worst = [0.0, 0.0]
        for index in INDICES[1:3]:
            step = _step(prior, index)
            many = estimator(_repeated(step, PROBES))
            value, gradient = _truth(estimator, step, A)
            worst[0] = max(worst[0], _standard_errors(many.value[:, None], value))
            worst[1] = max(worst[1], _standard_errors(many.gradient.flatten(1), gradient))
        name = type(estimator).__name__
        yield Check(f"{name}: mean of {PROBES} probes to exact I, in standard errors", worst[0], 3)
        yield Check(f"{name}: to exact ∇I, in standard errors", worst[1], 3)
    errors = [_difference_error(_step(prior, index)) for index in INDICES[1:3]]
    yield Check("central difference = second-order pass", max(errors), 0.05)


def _difference_error(step: Step) -> float:
    """Return the relative error of the central difference, of the first sample to the last."""
    by_autograd, by_difference = (
        Lanczos(krylov=MEASURED, derivative=how)(step).gradient  # type: ignore[arg-type]
        for how in ("autograd", "difference")
    )
    return float((norm(by_difference - by_autograd) / norm(by_autograd)).max())


def _truth(estimator: Estimator, step: Step, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an estimator should give for the first sample: I (1,) and ∇I (n,)."""
    prior, x, level = step.denoiser, step.x.detach()[:1], step.t
    std: Tensor | float = STD
    if isinstance(estimator, Ridge | TraceLimit):
        ridge = estimator.delta**2 * level.sigma**2 / (level.alpha**2 + level.sigma**2)
        std = math.sqrt(STD**2 + ridge)
    if isinstance(estimator, TraceLimit):
        P, slopes = exact.third_order(prior, x, level)
        M = A.mT @ A / std**2
        gradient = 0.5 * torch.einsum("ij,bjik->bk", M, slopes)
        return 0.5 * (M * P[0]).sum()[None], gradient[0]
    value = exact.information(prior, x, level, A, std)
    return value, exact.gradient(prior, x, level, A, std).flatten()


def _standard_errors(draws: Tensor, truth: Tensor) -> float:
    """Return ‖mean − truth‖ in units of the mean's own standard error."""
    error = draws.std(0) / math.sqrt(len(draws))
    return float((draws.mean(0) - truth).norm() / error.norm())


def _sliced(a: Tensor, b: Tensor) -> float:
    """Return the mean Wasserstein-1 distance of two equally large samples (N, n), 50 directions."""
    directions = unit(_random(8, 50, a.shape[1]))
    return float(((a @ directions.T).sort(0)[0] - (b @ directions.T).sort(0)[0]).abs().mean())


def _laws() -> Iterator[Check]:
    prior, count = _mixture(), 2000
    truth, other = (prior.sample(count, _generator(seed)).flatten(1) for seed in (9, 10))
    spread = float(truth.std(0).mean())
    floor = _sliced(truth, other) / spread
    noise = SampleNoise(1, [str(i) for i in range(count)])
    like = torch.zeros(count, *SHAPE, dtype=torch.float64)
    problem = Problem(like.new_zeros(count, MEASURED), _operator(), STD)
    for name, solver in {"DDPM": DDPM(), "DDIM": DDIM()}.items():
        draws = Sampler(prior, solver, num_steps=200).run(problem, noise, like).flatten(1)
        yield Check(
            f"unguided {name} reproduces the mixture: sliced W₁ / sd",
            _sliced(draws, truth) / spread,
            0.08,
            f"exact against exact: {floor:.3f}",
        )
    x0 = prior.sample(16, _generator(11))
    operator = _operator()
    y = operator(x0[:1])[0] + 0.05
    posterior = prior.condition(operator.matrix, y, STD)
    log_likelihood = -0.5 * ((y - operator(x0)) ** 2).sum(1) / STD**2
    excess = prior.log_prob(x0, CLEAN) + log_likelihood - posterior.log_prob(x0, CLEAN)
    yield Check(
        "Bayes: log p(x₀) + log p(y | x₀) − log p(x₀ | y) is constant",
        float((excess - excess.mean()).abs().max()),
        1e-6,
    )


def _joint_posterior_mean(
    mean: Tensor, C: Tensor, level: Level, A: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Return E[x₀ | x_t, y] (B, n) from the joint Gaussian of x₀, x_t and y."""
    identity = torch.eye(SIZE, dtype=C.dtype)
    H = torch.cat([level.alpha * identity, A])
    noise = torch.cat([C.new_full((SIZE,), level.sigma), C.new_full((len(A),), STD)]) ** 2
    gain = C @ H.T @ torch.linalg.inv(H @ C @ H.T + torch.diag(noise))
    return mean + (torch.cat([x, y], 1) - H @ mean) @ gain.T


def _posterior_means() -> Iterator[Check]:
    A, mean = _operator().matrix, _random(3, *SHAPE)
    identity = torch.eye(SIZE, dtype=torch.float64)
    dense = _covariances(4, 1)
    cases: tuple[tuple[str, GaussianPrior, Tensor, Guidance], ...] = (
        (
            "ΠGDM = E[x₀ | x_t, y] on an isotropic Gaussian prior",
            GaussianPrior(mean, 0.7),
            0.7 * identity,
            PiGDM(prior_variance=0.7, weight="posterior"),
        ),
        (
            "MomentMatching = E[x₀ | x_t, y] on any Gaussian prior",
            GaussianPrior(mean, DenseCovariance(dense)),
            dense[0],
            MomentMatching(krylov=MEASURED),
        ),
    )
    for name, prior, C, guidance in cases:
        worst = 0.0
        for index in INDICES:
            step = _step(prior, index)
            moved = guidance.guide_denoised(step, step.x0.detach()).flatten(1)
            x = step.x.detach().flatten(1)
            expected = _joint_posterior_mean(mean.flatten(), C, step.t, A, x, step.problem.y)
            worst = max(worst, _relative(moved, expected))
        yield Check(name, worst, 1e-6)


def _operators() -> Iterator[Check]:
    shape = (3, 16, 12)
    noise = SampleNoise(0, ["a", "b"])
    x = _random(12, 2, *shape)
    adjoint, inverse, solve = 0.0, 0.0, 0.0
    operators: tuple[LinearOperator, ...] = (
        Identity(),
        RandomMask(0.9),
        BoxMask(6, 2),
        GaussianBlur(9, 1.5),
        MotionBlur(7, 0.5),
        MotionBlur(7, 0.5, "circular"),
        Downsample(4),
    )
    for operator in operators:
        A = operator.bind(shape, noise, x)
        z = A(x)
        y = A.zero_padding(_random(13, *z.shape))
        gap = (dot(z, y) - dot(x, A.adjoint(y))).abs() / (norm(z) * norm(y))
        adjoint = max(adjoint, float(gap.max()))
        shift = 0.1
        u = A.solve(y, shift)
        left = A(A.adjoint(u)) + shift * u
        solve = max(solve, float((norm(A.zero_padding(left) - y) / norm(y)).max()))
        if not isinstance(operator, MotionBlur | GaussianBlur):  # theirs leave out small values
            inverse = max(inverse, float((norm(A(A.pinv(z)) - z) / norm(z)).max()))
    yield Check("operators: ⟨Ax, y⟩ = ⟨x, Aᵀy⟩", adjoint, 1e-12)
    yield Check("operators: (AAᵀ + λ) solve(y) = y", solve, 1e-5)
    yield Check("masks, downsampling: A A⁺ A = A", inverse, 1e-9)


def _independence() -> Iterator[Check]:
    prior = _mixture()
    step = _step(prior, 300, batch=4)
    cmi = CMI(min_signal=0.0, max_signal=1.0)
    worst = 0.0
    bases: tuple[Guidance, ...] = (DPS(), PiGDM(), MCG(), DSG(), MomentMatching())
    for guidance in bases:
        sampler = Sampler(prior, DDPM(), [cmi, guidance], num_steps=5)
        together = sampler.run(step.problem, step.noise, step.x.detach())
        for row in range(4):
            alone = sampler.run(
                replace(step.problem, y=step.problem.y[row : row + 1]),
                SampleNoise(step.noise.seed, step.noise.ids[row : row + 1]),
                step.x.detach()[row : row + 1],
            )
            worst = max(worst, _relative(alone, together[row : row + 1]))
    yield Check("a sample alone = the sample in a batch, five guidances with CMI", worst, 1e-9)
