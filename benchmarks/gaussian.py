"""Exact laws of methods on a Gaussian prior: how far from the posterior, without drawing a sample.

    python benchmarks/gaussian.py            print the table of docs/methods.md, in some minutes
    python benchmarks/gaussian.py DDRM TMPD  print these rows

Six dimensions, three measurements, σ = 0.1, 100 levels of the linear chain. Methods that are not
affine in their random numbers (SITCOM, RED-diff, DSG, DPS, particles) have no such law.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from cmi_lightning import Problem, Sampler
from cmi_lightning.exact import (
    DenseCovariance,
    GaussianPrior,
    exact_posterior,
    sampler_law,
    wasserstein,
)
from cmi_lightning.guidance import (
    CADPS,
    CDPS,
    DDNM,
    DMPS,
    MCG,
    TMPD,
    AnnealedDPS,
    DiffPIR,
    Guidance,
    MomentMatching,
    PiGDM,
)
from cmi_lightning.operators import Dense
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers import (
    DAPS,
    DDIM,
    DDPM,
    DDRM,
    DDNMPlus,
    DPMSolver,
    PnPDM,
    Renoise,
    Resampled,
    Solver,
)

N, M, STD, LEVELS = 6, 3, 0.1, 100


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROOT = _normal(N, N, seed=0)
C = ROOT @ ROOT.mT / N / 2 + 0.05 * torch.eye(N)
A = _normal(M, N, seed=1) / N**0.5
PRIOR = GaussianPrior(0.3 * _normal(N, seed=2), DenseCovariance(C[None]), Schedule.linear())
TRUTH = PRIOR.sample(1, torch.Generator().manual_seed(3))
PROBLEM = Problem(TRUTH @ A.mT + STD * _normal(1, M, seed=4), Dense(A), STD)
VARIANCE = float(C.trace()) / N

METHODS: dict[str, tuple[Solver, list[Guidance]]] = {
    "MomentMatching": (DDPM(), [MomentMatching(M)]),
    "MomentMatching, DDIM": (DDIM(), [MomentMatching(M)]),
    "MomentMatching, DPM-Solver++": (DPMSolver(), [MomentMatching(M)]),
    "line search": (DDPM(), [MomentMatching(1)]),
    "ΠGDM, posterior": (DDPM(), [PiGDM(VARIANCE, "posterior")]),
    "CA-DPS": (DDPM(), [CADPS()]),
    "CA-DPS, shrink 0": (DDPM(), [CADPS(shrink=0.0)]),
    "TMPD": (DDPM(), [TMPD()]),
    "annealed DPS": (DDPM(), [AnnealedDPS()]),
    "DMPS": (DDPM(), [DMPS()]),
    "C-DPS": (DDPM(), [CDPS()]),
    "DiffPIR": (Renoise(0.3), [DiffPIR()]),
    "DiffPIR, known variance": (Renoise(0.3), [DiffPIR(prior_variance=VARIANCE)]),
    "DDNM": (Renoise(0.7225, True), [DDNM()]),
    "DDRM": (DDRM(), []),
    "DDNM+": (DDNMPlus(), []),
    "DAPS, x̂₀, r = ϱ": (DAPS(0, spread=1.0), []),
    "DAPS, r = ϱ": (DAPS(5, spread=1.0), []),
    "DAPS, x̂₀": (DAPS(0, low=0.02), []),
    "DAPS": (DAPS(5, low=0.02), []),
    "PnP-DM": (PnPDM(), []),
    "PnP-DM, ρ to 0.3": (PnPDM(low=0.3, inner=40), []),
    "ILVR": (DDPM(), [MCG(0.0)]),
    "RePaint": (Resampled(DDPM(), 10, 3), [MCG(0.0, "now")]),
}


def row(name: str) -> str:
    """Return a method's line of the table."""
    solver, guidances = METHODS[name]
    posterior = exact_posterior(PRIOR, PROBLEM)
    mean, covariance = posterior.means[0], posterior.covariances.matrix()[0]
    sampler = Sampler(PRIOR, solver, guidances, LEVELS, clamp=False)
    found = sampler_law(sampler, PROBLEM, TRUTH)
    sd = float(covariance.trace().sqrt())
    off = float((found[0] - mean).norm()) / sd
    spread = float(found[1].trace().sqrt()) / sd
    distance = wasserstein(found, (mean, covariance)) / sd
    return f"| {name} | {distance:.3f} | {off:.3f} | {spread:.3f} |"


def main() -> None:
    print("| method | distance | mean off by | spread |\n|---|---|---|---|")
    for name in sys.argv[1:] or METHODS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
