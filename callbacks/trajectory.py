"""What happens along the reverse process: curves of the steps' quantities, and a film strip."""

from __future__ import annotations

import csv
from collections import defaultdict
from typing import Any

import lightning as L
from PIL import Image
from torch import Tensor

from cmi_lightning.callbacks.base import SamplingCallback, log_image, noise_norm, output_folder
from cmi_lightning.callbacks.drawing import save_png, tile, to_tile
from cmi_lightning.module import Restoration
from cmi_lightning.problem import Problem
from cmi_lightning.step import Record

FILM_COLUMNS = 8


class TrajectoryLogger(SamplingCallback):
    """Logs every quantity that a step reports: residual ‖y − A x̂₀‖, step norms, CMI values….

    Means over the samples go to ``trajectory.csv`` batch by batch (columns batch, index, time,
    alpha, sigma, name, mean); their average over all samples to the trainer's loggers (x axis: the
    number of the step, from 1) and to ``trajectory.png``, one panel per quantity. ``film.png``
    shows x̂₀ of the first samples at some steps.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        per_sample: also write a CSV column per sample of the batch: its values, in batch order.
        max_images: rows of the film strip, ≥ 0; 0 for none.
        save_every: steps between the strip's columns; default: as many as give 8 columns.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        per_sample: bool = False,
        max_images: int = 8,
        save_every: int | None = None,
    ) -> None:
        self.dirpath, self.per_sample = dirpath, per_sample
        self.max_images, self.save_every = max_images, save_every
        self._reset()

    def _reset(self) -> None:
        # sums[name][step number] = [sum over samples, number of samples]
        self.sums: dict[str, dict[int, list[float]]] = defaultdict(dict)
        self.expected: list[float] = [0.0, 0]
        self.rows: list[list[Any]] = []
        self.batches = 0
        self.film: list[list[Image.Image]] = []
        self.strips: list[list[Image.Image]] = []  # of the batch under way
        self.headings: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self._reset()

    def on_sampling_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        ids: list[str],
        problem: Problem,
    ) -> None:
        """Note the residual that noise alone would leave."""
        expected = noise_norm(problem)
        self.expected[0] += float(expected.sum())
        self.expected[1] += len(ids)
        wanted = min(len(ids), self.max_images - len(self.film))
        self.rows, self.strips = [], [[] for _ in range(wanted)]

    def on_sampling_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, record: Record
    ) -> None:
        """Add up the step's quantities, and keep x̂₀ for the strip."""
        number = record.num_steps - record.index
        for name, value in record.log.items():
            values = value.tolist()
            total = self.sums[name].setdefault(number, [0.0, 0])
            total[0] += sum(values)
            total[1] += len(values)
            level = [self.batches, record.index, *map(_short, (record.now.time, *record.now[:2]))]
            each = [_short(v) for v in values] if self.per_sample else []
            self.rows.append([*level, name, _short(sum(values) / len(values)), *each])
        if self.strips and self._shown(number, record.num_steps):
            for strip, x0 in zip(self.strips, record.x0, strict=False):
                strip.append(to_tile(x0))
            if not self.film:
                self.headings.append(f"step {number}")

    def _shown(self, number: int, total: int) -> bool:
        if self.save_every is not None:
            return number % self.save_every == 0 or number == total
        columns = min(FILM_COLUMNS, total)
        return any(
            number == 1 + round(i * (total - 1) / max(columns - 1, 1)) for i in range(columns)
        )

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Restoration,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's rows."""
        if self.strips:
            truth: Tensor | None = outputs["truth"]
            if truth is not None:
                for strip, x in zip(self.strips, truth, strict=False):
                    strip.append(to_tile(x))
                if not self.film:
                    self.headings.append("truth")
            self.film += self.strips
            self.strips = []
        if trainer.is_global_zero:
            path = output_folder(trainer, self.dirpath) / "trajectory.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if self.batches else "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if not self.batches:
                    header = ["batch", "index", "time", "alpha", "sigma", "name", "mean"]
                    each = [f"sample_{i}" for i in range(len(outputs["id"]))]
                    writer.writerow([*header, *(each if self.per_sample else [])])
                writer.writerows(self.rows)
        self.rows = []
        self.batches += 1

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write curves, plot and strip."""
        self._finish(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write what there is."""
        self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        folder = output_folder(trainer, self.dirpath)
        curves = {
            name: {step: total / count for step, (total, count) in sorted(points.items())}
            for name, points in self.sums.items()
        }
        if trainer.is_global_zero and curves:
            by_step: dict[int, dict[str, float]] = defaultdict(dict)
            for name, curve in curves.items():
                for step, mean in curve.items():
                    by_step[step][f"trajectory/{name}"] = mean
            for logger in trainer.loggers:
                for step, means in sorted(by_step.items()):
                    logger.log_metrics(means, step)
            total, count = self.expected
            plot = plot_curves(curves, total / count if count else None)
            save_png(plot, folder / "trajectory.png")
            log_image(trainer, "trajectory", plot)
        if trainer.is_global_zero and self.film and self.film[0]:
            full = [strip for strip in self.film if len(strip) == len(self.film[0])]
            strip = tile(full, self.headings)
            save_png(strip, folder / "film.png")
            log_image(trainer, "film", strip)
        self._reset()


def _short(value: float) -> str:
    return f"{value:.6g}"


def plot_curves(
    curves: dict[str, dict[int, float]], noise_norm: float | None = None
) -> Image.Image:
    """Draw one panel per quantity over the steps; the residual's has a line at ``noise_norm``."""
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
