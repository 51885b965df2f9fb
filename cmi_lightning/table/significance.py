"""Which differences between cells are more than chance: a test, and a correction for many."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from cmi_lightning.table.resampling import LEVEL, Array, of_clusters

FLIPS = 100_000  # Holm's smallest levels are near 0.002, which 10,000 would know to a quarter only


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
    """
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected
