"""Means and their standard errors: the one place for all that reports them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None for what there are too few values for."""

    mean: float | None
    se: float | None = None


def mean_and_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return the mean of n values and its standard error, std / √n.

    Values of a cluster (crops of one photograph, say) depend on each other. With G clusters the
    error is √(G / (G − 1) Σ_g (Σ_{i ∈ g} (v_i − mean))²) / n, which is std / √n for clusters of
    one value.

    Args:
        values: n finite numbers.
        clusters: the cluster of every value. Default: each has its own.

    Source: Cameron & Miller (2015), A practitioner's guide to cluster-robust inference, §II.

    Example:
        >>> mean_and_error([1.0, 3.0])
        Estimate(mean=2.0, se=1.0)
        >>> mean_and_error([1.0, 1.0, 3.0, 3.0], "aabb").se
        1.0
    """
    count = len(values)
    if not count:
        return Estimate(None)
    mean = math.fsum(values) / count
    sums: dict[Hashable, list[float]] = defaultdict(list)
    for value, key in zip(values, range(count) if clusters is None else clusters, strict=True):
        sums[key].append(value - mean)
    if len(sums) < 2:
        return Estimate(mean)
    squares = math.fsum(math.fsum(of_cluster) ** 2 for of_cluster in sums.values())
    return Estimate(mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / count)
