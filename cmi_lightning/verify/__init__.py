"""What ``cmi-lightning verify`` runs: checks of a network, of an operator, and a self-check."""

from cmi_lightning.verify.check import Check
from cmi_lightning.verify.exact import exact_checks
from cmi_lightning.verify.network import image_shape, network_checks
from cmi_lightning.verify.operator import operator_checks

__all__ = ["Check", "exact_checks", "image_shape", "network_checks", "operator_checks"]
