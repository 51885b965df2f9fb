"""Paired differences between the cells of a row, and which of them are significant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cmi_lightning.report.results import Comparison, Difference, Metric, Variant
from cmi_lightning.table.cells import Key, StartedCell
from cmi_lightning.table.resampling import bootstrap_interval, holm, interval_and_p, sign_flip_p
from cmi_lightning.table.spec import Table

COMPARED: tuple[tuple[Variant, Variant], ...] = (
    ("cmi", "base"),
    ("descent", "base"),
    ("equal", "base"),
    ("cmi", "equal"),
    ("descent", "equal"),
)


def compare(
    table: Table, cells: Mapping[Key, StartedCell], metrics: Sequence[Metric]
) -> tuple[Comparison, ...]:
    """Return the comparisons that a table's cells allow, each over the images that both have.

    Significant is what Holm's correction leaves among the cells of one metric and one kind of
    comparison.
    """
    comparisons = []
    for (task, method), (variant, against) in itertools.product(table.rows(), COMPARED):
        one, other = cells.get((task, method, variant)), cells.get((task, method, against))
        if one is not None and other is not None:
            differences = {m.key: d for m in metrics if (d := _difference(one, other, m))}
            comparisons.append(Comparison(task, method, variant, against, differences))
    for kind, metric in itertools.product(COMPARED, (m.key for m in metrics)):
        of_kind = [c.metrics for c in comparisons if (c.variant, c.against) == kind]
        family = [differences for differences in of_kind if metric in differences]
        rejected = holm([differences[metric].p for differences in family])
        for differences, significant in zip(family, rejected, strict=True):
            differences[metric] = replace(differences[metric], significant=significant)
    return tuple(comparisons)


def _difference(one: StartedCell, other: StartedCell, metric: Metric) -> Difference | None:
    """Return one cell minus another on a metric, over the images that both have.

    An image that failed in the first cell alone is in no mean, but counts as not improved.
    """
    if not metric.per_image:
        return _difference_of_sets(one, other, metric.key)
    mine, theirs = one.values(metric.key), other.values(metric.key)
    ids = [name for name in mine if name in theirs]
    if len(ids) < 2:
        return None
    values, clusters = [mine[name] - theirs[name] for name in ids], one.clusters_of(ids)
    lost = sum(record["failed"] is not None and record["id"] in theirs for record in one.all)
    low, high = bootstrap_interval(values, clusters)
    return Difference(
        difference=math.fsum(values) / len(values),
        low=low,
        high=high,
        p=sign_flip_p(values, clusters),
        pairs=len(values),
        significant=False,
        improved=sum(metric.sign * v > 0 for v in values) / (len(values) + lost),
        values=tuple(float(f"{v:.6g}") for v in values),
    )


def _difference_of_sets(one: StartedCell, other: StartedCell, metric: str) -> Difference | None:
    ids = tuple(name for name in one.records if name in other.records)
    if len(ids) < 3 or metric not in ("frechet", "kernel"):
        return None
    mine, theirs = one.distances(metric, ids), other.distances(metric, ids)
    if mine is None or theirs is None:
        return None
    whole, *draws = (mine - theirs).tolist()
    low, high, p = interval_and_p(whole, np.asarray(draws))
    return Difference(whole, low, high, p, len(ids), significant=False, improved=None, values=())
