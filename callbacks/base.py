"""Callbacks that watch sampling, not only batches."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from cmi_lightning.problem import Problem
from cmi_lightning.step import Record


class SamplingCallback(L.Callback):
    """A Lightning callback with two more hooks, called by ``PosteriorSampler.predict_step``.

    One that keeps something of every sample adds it to ``outputs["records"]`` and defines
    ``recorded`` (:class:`cmi_lightning.predict.records.Recorder`); what it makes of all samples, it
    makes from the records, which hold those of earlier runs and of other processes too.
    """

    def on_sampling_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        ids: list[str],
        problem: Problem,
    ) -> None:
        """Called once per batch, after the measurement is made and before the first step."""

    def on_sampling_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, record: Record
    ) -> None:
        """Called after every reverse step."""


def output_folder(trainer: L.Trainer, dirpath: str | None) -> Path:
    """Return ``dirpath``, or the trainer's ``default_root_dir``."""
    return Path(dirpath or trainer.default_root_dir).expanduser()


def noise_norm(problem: Problem) -> Tensor:
    """Return :attr:`Problem.noise_norm`."""
    return problem.noise_norm


def plain(value: float) -> float | str:
    """Return six digits of a number, or its name where JSON has none."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def describe(pl_module: L.LightningModule) -> dict[str, str]:
    """Return what the module says of itself; nothing where it says nothing."""
    method = getattr(pl_module, "describe", None)
    return method() if callable(method) else {}


def log_image(trainer: L.Trainer, name: str, image: Image.Image, step: int = 0) -> None:
    """Send an image to the trainer's TensorBoard loggers, if it has any."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
