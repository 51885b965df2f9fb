"""Distances between images, and sets of images, in a network's features; the features' files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cmi_lightning.errors import InputError
from cmi_lightning.paths import inside

SUBSETS = 100  # of the larger set, where two sets differ in size


def perceptual(maps: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the perceptual distance (B,) of images, given their layers' maps (B, C_l, H_l, W_l).

    d = mean_l mean_hw Σ_c (f_lchw/‖f_l·hw‖ − g_lchw/‖g_l·hw‖)², in [0, 4]: LPIPS without the
    weights learned from people's judgements, averaged over layers instead of summed.

    Source: Zhang et al. (2018), Eq. 1 with w = 1.
    """
    distances = []
    for f, g in zip(maps, other, strict=True):
        f, g = (nn.functional.normalize(z.double(), dim=1) for z in (f, g))
        distances.append((f - g).square().sum(1).flatten(1).mean(1))
    return torch.stack(distances).mean(0)


class _Stored(nn.Module):
    """The ``feature=`` module of torchmetrics that hands on features computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance of features (N, D) and (M, D), taken as Gaussian; N, M ≥ 2.

    d = ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½), by torchmetrics. With fewer images than features the
    covariances are singular, and with few the distance is too large: compare equal numbers only.

    Source: Heusel et al. (2017), whose FID has Inception's features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Stored(real.shape[1]), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kernel(real: Tensor, fake: Tensor) -> float:
    """Return the kernel distance of features (N, D) and (M, D), an unbiased MMD²; N, M ≥ 2.

    The kernel is (x·y/D + 1)³; by torchmetrics, on all images at once. Where the sets differ in
    size, the mean of 100 subsets as large as the smaller one, the same in every call. It may be
    negative: of images that go in pairs, as restorations and truths do, or by its own error.

    Source: Bińkowski et al. (2018), whose KID has Inception's features.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(fake))
    subsets = 1 if len(real) == len(fake) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(
            _Stored(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles by the global generator
        torch.manual_seed(0)
        return float(metric.compute()[0])


def embedding_path(folder: Path, name: str, embeddings: str = "embeddings") -> Path:
    """Return where a run's folder keeps a sample's features, by its id.

    The file is an array (2 + 1 + K, D): of the truth, the restoration, A⁺y, and, where there are
    several, the K draws.
    """
    return inside(folder / embeddings, name, ".npy")


def read_embeddings(folder: Path, ids: Sequence[str], embeddings: str = "embeddings") -> Tensor:
    """Return the features (N, 3 + K, D) that ``FeatureMetrics`` wrote for samples, in order.

    Raises:
        InputError: if a sample has none.
    """
    arrays = []
    for name in ids:
        path = embedding_path(folder, name, embeddings)
        try:
            arrays.append(np.load(path))
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise InputError(
                f"'{path}' is missing or damaged: run the same command again, with FeatureMetrics."
            ) from error
    return torch.from_numpy(np.stack(arrays))
