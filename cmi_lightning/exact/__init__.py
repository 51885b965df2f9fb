"""Closed-form priors, and exact posteriors and conditional mutual information of small problems."""

from cmi_lightning.exact.covariances import (
    Covariance,
    DenseCovariance,
    DiagonalCovariance,
    StationaryCovariance,
)
from cmi_lightning.exact.dense import (
    DenseProblem,
    as_dense,
    as_matrix,
    covariance,
    exact_posterior,
    gradient,
    information,
    jacobian,
    spectral_information,
)
from cmi_lightning.exact.gaussian import GaussianPrior, power_law_prior
from cmi_lightning.exact.law import sampler_law, wasserstein
from cmi_lightning.exact.mixture import GaussianMixture, load_mixture

__all__ = [
    "Covariance",
    "DenseCovariance",
    "DenseProblem",
    "DiagonalCovariance",
    "GaussianMixture",
    "GaussianPrior",
    "StationaryCovariance",
    "as_dense",
    "as_matrix",
    "covariance",
    "exact_posterior",
    "gradient",
    "information",
    "jacobian",
    "load_mixture",
    "power_law_prior",
    "sampler_law",
    "spectral_information",
    "wasserstein",
]
