"""A Gaussian mixture prior, whose x̂₀ has a closed form: the truth that samplers are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from cmi_lightning.denoisers.base import Denoiser, Prediction
from cmi_lightning.linalg import per_sample
from cmi_lightning.schedule import Level, Schedule


class GaussianMixture(Denoiser):
    """p(x₀) = Σ_k w_k N(μ_k, diag(v_k)), exactly denoised.

    p(x_t) = Σ_k w_k N(α μ_k, α² v_k + σ²) elementwise, and with γ_k = α v_k/(α² v_k + σ²) and
    responsibilities r_k(x_t), x̂₀ = Σ_k r_k [μ_k + γ_k (x_t − α μ_k)]. One component makes a
    Gaussian prior.

    Args:
        means: μ (K, *shape).
        variances: v > 0: a number, (K,), or (K, *shape).
        weights: w (K,), positive; normalised. Default: equal.
        schedule: noise levels; default: the linear DDPM chain.
    """

    means: Tensor
    variances: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        variances: Tensor | float = 1.0,
        weights: Tensor | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule or Schedule.linear()
        if weights is None:
            weights = means.new_ones(len(means))
        variances = per_sample(variances, means).expand_as(means).clone()
        self.image_shape = tuple(means.shape[1:])
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))

    def _by_component(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t − α μ_k and α² v_k + σ² (B, K, *), and log w_k N(x_t; …) (B, K)."""
        centred = x[:, None] - level.alpha * self.means
        variance = level.alpha**2 * self.variances + level.sigma**2
        exponent = (centred**2 / variance + torch.log(2 * torch.pi * variance)).flatten(2).sum(2)
        return centred, variance, self.log_weights - 0.5 * exponent

    def log_prob(self, x: Tensor, level: Level) -> Tensor:
        """Return log p(x_t) of x_t (B, *), in nats, (B,)."""
        return torch.logsumexp(self._by_component(x, level)[2], dim=1)

    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return the exact x̂₀ of x_t (B, *)."""
        centred, variance, logits = self._by_component(x, level)
        gain = level.alpha * self.variances / variance
        responsibilities = torch.softmax(logits, dim=1).reshape(*logits.shape, *(1,) * (x.ndim - 1))
        return Prediction((responsibilities * (self.means + gain * centred)).sum(1))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` draws of x₀ (count, *shape)."""
        k = torch.multinomial(self.log_weights.exp(), count, True, generator=generator)
        z = torch.randn(self.means[k].shape, generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.variances[k].sqrt() * z
