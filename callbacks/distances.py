"""Distances between images, and between sets of images, in the features of a network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_KEPT = 2**28  # bytes of the truths' roots that a bootstrap keeps for the next cell
SUBSETS = 100  # of the larger set, where two sets differ in size


def perceptual(maps: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the perceptual distance (B,) of images, given their feature maps.

    d = mean_l mean_hw Σ_c (f_lchw/‖f_l·hw‖ − g_lchw/‖g_l·hw‖)², in [0, 4]: LPIPS without the
    weights learned from people's judgements, averaged over layers instead of summed.

    Args:
        maps: the layers' features (B, C_l, H_l, W_l) of one set of images.
        other: those of the images they are compared with.

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
    """Return the Fréchet distance of two sets' features, taken as Gaussian.

    d = ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½), by torchmetrics. With fewer images than features the
    covariances are singular, and with few the distance is too large: compare equal numbers only.

    Args:
        real: features (N, D), N ≥ 2.
        fake: features (M, D), M ≥ 2.

    Source: Heusel et al. (2017), whose FID has Inception's features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Stored(real.shape[1]), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kernel(real: Tensor, fake: Tensor) -> float:
    """Return the kernel distance of two sets' features: the unbiased estimate of MMD².

    The kernel is (x·y/D + 1)³; by torchmetrics, on all images at once. Where the sets differ in
    size, the mean of 100 subsets as large as the smaller one, the same in every call. It may be
    negative: the estimate of a small distance, or images that go in pairs, as restorations and
    their truths do.

    Args:
        real: features (N, D), N ≥ 2.
        fake: features (M, D), M ≥ 2.

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


class FrechetBootstrap:
    """:func:`frechet` of resamples of images, from the same resamples of their truths.

    What depends on the truths alone is computed once, for all the cells of a table. With
    X, Y (n, D) the centred features, weighted by √count,

        tr (Σ Σ')^½ = tr (Σ^½ Σ' Σ^½)^½ = ‖X Yᵀ‖_* / (n − 1),

    the sum of singular values; the last form is cheaper for fewer images than features.

    Args:
        real: features (N, D) of the truths.
        counts: (R, N), how often each image is in a resample; at least 2 images in each.
    """

    def __init__(self, real: Tensor, counts: Tensor) -> None:
        self.real, self.counts = real.double(), counts.double()
        self.few = real.shape[0] < real.shape[1]
        self.roots: dict[int, Tensor] = {}
        self.kept = 8 * len(counts) * real.shape[1] ** 2 <= MOST_KEPT

    def __call__(self, fake: Tensor) -> Tensor:
        """Return the distances (R,) of features (N, D) of the restorations."""
        fake, found = fake.double(), []
        for i, w in enumerate(self._parts()):
            x, y = _centred(self.real, w), _centred(fake, w)
            free = w.sum(1) - 1
            if self.few:
                shared = torch.linalg.svdvals(x @ y.mT).sum(1) / free
            else:
                root = self.roots.get(i)
                if root is None:
                    root = self._root(x, free)
                    if self.kept:
                        self.roots[i] = root
                product = y @ root
                squares = torch.linalg.eigvalsh(product.mT @ product).clamp(min=0)
                shared = squares.sqrt().sum(1) / free.sqrt()
            traces = (x.square().sum((1, 2)) + y.square().sum((1, 2))) / free
            shift = (w @ self.real - w @ fake) / w.sum(1, keepdim=True)
            found.append(shift.square().sum(1) + traces - 2 * shared)
        return torch.cat(found)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.counts.split(64)  # that many (n, D) at a time

    @staticmethod
    def _root(x: Tensor, free: Tensor) -> Tensor:
        """Return Σ^½ (R, D, D) of centred features."""
        values, vectors = torch.linalg.eigh(x.mT @ x / free[:, None, None])
        return vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT


def _centred(x: Tensor, counts: Tensor) -> Tensor:
    """Return √count (x − mean) (R, N, D) of resamples of x (N, D)."""
    mean = counts @ x / counts.sum(1, keepdim=True)
    return (x - mean[:, None]) * counts.sqrt()[:, :, None]


def kernel_many(real: Tensor, fake: Tensor, counts: Tensor) -> Tensor:
    """Return :func:`kernel` (R,) of R resamples, as :class:`FrechetBootstrap` takes them.

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
