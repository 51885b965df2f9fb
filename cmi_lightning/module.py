"""The Lightning shell around the sampler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol, TypedDict, runtime_checkable

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.denoisers.base import Autocast, Denoiser
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    Convolution,
    Downsample,
    Identity,
    LinearOperator,
    PixelMask,
    Recipe,
)
from cmi_lightning.problem import GaussianNoise, Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver
from cmi_lightning.step import Record


class Details:
    """A batch's problem (y, A and the noise level) and the last step's record.

    A plain class: Lightning looks into containers and dataclasses and refuses frozen ones.
    """

    def __init__(self, problem: Problem, record: Record) -> None:
        self.problem, self.record = problem, record


class Restoration(TypedDict):
    """What ``predict_step`` returns and callbacks read; images are in [−1, 1].

    ``id``: list of sample ids. ``restored``: (B, C, H, W), not clamped. ``measurement``: A⁺y
    (B, C, H, W), the measurement seen as an image. ``truth``: (B, C, H, W), or None for real
    measurements. ``seconds``: sampling time per image. ``details``: what else a callback may want.
    """

    id: list[str]
    restored: Tensor
    measurement: Tensor
    truth: Tensor | None
    seconds: float
    details: Details


@runtime_checkable
class SamplingObserver(Protocol):
    """A callback that sees the steps, as ``cmi_lightning.callbacks.SamplingCallback`` does."""

    def on_sampling_start(
        self, trainer: Any, pl_module: Any, ids: list[str], problem: Problem
    ) -> None:
        """Called once per batch, before the first step."""

    def on_sampling_step(self, trainer: Any, pl_module: Any, record: Record) -> None:
        """Called after every step."""


class PosteriorSampler(L.LightningModule):
    """Restores images by ``Trainer.predict``: a prior, a degradation, a solver, guidances.

    A batch ``{"x": (B, C, H, W) in [−1, 1], "id": [...]}`` is measured, y = A x + n, and restored.
    A batch with ``"y_image"`` instead holds given measurements (see
    :class:`cmi_lightning.data.MeasurementFolderData`); ``operator`` is then not used.

    Args:
        denoiser: the prior.
        operator: A, for simulated measurements.
        solver: default: DDPM with the posterior variance.
        guidances: the likelihood; none draws from the prior.
        num_steps: steps, by guided-diffusion's respacing rule; None for every level of the prior.
        noise: the measurement noise, with the image range it is meant in. (A standard deviation per
            measurement is :class:`cmi_lightning.Problem`'s, for use without Lightning.)
        seed: seed of all random numbers (Lightning's ``seed_everything`` has no part in them); see
            :class:`cmi_lightning.noise.SampleNoise`.
        clamp: clamp the x̂₀ that the solver uses to the prior's value range.

    Raises:
        InputError: for parts that do not fit together, at construction or before sampling starts.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: LinearOperator | None = None,
        solver: Solver | None = None,
        guidances: list[Guidance] | None = None,
        num_steps: int | str | None = 100,
        noise: GaussianNoise = GaussianNoise(),  # noqa: B008
        seed: int = 0,
        clamp: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.operator = operator or Identity()
        self.solver = solver or DDPM()
        self.guidances = list(guidances or [])
        self.num_steps, self.seed, self.clamp = num_steps, seed, clamp
        self.measurement_noise = noise
        self.sampler()  # refuses parts that do not fit
        for guidance in self.guidances:
            if guidance.active and guidance.needs_noise and self.measurement_noise.std == 0:
                raise InputError(
                    f"{type(guidance).__name__} needs measurement noise: set noise.sigma above 0."
                )

    def sampler(self, dtype: torch.dtype | None = None) -> Sampler:
        """Return the sampler, with the network under autocast to ``dtype`` if given."""
        denoiser = self.denoiser if dtype is None else Autocast(self.denoiser, dtype)
        return Sampler(denoiser, self.solver, self.guidances, self.num_steps, self.clamp)

    def describe(self) -> dict[str, str]:
        """Return what will be run, for people."""
        std = self.measurement_noise.std
        shape = self.denoiser.image_shape
        size = _size(shape) if shape else "any"
        datamodule = getattr(self._trainer, "datamodule", None)
        return {
            "prior": f"{_name(self.denoiser)}, images {size}",
            "operator": getattr(datamodule, "given", None) or _name(self.operator),
            "noise": getattr(datamodule, "given_noise", None)
            or f"σ = {std:g} on [−1, 1] = {std / 2:g} on [0, 1]",
            "solver": _name(self.solver),
            "guidances": ", ".join(map(_name, self.guidances)) or "none",
            "steps": str(len(self.sampler().schedule)),
            "seed": str(self.seed),
        }

    def setup(self, stage: str) -> None:
        """Check everything before any sampling; see :meth:`check`."""
        self.check(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]

    def check(self, trainer: L.Trainer, datamodule: Any) -> None:
        """Check the trainer's precision, and the images of a datamodule that was set up.

        Raises:
            InputError: for a precision that would round the measurement, or if the datamodule's
                ``image_shape`` does not suit the network or the operator.
        """
        precision = str(trainer.precision)
        if precision.endswith("-true") and precision not in ("32-true", "64-true"):
            raise InputError(
                f"trainer.precision={precision} would round the measurement; use "
                f"{precision.removesuffix('-true')}-mixed, which lowers the network alone."
            )
        shape = getattr(datamodule, "image_shape", None)
        if shape is None:
            return
        self._check_shape(tuple(shape))
        if isinstance(self.operator, Recipe) and getattr(datamodule, "given", None) is None:
            self.operator.bind(shape, SampleNoise(self.seed, ["check"]), torch.zeros(1))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse images (C, H, W) that the network does not take."""
        wanted, multiple = self.denoiser.image_shape, self.denoiser.size_multiple
        given = _size(shape)
        if wanted and any(w is not None and w != n for w, n in zip(wanted, shape, strict=True)):
            raise InputError(
                f"The images are {given} (channels×height×width) and the network takes "
                f"{_size(wanted)}; set data.channels or data.size, or use another network."
            )
        if any(n % multiple for n in shape[1:]):
            raise InputError(
                f"The images are {given} (channels×height×width) and the network needs sides that "
                f"are multiples of {multiple}; set data.size."
            )

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Restoration:
        """Measure and restore one batch."""
        dtype = None
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        with _plain_autograd(self.device.type):
            batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
            return self._restore(batch, dtype)

    def _restore(self, batch: dict[str, Any], dtype: torch.dtype | None) -> Restoration:
        ids = list(batch["id"])
        noise = SampleNoise(self.seed, ids)
        truth = batch.get("x")
        if truth is None:
            problem, like = self._given(batch, noise)
        else:
            operator = self.operator.bind(tuple(truth.shape[1:]), noise, truth)
            problem = Problem.simulate(truth, operator, self.measurement_noise.std, noise)
            like = truth
        self._check_shape(tuple(like.shape[1:]))
        observers = [c for c in self._callbacks() if isinstance(c, SamplingObserver)]
        for observer in observers:
            observer.on_sampling_start(self._trainer, self, ids, problem)
        started = time.perf_counter()
        for record in self.sampler(dtype).iterate(problem, noise, like):
            for observer in observers:
                observer.on_sampling_step(self._trainer, self, record)
        seconds = (time.perf_counter() - started) / len(ids)  # of sampling, without A⁺y
        return Restoration(
            id=ids,
            restored=record.x,
            measurement=problem.operator.pinv(problem.y),
            truth=truth,
            seconds=seconds,
            details=Details(problem, record),
        )

    def _callbacks(self) -> list[Any]:
        return self._trainer.callbacks if self._trainer is not None else []  # type: ignore[attr-defined]

    def _given(self, batch: dict[str, Any], noise: SampleNoise) -> tuple[Problem, Tensor]:
        """Return the problem of given measurements, and a tensor of the images' shape."""
        y = batch["y_image"]
        batch_size, channels, height, width = y.shape
        factor = int(batch["factor"][0]) if "factor" in batch else 1
        like = y.new_zeros(batch_size, channels, height * factor, width * factor)
        operator: LinearOperator
        if "mask" in batch:
            operator = PixelMask.from_mask(batch["mask"], like)
            y = operator(y)
        elif "kernel" in batch:
            operator = Convolution(batch["kernel"].to(y)).bind(tuple(like.shape[1:]), noise, like)
        elif factor > 1:
            operator = Downsample(factor).bind(tuple(like.shape[1:]), noise, like)
        else:
            operator = Identity()
        std = batch["sigma"].to(y) if "sigma" in batch else self.measurement_noise.std
        return Problem(y, operator, std), like


@contextlib.contextmanager
def _plain_autograd(device: str) -> Iterator[None]:
    """Leave Lightning's inference mode and autocast: guidance needs gradients in full precision."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _size(shape: tuple[int | None, ...]) -> str:
    """Return a shape as text, "any" for sides that are free."""
    return "×".join("any" if n is None else str(n) for n in shape)


def _name(part: object) -> str:
    """Return a short description: dataclasses print their options, others their class."""
    return repr(part) if hasattr(part, "__dataclass_fields__") else type(part).__name__
