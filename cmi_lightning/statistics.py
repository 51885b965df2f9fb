"""Means and their standard errors: the one place for all that reports them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


def mean_curves(
    every: Iterable[Mapping[str, Mapping[Any, Any]]],
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, int]]]:
    """Return the means of curves, and of how many curves each is.

    Args:
        every: curves by quantity: values, or six digits of them, by the number of the step.

    Example:
        >>> mean_curves([{"residual": {1: 4.0, 2: 1.0}}, {"residual": {1: 2.0}}])[0]
        {'residual': {1: 3.0, 2: 1.0}}
    """
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for curves in every:
        for quantity, curve in curves.items():
            for step, value in curve.items():
                values[quantity][int(step)].append(float(value))
    at = {quantity: sorted(curve.items()) for quantity, curve in values.items()}
    means = {q: {step: math.fsum(v) / len(v) for step, v in curve} for q, curve in at.items()}
    return means, {q: {step: len(v) for step, v in curve} for q, curve in at.items()}
