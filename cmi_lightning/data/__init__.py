"""Lightning data modules: image folders, given measurements, and Fashion-MNIST."""

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
