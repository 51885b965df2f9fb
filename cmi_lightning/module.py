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
from cmi_lightning.operators import Convolution, Downsample, Identity, LinearOperator, PixelMask
from cmi_lightning.problem import GaussianNoise, Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver
from cmi_lightning.step import Record


class Restoration(TypedDict):
    """What ``predict_step`` returns and callbacks read; images are in [−1, 1].

    ``id``: list of sample ids. ``restored``: (B, C, H, W), not clamped. ``measurement``: A⁺y
    (B, C, H, W), the measurement seen as an image. ``truth``: (B, C, H, W), or None for real
    measurements. ``problem``: y, A and the noise level. ``record``: the last step's record.
    ``seconds``: sampling time per image.
    """

    id: list[str]
    restored: Tensor
    measurement: Tensor
    truth: Tensor | None
    problem: Problem
    record: Record
    seconds: float


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
        noise: the measurement noise, with the image range it is meant in.
        seed: seed of all random numbers; see :class:`cmi_lightning.noise.SampleNoise`.
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
        noise: GaussianNoise | None = None,
        seed: int = 0,
        clamp: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.operator = operator or Identity()
        self.solver = solver or DDPM()
        self.guidances = list(guidances or [])
        self.num_steps, self.seed, self.clamp = num_steps, seed, clamp
        self.measurement_noise = noise or GaussianNoise()
        self.sampler()  # refuses parts that do not fit

    def sampler(self, dtype: torch.dtype | None = None) -> Sampler:
        """Return the sampler, with the network under autocast to ``dtype`` if given."""
        denoiser = self.denoiser if dtype is None else Autocast(self.denoiser, dtype)
        return Sampler(denoiser, self.solver, self.guidances, self.num_steps, self.clamp)

    def describe(self) -> dict[str, str]:
        """Return what will be run, for people."""
        std = self.measurement_noise.std
        shape = self.denoiser.image_shape
        size = "×".join("any" if n is None else str(n) for n in shape) if shape else "any"
        datamodule = getattr(self._trainer, "datamodule", None)
        return {
            "prior": f"{_name(self.denoiser)}, images {size}",
            "operator": getattr(datamodule, "given", None) or _name(self.operator),
            "noise": f"σ = {std:g} on [−1, 1] = {std / 2:g} on [0, 1]",
            "solver": _name(self.solver),
            "guidances": ", ".join(map(_name, self.guidances)) or "none",
            "steps": str(len(self.sampler().schedule)),
            "seed": str(self.seed),
        }

    def setup(self, stage: str) -> None:
        """Check images against prior and operator, before any sampling.

        Raises:
            InputError: if the images have other channels or another size than the network, or
                the operator cannot act on them.
        """
        shape = getattr(self.trainer.datamodule, "image_shape", None)  # type: ignore[attr-defined]
        if shape is None:
            return
        wanted = self.denoiser.image_shape
        if wanted and any(w is not None and w != n for w, n in zip(wanted, shape, strict=True)):
            size = "×".join("any" if n is None else str(n) for n in wanted)
            raise InputError(
                f"The images are {'×'.join(map(str, shape))} (channels×height×width) and the "
                f"network takes {size}; set data.channels or data.size, or use another network."
            )
        self.operator.bind(shape, SampleNoise(self.seed, ["check"]), torch.zeros(1))

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
        observers = [c for c in self._callbacks() if isinstance(c, SamplingObserver)]
        for observer in observers:
            observer.on_sampling_start(self._trainer, self, ids, problem)
        started = time.perf_counter()
        for record in self.sampler(dtype).iterate(problem, noise, like):
            for observer in observers:
                observer.on_sampling_step(self._trainer, self, record)
        return Restoration(
            id=ids,
            restored=record.x,
            measurement=problem.operator.pinv(problem.y),
            truth=truth,
            problem=problem,
            record=record,
            seconds=(time.perf_counter() - started) / len(ids),
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
        return Problem(y, operator, self.measurement_noise.std), like


@contextlib.contextmanager
def _plain_autograd(device: str) -> Iterator[None]:
    """Leave Lightning's inference mode and autocast: guidance needs gradients in full precision."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _name(part: object) -> str:
    """Return a short description: dataclasses print their options, others their class."""
    return repr(part) if hasattr(part, "__dataclass_fields__") else type(part).__name__
