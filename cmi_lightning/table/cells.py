"""The cells of a table that have been started: their records, metrics and features."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.paths import inside
from cmi_lightning.report.results import VARIANTS, Metric, Variant
from cmi_lightning.statistics import Estimate, mean_and_error, mean_curves
from cmi_lightning.table.records import Cell, measured, read_json, records
from cmi_lightning.table.resampling import frechet_many, kernel_many, resamples_of
from cmi_lightning.table.spec import Table

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

    def __init__(self, table: Table, cell: Cell, shown: list[dict[str, Any]]) -> None:
        self.cell, self.all = cell, shown
        self.records = {r["id"]: r for r in shown if not r["failed"]}
        self.clusters = {name: table.cluster_of(name) for name in self.records}
        self.curves = mean_curves([record.pop("curves", {}) for record in shown])[0]
        self.distances = functools.cache(self._distances)  # a cell is in several comparisons

    @property
    def failed(self) -> int:
        """How many images failed."""
        return len(self.all) - len(self.records)

    def clusters_of(self, ids: Sequence[str]) -> list[str] | None:
        """Return the images' clusters; None where each is its own."""
        return [cluster for name in ids if (cluster := self.clusters[name]) is not None] or None

    def values(self, metric: str) -> dict[str, float]:
        """Return a metric of every image that has it, by id."""
        every = {name: measured(record).get(metric) for name, record in self.records.items()}
        there = {name: float(value) for name, value in every.items() if value is not None}
        return {name: value for name, value in there.items() if math.isfinite(value)}

    @functools.cached_property
    def _features(self) -> dict[str, Tensor]:
        """The classifier's features (3, D) of truth, restoration and A⁺y, by id."""
        from cmi_lightning.callbacks.distances import embedding_path, read_embeddings

        there = [name for name in self.records if embedding_path(self.cell.folder, name).is_file()]
        read = read_embeddings(self.cell.folder, there).double() if there else ()
        return dict(zip(there, read, strict=True))

    def embeddings(self, ids: Sequence[str], of: int = RESTORED) -> tuple[Tensor, Tensor] | None:
        """Return the features (N, D) of truth and restoration; None where an image has none."""
        if not set(ids) <= self._features.keys():
            return None
        both = torch.stack([self._features[name] for name in ids])
        return both[:, 0], both[:, of]

    def _distances(self, metric: str, ids: tuple[str, ...]) -> Tensor | None:
        """Return a distance of sets of some images, then of resamples of them; None without."""
        if (both := self.embeddings(ids)) is None:
            return None
        clusters = np.unique(self.clusters_of(ids) or ids, return_inverse=True)[1]
        drawn = resamples_of(clusters.max() + 1, SET_RESAMPLES)[:, clusters]
        counts = torch.from_numpy(np.concatenate([np.ones((1, len(ids)), dtype=int), drawn]))
        return {"frechet": frechet_many, "kernel": kernel_many}[metric](*both, counts)

    def estimates(self, of: int = RESTORED) -> dict[str, Estimate]:
        """Return the means of what was measured of the restorations or of A⁺y, by metric."""
        from cmi_lightning.callbacks.distances import frechet, kernel

        there = {}
        for metric in (metric.key for metric in METRICS if metric.per_image):
            values = self.values(metric if of == RESTORED else f"{metric}_measurement")
            there[metric] = mean_and_error(list(values.values()), self.clusters_of(list(values)))
        there["fid"] = Estimate(self.fid() if of == RESTORED else None)
        ids = list(self.records)
        if len(ids) > 1 and (both := self.embeddings(ids, of)) is not None:
            there |= {"frechet": Estimate(frechet(*both)), "kernel": Estimate(kernel(*both))}
        return {key: estimate for key, estimate in there.items() if estimate.mean is not None}

    def seconds(self) -> float | None:
        """Return the sampling time per image."""
        paths = [inside(self.cell.folder / "timings", r["id"], ".json") for r in self.all]
        took = [t["seconds"] for t in map(read_json, paths) if "seconds" in t]
        return sum(took) / len(took) if took else None

    def fid(self) -> float | None:
        """Return the run's FID, where its network was at hand and it is of just these images."""
        entry = read_json(self.cell.folder / "summary.json").get("metrics", {}).get("fid")
        return float(entry["mean"]) if entry and entry["count"] == len(self.records) else None


def started_cells(table: Table) -> dict[Key, StartedCell]:
    """Return the cells that have been started, in the table's order.

    Their steps are those that they have been run with: the table may ask for others by now.

    Of a base with and without CMI those images are looked at that all have finished, so that
    their means can be compared while a run is under way; of its row of equal cost, which may be
    wanted for fewer, those among them.
    """
    started = {}
    for task, method in table.rows():
        row = {}
        for variant in VARIANTS:
            cell = table.at_equal_cost(table.cell(task, method, variant))
            if finished := records(cell.folder, cell.images):
                row[variant] = replace(cell, steps=finished[0]["steps"]), finished
        wanted = [{r["id"] for r in row[v][1]} for v in row if v != "equal"]
        for variant, (cell, finished) in row.items():
            if shown := [r for r in finished if all(r["id"] in ids for ids in wanted)]:
                started[task, method, variant] = StartedCell(table, cell, shown)
    return started
