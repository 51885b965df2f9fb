"""Callbacks: what is shown, measured and written while images are restored or a prior trained."""

from cmi_lightning.callbacks.base import SamplingCallback
from cmi_lightning.callbacks.feature_metrics import FeatureMetrics
from cmi_lightning.callbacks.images import ImageWriter
from cmi_lightning.callbacks.metrics import RestorationMetrics
from cmi_lightning.callbacks.posterior import PosteriorQuality
from cmi_lightning.callbacks.progress import SamplingProgress
from cmi_lightning.callbacks.samplegrid import SampleGrid
from cmi_lightning.callbacks.trajectory import TrajectoryLogger

__all__ = [
    "FeatureMetrics",
    "ImageWriter",
    "PosteriorQuality",
    "RestorationMetrics",
    "SampleGrid",
    "SamplingCallback",
    "SamplingProgress",
    "TrajectoryLogger",
]
