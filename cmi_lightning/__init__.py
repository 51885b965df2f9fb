"""cmi-lightning: restore images with pretrained diffusion models by conditional mutual information.

The core is pure PyTorch; :class:`PosteriorSampler`, the Lightning module, is imported on first use,
because Lightning loads much that the mathematics does not need.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cmi_lightning.errors import InputError
from cmi_lightning.problem import GaussianNoise, Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Schedule

if TYPE_CHECKING:
    from cmi_lightning.predict.module import PosteriorSampler

try:
    __version__ = version("cmi-lightning")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "GaussianNoise",
    "InputError",
    "PosteriorSampler",
    "Problem",
    "Sampler",
    "Schedule",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "PosteriorSampler":
        from cmi_lightning.predict.module import PosteriorSampler

        return PosteriorSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
