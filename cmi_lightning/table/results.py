"""What the cells' records say together: means, paired differences, costs, images to look at."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.identity import digest
from cmi_lightning.paths import inside
from cmi_lightning.table.run import at_equal_cost, records
from cmi_lightning.table.spec import CMI, VARIANTS, Cell, Table, Variant, passes
from cmi_lightning.table.statistics import (
    LEVEL,
    bootstrap_interval,
    holm,
    interval_and_p,
    mean_and_error,
    resamples_of,
    sign_flip_p,
)

if TYPE_CHECKING:
    from cmi_lightning.callbacks.feature_metrics import FrechetBootstrap

RESTORED, MEASURED = 1, 2  # rows of FeatureMetrics' embeddings
# A Fréchet distance takes a millisecond, a mean nothing; fewer could not tell 30 cells apart.
SET_RESAMPLES = 2000
EXTREMES = 3  # best and worst images shown of a cell
# key: label, unit, better, digits; those with an embedding are of sets of images
PER_IMAGE = {
    "psnr": ("PSNR", "dB", "higher", 2),
    "ssim": ("SSIM", "", "higher", 4),
    "lpips": ("LPIPS", "", "lower", 4),
    "perceptual": ("perceptual distance", "", "lower", 4),
}
OF_SETS = {
    "fid": ("FID", "", "lower", 2),
    "frechet": ("Fréchet distance", "", "lower", 3),
    "kernel": ("kernel distance", "", "lower", 4),
}
COMPARISONS: tuple[tuple[Variant, Variant], ...] = (
    ("cmi", "base"),
    ("equal", "base"),
    ("cmi", "equal"),
)


class CellResults:
    """The images of a cell that are looked at.

    Attributes:
        cell: the cell.
        all: their records, in the order in which the images are restored.
        whole: whether these are all that the cell has finished.
        records: by id; without those that failed.
        failed: how many failed.
        curves: the mean of every quantity at every step.
    """

    def __init__(
        self,
        cell: Cell,
        found: list[dict[str, Any]],
        whole: bool,
        bootstraps: dict[str, FrechetBootstrap],
    ) -> None:
        self.cell, self.all, self.whole = cell, found, whole
        self.records = {r["id"]: r for r in self.all if not r["failed"]}
        self.failed = len(self.all) - len(self.records)
        self.curves = _means([record.pop("curves", {}) for record in self.all])
        self._embeddings: dict[str, Tensor] = {}
        self._draws: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._bootstraps = bootstraps

    def distances(self, metric: str, ids: Sequence[str]) -> Tensor | None:
        """Return a distance of sets of some images, and of resamples of them; None without."""
        from cmi_lightning.callbacks.feature_metrics import kernel_many

        key = (metric, tuple(ids))
        if key not in self._draws:
            both = self.embeddings(ids)
            if both is None:
                return None
            once = np.ones((1, len(ids)), dtype=int)
            counts = torch.from_numpy(np.concatenate([once, resamples_of(len(ids), SET_RESAMPLES)]))
            if metric == "frechet":
                self._draws[key] = self._bootstrap(both[0], counts)(both[1])
            else:
                self._draws[key] = kernel_many(*both, counts)
        return self._draws[key]

    def _bootstrap(self, real: Tensor, counts: Tensor) -> FrechetBootstrap:
        """Return the bootstrap of some truths, which cells of the same images share."""
        from cmi_lightning.callbacks.feature_metrics import FrechetBootstrap

        key = digest(real, counts)
        if key not in self._bootstraps:
            self._bootstraps.clear()  # one takes tens of megabytes, and rows come in order
            self._bootstraps[key] = FrechetBootstrap(real, counts)
        return self._bootstraps[key]

    def values(self, metric: str, suffix: str = "") -> dict[str, float]:
        """Return a metric of every image that has it, by id."""
        found = {}
        for name, record in self.records.items():
            parts = {**record.get("metrics", {}), **record.get("perceptual", {})}
            value = parts.get(f"{metric}{suffix}")
            if value is not None and math.isfinite(float(value)):
                found[name] = float(value)
        return found

    def embeddings(self, ids: Sequence[str], of: int = RESTORED) -> tuple[Tensor, Tensor] | None:
        """Return the classifier's features (N, D) of truth and restoration; None without."""
        from cmi_lightning.callbacks.feature_metrics import embedding_path, read_embeddings

        new = [name for name in ids if name not in self._embeddings]
        if not all(embedding_path(self.cell.folder, name).is_file() for name in new):
            return None
        if new:
            found = read_embeddings(self.cell.folder, new).double()
            self._embeddings |= dict(zip(new, found, strict=True))
        both = torch.stack([self._embeddings[name] for name in ids])
        return both[:, 0], both[:, of]

    def seconds(self) -> float | None:
        """Return the sampling time per image."""
        took = []
        for record in self.all:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
                path = inside(self.cell.folder / "timings", record["id"], ".json")
                took.append(json.loads(path.read_text(encoding="utf-8"))["seconds"])
        return sum(took) / len(took) if took else None

    def fid(self) -> float | None:
        """Return the run's FID, where its network was at hand; it is of all the run's images."""
        if not self.whole:
            return None
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            text = (self.cell.folder / "summary.json").read_text(encoding="utf-8")
            return float(json.loads(text)["metrics"]["fid"]["mean"])
        return None


def _means(every: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the mean of every quantity at every step over the images that have it."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for curves in every:
        for quantity, curve in curves.items():
            for step, value in curve.items():
                values[quantity][int(step)].append(float(value))
    return {
        quantity: {str(step): math.fsum(v) / len(v) for step, v in sorted(curve.items())}
        for quantity, curve in values.items()
    }


def gather(table: Table) -> dict[tuple[str, str, Variant], CellResults]:
    """Return the cells that have been started, in the table's order.

    Of a base with and without CMI those images are looked at that both have finished, so that
    their means can be compared while a run is under way; of its row of equal cost, which may be
    wanted for fewer, those among them.
    """
    found = {}
    bootstraps: dict[str, FrechetBootstrap] = {}
    for task, method in table.rows():
        row = {}
        for variant in VARIANTS:
            cell = at_equal_cost(table, table.cell(task, method, variant))
            if finished := records(cell.folder, table.limit(variant, table.images)):
                row[variant] = cell, finished
        ids = [{r["id"] for r in row[variant][1]} for variant in VARIANTS if variant in row]
        common = set.intersection(*ids[:2]) if ids else set()
        for variant, (cell, finished) in row.items():
            shared = [record for record in finished if record["id"] in common]
            whole = sum(1 for _ in (cell.folder / "records").rglob("*.json")) == len(shared)
            if shared:
                found[task, method, variant] = CellResults(cell, shared, whole, bootstraps)
    return found


def aggregate(table: Table, config: str = "", command: str = "") -> dict[str, Any]:
    """Return everything that the report and the tables show, as strict JSON holds it.

    Args:
        table: the table; what is not finished is left out.
        config: the configuration as YAML, to be shown.
        command: the command, to be shown.
    """
    cells = gather(table)
    metrics = _metrics(cells)
    sets = {key: _set_metrics(cell, metrics) for key, cell in cells.items()}
    comparisons = [
        comparison
        for task, method in table.rows()
        for variant, against in COMPARISONS
        if (comparison := _compare(cells, task, method, variant, against, metrics))
    ]
    _correct(comparisons)
    posterior, spread_notes = _posterior(table)
    study = _study(table)
    return {
        "title": table.title,
        "command": command,
        "commit": _commit(),
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "config": config,
        "environment": _environment(),
        "images": max((len(c.all) for c in cells.values()), default=0),
        "steps": table.steps,
        "notes": [*_notes(table, cells, comparisons, study), *spread_notes],
        "study": study,
        "objective": table.objective,
        "protocol": _protocol(cells),
        "metrics": [
            {"key": key, "label": label, "unit": unit, "better": better, "digits": digits}
            | {"per_image": key in PER_IMAGE}
            for key, (label, unit, better, digits) in metrics.items()
        ],
        "tasks": [{"key": k, "label": t.label} for k, t in table.tasks.items()],
        "methods": list(table.methods),
        "cells": [_cell(table, key, cell, metrics, sets[key]) for key, cell in cells.items()],
        "measured": _measured(cells, metrics),
        "comparisons": comparisons,
        "posterior": posterior,
        "examples": _examples(table, cells),
        "extremes": _extremes(table, cells, comparisons),
    }


def _metrics(cells: Mapping[Any, CellResults]) -> dict[str, tuple[str, str, str, int]]:
    """Return the metrics that some cell has."""
    found = {k: v for k, v in PER_IMAGE.items() if any(c.values(k) for c in cells.values())}
    if any(c.fid() is not None for c in cells.values()):
        found["fid"] = OF_SETS["fid"]
    if any(c.embeddings(list(c.records)[:1]) for c in cells.values() if c.records):
        found |= {k: OF_SETS[k] for k in ("frechet", "kernel")}
    for results in cells.values():  # the network's name belongs to the metrics'
        path = results.cell.folder / "features.json"
        if path.is_file():
            for key, label in json.loads(path.read_text(encoding="utf-8"))["labels"].items():
                if key in found:
                    found[key] = (label, *found[key][1:])
            break
    return found


def _set_metrics(
    cell: CellResults, metrics: Mapping[str, Any], of: int = RESTORED
) -> dict[str, float | None]:
    """Return the metrics that are of a cell's images together."""
    from cmi_lightning.callbacks.feature_metrics import frechet, kernel

    found: dict[str, float | None] = {}
    if "fid" in metrics and of == RESTORED:
        found["fid"] = cell.fid()
    if "frechet" in metrics and len(cell.records) > 1:
        both = cell.embeddings(list(cell.records), of)
        if both is not None:
            found |= {"frechet": frechet(*both), "kernel": kernel(*both)}
    return found


def _cell(
    table: Table,
    key: tuple[str, str, Variant],
    results: CellResults,
    metrics: Mapping[str, Any],
    sets: Mapping[str, float | None],
) -> dict[str, Any]:
    task, method, variant = key
    values: dict[str, dict[str, float | None]] = {}
    for metric in metrics:
        if metric in PER_IMAGE and (per_image := results.values(metric)):
            values[metric] = mean_and_error(list(per_image.values()))
        elif sets.get(metric) is not None:
            values[metric] = {"mean": sets[metric], "se": None}
    return {
        "task": task,
        "method": method,
        "variant": variant,
        "label": results.cell.label,
        "steps": results.cell.steps,
        "images": len(results.all),
        "failed": results.failed,
        "options": {f"step_sizes.{k}": v for k, v in results.cell.step_sizes.items()},
        "metrics": values,
        "passes": passes(results.all),
        "seconds": results.seconds(),
        "folder": results.cell.folder.relative_to(table.folder).as_posix(),
        "curves": results.curves,
    }


def _compare(
    cells: Mapping[tuple[str, str, Variant], CellResults],
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
    return {"difference": whole, "low": low, "high": high, "p": p}


def _correct(comparisons: list[dict[str, Any]]) -> None:
    """Mark what is significant among the cells of one metric and one kind of comparison."""
    families: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for comparison in comparisons:
        for metric, entry in comparison["metrics"].items():
            families[comparison["variant"], comparison["against"], metric].append(entry)
    for entries in families.values():
        for entry, rejected in zip(entries, holm([e["p"] for e in entries]), strict=True):
            entry["significant"] = rejected


def _measured(
    cells: Mapping[tuple[str, str, Variant], CellResults], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metrics of A⁺y, from the first cell of each task."""
    found: dict[str, Any] = {}
    for (task, _, _), results in cells.items():
        if task not in found:
            columns = {m: list(results.values(m, "_measurement").values()) for m in PER_IMAGE}
            values = {m: mean_and_error(v) for m, v in columns.items() if v}
            sets = _set_metrics(results, metrics, MEASURED)
            found[task] = {
                "metrics": values | {m: {"mean": v, "se": None} for m, v in sets.items()}
            }
    return found


def _posterior(table: Table) -> tuple[list[dict[str, Any]], list[str]]:
    found, notes = [], []
    for cell in table.posterior_cells():
        path = cell.folder / "posterior.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        name = f"{cell.task}, {cell.label}"
        for note in summary["notes"]:
            of_one = bool(summary["failed"]) and "failed" in note
            notes.append(f"{name}: {note}" if of_one else note)
        found.append(
            {
                "task": cell.task,
                "method": cell.method,
                "variant": cell.variant,
                "label": cell.label,
                "images": summary["images"],
                "draws": summary["draws"],
                "coverage": {p: c["value"] for p, c in summary["coverage"].items()},
                "expected": {p: c["expected"] for p, c in summary["coverage"].items()},
                "spread_skill": summary["spread_skill"]["value"],
                "residual": summary["residual"]["value"],
                "errors": {
                    "50": summary["coverage"]["50"]["standard_error"],
                    "90": summary["coverage"]["90"]["standard_error"],
                    "spread_skill": summary["spread_skill"]["standard_error"],
                    "residual": summary["residual"]["standard_error"],
                },
                "folder": cell.folder.relative_to(table.folder).as_posix(),
            }
        )
    return found, list(dict.fromkeys(notes))


Kind = Literal["truth", "measurement", "restored"]


def _picture(table: Table, results: CellResults, kind: Kind, name: str) -> str | None:
    """Return the path of one of an image's files, relative to the table's folder."""
    path = inside(results.cell.folder / kind, name, ".png")
    return path.relative_to(table.folder).as_posix() if path.is_file() else None


def _examples(
    table: Table, cells: Mapping[tuple[str, str, Variant], CellResults]
) -> dict[str, list[dict[str, Any]]]:
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


def _extremes(
    table: Table,
    cells: Mapping[tuple[str, str, Variant], CellResults],
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


def _notes(
    table: Table,
    cells: Mapping[tuple[str, str, Variant], CellResults],
    comparisons: Sequence[Mapping[str, Any]],
    study: Mapping[str, Any],
) -> list[str]:
    notes = []
    if not cells:
        return ["No cell has finished an image yet."]
    short = [
        len(results.all)
        for (_, _, variant), results in cells.items()
        if len(results.all) < table.limit(variant, table.images)
    ]
    if short:
        notes.append(
            f"The run is not finished (or there are no more images): {len(short)} of {len(cells)} "
            f"rows have fewer images than wanted, the shortest {min(short)}; with and without CMI "
            "they are the same."
        )
    wanted = sum(len(table.variants(m)) for _, m in table.rows())
    if missing := wanted - len(cells):
        notes.append(f"{missing} of {wanted} cells have not been started.")
    for results in cells.values():
        if results.failed:
            notes.append(
                f"{results.cell.task}, {results.cell.label}: {results.failed} images failed and "
                "are left out."
            )
    family = sum((c["variant"], c["against"]) == ("cmi", "base") for c in comparisons)
    if family:
        notes.append(
            f"{family} comparisons with the base are made of each metric. A difference is "
            f"significant after Holm's correction over all of its kind (family-wise "
            f"{100 * LEVEL:g} %), each metric and each kind of comparison for itself; the 95 % "
            "intervals are of one comparison each: of twenty without any effect, one leaves out "
            "zero."
        )
    if any(key[2] == "equal" for key in cells):
        if table.limit("equal", table.images) < table.images:
            notes.append(
                f"The rows of equal cost have the first {table.equal_images} images; differences "
                "are over the images that both sides have."
            )
        notes.append(
            "The rows of equal cost have the step sizes that were chosen for "
            f"{table.steps} steps; nothing was searched for their longer runs."
        )
    rows = [s for task in study.values() for name, s in task.items() if name.startswith(CMI)]
    if rows:
        zero = sum(s["winner"] == 0 for s in rows)
        notes.append(
            f"In {zero} of {len(rows)} cells the search on validation images preferred no CMI to "
            "every scale of it; the table shows the best scale other than zero."
        )
    return notes


def _study(table: Table) -> dict[str, Any]:
    """Return what ``tune`` tried for the table's rows and chose, where the table uses it."""
    try:
        text = (table.folder / "tune" / "study.json").read_text(encoding="utf-8")
        found = json.loads(text)["study"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    return {
        task: {
            name: entry
            for name, entry in found.get(task, {}).items()
            if table.step_sizes.get(task, {}).get(name) == entry["chosen"]
        }
        for task in dict.fromkeys(task for task, _ in table.rows())
    }


def _protocol(cells: Mapping[Any, CellResults]) -> dict[str, str]:
    """Return how the metrics were computed, as the first cell's run says."""
    found: dict[str, str] = {}
    for results in cells.values():
        for file in ("summary.json", "features.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                text = (results.cell.folder / file).read_text(encoding="utf-8")
                protocol = json.loads(text).get("protocol", {})
                found |= {key: str(value) for key, value in protocol.items()}
        break
    return found


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("cmi-lightning", "torch", "lightning", "torchmetrics", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**found, "device": device}


def _commit() -> str | None:
    """Return the commit of the checkout this package is in, if it is in one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
