"""What ``cmi-lightning verify`` runs: checks on exact priors, and of a network's derivatives."""

from cmi_lightning.verify.check import Check
from cmi_lightning.verify.exact import exact_checks
from cmi_lightning.verify.network import network_checks

__all__ = ["Check", "exact_checks", "network_checks"]
