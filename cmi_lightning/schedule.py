"""Noise schedules: x_t = α_t x₀ + σ_t ε at a finite list of noise levels.

Longer than other files: each of the six chains has its formula, its source and its options here.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from cmi_lightning.checked import check_arguments, check_value
from cmi_lightning.errors import InputError, warn_once
from cmi_lightning.spacing import grid, power_grid, spaced

ScheduleName = Literal["linear", "cosine", "edm", "vp", "rectified"]


class Level(NamedTuple):
    """One noise level: x_t = α x₀ + σ ε, and ``time``, what the network is told about it.

    >>> Schedule.linear()[999].time
    999
    """

    alpha: float
    sigma: float
    time: float


# α of σ/α: variance-preserving, rectified, variance-exploding.
_FORMS = (lambda r: (1 + r * r) ** -0.5, lambda r: 1 / (1 + r), lambda r: 1.0)
CLEAN = Level(alpha=1.0, sigma=0.0, time=0.0)


class PosteriorCoefficients(NamedTuple):
    """Coefficients of one reverse step x_t → x_s of the exact Gaussian chain.

    q(x_s | x_t, x₀) = N(``from_x``·x_t + ``from_x0``·x₀, ``variance``), and ``beta`` is the
    variance σ_t² − (α_t/α_s)² σ_s² that the forward chain adds from s to t (β_t of the chain).

    >>> s, t = Schedule.edm()[98], Schedule.edm()[99]
    >>> q = reverse_coefficients(t, s)
    >>> round(q.from_x + q.from_x0, 6)
    1.0
    """

    from_x: float
    from_x0: float
    variance: float
    beta: float


def reverse_coefficients(t: Level, s: Level) -> PosteriorCoefficients:
    """Bayes' rule for two levels of the chain, ``s`` less noisy than ``t``.

    For the variance-preserving chain this is Ho et al. (2020), Eq. 7.
    """
    ratio = t.alpha / s.alpha
    beta = t.sigma**2 - ratio**2 * s.sigma**2
    return PosteriorCoefficients(
        from_x=ratio * s.sigma**2 / t.sigma**2,
        from_x0=s.alpha * beta / t.sigma**2,
        variance=beta * s.sigma**2 / t.sigma**2,
        beta=beta,
    )


@dataclass(frozen=True)
class Schedule:
    """Noise levels (α_i, σ_i), from the least noisy to the noisiest, with the network's times.

    The constructors are :meth:`linear` (the discrete DDPM chain, the default everywhere),
    :meth:`cosine`, :meth:`edm`, :meth:`vp`, :meth:`rectified` and :meth:`from_betas`;
    :meth:`respace` thins any of them to fewer steps. In YAML,
    ``{class_path: cmi_lightning.Schedule.vp, init_args: {…}}``.

    >>> schedule = Schedule.linear().respace(4)
    >>> schedule.times
    (0, 333, 666, 999)
    >>> [(t.time, s.time) for _, t, s in schedule.pairs()]
    [(999, 666), (666, 333), (333, 0), (0, 0.0)]

    Args:
        alphas: signal coefficients α_i > 0.
        sigmas: noise coefficients σ_i > 0, such that σ_i/α_i never falls from i to i + 1.
        times: what the network receives at each level (the original index for DDPM chains).
    """

    alphas: Sequence[float]
    sigmas: Sequence[float]
    times: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.alphas) == len(self.sigmas) == len(self.times) > 0:
            raise InputError("alphas, sigmas and times must be of one length, at least 1.")
        if not all(a > 0 for a in self.alphas):
            raise InputError(
                "A level without signal (α = 0) says nothing about x₀: leave it out of the "
                "schedule, or use Schedule.from_betas, which does."
            )
        noise_to_signal = [s / a for a, s in zip(self.alphas, self.sigmas, strict=True)]
        if not noise_to_signal[0] > 0 or not all(a <= b for a, b in pairwise(noise_to_signal)):
            raise InputError("σ/α must be above 0 and increase, or stay, from level to level.")

    @classmethod
    def _from_alpha_bars(cls, alpha_bars: np.ndarray) -> Schedule:
        return cls(
            tuple(np.sqrt(alpha_bars).tolist()),
            tuple(np.sqrt(1 - alpha_bars).tolist()),
            tuple(range(len(alpha_bars))),
        )

    @classmethod
    def linear(
        cls, num_levels: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Schedule:
        """DDPM's variance-preserving chain: β rises linearly, α_t² = ᾱ_t = ∏(1 − β) = 1 − σ_t².

        The default βs belong to 1000 levels. Source: Ho et al. (2020), Sec. 4.
        """
        check_arguments(cls.linear, locals(), num_levels="[1, inf)")
        return cls.from_betas(grid(beta_start, beta_end, num_levels))

    @classmethod
    def cosine(cls, num_levels: int = 1000, offset: float = 0.008) -> Schedule:
        """ᾱ(t) ∝ cos²((t/N + s)/(1 + s)·π/2), with β capped at 0.999.

        Source: Nichol & Dhariwal (2021), Eq. 17.
        """
        check_arguments(cls.cosine, locals(), num_levels="[1, inf)")
        grid = (np.arange(num_levels + 1) / num_levels + offset) / (1 + offset)
        abar = np.cos(grid * math.pi / 2) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
        return cls._from_alpha_bars(np.cumprod(1 - betas))

    @classmethod
    def edm(
        cls,
        num_levels: int = 100,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> Schedule:
        """A variance-exploding chain: α = 1, σ_i^{1/ρ} evenly spaced, time = σ.

        Source: Karras et al. (2022), Eq. 5.
        """
        positive = dict.fromkeys(("sigma_min", "sigma_max", "rho"), "(0, inf)")
        check_arguments(cls.edm, locals(), num_levels="[1, inf)", **positive)
        sigmas = tuple(power_grid(sigma_min, sigma_max, num_levels, rho))
        return cls((1.0,) * num_levels, sigmas, sigmas)

    @classmethod
    def vp(
        cls,
        num_levels: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        t_min: float = 1e-3,
        time_scale: float = 999.0,
    ) -> Schedule:
        """The continuous variance-preserving process, at evenly spaced t from ``t_min`` to 1.

        log α(t) = −t²(β_max − β_min)/4 − t β_min/2 and σ² = 1 − α². The network receives
        ``time_scale``·t: 999 t in the authors' code, 1 for networks that take t itself.

        Source: Song et al. (2021), Score-based generative modeling through SDEs, Eq. 33.
        """
        check_arguments(cls.vp, locals(), num_levels="[1, inf)")
        t = grid(t_min, 1, num_levels)
        log_alpha = -(t**2) * (beta_max - beta_min) / 4 - t * beta_min / 2
        sigmas = np.sqrt(-np.expm1(2 * log_alpha))
        return cls(
            tuple(np.exp(log_alpha).tolist()),
            tuple(sigmas.tolist()),
            tuple((time_scale * t).tolist()),
        )

    @classmethod
    def rectified(
        cls,
        num_levels: int = 999,
        shift: float = 1.0,
        t_min: float = 1e-3,
        t_max: float = 0.999,
        time_scale: float = 1000.0,
    ) -> Schedule:
        """The straight paths of flow matching, x_t = (1 − t) x₀ + t ε, at t from ``t_min``.

        t is evenly spaced, then σ = k t/(1 + (k − 1) t) with k = ``shift``: σ/α becomes k times as
        large. Nothing is left of x₀ at t = 1, so that the noisiest level is just below. The network
        receives ``time_scale``·σ: 1000 σ in Stable Diffusion 3; 1 for networks that take σ itself.

        >>> Schedule.rectified(3, shift=3.0, t_min=0.25, t_max=0.75).sigmas
        (0.5, 0.75, 0.9)

        Source: Liu et al. (2023), Lipman et al. (2023); the shift, Esser et al. (2024), Eq. 23.
        """
        check_arguments(cls.rectified, locals(), num_levels="[1, inf)", shift="(0, inf)")
        if not 0 < t_min < t_max < 1:
            raise InputError(
                f"A rectified schedule needs 0 < t_min < t_max < 1, got t_min={t_min:g}, "
                f"t_max={t_max:g}."
            )
        t = grid(t_min, t_max, num_levels)
        denominator = 1 + (shift - 1) * t
        sigmas, alphas = shift * t / denominator, (1 - t) / denominator
        return cls(
            tuple(alphas.tolist()), tuple(sigmas.tolist()), tuple((time_scale * sigmas).tolist())
        )

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> Schedule:
        """A variance-preserving chain of given β_t: ᾱ_t = ∏(1 − β), times 0, 1, 2, ….

        A last level without signal (β = 1, zero terminal SNR) is left out, with a warning: there
        x̂₀ does not depend on x_t, and the level before it is noise for all purposes.

        Raises:
            InputError: if a β is not in (0, 1], or is 1 before the last.
        """
        b = np.asarray(betas, dtype=np.float64)
        kept = b[: len(b) - int(b.size and b[-1] == 1)]
        if not kept.size or np.any(kept <= 0) or np.any(kept >= 1):
            raise InputError(
                "betas must lie between 0 and 1 (the last may be 1), at least one of them."
            )
        if len(kept) < len(b):
            warn_once(
                "The chain's last level has no signal (β = 1): sampling starts at level "
                f"{len(kept)} of {len(b)}."
            )
        return cls._from_alpha_bars(np.cumprod(1 - kept))

    def scale_noise(self, factor: float) -> Schedule:
        """Return the schedule with every σ times ``factor``: that of x_t in other units."""
        check_value("factor", factor, float, "(0, inf)")
        return Schedule(self.alphas, tuple(factor * s for s in self.sigmas), self.times)

    @classmethod
    def named(cls, schedule: Schedule | str) -> Schedule:
        """Return a schedule as it is, or that of a :data:`ScheduleName`."""
        if isinstance(schedule, Schedule):
            return schedule
        if schedule not in (names := get_args(ScheduleName)):
            raise InputError(f"schedule must be one of {', '.join(names)}, got '{schedule}'.")
        made: Schedule = getattr(cls, schedule)()
        return made

    def refuse_curved(self) -> None:
        """Refuse levels that are on no straight path, α + σ = 1, for networks of the velocity."""
        if max(abs(a + s - 1) for a, s in zip(self.alphas, self.sigmas, strict=True)) > 1e-6:
            raise InputError(
                "A velocity ε − x₀ belongs to straight paths, α + σ = 1, and the schedule has "
                "others: set schedule to rectified (or prediction to v, for v = α ε − σ x₀)."
            )

    def __len__(self) -> int:
        return len(self.alphas)

    def __getitem__(self, i: int) -> Level:
        return Level(self.alphas[i], self.sigmas[i], self.times[i])

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest σ/α."""
        return self.sigmas[0] / self.alphas[0], self.sigmas[-1] / self.alphas[-1]

    def level(self, noise_to_signal: float) -> Level:
        """Return the level of a given σ/α.

        Between neighbours log α and time are linear in log σ/α. On schedules with α² + σ² = 1,
        α + σ = 1 or α = 1 the level is on them; a time proportional to σ stays so.

        >>> schedule = Schedule.linear()
        >>> level = schedule.level(1.0)
        >>> round(level.alpha**2, 4), 258 < level.time < 259
        (0.5, True)

        Raises:
            InputError: outside of :attr:`range`.
        """
        low, high = self.range
        if not low * (1 - 1e-9) <= noise_to_signal <= high * (1 + 1e-9):
            raise InputError(
                f"The prior knows noise levels σ/α from {low:.3g} to {high:.3g}, and not "
                f"{noise_to_signal:.3g}."
            )
        i = bisect.bisect_left(
            range(len(self)), noise_to_signal, key=lambda k: self.sigmas[k] / self.alphas[k]
        )
        i = min(max(i, 1), len(self) - 1)
        below, above = self[max(i - 1, 0)], self[i]
        a, b = (math.log(x.sigma / x.alpha) for x in (below, above))
        share = min(max((math.log(noise_to_signal) - a) / (b - a), 0.0), 1.0) if b > a else 1.0
        alpha = below.alpha * (above.alpha / below.alpha) ** share
        for form in _FORMS:  # exact where the schedule is of one of them
            low, high = (x.alpha / form(x.sigma / x.alpha) for x in (below, above))
            if math.isclose(low, high, rel_tol=1e-9):
                alpha = low * form(noise_to_signal)
        sigma, time = alpha * noise_to_signal, below.time + share * (above.time - below.time)
        if math.isclose(below.time * above.sigma, above.time * below.sigma, rel_tol=1e-9):
            time = above.time / above.sigma * sigma  # as where the network is told σ
        return Level(alpha, sigma, time)

    def at(self, noise_to_signal: Sequence[float]) -> Schedule:
        """Return the schedule of the levels of given σ/α, ascending; see :meth:`level`."""
        return Schedule(*zip(*(self.level(ratio) for ratio in noise_to_signal), strict=True))

    def respace(self, num_steps: int | str) -> Schedule:
        """Keep ``num_steps`` levels by guided-diffusion's rule; the network's times stay.

        A count of one step, alone or as the last section, keeps the noisiest level, from which
        sampling starts; guided-diffusion keeps the least noisy one. "ddimK" is as published.

        Args:
            num_steps: a count; "a,b,c" for counts in equal sections; or "ddimK" for the smallest
                integer stride that leaves K levels.

        Raises:
            InputError: if there are not that many levels.
        """
        keep = spaced(len(self), num_steps)
        alphas, sigmas, times = (
            tuple(values[i] for i in keep) for values in (self.alphas, self.sigmas, self.times)
        )
        return Schedule(alphas, sigmas, times)

    def pairs(self) -> Iterator[tuple[int, Level, Level]]:
        """Yield (i, level i, next lower level), from the noisiest down to the clean image."""
        for i in reversed(range(len(self))):
            yield i, self[i], self[i - 1] if i else CLEAN
