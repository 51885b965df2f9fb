"""What is refused before any sampling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cmi_lightning.denoisers.tiled import suited
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity, Operator
from cmi_lightning.predict.auto import earlier
from cmi_lightning.predict.callback import recorders
from cmi_lightning.predict.fingerprint import inputs, of_run
from cmi_lightning.predict.folder import RunFolder
from cmi_lightning.predict.processes import refuse_strategy

if TYPE_CHECKING:
    from cmi_lightning.predict.module import PosteriorSampler


def check(module: PosteriorSampler, trainer: Any, datamodule: Any) -> None:
    """Check the trainer's options and folder, and the images of a datamodule that was set up.

    Raises:
        InputError: for a strategy that does not work, a precision that would round the measurement,
            a folder that belongs to other options, or an image shape that does not suit the network
            or the operator.
    """
    refuse_strategy(trainer)
    precision = str(trainer.precision)
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise InputError(
            f"trainer.precision={precision} would round the measurement; use "
            f"{precision.removesuffix('-true')}-mixed, which lowers the network alone."
        )
    module.chosen = earlier(module, trainer, datamodule)
    shapes = image_shapes(datamodule)
    module.shapes = dict.fromkeys(shapes)
    if len(shapes) == 1:  # first: the denoiser is one of the options that are compared
        module.denoiser = suited(module.denoiser, shapes[0])
    if trainer.limit_predict_batches == 0:
        raise InputError("trainer.limit_predict_batches=0 leaves nothing to restore.")
    if recorders(trainer):
        folder = RunFolder(Path(trainer.default_root_dir).expanduser())
        folder.refuse_overlap(inputs(datamodule))
        folder.refuse_foreign_logs(trainer)
        if not module.overwrite and (folder.path / "run.json").is_file():
            folder.refuse_other(of_run(module, trainer, datamodule))
    given = getattr(datamodule, "given", None)
    if given and not getattr(datamodule, "takes_operator", False):
        refuse_operator(module.operator, f"the data are {given}")
    ids = [f"check/{row}" for row in range(module.operator.images or 1)]
    try:
        for shape in dict.fromkeys([*shapes[:1], *shapes[-1:]]):  # the smallest and the largest
            suited(module.denoiser, shape).rehearse(shape)
        for shape in shapes:
            suited(module.denoiser, shape).check(shape)
            module.operator.bind(shape, SampleNoise(module.seed, ids), torch.zeros(1))
    except InputError as error:
        if len(shapes) > 1 and hasattr(datamodule, "first_of"):
            raise InputError(f"'{datamodule.first_of(shape)}': {error}") from error
        raise


def image_shapes(datamodule: Any) -> list[tuple[int, ...]]:
    """Return the different shapes (C, H, W) of the images that are known, small ones first."""
    found = getattr(datamodule, "image_shapes", None)
    if found is None and (one := getattr(datamodule, "image_shape", None)) is not None:
        found = [one]
    return sorted(map(tuple, found or ()), key=math.prod)


def refuse_operator(operator: Operator, reason: str) -> None:
    """Refuse an operator that would not be used."""
    if not isinstance(operator, Identity):
        raise InputError(
            f"model.operator={type(operator).__name__} would not be used: {reason}. Set "
            "model.operator=Identity."
        )
