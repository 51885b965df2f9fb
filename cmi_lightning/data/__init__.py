"""Lightning data modules: image folders, given measurements, and Fashion-MNIST.

Imported on first use: `restore` reads images without lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmi_lightning.data.base import RestorationData
    from cmi_lightning.data.crops import PhotoCropsData
    from cmi_lightning.data.fashion import FashionMNIST, FashionMNISTData
    from cmi_lightning.data.folder import ImageFolder, ImageFolderData
    from cmi_lightning.data.measurements import MeasurementFolder, MeasurementFolderData

__all__ = [
    "FashionMNIST",
    "FashionMNISTData",
    "ImageFolder",
    "ImageFolderData",
    "MeasurementFolder",
    "MeasurementFolderData",
    "PhotoCropsData",
    "RestorationData",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in ("base", "crops", "fashion", "folder", "measurements"):
            module = importlib.import_module(f"{__name__}.{home}")
            if getattr(module, name, object).__module__ == module.__name__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
