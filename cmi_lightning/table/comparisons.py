"""Paired differences between the cells of a row, and which of them are significant."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cmi_lightning.report.results import AGAINST, VARIANTS, Difference, Metric
from cmi_lightning.table.cells import Key, StartedCell
from cmi_lightning.table.resampling import bootstrap_interval, holm, interval_and_p, sign_flip_p

COMPARED = [(v, against) for against in AGAINST for v in VARIANTS if v not in ("base", against)]
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
        of_kind = {
            key: {m.key: d for m in metrics if (d := _difference(cells[key], cells[other], m))}
            for key in cells
            if key[2] == variant and (other := (*key[:2], against)) in cells
        }
        for metric in (metric.key for metric in metrics):
            family = [found for found in of_kind.values() if metric in found]
            rejected = holm([found[metric].p for found in family])
            for found, significant in zip(family, rejected, strict=True):
                found[metric] = replace(found[metric], significant=significant)
        for key, found in of_kind.items():
            every[key][against] = found
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
