"""Estimators of ∇I against the truth: on exact mixtures, and on the shipped network.

    python benchmarks/estimators.py mixture    d = 6, 80, 800; the truth is a dense computation
    python benchmarks/estimators.py network    ×4 and box; the reference is 64 probes, 24 Krylov
                                               vectors, on the same x_t
    python benchmarks/estimators.py steps      the central difference by its step length, and the
                                               curvature form, against the second-order pass

Columns: bias ‖mean − truth‖/‖truth‖ with its standard error, standard deviation of one probe in
units of ‖truth‖, cosine of one probe and of the mean to the truth, relative bias of the value,
network passes (forwards + vector-Jacobian products) beyond the shared forward, seconds per call.
Figures are means over the noise levels and points named above each table. It prints Markdown.

Over 300 lines: three tables of one set of estimators, two of which exist only here.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmi_lightning import exact
from cmi_lightning.data import ImageFolderData
from cmi_lightning.denoisers import Autocast, shipped_prior
from cmi_lightning.exact import DenseCovariance, GaussianMixture
from cmi_lightning.information import (
    Estimator,
    ImageProbes,
    Information,
    Lanczos,
    ProbeEstimator,
    Ridge,
    TraceLimit,
    TwoTraces,
)
from cmi_lightning.information.base import (
    STEP_LENGTH,
    Whitened,
    clipped_inverse,
    contraction,
)
from cmi_lightning.linalg import dot, krylov, norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Dense, Downsample
from cmi_lightning.problem import Problem
from cmi_lightning.step import Step


@dataclass(frozen=True)
class Curvature(ProbeEstimator):
    """∇⟨q, Σ q⟩ as the second derivative of x̂₀ along q = Aᵀ Σ_n^{-1/2} S^{-1/2} v: two forwards.

    Right only where the score is a gradient field. Measured here, and not offered by the package.
    """

    krylov: int = 3
    length: float = 0.1

    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        A, std, x = step.problem.operator, step.problem.std, step.x.detach()
        v = A.sample_noise(draw, step.problem.y)
        space = krylov(Whitened(step, std), v, self.krylov)
        w, residual = space.apply(lambda s: torch.where(s > 1, s.clamp_min(1) ** -0.5, 0.0))
        value = 0.5 * space.quadratic(lambda s: s.clamp_min(1).log())
        q = A.adjoint(w / std)
        h = per_sample(self.length * step.t.sigma * math.sqrt(x[0].numel()) / norm(q), q)
        ends = [step.at(x + s * h * q, step.t).x0.detach() for s in (1, -1)]
        second = (ends[0] + ends[1] - 2 * step.x0.detach()) / h**2
        return Information(value, 0.5 * step.covariance_factor * second, residual)


@dataclass(frozen=True)
class Residual(ProbeEstimator):
    """½ ∇⟨u, Σ u⟩ with u = Aᵀ Σ_n^{-1/2} S⁻¹ r: the whitened residual r ~ N(0, S) for the probe.

    MomentMatching has built its Krylov space already. Measured here, and not offered.
    """

    krylov: int = 3

    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        A, S = step.linearized, Whitened(step, step.problem.std)
        space = krylov(S, step.residual.detach() / S.std, self.krylov)
        w, residual = space.apply(clipped_inverse)
        value = 0.5 * space.quadratic(lambda s: s.clamp_min(1).log() * clipped_inverse(s))
        u, here = A.adjoint(w / S.std), space.combine(clipped_inverse, S.pulled)
        return Information(value, 0.5 * contraction(step, u, u, "forward", here=here), residual)


ESTIMATORS: dict[str, Estimator] = {
    "Lanczos, krylov 1": Lanczos(krylov=1),
    "Lanczos, krylov 1, difference": Lanczos(krylov=1, derivative="difference"),
    "Lanczos, krylov 1, forward": Lanczos(krylov=1, derivative="forward"),
    "Lanczos, krylov 3": Lanczos(krylov=3),
    "Lanczos, krylov 6": Lanczos(krylov=6),
    "Lanczos, krylov 3, difference": Lanczos(krylov=3, derivative="difference"),
    "Ridge, δ 0.3, krylov 3": Ridge(krylov=3, delta=0.3),
    "Ridge, δ 1, krylov 3": Ridge(krylov=3, delta=1.0),
    "TraceLimit, δ 1": TraceLimit(delta=1.0),
    "TraceLimit, δ 1, difference": TraceLimit(delta=1.0, derivative="difference"),
    "ImageProbes, krylov 3": ImageProbes(krylov=3),
    "ImageProbes, krylov 6": ImageProbes(krylov=6),
    "TwoTraces, krylov 6": TwoTraces(krylov=6),
    "(curvature, krylov 3)": Curvature(krylov=3),
    "(residual, krylov 3)": Residual(krylov=3),
}
HEADER = (
    "| estimator | bias | sd per probe | cosine, one probe | cosine, mean | value bias | passes | "
    "seconds |\n|---|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass
class Draws:
    """Single-probe estimates at one point, and the truth there."""

    gradients: Tensor  # (P, n)
    values: Tensor  # (P,)
    gradient: Tensor  # (n,)
    value: Tensor  # ()

    def figures(self) -> Tensor:
        size = self.gradient.norm()
        mean, error = self.gradients.mean(0), self.gradients.var(0).sum().sqrt()
        cosine = torch.nn.functional.cosine_similarity
        return torch.stack(
            [
                (mean - self.gradient).norm() / size,
                error / math.sqrt(len(self.gradients)) / size,
                error / size,
                cosine(self.gradients, self.gradient[None]).mean(),
                cosine(mean, self.gradient, dim=0),
                self.values.mean() / self.value - 1,
            ]
        ).double()


def line(name: str, draws: list[Draws], passes: int, seconds: float) -> str:
    bias, error, sd, one, mean, value = torch.stack([d.figures() for d in draws]).mean(0).tolist()
    return (
        f"| {name} | {bias:.3f} ± {error:.3f} | {sd:.2f} | {one:.3f} | {mean:.3f} | {value:+.1%} | "
        f"{passes} | {seconds:.3f} |"
    )


def timed(estimator: Estimator, step: Step) -> tuple[Information, int, float]:
    """The estimate, its network passes beyond the shared forward, and seconds."""
    _ = step.x0
    before = (step.cost.forwards, step.cost.vjps)
    started = time.perf_counter()
    information = estimator(step)
    seconds = time.perf_counter() - started
    return information, step.cost.forwards - before[0] + step.cost.vjps - before[1], seconds


def mixture(d: int) -> GaussianMixture:
    """Five overlapping components; with covariances of their own up to d = 100, dense ones."""
    g = torch.Generator().manual_seed(d)
    means = torch.randn(5, 1, 1, d, generator=g, dtype=torch.float64) * 2 / math.sqrt(d)
    if d > 100:
        # One for all: 800 variances of their own would tell the components apart at any noise.
        spread = 0.2 + torch.rand(1, 1, 1, d, generator=g, dtype=torch.float64)
        return GaussianMixture(means, spread)
    root = torch.randn(5, d, d, generator=g, dtype=torch.float64) * math.sqrt(0.5 / d)
    return GaussianMixture(means, DenseCovariance(root @ root.mT + 0.1 * torch.eye(d)))


def on_mixtures(probes: int, indices: tuple[int, ...] = (150, 300, 500)) -> None:
    for d, m in ((6, 3), (80, 40), (800, 100)):
        prior, g = mixture(d), torch.Generator().manual_seed(1)
        matrix = torch.randn(m, d, generator=g, dtype=torch.float64) / math.sqrt(d)
        operator, rows = Dense(matrix, (1, 1, d)), min(probes, 200_000 // d)
        noise = SampleNoise(0, [str(i) for i in range(rows)])
        steps, truths = [], []
        for index in indices:
            x0 = prior.sample(1, torch.Generator().manual_seed(index))
            t, s = prior.schedule[index], prior.schedule[index - 1]
            z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2 * index))
            x = t.alpha * x0 + t.sigma * z.double()
            y = operator(x0) + 0.1 * torch.randn(m, generator=g, dtype=torch.float64)
            truths.append(
                (
                    exact.gradient(prior, x, t, matrix, 0.1).flatten(),
                    exact.information(prior, x, t, matrix, 0.1)[0],
                )
            )
            problem = Problem(y.expand(rows, m), operator, 0.1)
            many = x.expand(rows, *x.shape[1:]).clone()
            steps.append(Step(index, many, t, s, problem, prior, noise))
        print(
            f"\n**Mixture, d = {d}, m = {m}**, σ = 0.1, t = {', '.join(map(str, indices))}, {rows} "
            f"probes each; seconds for {rows} probes.\n\n{HEADER}"
        )
        for name, estimator in ESTIMATORS.items():
            draws, seconds, passes = [], 0.0, 0
            for step, (gradient, value) in zip(steps, truths, strict=True):
                information, passes, spent = timed(estimator, replace(step, log={}))
                seconds += spent / len(steps)
                draws.append(
                    Draws(information.gradient.flatten(1), information.value, gradient, value)
                )
            print(line(name, draws, passes, seconds), flush=True)


def on_network(
    probes: int, reference_probes: int, count: int, indices: tuple[int, ...] = (200, 400, 600)
) -> None:
    prior = shipped_prior("fashion-mnist")
    data = ImageFolderData("fashion-mnist-test", batch_size=count)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    x0, ids = batch["x"], list(batch["id"])
    for task, operator in (("×4", Downsample(4)), ("box 14×14", BoxMask(14, 4))):
        for index in indices:
            noise = SampleNoise(0, ids)
            problem = Problem.simulate(x0, operator, 0.05, noise)
            t, s = prior.schedule[index], prior.schedule[index - 1]
            x = t.alpha * x0 + t.sigma * noise.normal("benchmark", index, x0)

            def at(seed: int) -> Step:
                # another seed, other probes; the point stays
                return Step(index, x, t, s, problem, prior, SampleNoise(seed, ids))  # noqa: B023

            halves = [
                Lanczos(probes=reference_probes // 2, krylov=24)(at(seed)) for seed in (1000, 1001)
            ]
            gradient = 0.5 * (halves[0].gradient + halves[1].gradient)
            value = 0.5 * (halves[0].value + halves[1].value)
            a, b = (half.gradient.flatten(1) for half in halves)
            agreement = (dot(a, b) / norm(a) / norm(b)).mean()
            print(
                f"\n**Network, {task}, t = {index}**, {count} images, {probes} probes each, "
                f"I = {value.mean():.0f} nats; cosine of the reference's halves {agreement:.3f}, "
                f"residual of its solve {halves[0].residual.mean():.2f}; seconds for {count} "
                f"images.\n\n{HEADER}",
                flush=True,
            )
            for name, estimator in ESTIMATORS.items():
                runs = [timed(estimator, at(seed)) for seed in range(probes)]
                draws = [
                    Draws(
                        torch.stack([r[0].gradient[i].flatten() for r in runs]),
                        torch.stack([r[0].value[i] for r in runs]),
                        gradient[i].flatten(),
                        value[i],
                    )
                    for i in range(count)
                ]
                seconds = sum(r[2] for r in runs) / len(runs)
                print(line(name, draws, runs[0][1], seconds), flush=True)


def step_lengths(count: int) -> None:
    """Largest relative error in float32, smallest cosine in bfloat16, of ``count`` images."""
    prior = shipped_prior("fashion-mnist")
    low = Autocast(prior, torch.bfloat16)
    data = ImageFolderData("fashion-mnist-test", batch_size=count)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    x0, ids = batch["x"], list(batch["id"])
    lengths = (0.01, 0.02, STEP_LENGTH, 0.05, 0.1)
    headings = [f"{length:g}: error" for length in lengths]
    headings += [f"{length:g}: cosine, bf16" for length in lengths]
    print(f"| task, t | {' | '.join(headings)} | curvature: cosines |")
    print("|---|" + "---:|" * (len(headings) + 1))
    for task, operator in (("×4", Downsample(4)), ("box", BoxMask(14, 4))):
        for index in (50, 200, 400, 600, 800):
            noise = SampleNoise(0, ids)
            problem = Problem.simulate(x0, operator, 0.05, noise)
            t, s = prior.schedule[index], prior.schedule[index - 1]
            x = t.alpha * x0 + t.sigma * noise.normal("benchmark", index, x0)
            step, lowered = (Step(index, x, t, s, problem, d, noise) for d in (prior, low))
            A, std = problem.operator, problem.std
            v = A.sample_noise(lambda like: noise.signs("steps", index, like), problem.y)  # noqa: B023
            space = krylov(Whitened(step, std), v, 6)
            w, _ = space.apply(clipped_inverse)
            root, _ = space.apply(lambda s: clipped_inverse(s).sqrt())
            u, p, q = (A.adjoint(z / std) for z in (w, v, root))
            exact_pass = contraction(step, u, p)
            errors, cosines = [], []
            for length in lengths:
                error = contraction(step, u, p, "difference", length) - exact_pass
                errors.append(f"{float((norm(error) / norm(exact_pass)).max()):.1%}")
                difference = contraction(lowered, u, p, "difference", length)
                cosines.append(f"{float(cosine(difference, exact_pass).min()):.3f}")
            size = 0.1 * t.sigma * math.sqrt(x[0].numel())
            h = per_sample(size / norm(q), q)
            with torch.no_grad():
                ahead, here, behind = (prior(x + s * h * q, t).x0 for s in (1, 0, -1))
            curvature = cosine((ahead + behind - 2 * here) / h**2, contraction(step, q, q))
            span = f"{float(curvature.min()):.2f} to {float(curvature.max()):.2f}"
            print(f"| {task}, {index} | {' | '.join([*errors, *cosines])} | {span} |", flush=True)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per sample, (B,)."""
    return dot(a, b) / (norm(a) * norm(b))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("where", choices=["mixture", "network", "steps"])
    parser.add_argument("--probes", type=int, help="probes per point: 1000, or 8 on the network")
    parser.add_argument("--reference", type=int, default=64, help="the network's reference probes")
    parser.add_argument("--count", type=int, default=4, help="images")
    args = parser.parse_args()
    if args.where == "mixture":
        on_mixtures(args.probes or 1000)
    elif args.where == "steps":
        step_lengths(args.count)
    else:
        on_network(args.probes or 8, args.reference, args.count)


if __name__ == "__main__":
    main()
