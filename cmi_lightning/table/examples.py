"""Which images a report shows: the first of each task, and those that CMI changed most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cmi_lightning.paths import inside
from cmi_lightning.table.cells import PER_IMAGE, CellResults, Key
from cmi_lightning.table.spec import Table

EXTREMES = 3  # best and worst images shown of a cell
Kind = Literal["truth", "measurement", "restored"]


def _picture(table: Table, results: CellResults, kind: Kind, name: str) -> str | None:
    """Return the path of one of an image's files, relative to the table's folder."""
    path = inside(results.cell.folder / kind, name, ".png")
    return path.relative_to(table.folder).as_posix() if path.is_file() else None


def examples(table: Table, cells: Mapping[Key, CellResults]) -> dict[str, list[dict[str, Any]]]:
    """Return the first images that all cells of a task have."""
    found: dict[str, list[dict[str, Any]]] = {}
    for task in dict.fromkeys(key[0] for key in cells):
        of_task = {key[1:]: results for key, results in cells.items() if key[0] == task}
        first = next(iter(of_task.values()))
        common = [n for n in first.records if all(n in c.records for c in of_task.values())]
        found[task] = []
        for name in common[: table.examples]:
            restored: dict[str, dict[str, str | None]] = defaultdict(dict)
            for (method, variant), results in of_task.items():
                restored[method][variant] = _picture(table, results, "restored", name)
            found[task].append(
                {
                    "id": name,
                    "truth": _picture(table, first, "truth", name),
                    "measurement": _picture(table, first, "measurement", name),
                    "restored": dict(restored),
                }
            )
    return found


def extremes(
    table: Table,
    cells: Mapping[Key, CellResults],
    comparisons: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the images that CMI changed most, for better and worse, in every row."""
    found = []
    for comparison in comparisons:
        if (comparison["variant"], comparison["against"]) != ("cmi", "base"):
            continue
        task, method = comparison["task"], comparison["method"]
        one, other = cells[task, method, "cmi"], cells[task, method, "base"]
        metric = next((m for m in PER_IMAGE if m in comparison["metrics"]), None)
        if metric is None:
            continue
        mine, theirs = one.values(metric), other.values(metric)
        sign = 1 if PER_IMAGE[metric][2] == "higher" else -1
        gains = {name: sign * (mine[name] - theirs[name]) for name in mine if name in theirs}
        order = sorted(gains, key=lambda name: -gains[name])

        def entry(
            name: str,
            one: CellResults = one,
            other: CellResults = other,
            gains: dict[str, float] = gains,
            sign: int = sign,
        ) -> dict[str, Any]:
            return {
                "id": name,
                "difference": sign * gains[name],
                "truth": _picture(table, one, "truth", name),
                "measurement": _picture(table, one, "measurement", name),
                "base": _picture(table, other, "restored", name),
                "cmi": _picture(table, one, "restored", name),
            }

        found.append(
            {
                "task": task,
                "method": method,
                "metric": metric,
                "best": [entry(name) for name in order[:EXTREMES]],
                "worst": [entry(name) for name in order[: -EXTREMES - 1 : -1]],
            }
        )
    return found
