"""Paired differences between the cells of a row, and which of them are significant."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cmi_lightning.report.results import Difference, Metric, Variant
from cmi_lightning.table.cells import Key, StartedCell
from cmi_lightning.table.resampling import bootstrap_interval, holm, interval_and_p, sign_flip_p

COMPARED: tuple[tuple[Variant, Variant], ...] = (
    ("cmi", "base"),
    ("descent", "base"),
    ("equal", "base"),
    ("cmi", "equal"),
    ("descent", "equal"),
)
Differences = dict[str, dict[str, Difference]]  # by what a cell is compared with, then by metric


def compare(
    cells: Mapping[Key, StartedCell], metrics: Sequence[Metric]
) -> Mapping[Key, Differences]:
    """Return the differences that a table's cells allow, each over the images that both have.

    Significant is what Holm's correction leaves among the cells of one metric and one kind of
    comparison.
    """
    every: dict[Key, Differences] = defaultdict(dict)
    for variant, against in COMPARED:
        pairs = {key: (*key[:2], against) for key in cells if key[2] == variant}
        for key, other in ((key, cells[other]) for key, other in pairs.items() if other in cells):
            paired = {metric.key: _difference(cells[key], other, metric) for metric in metrics}
            every[key][against] = {name: found for name, found in paired.items() if found}
        for metric in metrics:
            of_kind = [every[key][against] for key in pairs if against in every[key]]
            family = [differences for differences in of_kind if metric.key in differences]
            rejected = holm([differences[metric.key].p for differences in family])
            for differences, significant in zip(family, rejected, strict=True):
                found = differences[metric.key]
                differences[metric.key] = replace(found, significant=significant)
    return every


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
        values={name: float(f"{v:.6g}") for name, v in zip(ids, values, strict=True)},
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
    return Difference(whole, low, high, p, len(ids), significant=False, improved=None, values={})
