"""cmi-lightning: restore images with pretrained diffusion models by conditional mutual information.

The core is pure PyTorch. Every name is imported on first use: Lightning loads much that the
mathematics does not need, and PyTorch much that ``cmi-lightning --help`` does not.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cmi_lightning.errors import InputError

if TYPE_CHECKING:
    from cmi_lightning.api import Restorer, restore
    from cmi_lightning.measurement_noise import (
        GaussianNoise,
        PoissonGaussianNoise,
        PoissonNoise,
    )
    from cmi_lightning.paths import example
    from cmi_lightning.predict.module import PosteriorSampler
    from cmi_lightning.problem import Problem
    from cmi_lightning.sampler import Sampler
    from cmi_lightning.schedule import Schedule

try:
    __version__ = version("cmi-lightning")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "GaussianNoise",
    "InputError",
    "PoissonGaussianNoise",
    "PoissonNoise",
    "PosteriorSampler",
    "Problem",
    "Restorer",
    "Sampler",
    "Schedule",
    "__version__",
    "example",
    "restore",
]

HOMES = {
    "GaussianNoise": "measurement_noise",
    "PoissonGaussianNoise": "measurement_noise",
    "PoissonNoise": "measurement_noise",
    "PosteriorSampler": "predict.module",
    "Problem": "problem",
    "Restorer": "api",
    "Sampler": "sampler",
    "Schedule": "schedule",
    "example": "paths",
    "restore": "api",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cmi_lightning.{HOMES[name]}"), name)
