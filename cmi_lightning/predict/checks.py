"""What is refused before any sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity, Operator
from cmi_lightning.predict.callback import recorders
from cmi_lightning.predict.fingerprint import inputs
from cmi_lightning.predict.folder import RunFolder
from cmi_lightning.predict.records import RESULTS, refuse_foreign_logs, refuse_other

if TYPE_CHECKING:
    from cmi_lightning.predict.module import PosteriorSampler


def check(module: PosteriorSampler, trainer: Any, datamodule: Any) -> None:
    """Check the trainer's precision and folder, and the images of a datamodule that was set up.

    Raises:
        InputError: for a precision that would round the measurement, if the trainer's folder
            belongs to other options, or if the datamodule's ``image_shape`` does not suit the
            network or the operator.
    """
    precision = str(trainer.precision)
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise InputError(
            f"trainer.precision={precision} would round the measurement; use "
            f"{precision.removesuffix('-true')}-mixed, which lowers the network alone."
        )
    shape = getattr(datamodule, "image_shape", None)
    if shape is not None:
        module.suit(tuple(shape))  # first: it is one of the options that are compared
    if trainer.limit_predict_batches == 0:
        raise InputError("trainer.limit_predict_batches=0 leaves nothing to restore.")
    if recorders(trainer):
        folder = Path(trainer.default_root_dir).expanduser()
        RunFolder(folder).refuse_overlap(inputs(datamodule), RESULTS)
        refuse_foreign_logs(trainer, folder)
        if not module.overwrite and (folder / "run.json").is_file():
            refuse_other(folder, module.fingerprint(trainer, datamodule))
    given = getattr(datamodule, "given", None)
    if given and not getattr(datamodule, "takes_operator", False):
        refuse_operator(module.operator, f"the data are {given}")
    if shape is None:
        return
    module.denoiser.rehearse(tuple(shape))
    ids = [f"check/{row}" for row in range(module.operator.images or 1)]
    module.operator.bind(shape, SampleNoise(module.seed, ids), torch.zeros(1))


def refuse_operator(operator: Operator, reason: str) -> None:
    """Refuse an operator that would not be used."""
    if not isinstance(operator, Identity):
        raise InputError(
            f"model.operator={type(operator).__name__} would not be used: {reason}. Set "
            "model.operator=Identity."
        )
