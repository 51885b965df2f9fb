"""Live progress over images and steps."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import rich
from lightning.pytorch.callbacks import ProgressBar
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from cmi_lightning.callbacks.base import SamplingCallback, describe, noise_norm
from cmi_lightning.module import Restoration
from cmi_lightning.problem import Problem
from cmi_lightning.step import Record


class SamplingProgress(ProgressBar, SamplingCallback):
    """Shows images and steps done, the mean residual ‖y − A x̂₀‖, images per second, time left.

    It starts with a table of the run (``pl_module.describe()``) and takes the place of Lightning's
    own bar, which counts batches only. Where the output is not a terminal (a log file, CI) it
    prints a plain line at most every ``interval`` seconds, and one at the end.

    Lightning refuses ``Trainer(enable_progress_bar=False)`` beside any progress bar in the list of
    callbacks; ``enabled: false`` is the way to silence this one.

    Args:
        interval: seconds between lines where the output is not a terminal, ≥ 0.
        enabled: show anything at all.
    """

    def __init__(self, interval: float = 10.0, enabled: bool = True) -> None:
        super().__init__()
        self.interval, self.enabled = interval, enabled
        self.live: Progress | None = None
        self._reset(0)

    def _reset(self, total: int) -> None:
        self.total, self.done, self.batch_size = total, 0, 0
        self.steps_done, self.num_steps = 0, 0
        self.residual, self.expected = float("nan"), float("nan")
        self.started = self.last_line = time.monotonic()
        self.bars: tuple[TaskID, TaskID] | None = None

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all ranks but the first)."""
        self.enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        rich.get_console().print(*args, **kwargs)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the run's table and start the bars."""
        self._reset(_num_images(trainer))
        if not self.enabled:
            return
        console = rich.get_console()
        table = Table(show_header=False, title="Run", title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        machine = {"device": str(pl_module.device), "precision": str(trainer.precision)}
        for name, text in {**describe(pl_module), "images": str(self.total), **machine}.items():
            table.add_row(name, escape(text))
        console.print(table)
        if console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[detail]}", style="dim"),
                console=console,
                refresh_per_second=4,
            )
            self.bars = (
                self.live.add_task("images", total=self.total, count="", detail=""),
                self.live.add_task("steps", total=None, count="", detail=""),
            )
            self.live.start()

    def on_sampling_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        ids: list[str],
        problem: Problem,
    ) -> None:
        """Note the batch's size and the residual that noise alone would leave."""
        self.batch_size, self.steps_done, self.num_steps = len(ids), 0, 0
        self.expected = float(noise_norm(problem).mean())

    def on_sampling_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, record: Record
    ) -> None:
        """Advance the steps."""
        if self.enabled:
            self.num_steps, self.steps_done = record.num_steps, record.num_steps - record.index
            if "residual" in record.log:
                self.residual = float(record.log["residual"].mean())
            self._show()

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Restoration,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the images."""
        self.done += len(outputs["id"])
        self.total = max(self.total, self.done)
        self.batch_size = 0
        self._show()

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bars down and say how long it took."""
        self._close()
        if self.enabled:
            seconds = time.monotonic() - self.started
            self._line(
                f"sampled {self.done} images in {_clock(seconds)}"
                f" ({self.done / max(seconds, 1e-9):.3g} images/s)"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the terminal back, whatever happened."""
        self._close()

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    @property
    def fraction_done(self) -> float:
        """Images done, with those under way in proportion to their steps."""
        return self.done + self.batch_size * self.steps_done / max(self.num_steps, 1)

    def _texts(self) -> tuple[str, str, str, str]:
        seconds = time.monotonic() - self.started
        rate = self.fraction_done / max(seconds, 1e-9)
        left = _clock(max(self.total - self.fraction_done, 0) / rate) if rate else "?"
        residual = f"residual {self.residual:.4g} (noise alone {self.expected:.4g})"
        return (
            f"{self.done}/{self.total}",
            f"{rate:.3g} images/s, {left} left",
            f"{self.steps_done}/{self.num_steps}",
            residual,
        )

    def _show(self) -> None:
        if not self.enabled:
            return
        images, speed, steps, residual = self._texts()
        if self.live is not None and self.bars is not None:
            self.live.update(
                self.bars[0],
                completed=self.fraction_done,
                total=self.total,
                count=images,
                detail=speed,
            )
            self.live.update(
                self.bars[1],
                completed=self.steps_done,
                total=self.num_steps,
                count=steps,
                detail=residual,
            )
        elif time.monotonic() - self.last_line >= self.interval:
            self.last_line = time.monotonic()
            self._line(f"images {images}, step {steps}, {residual}, {speed}")

    def _line(self, text: str) -> None:
        # soft_wrap: a log wants one line per line, however long.
        rich.get_console().print(text, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _num_images(trainer: L.Trainer) -> int:
    """Count the images of this process, 0 where a loader does not know."""
    loaders = trainer.predict_dataloaders
    total = 0
    for loader, batches in zip(
        loaders if isinstance(loaders, list) else [loaders],
        trainer.num_predict_batches,
        strict=False,
    ):
        try:
            share = math.ceil(len(loader.dataset) / trainer.world_size)
            total += min(share, int(batches * loader.batch_sampler.batch_size))
        except (AttributeError, TypeError, OverflowError):
            return 0
    return total
