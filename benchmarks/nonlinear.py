"""Forward models that are not linear: PSNR of DPS against what `guess` shows, on eight garments.

    python benchmarks/nonlinear.py            the table of docs/guides/operator.md (a minute)

DPS on the garments' prior, 100 DDPM steps, σ = 0.05. ζ was chosen on validation garments. Of
several draws of an image the one of smallest ‖y − A(x)‖ is kept; the truth chooses nothing.
"""

from __future__ import annotations

import torch

from cmi_lightning import Problem, Sampler
from cmi_lightning.data import ImageFolderData
from cmi_lightning.data.pictures import psnr
from cmi_lightning.denoisers import shipped_prior
from cmi_lightning.guidance import DPS
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import HDR, Operator, PhaseRetrieval
from cmi_lightning.solvers import DDPM

CASES: list[tuple[Operator, float, int]] = [(HDR(), 0.5, 1), (PhaseRetrieval(), 2.0, 4)]


def main() -> None:
    """Print a row for each forward model, and one for each further draw."""
    data = ImageFolderData("fashion-mnist-test")
    data.setup("predict")
    chosen = torch.linspace(0, len(data.images) - 1, 8).round().int().tolist()
    items = [data.images[i] for i in chosen]
    truth, ids = torch.stack([item["x"] for item in items]), [item["id"] for item in items]
    prior = shipped_prior("fashion-mnist")
    print("| operator | ζ | draws | guess, dB | this draw, dB | smallest residual, dB |")
    print("|---|---:|---:|---:|---:|---:|")
    for operator, scale, draws in CASES:
        problem = Problem.simulate(truth, operator, 0.05, SampleNoise(0, ids))
        guess = psnr(problem.operator.guess(problem.y), truth).mean()
        kept, smallest = torch.zeros_like(truth), torch.full((len(ids),), torch.inf)
        for draw in range(draws):
            noise = SampleNoise(0, [f"{i}#{draw}" if draw else i for i in ids])
            x = Sampler(prior, DDPM(), [DPS(scale)], 100).run(problem, noise, truth)
            residual = norm(problem.y - problem.operator(x))
            nearer = residual < smallest
            kept[nearer], smallest[nearer] = x[nearer], residual[nearer]
            print(
                f"| {type(operator).__name__} | {scale} | {draw + 1} | {guess:.1f} | "
                f"{psnr(x, truth).mean():.1f} | {psnr(kept, truth).mean():.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
