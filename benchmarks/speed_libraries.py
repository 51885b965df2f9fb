"""DPS and moment matching here, in deepinv and in azula: same network, levels, y and steps.

    pip install -e '.[reference]'
    python benchmarks/speed_libraries.py                    the shipped photographs' prior, batch 4
    python benchmarks/speed_libraries.py --prior fashion-mnist --batch 8 --runs 5

Each row is a whole chain. Rows run in turn on one thread of one process, raw between them, and
ratios are those of the same round: seconds are CPU time, which other programs change little. Raw
is one forward and one vector-Jacobian product a step. Passes are counted at the network. Krylov is
the number of vectors that the solve of moment matching may use. PSNR shows that every row restores.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import azula.denoise
import azula.sample
import torch
from azula.guidance.dps import DPSSampler
from azula.guidance.mmps import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from deepinv.models.base import Denoiser as DeepinvDenoiser
from deepinv.physics import GaussianNoise, LinearPhysics
from deepinv.sampling import (
    DDPMSolver,
    DPSDataFidelity,
    MomentMatchingDataFidelity,
    NoisyDataFidelity,
    PosteriorDiffusion,
    VariancePreservingDiffusion,
)
from speed import raw, seconds
from torch import Tensor

from cmi_lightning import Problem, Sampler
from cmi_lightning.denoisers import Denoiser, Prediction, shipped_prior
from cmi_lightning.denoisers.base import Wrapper
from cmi_lightning.guidance import DPS, Guidance, MomentMatching
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask
from cmi_lightning.predict.memory import keep_memory
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers import DDPM

STD = 0.1
PASSES: Counter[str] = Counter()


class _Count(torch.autograd.Function):
    """The identity, which counts products with the Jacobian of what came before."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        PASSES["products"] += 1
        return grad


class Counting(Wrapper):
    """A prior that counts its passes."""

    def forward(self, x: Tensor, level: Level) -> Prediction:
        PASSES["forwards"] += 1
        prediction = self.denoiser(x, level)
        return prediction._replace(x0=_Count.apply(prediction.x0))


class ForAzula(azula.denoise.Denoiser):
    """A prior as azula's: time i + 1 of its chain is level i of ours, time 0 the clean image."""

    def __init__(self, prior: Denoiser, levels: Schedule) -> None:
        super().__init__()
        self.prior, self.levels = prior, levels
        self.alpha = torch.tensor([1.0, *levels.alphas])
        self.sigma = torch.tensor([0.0, *levels.sigmas])

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t.round().long()], self.sigma[t.round().long()]

    def forward(self, x_t: Tensor, t: Tensor) -> azula.denoise.DiracPosterior:
        return azula.denoise.DiracPosterior(self.prior(x_t, self.levels[int(t.round()) - 1]).x0)


class ForDeepinv(DeepinvDenoiser):
    """A prior as deepinv's, which asks for x̂₀ at x̄ = x_t/α and σ̄ = σ/α."""

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        low, high = self.prior.schedule.range
        level = self.prior.schedule.level(min(max(float(sigma.max()), low), high))
        return self.prior(level.alpha * x, level).x0


def chains(
    prior: Denoiser, problem: Problem, noise: SampleNoise, like: Tensor, steps: int, krylov: int
) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Return the chains by method and library."""
    operator, levels = problem.operator, prior.schedule.respace(steps)
    y = problem.y.flatten(1)

    def forward(x: Tensor) -> Tensor:
        return operator(x).flatten(1)

    def adjoint(v: Tensor) -> Tensor:
        return operator.adjoint(v.reshape(problem.y.shape))

    def ours(guidance: Guidance) -> Callable[[], Tensor]:
        sampler = Sampler(prior, DDPM(), [guidance], steps)
        return lambda: sampler.run(problem, noise, like)

    def with_azula(sampler: azula.sample.Sampler) -> Callable[[], Tensor]:
        return lambda: sampler(torch.randn_like(like))

    def with_deepinv(fidelity: NoisyDataFidelity) -> Callable[[], Tensor]:
        sampler = PosteriorDiffusion(
            fidelity,
            ForDeepinv(prior),
            VariancePreservingDiffusion(dtype=torch.float32),
            DDPMSolver(torch.linspace(1, 0, steps + 1)),
            dtype=torch.float32,
            minus_one_one=False,
        )
        physics = LinearPhysics(A=forward, A_adjoint=adjoint, noise_model=GaussianNoise(STD))
        return lambda: sampler(y, physics, x_init=tuple(like.shape))

    theirs = ForAzula(prior, levels)
    options = {"start": float(steps), "steps": steps, "silent": True}
    covariance = IsotropicCovariance(torch.tensor(STD**2))
    matched = MMPSDenoiser(theirs, y, forward, covariance, iterations=krylov)
    return {
        ("DPS", "cmi-lightning"): ours(DPS()),
        ("DPS", "deepinv"): with_deepinv(DPSDataFidelity(clip=(-1, 1))),
        ("DPS", "azula"): with_azula(DPSSampler(theirs, y, forward, **options)),
        ("moment matching", "cmi-lightning"): ours(MomentMatching(krylov=krylov)),
        ("moment matching", "deepinv"): with_deepinv(
            MomentMatchingDataFidelity(cg_max_iter=krylov, clip=(-1, 1))
        ),
        ("moment matching", "azula"): with_azula(azula.sample.DDPMSampler(matched, **options)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="photos-64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--krylov", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()  # for all three alike
    plain = shipped_prior(args.prior)
    prior = Counting(plain)
    size = plain.trained_side or 32
    noise = SampleNoise(0, [str(i) for i in range(args.batch)])
    like = torch.zeros(args.batch, plain.image_shape[0], size, size)  # type: ignore[index]
    nothing = Problem.simulate(like, BoxMask(size // 2, margin=0), STD, noise)  # guides nothing
    images = Sampler(plain, DDPM(), [], 50).run(nothing, noise, like).clamp(-1, 1)
    problem = Problem.simulate(images, BoxMask(size // 2, margin=size // 8), STD, noise)
    work = chains(prior, problem, noise, like, args.steps, args.krylov)
    ratios: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    passes, quality = {}, {}
    for run in range(args.runs + 1):
        least = seconds(lambda: raw(plain, like, args.steps), "cpu")
        for name, chain in work.items():
            PASSES.clear()
            results: list[Tensor] = []
            spent = seconds(lambda c=chain, r=results: r.append(c()), "cpu")  # type: ignore[misc]
            passes[name] = "{forwards} + {products}".format_map(PASSES)
            error = (results[0].clamp(-1, 1) - images).square().flatten(1).mean(1)
            quality[name] = float((10 * torch.log10(4 / error)).mean())
            if run:  # the first one warms up
                ratios[name].append(spent / least)
    print(
        f"{args.prior}, batch {args.batch}, {size}x{size}, {args.steps} steps, krylov {args.krylov}"
    )
    print("| method | library | forwards + products | time / raw | PSNR, dB |")
    print("|---|---|---:|---|---:|")
    for (method, library), r in ratios.items():
        name = (method, library)
        print(
            f"| {method} | {library} | {passes[name]} | {statistics.median(r):.2f} "
            f"({min(r):.2f} to {max(r):.2f}) | {quality[name]:.1f} |"
        )


if __name__ == "__main__":
    main()
