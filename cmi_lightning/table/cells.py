"""The cells of a table that have been started: their records, metrics and features."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.paths import inside
from cmi_lightning.predict.fingerprint import digest
from cmi_lightning.table.run import at_equal_cost, records
from cmi_lightning.table.spec import VARIANTS, Cell, Table, Variant
from cmi_lightning.table.statistics import resamples_of

if TYPE_CHECKING:
    from cmi_lightning.callbacks.distances import FrechetBootstrap

RESTORED, MEASURED = 1, 2  # rows of FeatureMetrics' embeddings
# A Fréchet distance takes a millisecond, a mean nothing; fewer could not tell 30 cells apart.
SET_RESAMPLES = 2000
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

Key = tuple[str, str, Variant]  # task, method, variant


class CellResults:
    """The images of a cell that are looked at.

    Attributes:
        cell: the cell.
        all: their records, in the order in which the images are restored.
        records: by id; without those that failed.
        failed: how many failed.
        curves: the mean of every quantity at every step.
    """

    def __init__(
        self,
        cell: Cell,
        found: list[dict[str, Any]],
        bootstraps: dict[str, FrechetBootstrap],
    ) -> None:
        self.cell, self.all = cell, found
        self.records = {r["id"]: r for r in self.all if not r["failed"]}
        self.failed = len(self.all) - len(self.records)
        self.curves = _means([record.pop("curves", {}) for record in self.all])
        self._embeddings: dict[str, Tensor] = {}
        self._draws: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._bootstraps = bootstraps

    def distances(self, metric: str, ids: Sequence[str]) -> Tensor | None:
        """Return a distance of sets of some images, and of resamples of them; None without."""
        from cmi_lightning.callbacks.distances import kernel_many

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
        from cmi_lightning.callbacks.distances import FrechetBootstrap

        key = digest(real, counts)
        if key not in self._bootstraps:
            # One takes tens of megabytes. Two are in use: of all images, and of equal cost's.
            while len(self._bootstraps) > 1:
                del self._bootstraps[next(iter(self._bootstraps))]
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
        """Return the run's FID, where its network was at hand and it is of just these images."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            text = (self.cell.folder / "summary.json").read_text(encoding="utf-8")
            entry = json.loads(text)["metrics"]["fid"]
            return float(entry["mean"]) if entry["count"] == len(self.all) else None
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


def gather(table: Table) -> dict[Key, CellResults]:
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
        pair = [row[variant][1] for variant in ("base", "cmi") if variant in row]
        every = [{record["id"] for record in finished} for finished in pair]
        for variant, (cell, finished) in row.items():
            shared = [r for r in finished if all(r["id"] in ids for ids in every)]
            if shared:
                found[task, method, variant] = CellResults(cell, shared, bootstraps)
    return found
