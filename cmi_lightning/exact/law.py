"""The exact law of what a sampler draws, where its result is affine in its random numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler


@dataclass(frozen=True)
class _OneByOne(SampleNoise):
    """Row 0 draws zeros; row k draws zeros but for the k-th number of the run, which is 1."""

    places: dict[tuple[str, int], int] = field(default_factory=dict)

    def normal(self, stream: str, step: int, like: Tensor) -> Tensor:
        size = like[0].numel()
        first = self.places.setdefault((stream, step), self.count)
        self.places["", 0] = max(self.count, first + size)
        flat = like.new_zeros(len(like), size)
        if len(like) > first + size:
            flat[1 + first : 1 + first + size] = torch.eye(size, dtype=like.dtype)
        return flat.reshape(like.shape)

    def signs(self, stream: str, step: int, like: Tensor) -> Tensor:
        return torch.ones_like(like)

    @property
    def count(self) -> int:
        return self.places.get(("", 0), 0)


def sampler_law(sampler: Sampler, problem: Problem, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (n,) and covariance (n, n) of the sampler's draws, without drawing any.

    For a Gaussian prior and a linear operator, most methods are affine in their normal numbers:
    x = c + Σₖ gₖ zₖ. One run of a batch finds c and all gₖ: the covariance is Σₖ gₖ gₖᵀ. Methods
    that are not affine (Adam, spheres, particles) give nonsense. Random signs are all 1.

    >>> from cmi_lightning.exact import GaussianPrior
    >>> from cmi_lightning.operators import Identity
    >>> from cmi_lightning.solvers import DDPM
    >>> x = torch.zeros(1, 1, dtype=torch.float64)
    >>> sampler = Sampler(GaussianPrior(x[0], 0.5), DDPM(), num_steps=500, clamp=False)
    >>> _, covariance = sampler_law(sampler, Problem(x + 1, Identity(), 0.1), x)
    >>> bool((covariance - 0.5).abs() < 0.02)
    True

    The sampler is unclamped, the problem of one measurement (1, *m), its operator for any number of
    images. ``like`` is one image (1, *) of n numbers, in the dtype to compute in.
    """
    noise = _OneByOne(0, ["0"])
    sampler.run(problem, noise, like)
    rows = noise.count + 1
    batch = replace(problem, y=problem.y.expand(rows, *problem.y.shape[1:]))
    noise = replace(noise, ids=[str(k) for k in range(rows)])
    x = sampler.run(batch, noise, like.expand(rows, *like.shape[1:])).flatten(1)
    g = x[1:] - x[:1]
    return x[0], g.mT @ g


def wasserstein(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return the Wasserstein-2 distance of two normal laws, each (mean (n,), covariance (n, n)).

    >>> one = torch.eye(1)
    >>> round(wasserstein((torch.zeros(1), one), (torch.ones(1), 4 * one)), 4)
    1.4142
    """
    (m, C), (k, D) = ((mean.double(), covariance.double()) for mean, covariance in (a, b))
    root = _root(D)
    spread = C.trace() + D.trace() - 2 * _root(root @ C @ root).trace()
    return float(((m - k).square().sum() + spread).clamp_min(0).sqrt())


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
