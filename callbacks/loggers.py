"""Values, options and images, sent to every logger that takes them.

The results are on disk before a logger sees them. One that fails is reported, and costs nothing.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image

from cmi_lightning.errors import cause

log = logging.getLogger(__name__)


def default_logger(save_dir: str) -> Logger:
    """Return a TensorBoard logger, or one of CSV files where TensorBoard is not installed.

    Args:
        save_dir: folder of TensorBoard's events; CSV files go to its ``logs/``.

    Example:
        >>> default_logger("runs/mine").save_dir
        'runs/mine'
    """
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        return TensorBoardLogger(save_dir, name="", version="")
    return CSVLogger(save_dir, name="logs", version="")


def log_values(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Send numbers to the trainer's loggers (``self.log`` is refused in predict)."""
    _each(trainer, "the values", lambda logger: logger.log_metrics(dict(values), step))


def log_options(trainer: L.Trainer, options: Mapping[str, Any]) -> None:
    """Send a run's options to the trainer's loggers."""
    _each(trainer, "the options", lambda logger: logger.log_hyperparams(dict(options)))


def log_image(trainer: L.Trainer, name: str, image: Image.Image, step: int = 0) -> None:
    """Send an image to those of the trainer's loggers that take images.

    TensorBoard, MLflow, Weights & Biases, Comet, and any with ``log_image(key, images, step)``.
    """
    _each(trainer, f"the image {name}", lambda logger: _send(logger, name, image, step))


def _send(logger: Any, name: str, image: Image.Image, step: int) -> None:
    pixels = np.asarray(image.convert("RGB"))
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, pixels, artifact_file=f"{name}/{step}.png")
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[image], step=step)
    elif hasattr(logger.experiment, "add_image"):
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    elif hasattr(logger.experiment, "log_image"):
        logger.experiment.log_image(pixels, name=name, step=step)


def _each(trainer: L.Trainer, what: str, call: Callable[[Any], object]) -> None:
    for logger in trainer.loggers if trainer.is_global_zero else ():
        try:
            call(logger)
        except Exception as error:
            log.warning(
                "%s did not take %s (%s). The results are in the run's folder.",
                *(type(logger).__name__, what, cause(error)),
            )
