"""Small problems in float64 that the tests of this folder share."""

import torch
from conftest import make_step, randn
from torch import Tensor

from cmi_lightning.exact import GaussianMixture
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    HDR,
    BoxMask,
    Convolution,
    Downsample,
    GaussianBlur,
    Identity,
    LinearOperator,
    MotionBlur,
    PhaseRetrieval,
    PixelMask,
)
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step

SHAPE = (2, 8, 6)
BATCH = 3
IDS = [f"sample/{row}" for row in range(BATCH)]  # as make_step names them


def unequal_mask(batch: int, height: int, width: int) -> Tensor:
    """Masks (B, H, W) that keep a different number of pixels of every image."""
    known = torch.ones(batch, height * width, dtype=torch.bool)
    for row in range(batch):
        known[row, :: row + 2] = False
    return known.unflatten(1, (height, width))


def kernels(count: int, height: int, width: int) -> Tensor:
    """Kernels of either sign (count, height, width), no blur amplifying anything."""
    taps = randn(count, height, width, seed=7)
    return taps / taps.abs().sum((1, 2), keepdim=True)


def bound(name: str, ids: list[str] = IDS) -> LinearOperator:
    """The operator of a name, as it meets images."""
    like = torch.empty(len(ids), *SHAPE, dtype=torch.float64)
    operator = {
        "identity": lambda: Identity(),
        "pixels": lambda: PixelMask.from_mask(unequal_mask(len(ids), *SHAPE[1:]), like),
        "box": lambda: BoxMask((3, 2), margin=1),
        "gaussian-reflect": lambda: GaussianBlur(7, 1.2),
        "motion-circular": lambda: MotionBlur(4, padding="circular"),
        "convolution-reflect": lambda: Convolution(kernels(len(ids), 3, 5)),
        "downsample": lambda: Downsample(2),
        "hdr": lambda: HDR(),
        "phase-retrieval": lambda: PhaseRetrieval(),
    }[name]()
    return operator.bind(SHAPE, SampleNoise(0, ids), like)


def mixture(schedule: Schedule | None = None) -> GaussianMixture:
    """Three components so close that x_t leaves open which of them it came from."""
    means = 0.15 * randn(3, *SHAPE, seed=1)
    variances = 0.05 + 0.3 * torch.rand(
        3, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(means, variances, weights, schedule)


def problem_step(
    name: str,
    index: int,
    schedule: Schedule | None = None,
    sigma: float | Tensor = 0.2,
    batch: int = BATCH,
) -> Step:
    """x_t of a batch, measured by an operator."""
    operator = bound(name, ids=[f"sample/{row}" for row in range(batch)])
    return make_step(mixture(schedule), operator, index, batch, sigma)


def per_row(value: Tensor, expected: Tensor) -> float:
    """Largest relative error ‖value − expected‖/‖expected‖ of any sample."""
    error = (value - expected).flatten(1).norm(dim=1)
    return float((error / expected.flatten(1).norm(dim=1)).max())
