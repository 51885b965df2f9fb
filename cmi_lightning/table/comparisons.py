"""Paired differences between the cells of a row, and which of them are significant."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from cmi_lightning.table.cells import PER_IMAGE, CellResults, Key
from cmi_lightning.table.spec import Table, Variant
from cmi_lightning.table.statistics import bootstrap_interval, holm, interval_and_p, sign_flip_p

COMPARISONS: tuple[tuple[Variant, Variant], ...] = (
    ("cmi", "base"),
    ("equal", "base"),
    ("cmi", "equal"),
)


def compare(
    table: Table, cells: Mapping[Key, CellResults], metrics: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the comparisons that a table's cells allow, each over the images that both have."""
    found = [
        comparison
        for task, method in table.rows()
        for variant, against in COMPARISONS
        if (comparison := _compare(cells, task, method, variant, against, metrics))
    ]
    _correct(found)
    return found


def _compare(
    cells: Mapping[Key, CellResults],
    task: str,
    method: str,
    variant: Variant,
    against: Variant,
    metrics: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the paired differences of two cells over the images that both have.

    An image that failed in the first cell alone is in no mean, but counts as not improved.
    """
    one, other = cells.get((task, method, variant)), cells.get((task, method, against))
    if one is None or other is None:
        return None
    found: dict[str, Any] = {}
    failed = [record["id"] for record in one.all if record["failed"]]
    for metric in metrics:
        if metric in PER_IMAGE:
            mine, theirs = one.values(metric), other.values(metric)
            ids = [name for name in mine if name in theirs]
            if len(ids) < 2:
                continue
            values = [mine[name] - theirs[name] for name in ids]
            lost = sum(name in theirs for name in failed)
            sign = 1 if metrics[metric][2] == "higher" else -1
            low, high = bootstrap_interval(values)
            found[metric] = {
                "difference": math.fsum(values) / len(values),
                "low": low,
                "high": high,
                "p": sign_flip_p(values),
                "pairs": len(values),
                "improved": sum(sign * v > 0 for v in values) / (len(values) + lost),
                "values": [float(f"{v:.6g}") for v in values],
            }
        elif metric in ("frechet", "kernel"):
            ids = [name for name in one.records if name in other.records]
            if (entry := _compare_sets(one, other, ids, metric)) is not None:
                found[metric] = entry
    return {
        "task": task,
        "method": method,
        "variant": variant,
        "against": against,
        "metrics": found,
    }


def _compare_sets(
    one: CellResults, other: CellResults, ids: list[str], metric: str
) -> dict[str, Any] | None:
    if len(ids) < 3:
        return None
    mine, theirs = one.distances(metric, ids), other.distances(metric, ids)
    if mine is None or theirs is None:
        return None
    whole, *draws = (mine - theirs).tolist()
    low, high, p = interval_and_p(whole, np.asarray(draws))
    return {"difference": whole, "low": low, "high": high, "p": p, "pairs": len(ids)}


def _correct(comparisons: list[dict[str, Any]]) -> None:
    """Mark what is significant among the cells of one metric and one kind of comparison."""
    families: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for comparison in comparisons:
        for metric, entry in comparison["metrics"].items():
            families[comparison["variant"], comparison["against"], metric].append(entry)
    for entries in families.values():
        for entry, rejected in zip(entries, holm([e["p"] for e in entries]), strict=True):
            entry["significant"] = rejected
