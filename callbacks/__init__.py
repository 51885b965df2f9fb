"""Callbacks: what is shown, measured and written while images are restored or a prior trained."""

from cmi_lightning.callbacks.base import RecordingCallback
from cmi_lightning.callbacks.classifier import GarmentClassifier
from cmi_lightning.callbacks.feature_metrics import FeatureMetrics
from cmi_lightning.callbacks.images import ImageWriter
from cmi_lightning.callbacks.loggers import default_logger
from cmi_lightning.callbacks.metrics import RestorationMetrics
from cmi_lightning.callbacks.networks import VGG, Alex, Inception
from cmi_lightning.callbacks.posterior import PosteriorQuality
from cmi_lightning.callbacks.progress import SamplingProgress
from cmi_lightning.callbacks.samplegrid import SampleGrid
from cmi_lightning.callbacks.trajectory import TrajectoryLogger
from cmi_lightning.predict.callback import SamplingCallback

__all__ = [
    "VGG",
    "Alex",
    "FeatureMetrics",
    "GarmentClassifier",
    "ImageWriter",
    "Inception",
    "PosteriorQuality",
    "RecordingCallback",
    "RestorationMetrics",
    "SampleGrid",
    "SamplingCallback",
    "SamplingProgress",
    "TrajectoryLogger",
    "default_logger",
]
