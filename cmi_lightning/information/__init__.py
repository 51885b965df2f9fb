"""Estimators of the conditional mutual information I(x₀; y | x_t) and of its gradient."""

from cmi_lightning.information.base import Estimator, Information, ProbeEstimator
from cmi_lightning.information.image import ImageProbes, TwoTraces
from cmi_lightning.information.measurement import Lanczos, Ridge, TraceLimit

__all__ = [
    "Estimator",
    "ImageProbes",
    "Information",
    "Lanczos",
    "ProbeEstimator",
    "Ridge",
    "TraceLimit",
    "TwoTraces",
]
