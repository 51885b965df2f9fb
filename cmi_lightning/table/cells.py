"""The cells of a table that have been started: their records, metrics and features."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.paths import inside
from cmi_lightning.predict.fingerprint import digest
from cmi_lightning.report.results import VARIANTS, Metric, Variant
from cmi_lightning.statistics import Estimate, mean_and_error
from cmi_lightning.table.run import at_equal_cost, records
from cmi_lightning.table.significance import resamples_of
from cmi_lightning.table.spec import Cell, Table

if TYPE_CHECKING:
    from cmi_lightning.callbacks.distances import FrechetBootstrap

RESTORED, MEASURED = 1, 2  # rows of FeatureMetrics' embeddings
# A Fréchet distance takes a millisecond, a mean nothing; fewer could not tell 30 cells apart.
SET_RESAMPLES = 2000
METRICS = (
    Metric("psnr", "PSNR", "dB", "higher", 2, True),
    Metric("ssim", "SSIM", "", "higher", 4, True),
    Metric("lpips", "LPIPS", "", "lower", 4, True),
    Metric("perceptual", "perceptual distance", "", "lower", 4, True),
    Metric("fid", "FID", "", "lower", 2, False),
    Metric("frechet", "Fréchet distance", "", "lower", 3, False),
    Metric("kernel", "kernel distance", "", "lower", 4, False),
)

Key = tuple[str, str, Variant]  # task, method, variant


class StartedCell:
    """The images of a cell that are looked at.

    Attributes:
        cell: the cell.
        all: their records, in the order in which the images are restored.
        records: by id; without those that failed.
        clusters: by id, where the table has clusters of images.
        curves: the mean of every quantity at every step.
    """

    def __init__(
        self,
        table: Table,
        cell: Cell,
        all_records: list[dict[str, Any]],
        bootstraps: dict[str, FrechetBootstrap],
    ) -> None:
        self.cell, self.all = cell, all_records
        self.records = {r["id"]: r for r in self.all if not r["failed"]}
        self.clusters = {name: table.cluster_of(name) for name in self.records}
        self.curves = _mean_curves([record.pop("curves", {}) for record in self.all])
        self._embeddings: dict[str, Tensor] = {}
        self._draws: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._bootstraps = bootstraps

    @property
    def failed(self) -> int:
        """How many images failed."""
        return len(self.all) - len(self.records)

    def clusters_of(self, ids: Sequence[str]) -> list[str] | None:
        """Return the images' clusters; None where each is its own."""
        found = [cluster for name in ids if (cluster := self.clusters[name]) is not None]
        return found or None

    def values(self, metric: str, suffix: str = "") -> dict[str, float]:
        """Return a metric of every image that has it, by id."""
        found = {}
        for name, record in self.records.items():
            parts = {**record.get("metrics", {}), **record.get("perceptual", {})}
            value = parts.get(f"{metric}{suffix}")
            if value is not None and math.isfinite(float(value)):
                found[name] = float(value)
        return found

    def estimate(self, metric: str, suffix: str = "") -> Estimate:
        """Return a metric's mean over the images, and its error."""
        values = self.values(metric, suffix)
        return mean_and_error(list(values.values()), self.clusters_of(list(values)))

    def embeddings(self, ids: Sequence[str], of: int = RESTORED) -> tuple[Tensor, Tensor] | None:
        """Return the classifier's features (N, D) of truth and restoration; None without."""
        from cmi_lightning.callbacks.embeddings import embedding_path, read_embeddings

        new = [name for name in ids if name not in self._embeddings]
        if not all(embedding_path(self.cell.folder, name).is_file() for name in new):
            return None
        if new:
            read = read_embeddings(self.cell.folder, new).double()
            self._embeddings |= dict(zip(new, read, strict=True))
        both = torch.stack([self._embeddings[name] for name in ids])
        return both[:, 0], both[:, of]

    def distances(self, metric: str, ids: Sequence[str]) -> Tensor | None:
        """Return a distance of sets of some images, and of resamples of them; None without."""
        from cmi_lightning.callbacks.distances import kernel_many

        key = (metric, tuple(ids))
        if key not in self._draws:
            both = self.embeddings(ids)
            if both is None:
                return None
            clusters = np.unique(self.clusters_of(ids) or ids, return_inverse=True)[1]
            drawn = resamples_of(clusters.max() + 1, SET_RESAMPLES)[:, clusters]
            once = np.ones((1, len(ids)), dtype=int)
            counts = torch.from_numpy(np.concatenate([once, drawn]))
            if metric == "frechet":
                self._draws[key] = self._bootstrap(both[0], counts)(both[1])
            else:
                self._draws[key] = kernel_many(*both, counts)
        return self._draws[key]

    def _bootstrap(self, real: Tensor, counts: Tensor) -> FrechetBootstrap:
        """Return the bootstrap of some truths, which cells of the same images share."""
        from cmi_lightning.callbacks.distances import FrechetBootstrap

        key = digest(real, counts)
        if key not in self._bootstraps:
            # One takes tens of megabytes. Two are in use: of all images, and of equal cost's.
            while len(self._bootstraps) > 1:
                del self._bootstraps[next(iter(self._bootstraps))]
            self._bootstraps[key] = FrechetBootstrap(real, counts)
        return self._bootstraps[key]

    def sets(self, metrics: Sequence[str], of: int = RESTORED) -> dict[str, Estimate]:
        """Return those of the metrics that are of all the images together."""
        from cmi_lightning.callbacks.distances import frechet, kernel

        found: dict[str, float | None] = {}
        if "fid" in metrics and of == RESTORED:
            found["fid"] = self.fid()
        if "frechet" in metrics and len(self.records) > 1:
            both = self.embeddings(list(self.records), of)
            if both is not None:
                found |= {"frechet": frechet(*both), "kernel": kernel(*both)}
        return {name: Estimate(value) for name, value in found.items() if value is not None}

    def seconds(self) -> float | None:
        """Return the sampling time per image."""
        paths = [inside(self.cell.folder / "timings", r["id"], ".json") for r in self.all]
        took = [t["seconds"] for t in map(read_json, paths) if "seconds" in t]
        return sum(took) / len(took) if took else None

    def fid(self) -> float | None:
        """Return the run's FID, where its network was at hand and it is of just these images."""
        entry = read_json(self.cell.folder / "summary.json").get("metrics", {}).get("fid")
        return float(entry["mean"]) if entry and entry["count"] == len(self.records) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's content; empty where it is absent or cut short."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}


def _mean_curves(every: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[int, float]]:
    """Return the mean of every quantity at every step over the images that have it."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for curves in every:
        for quantity, curve in curves.items():
            for step, value in curve.items():
                values[quantity][int(step)].append(float(value))
    return {
        quantity: {step: math.fsum(v) / len(v) for step, v in sorted(curve.items())}
        for quantity, curve in values.items()
    }


def started_cells(table: Table) -> dict[Key, StartedCell]:
    """Return the cells that have been started, in the table's order.

    Of a base with and without CMI those images are looked at that both have finished, so that
    their means can be compared while a run is under way; of its row of equal cost, which may be
    wanted for fewer, those among them.
    """
    started = {}
    bootstraps: dict[str, FrechetBootstrap] = {}
    for task, method in table.rows():
        row = {}
        for variant in VARIANTS:
            cell = at_equal_cost(table, table.cell(task, method, variant))
            if finished := records(cell.folder, table.limit(variant, table.images)):
                row[variant] = cell, finished
        pair = [row[variant][1] for variant in ("base", "cmi") if variant in row]
        every = [{record["id"] for record in finished} for finished in pair]
        for variant, (cell, finished) in row.items():
            shared = [r for r in finished if all(r["id"] in ids for ids in every)]
            if shared:
                started[task, method, variant] = StartedCell(table, cell, shared, bootstraps)
    return started
