"""Priors whose x̂₀, scores, Jacobians and posteriors have closed forms: the truth of every test."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmi_lightning.checked import check_value
from cmi_lightning.denoisers.base import Denoiser, Prediction
from cmi_lightning.errors import InputError
from cmi_lightning.exact.covariances import (
    KINDS,
    Covariance,
    DenseCovariance,
    diagonal,
)
from cmi_lightning.exact.moments import conditioned, mixed, total_covariance
from cmi_lightning.schedule import Level, Schedule


class _Terms(NamedTuple):
    """x_t against the components, in their eigenbases; ``logits`` are log w_k N(x_t; α μ_k, V_k).

    Fast: ``residual`` is Uᵀ(x_t − α c) (B, n), ``offsets`` are Uᵀ(μ_k − c) (K, n) for a centre c,
    and ``logits`` lack what all components share. Else ``residual`` is Uₖᵀ(x_t − α μ_k) (B, K, n).
    """

    variance: Tensor
    residual: Tensor
    logits: Tensor
    offsets: Tensor | None

    @property
    def responsibilities(self) -> Tensor:
        """r_k(x_t) = p(k | x_t), (B, K)."""
        return torch.softmax(self.logits, dim=1)


class GaussianMixture(Denoiser):
    """p(x₀) = Σ_k w_k N(μ_k, C_k) on images or vectors, exactly denoised.

    p(x_t) = Σ_k w_k N(α μ_k, V_k) with V_k = α² C_k + σ². With gains G_k = α C_k V_k⁻¹, component
    scores s_k = −V_k⁻¹(x_t − α μ_k) and responsibilities r_k = p(k | x_t),

        x̂₀ = Σ_k r_k [μ_k + G_k (x_t − α μ_k)],
        ∇ log p(x_t) = Σ_k r_k s_k,
        ∂x̂₀/∂x_t = Σ_k r_k G_k + (σ²/α) Cov_r[s_k].

    All of it is differentiable, computed in the mixture's dtype and returned in that of x_t.
    At σ = 0, densities and scores are those of x₀, and need positive eigenvalues. ``fast``: with
    one covariance for all and large means, responsibilities come from a matrix product ⟨x_t, μ_k⟩
    that never forms (B, K, n). A row then depends on its batch by rounding.

    >>> mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), covariance=0.1)
    >>> level = Level(alpha=1.0, sigma=1.0, time=0.0)
    >>> mixture(torch.zeros(1, 1), level).x0.abs() < 1e-6  # halfway between the components
    tensor([[True]])
    >>> posterior = mixture.condition(torch.ones(1, 1), y=torch.ones(1), std=0.1)
    >>> posterior.mean().round(decimals=3)
    tensor([1.])

    Args:
        means: μ (K, *shape).
        covariance: a variance ≥ 0: a number, (K,), or (K, *shape); or a :class:`Covariance` of one
            or K components.
        weights: w (K,), at least 0; normalised. Default: equal.
        schedule: noise levels; default: the linear DDPM chain.

    Raises:
        InputError: if means, covariance and weights do not fit together.
    """

    means: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        covariance: Covariance | Tensor | float = 1.0,
        weights: Tensor | Sequence[float] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        check_value("covariance", covariance, float | Tensor | Covariance, "[0, inf)")
        check_value("weights", weights, Tensor | Sequence[float] | None, "[0, inf)")
        self.schedule, self.image_shape = schedule or Schedule.linear(), tuple(means.shape[1:])
        if not isinstance(covariance, Covariance):
            covariance = diagonal(covariance, means)
        count, size = len(means), means[0].numel()
        if covariance.values.shape not in ((1, size), (count, size)):
            raise InputError(
                f"The means are {count} of {size} numbers each and the covariances "
                f"{len(covariance.values)} of {covariance.values.shape[1]}; they must agree."
            )
        given = [1.0] * count if weights is None else weights
        weights = torch.as_tensor(given, dtype=means.dtype, device=means.device)
        if weights.shape != (count,) or bool((weights < 0).any()) or not float(weights.sum()) > 0:
            raise InputError(
                f"A mixture of {count} components needs as many weights, at least 0, and not all "
                f"0, got {weights.tolist()}."
            )
        self.covariances = copy.deepcopy(covariance).to(means.dtype)
        self.register_buffer("means", means)
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        # Small mixtures cost next to nothing either way, and so keep their rows apart.
        self.fast = 1 == len(covariance.values) < count and means.numel() > 1024

    @property
    def variances(self) -> Tensor:
        """The diagonals of the C_k, (K, *shape)."""
        return self.covariances.variances().unflatten(1, self.image_shape).expand_as(self.means)

    def _variance(self, level: Level) -> Tensor:
        """Return the eigenvalues of V_k = α² C_k + σ², (K, n) or (1, n)."""
        variance = level.alpha**2 * self.covariances.values + level.sigma**2
        if level.sigma == 0 and bool((variance == 0).any()):
            raise InputError(
                "A degenerate covariance has no density without noise; ask at a level with σ > 0."
            )
        return variance

    def _separate(self, x: Tensor, level: Level) -> _Terms:
        """Return x_t (B, *) against every component."""
        variance = self._variance(level)
        centred = x.flatten(1).to(self.means.dtype)[:, None] - level.alpha * self.means.flatten(1)
        residual = self.covariances.to_basis(centred)
        logits = self.log_weights - 0.5 * _exponent(residual, variance)
        return _Terms(variance, residual, logits, None)

    def _terms(self, x: Tensor, level: Level) -> _Terms:
        """Return x_t (B, *) against the components, the fast way where there is one."""
        if not self.fast:
            return self._separate(x, level)
        variance, means = self._variance(level), self.means.flatten(1)
        centre = means.mean(0, keepdim=True)  # without it, a common offset would cost digits
        residual = self.covariances.to_basis(x.flatten(1).to(means.dtype) - level.alpha * centre)
        offsets = self.covariances.to_basis(means - centre)
        scaled = level.alpha * offsets / variance
        exponent = 0.5 * level.alpha * (offsets * scaled).sum(1)
        logits = self.log_weights - exponent + residual @ scaled.mT
        return _Terms(variance, residual, logits, offsets)

    def log_prob(self, x: Tensor, level: Level) -> Tensor:
        """Return log p(x_t) of x_t (B, *), in nats, (B,)."""
        terms = self._terms(x, level)
        log_prob = torch.logsumexp(terms.logits, dim=1)
        if terms.offsets is not None:
            log_prob = log_prob - 0.5 * _exponent(terms.residual, terms.variance)
        return log_prob.to(x.dtype)

    def score(self, x: Tensor, level: Level) -> Tensor:
        """Return ∇ log p(x_t) of x_t (B, *), (B, *)."""
        terms = self._terms(x, level)
        r, z = terms.responsibilities, terms.residual
        if terms.offsets is not None:
            scaled = level.alpha * terms.offsets / terms.variance
            score = self.covariances.from_basis(torch.addmm(z / -terms.variance, r, scaled))
        else:
            score = -(r[..., None] * self.covariances.from_basis(z / terms.variance)).sum(1)
        return score.reshape(x.shape).to(x.dtype)

    def forward(self, x: Tensor, level: Level) -> Prediction:
        with torch.autocast(x.device.type, enabled=False):  # low precision would not be exact
            terms = self._terms(x, level)
            r, z, means = terms.responsibilities, terms.residual, self.means.flatten(1)
            gain = level.alpha * self.covariances.values / terms.variance
            if terms.offsets is not None:
                centre = self.covariances.to_basis(means.mean(0, keepdim=True))
                kept = centre + (1 - level.alpha * gain) * terms.offsets
                x0 = self.covariances.from_basis(torch.addmm(gain * z, r, kept))
            else:
                x0 = (r[..., None] * (means + self.covariances.from_basis(gain * z))).sum(1)
        return Prediction(x0.reshape(x.shape).to(x.dtype))

    def jacobian(self, x: Tensor, level: Level) -> Tensor:
        """Return ∂x̂₀/∂x_t (B, n, n) of x_t (B, *), in closed form; differentiable."""
        terms = self._separate(x, level)
        r = terms.responsibilities
        gains = self.covariances.matrix(level.alpha * self.covariances.values / terms.variance)
        scores = -self.covariances.from_basis(terms.residual / terms.variance)
        scores = scores - (r[..., None] * scores).sum(1, keepdim=True)
        spread = torch.einsum("bk,bki,bkj->bij", r, scores, scores)
        return (mixed(r, gains) + level.sigma**2 / level.alpha * spread).to(x.dtype)

    def mean(self) -> Tensor:
        """Return E[x₀] (*shape)."""
        return (self.log_weights.exp() @ self.means.flatten(1)).reshape(self.means.shape[1:])

    def covariance(self, x: Tensor | None = None, level: Level | None = None) -> Tensor:
        """Return Cov[x₀ | x_t] (B, n, n) of x_t (B, *) at ``level``; Cov[x₀] (n, n) without both.

        By the law of total covariance, Σ_k r_k (σ² C_k V_k⁻¹ + m_k m_kᵀ) − x̂₀ x̂₀ᵀ with the
        components' posterior means m_k = μ_k + G_k (x_t − α μ_k).
        """
        if (x is None) != (level is None):
            raise TypeError("covariance takes x_t and its level, or neither.")
        if x is None or level is None:
            r, means = self.log_weights.exp()[None], self.means.flatten(1)[None]
            return total_covariance(r, means, self.covariances.matrix())[0]
        terms = self._separate(x, level)
        shrunk = self.covariances.values / terms.variance
        moved = self.covariances.from_basis(level.alpha * shrunk * terms.residual)
        within = self.covariances.matrix(level.sigma**2 * shrunk)
        total = total_covariance(terms.responsibilities, self.means.flatten(1) + moved, within)
        return total.to(x.dtype)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` draws of x₀ (count, *shape)."""
        device, shape = generator.device, (count, *self.means.shape[1:])
        weights = self.log_weights.exp().to(device)
        k = torch.multinomial(weights, count, True, generator=generator)
        z = torch.randn(shape, generator=generator, dtype=self.means.dtype, device=device)
        k, z = k.to(self.means.device), z.to(self.means.device).flatten(1)
        values = self.covariances.values
        # Draws are stacked per component, so that each component's basis is applied to its own.
        column = k if len(values) > 1 else torch.zeros_like(k)
        same = torch.nn.functional.one_hot(column, len(values)).cumsum(0)
        row = same.gather(1, column[:, None])[:, 0] - 1
        stacked = z.new_zeros(int(row.max()) + 1, *values.shape)
        stacked[row, column] = z
        moved = self.covariances.from_basis(values.sqrt() * stacked)[row, column]
        return self.means[k] + moved.reshape(shape)

    def condition(self, matrix: Tensor, y: Tensor, std: Tensor | float) -> GaussianMixture:
        """Return the posterior p(x₀ | y) of y = A x₀ + n, n ~ N(0, diag(std²)): again a mixture.

        With S_k = A C_k Aᵀ + diag(std²), weights ∝ w_k N(y; A μ_k, S_k), means
        μ_k + C_k Aᵀ S_k⁻¹ (y − A μ_k) and covariances C_k − C_k Aᵀ S_k⁻¹ A C_k. Its density is
        ``log_prob`` at :data:`cmi_lightning.schedule.CLEAN`. Computed in float64.

        Args:
            matrix: A (m, n) on flattened images.
            y: (m,).
            std: noise standard deviation ≥ 0, a number or (m,).

        Raises:
            InputError: if shapes do not fit, or measurements without noise determine one another.
        """
        A = matrix.cpu().double()  # not every accelerator has float64
        means = self.means.cpu().double().flatten(1)
        if A.ndim != 2 or A.shape[1] != means.shape[1] or y.shape != A.shape[:1]:
            raise InputError(
                f"The operator's matrix must be (m, {means.shape[1]}) and y (m,), got "
                f"{tuple(A.shape)} and {tuple(y.shape)}."
            )
        # Widened before it is multiplied out: single precision would leave negative eigenvalues.
        covariance = copy.deepcopy(self.covariances).cpu().double().matrix()
        std = std.cpu() if isinstance(std, Tensor) else std
        noise = torch.as_tensor(std, dtype=A.dtype).expand(len(A)) ** 2
        means, shrunk, fit = conditioned(means, covariance, A, y.cpu().double(), noise)
        floor, like = A.shape[1] * torch.finfo(A.dtype).eps, self.means
        floor *= float(self.covariances.values.max())
        posterior = DenseCovariance(shrunk, floor).to(like)
        means = means.to(like).reshape(like.shape)
        weights = torch.softmax(self.log_weights.cpu().double() + fit, dim=0).to(like)
        return GaussianMixture(means, posterior, weights, self.schedule)

    def save(self, path: str | Path) -> None:
        """Write mixture and schedule to a ``.safetensors`` file, for :func:`load_mixture`."""
        s = self.schedule
        tensors = {
            "means": self.means,
            "log_weights": self.log_weights,
            "schedule": torch.tensor([s.alphas, s.sigmas, s.times], dtype=torch.float64),
            **{f"covariance.{name}": v for name, v in self.covariances.options().items()},
        }
        tensors = {name: v.detach().cpu().contiguous().clone() for name, v in tensors.items()}
        save_file(tensors, path, {"covariance": type(self.covariances).__name__})


def load_mixture(path: str) -> GaussianMixture:
    """Return the mixture that :meth:`GaussianMixture.save` wrote, or raise InputError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"No mixture at '{path}': give a file that GaussianMixture.save wrote.")
    try:
        with safe_open(file, "pt") as opened:
            kind = KINDS[(opened.metadata() or {})["covariance"]]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        of, named = "covariance.", tensors.items()
        covariance = kind.restored({n.removeprefix(of): v for n, v in named if n.startswith(of)})
        means, log_weights = tensors["means"], tensors["log_weights"]
        schedule = Schedule(*(tuple(row) for row in tensors["schedule"].tolist()))
    except (SafetensorError, KeyError) as error:
        raise InputError(f"'{path}' is not a file that GaussianMixture.save wrote.") from error
    mixture = GaussianMixture(means, covariance, log_weights.exp(), schedule)
    mixture.log_weights = log_weights  # to the last bit
    return mixture


def _exponent(residual: Tensor, variance: Tensor) -> Tensor:
    """Return −2 log N(residual; 0, variance), summed over the last dimension."""
    return (residual**2 / variance + torch.log(2 * torch.pi * variance)).sum(-1)
