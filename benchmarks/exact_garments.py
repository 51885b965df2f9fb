"""Is it the network?  CMI up and down on an *exact* denoiser of an image-like prior.

    python benchmarks/exact_garments.py --prior many    1,000 clusters that share a covariance
    python benchmarks/exact_garments.py --prior ten     ten clusters with covariances of their own
    python benchmarks/exact_garments.py --real          real garments, not draws of the mixture

The prior is a Gaussian mixture of k-means clusters of Fashion-MNIST, dense covariances included.
Truths are draws of the mixture, so that prior, Jacobian and I have no error, but for the Krylov
space and the probe. Step sizes of the bases are chosen on other draws. Variants share measurements
and noise, so that differences are paired; intervals are 95 % bootstrap intervals. E[x₀ | y] and
draws of p(x₀ | y) are exact: a sampler's distance to E[x₀ | y] should be that of such draws.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from why import LANCZOS, RandomDirection

from cmi_lightning import Problem, Sampler
from cmi_lightning.data.fashion import NUM_HELD_OUT, FashionMNIST
from cmi_lightning.denoisers import Denoiser, Prediction
from cmi_lightning.exact import (
    DenseCovariance,
    DiagonalCovariance,
    GaussianMixture,
    as_dense,
    load_mixture,
)
from cmi_lightning.guidance import CMI, DPS, Guidance, MomentMatching, PiGDM
from cmi_lightning.information import Lanczos
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Downsample, Recipe
from cmi_lightning.schedule import Level
from cmi_lightning.solvers import DDPM
from cmi_lightning.table.statistics import bootstrap_interval

FOLDER = Path("runs/exact_garments")
SHAPE, STD, FLOOR = (1, 32, 32), 0.05, 0.02
PRIORS = {"ten": (10, False), "many": (1000, True)}  # clusters; whether they share a covariance
TASKS: dict[str, Recipe] = {"super-resolution ×4": Downsample(4), "box": BoxMask(14, margin=4)}
BASES = {
    "DPS": (DPS, (0.5, 1.0, 2.0, 4.0, 8.0)),
    "ΠGDM": (PiGDM, (0.25, 0.5, 1.0, 2.0, 4.0)),
    "MomentMatching": (lambda s: MomentMatching(krylov=6, scale=s), (0.7, 1.0, 1.4)),
}
# The base is CMI that moves nothing, for I along its way.
VARIANTS = {"base": 1e-9, "random 0.1": 0.1, "random 0.3": 0.3}
VARIANTS |= {f"ascent {scale:g}": scale for scale in (0.03, 0.1, 0.3)}
VARIANTS |= {f"descent {scale:g}": -scale for scale in (0.03, 0.1, 0.3)}


def fit(count: int, shared: bool, images: int = 20_000, rounds: int = 10) -> GaussianMixture:
    """Return the mixture of k-means clusters of the first training images, in float64."""
    pixels = FashionMNIST(train=True).pixels[:images].flatten(1)
    x, g = pixels / 127.5 - 1, torch.Generator().manual_seed(0)
    means = x[torch.randperm(images, generator=g)[:count]]
    for _ in range(rounds):
        nearest = (x @ means.mT - 0.5 * (means**2).sum(1)).argmax(1)
        sizes = nearest.bincount(minlength=count)
        sums = torch.zeros_like(means).index_add_(0, nearest, x)
        means = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), means)
    rest = (x - means[nearest]).double()
    groups = [rest] if shared else [rest[nearest == k] for k in range(count)]
    covariance = torch.stack([r.mT @ r / len(r) for r in groups])
    covariance.diagonal(dim1=1, dim2=2).add_(FLOOR**2)
    means = means.double().unflatten(1, SHAPE)
    return GaussianMixture(means, DenseCovariance(covariance), sizes.double())


class Rotated(Denoiser):
    """A mixture with one covariance, in its eigenbasis, so that means are rotated once."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.basis, values = mixture.covariances.vectors[0], mixture.covariances.values
        means, weights = mixture.means.flatten(1) @ self.basis, mixture.log_weights.exp()
        self.mixture = GaussianMixture(means, DiagonalCovariance(values), weights)
        self.schedule, self.image_shape = mixture.schedule, mixture.image_shape

    def forward(self, x: Tensor, level: Level) -> Prediction:
        x0 = self.mixture(x.flatten(1) @ self.basis, level).x0
        return Prediction((x0 @ self.basis.mT).reshape(x.shape))


class Batch(NamedTuple):
    """Truths (B, 1, 32, 32), their measurements, and the noise of all samplers."""

    x: Tensor
    problem: Problem
    noise: SampleNoise


def measure(x: Tensor, task: str, role: str) -> Batch:
    noise = SampleNoise(0, [f"{role}/{k}" for k in range(len(x))])
    operator = TASKS[task].bind(SHAPE, noise, x)
    return Batch(x, Problem.simulate(x, operator, STD, noise), noise)


def exact(prior: GaussianMixture, matrices: Tensor, batch: Batch, task: str) -> tuple[Tensor, ...]:
    """Return E[x₀ | y] and a draw of p(x₀ | y), of a mixture in float64 with these covariances.

    The draw is Matheron's: a draw of the posterior's component, moved by the gain as y asks.
    """
    means, moments, draws = prior.means.flatten(1), [], []
    g = torch.Generator().manual_seed(1)
    for row, name in enumerate(batch.noise.ids):
        noise, like = SampleNoise(batch.noise.seed, [name]), batch.x[:1].double()
        y = batch.problem.y[row : row + 1].double()
        A, y, _ = as_dense(Problem(y, TASKS[task].bind(SHAPE, noise, like), STD))
        CA = matrices @ A.mT
        L = torch.linalg.cholesky(A @ CA + STD**2 * torch.eye(len(A)).double())
        rest = (y - means @ A.mT).unflatten(0, (len(matrices), -1)).mT  # (·, m, components)
        white = torch.linalg.solve_triangular(L, rest, upper=False)
        pivots = L.diagonal(dim1=1, dim2=2).log().sum(1)
        fits = prior.log_weights - (0.5 * (white**2).sum(1) + pivots[:, None]).flatten()
        gain = torch.cholesky_solve(CA.mT, L).mT
        moved = means + (gain @ rest).mT.flatten(0, 1)
        moments.append(torch.softmax(fits, 0) @ moved)
        k = int(torch.multinomial(torch.softmax(fits, 0), 1, generator=g))
        c = k % len(matrices)  # 0 where there is one
        z, n = (torch.randn(s, generator=g, dtype=y.dtype) for s in (len(means[k]), len(y)))
        values, vectors = prior.covariances.values[c], prior.covariances.vectors[c]
        draw = means[k] + vectors @ (values.sqrt() * z)
        draws.append(draw + gain[c] @ (y - A @ draw - STD * n))
    return tuple(torch.stack(rows).float().unflatten(1, SHAPE) for rows in (moments, draws))


def restore(prior: Denoiser, batch: Batch, guidances: list[Guidance]) -> tuple[Tensor, float]:
    """Return restored images, and the mean of I over images and acting steps, in nats."""
    values, restored = [], batch.x
    sampler = Sampler(prior, DDPM(), guidances, num_steps=100)
    for record in sampler.iterate(batch.problem, batch.noise, batch.x):
        restored = record.x
        if "cmi/value" in record.log:
            values.append(float(record.log["cmi/value"].mean()))
    return restored, sum(values) / max(len(values), 1)


def square(x: Tensor, other: Tensor) -> Tensor:
    return ((x - other) ** 2).flatten(1).mean(1)


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Return the PSNR per image, of images clamped to [−1, 1], in dB."""
    return 10 * torch.log10(4 / square(x.clamp(-1, 1), truth.clamp(-1, 1)))


def cmi(variant: str, probes: int) -> CMI:
    chance = variant.startswith("random")
    estimator = RandomDirection() if chance else Lanczos(probes=probes, **LANCZOS)
    options = {"step_size": "noise", "max_step": 1.0, "interval": 6}
    return CMI(VARIANTS[variant], estimator=estimator, **options)


def row(name: str, metrics: list[Tensor], base: list[Tensor] | None, nats: float) -> None:
    """Print means, or differences from the base with their intervals."""
    shown = [f"{m.mean():.2f}" for m in metrics]
    if base is not None:
        differences = [m - b for m, b in zip(metrics, base, strict=True)]
        ends = [bootstrap_interval(d.tolist()) for d in differences]
        pairs = zip(differences, ends, strict=True)
        shown = [f"{d.mean():+.2f} [{low:+.2f}, {high:+.2f}]" for d, (low, high) in pairs]
    shown.append("" if math.isnan(nats) else f"{nats:.1f}")
    print(f"| {name} | {' | '.join(shown)} |".replace("-", "−"), flush=True)


def table(
    prior: Denoiser,
    batch: Batch,
    trial: Batch,
    moments: tuple[Tensor, ...],
    options: argparse.Namespace,
) -> None:
    mean, draw = moments

    def metrics(x: Tensor) -> list[Tensor]:
        errors = [1000 * square(x, batch.x), 1000 * square(x, mean)]
        return [psnr(x, batch.x), *errors]

    row("E[x₀ given y]", metrics(mean), None, math.nan)
    row("a draw of p(x₀ given y)", metrics(draw), None, math.nan)
    for name in options.bases:
        guidance, sizes = BASES[name]
        tried = {s: restore(prior, trial, [guidance(s)])[0] for s in sizes}
        best = max(tried, key=lambda s: psnr(tried[s], trial.x).mean())
        base = None
        for variant in options.variants:
            x, nats = restore(prior, batch, [guidance(best), cmi(variant, options.probes)])
            row(f"{name} {best:g}, {variant}", metrics(x), base, nats)
            base = metrics(x) if base is None else base


def main(options: argparse.Namespace) -> None:
    path = FOLDER / f"{options.prior}.safetensors"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        fit(*PRIORS[options.prior]).save(path)
    wide = load_mixture(str(path))
    g, n = torch.Generator().manual_seed(0), options.images
    tuning, truth = wide.sample(12, g).float(), wide.sample(n, g).float()
    if options.real:
        held_out = FashionMNIST(train=True).pixels[-NUM_HELD_OUT:].float() / 127.5 - 1
        truth, tuning = held_out[:n], held_out[n : n + 12]
    matrices = wide.covariances.matrix()
    for task in options.tasks:
        batch, trial = measure(truth, task, "test"), measure(tuning, task, "tuning")
        moments = exact(wide, matrices, batch, task)
        narrow = copy.deepcopy(wide).float()
        prior = Rotated(narrow) if PRIORS[options.prior][1] else narrow
        print(f"\n| {task} | PSNR, dB | squared error, ×1000 | to E[x₀ given y], ×1000 | I, nats |")
        print("|---|" + "---:|" * 4)
        table(prior, batch, trial, moments, options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prior", default="many", choices=list(PRIORS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--probes", type=int, default=1, help="of CMI's gradient")
    parser.add_argument("--real", action="store_true")
    torch.set_num_threads(1)
    main(parser.parse_args())
