"""Intervals and p by drawing images with replacement or flipping signs; Holm's correction."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
FLIPS = 100_000  # Holm's smallest levels are near 0.002, which 10,000 would know to a quarter only
LEVEL = 0.05
Array = np.ndarray


@functools.lru_cache(maxsize=8)  # comparisons of as many images take the same draws
def resamples_of(count: int, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Return (resamples, count): how often each image, or cluster, is drawn with replacement."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    counts.setflags(write=False)
    return counts


def of_clusters(values: Sequence[float], clusters: Sequence[str] | None) -> tuple[Array, Array]:
    """Return the sum of values in every cluster, and how many there are."""
    data = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return data, np.ones(len(data))
    codes = np.unique(clusters, return_inverse=True)[1]
    return np.bincount(codes, data), np.bincount(codes)


def bootstrap_interval(
    differences: Sequence[float],
    clusters: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, clusters drawn with replacement.

    Args:
        differences: one paired difference per image.
        clusters: the cluster of every image. Default: each has its own.
        resamples: how many times the clusters are drawn.
        seed: of the draws.

    Source: Efron & Tibshirani (1993), An introduction to the bootstrap, ch. 13.
    """
    sums, sizes = of_clusters(differences, clusters)
    counts = resamples_of(len(sums), resamples, seed)
    low, high = np.quantile(counts @ sums / (counts @ sizes), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def sign_flip_p(
    differences: Sequence[float],
    clusters: Sequence[str] | None = None,
    resamples: int = FLIPS,
    seed: int = 0,
) -> float:
    """Return the two-sided p of "the differences are symmetric about 0", by flipping signs.

    p = (1 + #{|mean of flipped| ≥ |mean|}) / (1 + resamples), which is valid for any number of
    resamples (Phipson & Smyth 2010).

    Args:
        differences: one paired difference per image.
        clusters: the cluster of every image; a cluster's signs are flipped together.
        resamples: how many sets of signs are drawn.
        seed: of the signs.
    """
    sums, _ = of_clusters(differences, clusters)
    # Rounding must not make a difference of the flips that give the sum itself.
    least = abs(sums.sum()) * (1 - 1e-12)
    chunks = np.array_split(_signs(len(sums), resamples, seed), max(1, resamples // 10_000))
    beyond = sum(int((np.abs(signs @ sums) >= least).sum()) for signs in chunks)
    return float((1 + beyond) / (1 + resamples))


@functools.lru_cache(maxsize=4)  # comparisons of as many images take the same signs
def _signs(count: int, resamples: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(resamples, count), dtype=np.int8) * 2 - 1
    signs.setflags(write=False)
    return signs


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Return which hypotheses are rejected with a family-wise error of ``level``.

    The k-th smallest of n is compared with level / (n − k + 1), until one is larger.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.

    Example:
        >>> holm([0.03, 0.01, 0.04])
        [False, True, False]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order, rejected = p.argsort(), np.zeros(len(p), dtype=bool)
    rejected[order] = np.logical_and.accumulate(p[order] <= level / np.arange(len(p), 0, -1))
    return list(map(bool, rejected))


def interval_and_p(value: float, draws: Array) -> tuple[float, float, float]:
    """Return the 95 % basic bootstrap interval of a statistic of a set of images, and a p.

    The draws d of the statistic θ are mirrored, 2θ − d: drawing with replacement moves a distance
    between distributions up, as fewer images do, and mirroring takes that off instead of adding
    it. p is twice the smaller share of mirrored draws on one side of 0, with one added to it.

    Args:
        value: the statistic θ of all images.
        draws: the statistic in every resample.

    Source: Davison & Hinkley (1997), Bootstrap methods and their application, §5.2.
    """
    mirrored = 2 * value - draws
    low, high = np.quantile(mirrored, [LEVEL / 2, 1 - LEVEL / 2])
    tail = min((mirrored <= 0).sum(), (mirrored >= 0).sum())
    return float(low), float(high), float(min(1.0, 2 * (1 + tail) / (1 + len(draws))))


def frechet_many(real: Tensor, fake: Tensor, counts: Tensor) -> Tensor:
    """Return the Fréchet distance (R,) of resamples of images from the same ones of their truths.

    With X, Y (n, D) the centred features, weighted by √count, tr (Σ Σ')^½ = ‖X Yᵀ‖_* / (n − 1),
    the sum of singular values. Those are of the triangular factors too, X = Q R: ‖R_X R_Yᵀ‖_*.

    Args:
        real: features (N, D) of the truths.
        fake: features (N, D) of the restorations.
        counts: (R, N), how often each image is in a resample; at least 2 images in each.
    """
    real, fake, distances = real.double(), fake.double(), []
    for w in counts.double().split(64):  # that many (n, D) at a time
        shift = (w @ real - w @ fake) / w.sum(1, keepdim=True)
        x, y = (_centred(features, w) for features in (real, fake))
        traces = x.square().sum((1, 2)) + y.square().sum((1, 2))
        if x.shape[1] > x.shape[2]:
            x, y = (torch.linalg.qr(z, mode="r")[1] for z in (x, y))
        shared = torch.linalg.svdvals(x @ y.mT).sum(1)
        distances.append(shift.square().sum(1) + (traces - 2 * shared) / (w.sum(1) - 1))
    return torch.cat(distances)


def _centred(x: Tensor, counts: Tensor) -> Tensor:
    """Return √count (x − mean) (R, N, D) of resamples of x (N, D)."""
    mean = counts @ x / counts.sum(1, keepdim=True)
    return (x - mean[:, None]) * counts.sqrt()[:, :, None]


def kernel_many(real: Tensor, fake: Tensor, counts: Tensor) -> Tensor:
    """Return the kernel distance (R,) of R resamples, as :func:`frechet_many` takes them.

    An image that is in a resample n times counts as n images, as it would for torchmetrics.
    """
    x, y, w = real.double(), fake.double(), counts.double()

    def gram(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    total = w.sum(1)
    within = torch.zeros_like(total)
    for a in (x, y):
        k = gram(a, a)
        within += ((w @ k) * w).sum(1) - w @ k.diagonal()
    across = ((w @ gram(x, y)) * w).sum(1)
    return within / (total * (total - 1)) - 2 * across / total**2
