"""Live progress over images and steps."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import rich
from lightning.pytorch.callbacks import ProgressBar
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from torch import Tensor

from cmi_lightning.checked import check
from cmi_lightning.errors import counted
from cmi_lightning.predict.callback import SamplingCallback
from cmi_lightning.predict.module import PosteriorSampler
from cmi_lightning.problem import Problem
from cmi_lightning.step import Record

REFRESH = 4  # times a second that bars are drawn anew


class SamplingProgress(ProgressBar, SamplingCallback):
    """Shows images and steps done, the mean residual ‖y − A x̂₀‖, images per hour, time left.

    The images are those of all processes, and of an earlier run that this one goes on from. It
    starts with a table of the run. Where the output is not a terminal (a log file, CI) it prints a
    plain line at most every ``interval`` seconds, and one at the end.

    Lightning refuses ``Trainer(enable_progress_bar=False)`` beside a progress bar among the
    callbacks: silence this one by ``enabled: false``.

    Args:
        interval: seconds between lines where the output is not a terminal, ≥ 0.
        enabled: show anything at all.

    Example:
        >>> SamplingProgress(interval=60).interval
        60
    """

    def __init__(self, interval: float = 10.0, enabled: bool = True) -> None:
        super().__init__()
        self.interval, self.enabled = interval, enabled
        check(self, interval="[0, inf]")
        self.live: Progress | None = None
        self._reset(0)

    def _reset(self, total: int) -> None:
        self.total, self.done, self.before = total, 0, 0  # before: done by an earlier run
        self.batch_size, self.draw, self.draws = 0, 0, 1
        self.steps_done, self.num_steps = 0, 0
        self.residual, self.expected = float("nan"), float("nan")
        self.log: dict[str, Tensor] = {}  # of the last step, on its device
        self.started = self.last_line = time.monotonic()
        self.bars: tuple[TaskID, TaskID] | None = None

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all ranks but the first)."""
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        rich.get_console().print(*args, **kwargs)

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the run's table and start the bars."""
        self._reset(_num_images(trainer))
        self.draws = pl_module.samples_per_image
        if not self.enabled:
            return
        console = rich.get_console()
        table = Table(show_header=False, title="Run", title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        images = f"{self.total}" if self.total else "not known"
        if done := len(pl_module.run.done):
            images += f"; {done} are done in {pl_module.run.folder}"
        precision = pl_module.chosen.precision or str(trainer.precision)
        machine = {"device": str(pl_module.device), "precision": precision}
        for name, text in {**pl_module.describe(), "images": images, **machine}.items():
            table.add_row(name, escape(text))
        console.print(table)
        if console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[detail]}", style="dim"),
                console=console,
                refresh_per_second=REFRESH,
            )
            self.bars = (
                self.live.add_task("images", total=self.total, count="", detail=""),
                self.live.add_task("steps", total=None, count="", detail=""),
            )
            self.live.start()

    def on_sampling_start(
        self, trainer: L.Trainer, pl_module: PosteriorSampler, ids: list[str], problem: Problem
    ) -> None:
        """Note the batch's size and the residual that noise alone would leave."""
        self.draw = self.draw % self.draws + 1
        self.batch_size, self.steps_done, self.num_steps = len(ids), 0, 0
        self.expected = float(problem.noise_norm.mean())

    def on_sampling_step(
        self, trainer: L.Trainer, pl_module: PosteriorSampler, record: Record
    ) -> None:
        if self.enabled:
            self.num_steps, self.steps_done = record.num_steps, record.num_steps - record.index
            self.log = record.log
            self._show()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the images: the processes go through the batches side by side."""
        own = set(outputs["id"])
        self.done += len(batch["id"])
        self.before += sum(n in pl_module.run.done and n not in own for n in batch["id"])
        self.total = max(self.total, self.done)
        self.batch_size = self.draw = 0
        self._show(now=True)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bars down and say how long it took."""
        self._close()
        if self.enabled:
            seconds = time.monotonic() - self.started
            sampled = self.done - self.before
            if self.before and not sampled:
                self._line(f"nothing to sample: {counted(self.done, 'image')} done before")
            else:
                before = f"; {self.before} were done before" if self.before else ""
                rate = _hourly(sampled / max(seconds, 1e-9))
                self._line(
                    f"sampled {counted(sampled, 'image')} in {_clock(seconds)} ({rate}){before}"
                )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._close()

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    @property
    def fraction_done(self) -> float:
        """Images done, with those under way in proportion to their steps."""
        share = (max(self.draw - 1, 0) + self.steps_done / max(self.num_steps, 1)) / self.draws
        return self.done + self.batch_size * share

    def _show(self, now: bool = False) -> None:
        """Show what there is, if it is time, or ``now`` on a terminal."""
        wait = self.interval if self.live is None else 0 if now else 1 / REFRESH
        time_now = time.monotonic()
        if not self.enabled or time_now - self.last_line < wait:
            return
        # The device is asked for a number only where it is shown: at other steps it need not wait.
        if "residual" in self.log:
            self.residual = float(self.log["residual"].mean())
        self.last_line, seconds = time_now, time_now - self.started
        rate = (self.fraction_done - self.before) / max(seconds, 1e-9)
        left = _clock(max(self.total - self.fraction_done, 0) / rate) if rate else "?"
        images, speed = f"{self.done}/{self.total}", f"{_hourly(rate)}, {left} left"
        steps = f"{self.steps_done}/{self.num_steps}"
        steps += f" of draw {self.draw}/{self.draws}" if self.draws > 1 else ""
        residual = f"residual {self.residual:.4g} (noise alone {self.expected:.4g})"
        if self.live is not None and self.bars is not None:
            for bar, done, total, count, detail in (
                (self.bars[0], self.fraction_done, self.total, images, speed),
                (self.bars[1], self.steps_done, self.num_steps, steps, residual),
            ):
                self.live.update(bar, completed=done, total=total, count=count, detail=detail)
        else:
            self._line(f"images {images}, step {steps}, {residual}, {speed}")

    def _line(self, text: str) -> None:
        # soft_wrap: a log wants one line per line, however long.
        rich.get_console().print(text, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _hourly(rate: float) -> str:
    """Return images per hour, of images per second."""
    hourly = rate * 3600
    return f"{hourly:,.0f} images/h" if hourly >= 100 else f"{hourly:.3g} images/h"


def _num_images(trainer: L.Trainer) -> int:
    """Count the images of all processes, 0 where a loader does not know."""
    loaders, total = trainer.predict_dataloaders, 0
    every = loaders if isinstance(loaders, list) else [loaders]
    for loader, batches in zip(every, trainer.num_predict_batches, strict=False):
        try:
            total += min(len(loader.dataset), int(batches * loader.batch_sampler.batch_size))
        except (AttributeError, TypeError, OverflowError):
            return 0
    return total
