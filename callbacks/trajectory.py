"""What happens along the reverse process: curves of the steps' quantities, and a film strip."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from cmi_lightning.callbacks.base import RecordingCallback, plain
from cmi_lightning.callbacks.drawing import save_png, to_tile
from cmi_lightning.callbacks.loggers import log_image
from cmi_lightning.checked import check
from cmi_lightning.files import write
from cmi_lightning.predict.module import PosteriorSampler, Restoration
from cmi_lightning.problem import Problem
from cmi_lightning.statistics import mean_curves
from cmi_lightning.step import Record

log = logging.getLogger(__name__)
FILM_COLUMNS = 8
Curves = dict[str, dict[int, float]]  # by quantity and the number of the step, from 1


class TrajectoryLogger(RecordingCallback):
    """Logs every quantity that a step reports: residual ‖y − A x̂₀‖, step norms, CMI values….

    Every sample's own curves (the mean of its draws) go to its record. Their mean over all samples
    that have a number there goes to ``trajectory.csv`` (columns step, index, time, alpha, sigma,
    name, mean, count), to the loggers by the number of the step, from 1, and to ``trajectory.png``.
    ``film.png`` shows x̂₀ of the first samples at some steps.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        per_sample: also write a CSV column per sample, under its id.
        max_images: rows of the film strip, ≥ 0; 0 for none.
        save_every: steps between the strip's columns; default: as many as give 8 columns.

    Example:
        >>> TrajectoryLogger(max_images=2, save_every=10).max_images
        2
    """

    key = "curves"

    def __init__(
        self,
        dirpath: str | None = None,
        per_sample: bool = False,
        max_images: int = 8,
        save_every: int | None = None,
    ) -> None:
        super().__init__(dirpath)
        self.per_sample, self.max_images, self.save_every = per_sample, max_images, save_every
        check(self, max_images="[0, inf)", save_every="[1, inf)")
        self._reset()

    def _reset(self) -> None:
        self.passes: dict[str, list[Curves]] = {}  # of the batch, one for each finished draw
        self.under_way: list[tuple[int, dict[str, Tensor]]] = []  # logs of a draw's steps
        self.strips: dict[str, dict[str, Image.Image]] = {}

    def files(self, record: Mapping[str, Any]) -> list[Path]:
        return [self.strip(record["id"], "film")] if "film" in record else []

    def on_sampling_start(
        self, trainer: L.Trainer, pl_module: PosteriorSampler, ids: list[str], problem: Problem
    ) -> None:
        """Make room; a pass that did not end ran out of memory, and is forgotten."""
        self.under_way = []
        shown = [name for name in ids if pl_module.run.position(name) < self.max_images]
        self.strips.update({name: {} for name in shown if name not in self.passes})

    def on_sampling_step(
        self, trainer: L.Trainer, pl_module: PosteriorSampler, record: Record
    ) -> None:
        """Note the step's quantities, and x̂₀ (of the first draw) for the strip."""
        number = record.num_steps - record.index
        self.under_way.append((number, record.log))
        if self._shown(number, record.num_steps):
            for name, x0 in zip(record.ids, record.image, strict=True):
                if name in self.strips and name not in self.passes:
                    self.strips[name][f"step {number}"] = to_tile(x0)
        if record.index == 0:
            for name, curves in self._curves(record.ids).items():
                self.passes.setdefault(name, []).append(curves)

    def _curves(self, ids: Sequence[str]) -> dict[str, Curves]:
        """Return the samples' curves, read from the device once for all steps of a draw."""
        curves: dict[str, Curves] = {name: defaultdict(dict) for name in ids}
        places = [(number, name) for number, log in self.under_way for name in log]
        table = torch.stack([log[name] for _, log in self.under_way for name in log])
        for (number, quantity), values in zip(places, table.tolist(), strict=True):
            for name, value in zip(ids, values, strict=True):
                if math.isfinite(value):
                    curves[name][quantity][number] = value
        return curves

    def _shown(self, number: int, total: int) -> bool:
        if self.save_every is not None:
            return number % self.save_every == 0 or number == total
        columns = min(FILM_COLUMNS, total)
        return any(
            number == 1 + round(i * (total - 1) / max(columns - 1, 1)) for i in range(columns)
        )

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        entries = []
        for i, name in enumerate(outputs["id"]):
            means, _ = mean_curves(self.passes[name][-self.module.samples_per_image :])
            curves = {q: {str(n): plain(v) for n, v in curve.items()} for q, curve in means.items()}
            norm = plain(float(outputs["noise_norm"][i]))
            entry: dict[str, Any] = {"curves": curves, "noise_norm": norm}
            if strip := self.strips.get(name):
                if outputs["truth"] is not None:
                    strip["truth"] = to_tile(outputs["truth"][i])
                entry["film"] = self.save_strip(name, "film", strip)
            entries.append(entry)
        self._reset()
        return entries

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        self._reset()  # what was under way when a run broke off
        every = [record["curves"] for record in records]
        self.means, counts = mean_curves(every)
        ids = [record["id"] for record in records]
        write(self.folder / "trajectory.csv", self._table(counts, ids, every).encode())
        expected = [float(record["noise_norm"]) for record in records]
        try:
            plot = plot_curves(self.means, math.fsum(expected) / len(expected))
        except ModuleNotFoundError:
            log.warning(
                "There is no plot of the curves: matplotlib is not installed (pip install "
                "'cmi-lightning[plots]')."
            )
        else:
            if plot is not None:
                save_png(plot, self.folder / "trajectory.png")
                log_image(self.trainer, "trajectory", plot)
        self.write_strips(records[: self.max_images], "film")

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.means)

    def logged(self) -> Iterable[tuple[int, dict[str, float]]]:
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for quantity, curve in self.result.items():
            for step, mean in curve.items():
                by_step[step][f"trajectory/{quantity}"] = mean
        return sorted(by_step.items())

    def _table(
        self,
        counts: Mapping[str, Mapping[int, int]],
        ids: list[str],
        every: list[dict[str, dict[str, float]]],
    ) -> str:
        means = self.means
        file = io.StringIO()
        writer = csv.writer(file)
        header = ["step", "index", "time", "alpha", "sigma", "name", "mean", "count"]
        writer.writerow([*header, *(ids if self.per_sample else [])])
        pairs = self.module.sampler().schedule.pairs()
        for number, (index, now, _) in enumerate(pairs, start=1):
            level = [_short(v) for v in (now.time, now.alpha, now.sigma)]
            for quantity in [q for q in means if number in means[q]]:
                row = [quantity, _short(means[quantity][number]), counts[quantity][number]]
                own = [curves.get(quantity, {}).get(str(number)) for curves in every]
                each = ["" if v is None else _short(v) for v in own] if self.per_sample else []
                writer.writerow([number, index, *level, *row, *each])
        return file.getvalue()


def _short(value: float) -> str:
    return f"{value:.6g}"


def plot_curves(curves: Curves, noise_norm: float | None = None) -> Image.Image | None:
    """Draw one panel per quantity over the steps; the residual's has a line at ``noise_norm``.

    None where there are no curves.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if not curves:
        return None
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    for panel, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, panel + 1)
        steps, values = list(curve), np.asarray(list(curve.values()))
        axes.plot(steps, values, linewidth=1.6, marker="." if len(steps) < 20 else "")
        if name == "residual" and noise_norm:
            axes.axhline(noise_norm, color="0.4", linestyle="--", linewidth=1)
            axes.annotate(
                "noise alone", (0, noise_norm), (3, 3), ("axes fraction", "data"), "offset points",
                color="0.4", fontsize=8,
            )  # fmt: skip
        finite = values[np.isfinite(values)]
        if len(finite) and finite.min() > 0 and finite.max() > 50 * finite.min():
            axes.set_yscale("log")
        axes.set_title("‖y − A x̂₀‖" if name == "residual" else name, fontsize=10)
        axes.set_xlabel("step" if panel >= len(curves) - columns else "", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
