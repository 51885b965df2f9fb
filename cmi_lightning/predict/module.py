"""The Lightning shell around the sampler."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.data.base import LoaderData, RestorationData
from cmi_lightning.denoisers.base import Autocast, Denoiser, size_text
from cmi_lightning.denoisers.tiled import Tiled
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance, refuse_nonlinear
from cmi_lightning.measurement_noise import GaussianNoise, MeasurementNoise
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity, Operator
from cmi_lightning.predict.batch import as_batch, take
from cmi_lightning.predict.callback import SamplingCallback
from cmi_lightning.predict.fingerprint import digest, inputs, options
from cmi_lightning.predict.folder import RunFolder
from cmi_lightning.predict.memory import out_of_memory
from cmi_lightning.predict.records import (
    RESULTS,
    Run,
    leave_if_orphaned,
    refuse_foreign_logs,
    refuse_other,
)
from cmi_lightning.predict.restoration import Restoration, joined, nothing, restore
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver
from cmi_lightning.step import Record

log = logging.getLogger(__name__)
FAR = 2.0  # residuals, in units of the noise's, that no right restoration has
# Options that leave a finished sample's result as it is.
FREE = (
    "model.overwrite",
    "model.denoiser.network.checkpoint",
    "data.batch_size",
    "data.num_workers",
    "data.limit",
    "data.val_count",
    "data.strict",
)


class PosteriorSampler(L.LightningModule):
    """Restores images by ``Trainer.predict``: a prior, a degradation, a solver, guidances.

    A batch ``{"x": (B, C, H, W) in [−1, 1], "id": [...]}`` is measured, y = A x + n, and restored.
    A batch with ``"y_image"`` instead holds given measurements (see
    :class:`cmi_lightning.data.MeasurementFolderData`); an ``operator`` is then refused.

    Where callbacks keep something (:attr:`cmi_lightning.callbacks.SamplingCallback.key`), every
    finished sample has a record in the trainer's ``default_root_dir``, and predicting again
    restores what has none. Several processes share the batches; a sample's noise does not depend
    on how.

    Args:
        denoiser: the prior.
        operator: A, for simulated measurements.
        solver: default: DDPM with the posterior variance.
        guidances: the likelihood; none draws from the prior.
        num_steps: steps, by guided-diffusion's respacing rule; None for every level of the prior.
        noise: the measurement noise: :class:`cmi_lightning.GaussianNoise` with the image range it
            is meant in, :class:`cmi_lightning.PoissonNoise`, or a class of your own. Data may bring
            a level for each image, or for each measurement, as ``"sigma"``.
        seed: seed of all random numbers (Lightning's ``seed_everything`` has no part in them); see
            :class:`cmi_lightning.noise.SampleNoise`.
        clamp: clamp the x̂₀ that the solver uses to the prior's value range.
        samples_per_image: K draws from the posterior of each image, one after the other; the first
            is the one of K = 1. ``restored`` is then their mean.
        overwrite: start afresh in a folder that has results: what a run wrote there is removed.
        tile: side of the windows in which :class:`cmi_lightning.denoisers.Tiled` sees the image.
            None tiles where a network of one size gets larger images, and only there.

    Raises:
        InputError: for parts that do not fit together, at construction or before sampling starts.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Operator | None = None,
        solver: Solver | None = None,
        guidances: list[Guidance] | None = None,
        num_steps: int | str | None = 100,
        noise: MeasurementNoise = GaussianNoise(),  # noqa: B008
        seed: int = 0,
        clamp: bool = True,
        samples_per_image: int = 1,
        overwrite: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if samples_per_image < 1:
            raise InputError(f"samples_per_image must be at least 1, got {samples_per_image}.")
        self.samples_per_image = samples_per_image
        self.overwrite = overwrite
        self.run = Run()
        self._rows_that_fit: int | None = None  # learned from running out of memory
        self._fits: list[float] = []
        self._given = False  # measurements are given, not simulated
        self._said: set[str] = set()
        self.denoiser = denoiser if tile is None else Tiled(denoiser, tile)
        self.operator = operator or Identity()
        self.solver = solver or DDPM()
        self.guidances = list(guidances or [])
        self.num_steps, self.seed, self.clamp = num_steps, seed, clamp
        self.measurement_noise = noise
        self.sampler()  # refuses parts that do not fit
        parts: tuple[Any, ...] = (self.solver, *(g for g in self.guidances if g.active))
        refuse_nonlinear(parts, self.operator)
        for part in parts:
            if part.needs_noise and not self.measurement_noise.present:
                raise InputError(
                    f"{type(part).__name__} needs measurement noise: set noise.sigma above 0."
                )

    def sampler(self, dtype: torch.dtype | None = None) -> Sampler:
        """Return the sampler, with the network under autocast to ``dtype`` if given."""
        denoiser = self.denoiser if dtype is None else Autocast(self.denoiser, dtype)
        return Sampler(denoiser, self.solver, self.guidances, self.num_steps, self.clamp)

    def describe(self) -> dict[str, str]:
        """Return what will be run, for people."""
        noise, shape = _name(self.measurement_noise), self.denoiser.image_shape
        if isinstance(self.measurement_noise, GaussianNoise):
            std = self.measurement_noise.level
            noise = f"σ = {std:g} on [−1, 1] = {std / 2:g} on [0, 1]"
        size = size_text(shape) if shape else "any"
        if isinstance(self.denoiser, Tiled):
            size += f", in windows of {size_text(self.denoiser.window)}"
        datamodule = getattr(self._trainer, "datamodule", None)
        given = getattr(datamodule, "given", None)
        parts = [given] if given else []
        if not given or getattr(datamodule, "takes_operator", False):
            parts.append(_name(self.operator))
        return {
            "prior": f"{_name(self.denoiser)}, images {size}",
            "operator": ", ".join(parts),
            "noise": getattr(datamodule, "given_noise", None) or noise,
            "solver": _name(self.solver),
            "guidances": ", ".join(map(_name, self.guidances)) or "none",
            "steps": str(len(self.sampler().schedule)),
            "seed": str(self.seed),
            **({"samples per image": str(k)} if (k := self.samples_per_image) > 1 else {}),
        }

    def setup(self, stage: str) -> None:
        """Check everything before any sampling, see :meth:`check`, and look up what is done."""
        trainer: Any = self.trainer
        datamodule = trainer.datamodule
        self.run.close()
        self.check(trainer, datamodule)
        if not any(isinstance(c, _Close) for c in trainer.callbacks):
            trainer.callbacks.append(_Close())
        # The batches are shared out by Run.share: Lightning's sampler would make other batches on
        # every number of processes, and refuses to have fewer samples than processes.
        trainer._accelerator_connector.use_distributed_sampler = False
        recorders = _recorders(trainer)
        fingerprint = self.fingerprint(trainer, datamodule) if recorders else {}
        self.run, self._rows_that_fit = Run(), None
        self._fits, self._said = [], set()
        self.run.open(trainer, recorders, fingerprint, self.overwrite)

    def fingerprint(self, trainer: L.Trainer, datamodule: Any) -> dict[str, str]:
        """Return every option that decides the results, by name, with checksums of weights."""
        found = dict(options("model", self, weights=False))
        found.update(options("model.denoiser", self.denoiser))
        noise = self.measurement_noise
        found.update({"model.noise": str(getattr(noise, "level", noise))})
        found.update(options("data", datamodule))
        found["trainer.precision"] = str(trainer.precision)
        return {name: value for name, value in found.items() if name not in FREE}

    def check(self, trainer: Any, datamodule: Any) -> None:
        """Check the trainer's precision and folder, and the images of a datamodule that was set up.

        Raises:
            InputError: for a precision that would round the measurement, if the trainer's folder
                belongs to other options, or if the datamodule's ``image_shape`` does not suit the
                network or the operator.
        """
        precision = str(trainer.precision)
        if precision.endswith("-true") and precision not in ("32-true", "64-true"):
            raise InputError(
                f"trainer.precision={precision} would round the measurement; use "
                f"{precision.removesuffix('-true')}-mixed, which lowers the network alone."
            )
        shape = getattr(datamodule, "image_shape", None)
        if shape is not None:
            self._tile(tuple(shape))  # first: it is one of the options that are compared
        if trainer.limit_predict_batches == 0:
            raise InputError("trainer.limit_predict_batches=0 leaves nothing to restore.")
        if _recorders(trainer):
            folder = Path(trainer.default_root_dir).expanduser()
            RunFolder(folder).refuse_overlap(inputs(datamodule), RESULTS)
            refuse_foreign_logs(trainer, folder)
            if not self.overwrite and (folder / "run.json").is_file():
                refuse_other(folder, self.fingerprint(trainer, datamodule))
        given = getattr(datamodule, "given", None)
        if given and not getattr(datamodule, "takes_operator", False):
            self._refuse_operator(f"the data are {given}")
        if shape is None:
            return
        self.denoiser.rehearse(tuple(shape))
        ids = [f"check/{row}" for row in range(self.operator.images or 1)]
        self.operator.bind(shape, SampleNoise(self.seed, ids), torch.zeros(1))

    def _tile(self, shape: tuple[int, ...]) -> None:
        """Tile a network of one size where images (C, H, W) exceed it."""
        wanted = self.denoiser.image_shape
        if wanted is None or None in wanted[1:] or wanted == shape:
            return
        larger = all(n >= side for side, n in zip(wanted[1:], shape[1:], strict=True))  # type: ignore[operator]
        if larger and wanted[0] in (None, shape[0]):
            self.denoiser = Tiled(self.denoiser)

    def on_predict_start(self) -> None:
        """Let SIGTERM end the run as Ctrl-C does, not after the last batch as Lightning would."""
        if self.trainer.received_sigterm:
            raise SystemExit(128 + signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)  # Lightning puts the old handler back

    def _terminate(self, signum: int, frame: Any) -> None:
        signal.signal(signum, signal.SIG_IGN)
        if (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(signum)
        raise SystemExit(128 + signum)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Restoration:
        """Measure and restore one batch, or what of it is this process's to do."""
        dtype = None
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        with _plain_autograd(self.device.type):
            batch, notes = as_batch(batch, len(self.run.ids))
            self._say(notes)
            batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
            ids = batch["id"]
            rows, trainer = list(range(len(ids))), self._trainer
            each = [take(batch, [i]) for i in rows]
            checksums = [digest(*(v[0] for _, v in sorted(b.items()) if _each(v))) for b in each]
            if trainer is not None:
                batches = sum(trainer.num_predict_batches)  # type: ignore[attr-defined]
                rows = self.run.share(ids, trainer.world_size, trainer.global_rank, batches)
                for name, checksum in zip(ids, checksums, strict=True):
                    self.run.check_input(name, checksum)
            result = self._restore(take(batch, rows), dtype) if rows else nothing(batch)
        for i, name, record in zip(rows, result["id"], result["records"], strict=True):
            cost, failed = result["details"].cost, result["failed"].get(name)
            steps = self.samples_per_image * len(self.sampler().schedule)
            record.update(id=name, input=checksums[i], failed=failed, steps=steps, **vars(cost))
        self._note_fit(result)
        return result

    def on_predict_batch_end(  # type: ignore[override]
        self, outputs: Restoration, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the samples' records, after all callbacks have written their files."""
        for record in outputs["records"]:
            self.run.finish(record)

    def on_predict_epoch_end(self) -> None:
        """Learn how the other processes' samples went."""
        self.run.collect(self.trainer)

    def on_predict_end(self) -> None:
        """Say so if the restorations cannot be right."""
        if self.trainer.is_global_zero and (told := misfit(self._fits, self._given)):
            print(f"cmi-lightning: {told}", file=sys.stderr)

    def teardown(self, stage: str) -> None:
        """Let the next run into the folder."""
        self.run.close(finished=True)

    def _restore(self, batch: dict[str, Any], dtype: torch.dtype | None) -> Restoration:
        """Restore a batch, in two halves (as all later ones) if memory does not hold the whole."""
        count = len(batch["id"])
        while True:
            size = min(self._rows_that_fit or count, count)
            parts = [range(i, min(i + size, count)) for i in range(0, count, size)]
            try:
                return joined([self._restore_part(take(batch, rows), dtype) for rows in parts])
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if size == 1 or self._rows_that_fit is not None:
                    raise InputError(
                        f"Out of memory with {size} image(s) at a time: set a lower "
                        "data.batch_size or trainer.precision, or a guidance of fewer derivatives."
                    ) from error
            # Outside of the handler: the error holds on to the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._rows_that_fit = -(-size // 2)
            log.warning(
                "Out of memory with %d images at a time: going on with %d. The results are the "
                "same; data.batch_size=%d spares the attempt.",
                *(size, self._rows_that_fit, self._rows_that_fit),
            )

    def _restore_part(self, batch: dict[str, Any], dtype: torch.dtype | None) -> Restoration:
        data = getattr(self._trainer, "datamodule", None)
        data = data if isinstance(data, RestorationData) else LoaderData()
        problem, like = data.problem(
            batch, self.operator, self.measurement_noise, SampleNoise(self.seed, batch["id"])
        )
        if "x" not in batch and "y" not in batch:
            self._refuse_operator("the batch holds measurements, which say how they were made")
        self._tile(tuple(like.shape[1:]))
        self.denoiser.check(tuple(like.shape[1:]))
        return restore(
            problem,
            like,
            batch.get("x"),
            batch["id"],
            sampler=lambda: self.sampler(dtype),
            seed=self.seed,
            draws=self.samples_per_image,
            watch=_Watchers(self),
        )

    def _refuse_operator(self, reason: str) -> None:
        """Refuse an operator that would not be used."""
        if not isinstance(self.operator, Identity):
            raise InputError(
                f"model.operator={type(self.operator).__name__} would not be used: {reason}. Set "
                "model.operator=Identity."
            )

    def _note_fit(self, result: Restoration) -> None:
        """Note how well a batch's restorations fit, in units of what noise alone leaves."""
        if result["id"] and any(guidance.active for guidance in self.guidances):
            self._given = result["truth"] is None
            fits = (result["residual"] / result["noise_norm"]).tolist()
            self._fits += [
                fit
                for name, fit in zip(result["id"], fits, strict=True)
                if name not in result["failed"]
            ]

    def _say(self, notes: list[str]) -> None:
        """Print each note once."""
        for note in notes:
            if note not in self._said and getattr(self._trainer, "is_global_zero", True):
                print(f"cmi-lightning: {note}", file=sys.stderr)
            self._said.add(note)


def _watchers(trainer: Any) -> list[SamplingCallback]:
    """Return the callbacks with :class:`SamplingCallback`'s hooks, whatever their class."""
    hooks = ("on_sampling_start", "on_sampling_step")
    callbacks = getattr(trainer, "callbacks", ())
    return [c for c in callbacks if all(hasattr(c, hook) for hook in hooks)]


def _recorders(trainer: Any) -> list[SamplingCallback]:
    """Return the callbacks that keep something of every sample."""
    return [c for c in _watchers(trainer) if getattr(c, "key", None)]


class _Watchers:
    """The callbacks that watch sampling, and the end of a process whose parent is gone."""

    def __init__(self, module: PosteriorSampler) -> None:
        self.module: PosteriorSampler = module
        self.trainer: Any = module._trainer
        self.callbacks = _watchers(self.trainer)

    def start(self, ids: list[str], problem: Problem) -> None:
        for callback in self.callbacks:
            callback.on_sampling_start(self.trainer, self.module, ids, problem)

    def step(self, record: Record) -> None:
        leave_if_orphaned()
        for callback in self.callbacks:
            callback.on_sampling_step(self.trainer, self.module, record)


class _Close(L.Callback):
    """Lets the next run into the folder after an error."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pl_module.run.close()


def misfit(fits: list[float], given: bool) -> str | None:
    """Return a sentence if restorations are far from their measurements; None if they fit.

    Args:
        fits: ‖y − A x̂‖ of each image over σ√m, which noise alone leaves.
        given: the measurements were given, not simulated.

    >>> misfit([0.9, 1.1], given=True)
    """
    finite = sorted(fit for fit in fits if math.isfinite(fit))
    if not finite or (middle := finite[len(finite) // 2]) <= FAR:
        return None
    causes = "too few steps, or a step size (scale) that is too small or too large"
    if given:
        causes = (
            "a kernel of the other convention (data.kernel_convention), a reduction without "
            f"antialiasing, an inverted mask, a noise level that is too low, {causes}"
        )
    return (
        f"The restorations do not fit the measurements: ‖y − A x̂‖ is {middle:.3g} times what "
        f"noise alone leaves (median of {len(finite)} images). Usual causes: {causes}."
    )


def _each(value: Any) -> bool:
    """Whether a value of a one-row batch is the row's."""
    return isinstance(value, (Tensor, list)) and (not isinstance(value, Tensor) or value.ndim > 0)


@contextlib.contextmanager
def _plain_autograd(device: str) -> Iterator[None]:
    """Leave Lightning's inference mode and autocast: guidance needs gradients in full precision."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _name(part: object) -> str:
    """Return a short description: dataclasses print their options, others their class."""
    return repr(part) if hasattr(part, "__dataclass_fields__") else type(part).__name__
