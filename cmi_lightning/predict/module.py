"""The Lightning shell around the sampler."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.data.base import LoaderData, RestorationData
from cmi_lightning.denoisers.base import Autocast, Denoiser, size_text
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity, LinearOperator, OperatorFactory
from cmi_lightning.predict.callback import SamplingCallback
from cmi_lightning.predict.fingerprint import digest, options
from cmi_lightning.predict.records import Run, leave_if_orphaned
from cmi_lightning.problem import GaussianNoise, Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver
from cmi_lightning.step import Cost, Record

log = logging.getLogger(__name__)
# Options that leave a finished sample's result as it is.
FREE = (
    "model.denoiser.network.checkpoint",
    "data.batch_size",
    "data.num_workers",
    "data.limit",
    "data.val_count",
    "data.strict",
)


class Details:
    """A batch's problem (y, A and the noise level), the last step's record, and what it cost.

    A plain class: Lightning looks into containers and dataclasses and refuses frozen ones. After
    a batch that did not fit into memory, problem and record are those of its last part. ``cost``
    counts an image's network passes over all its draws; ``peak_memory`` is in bytes, of the GPU
    during the batch, or of the process so far.
    """

    def __init__(self, problem: Problem, record: Record, cost: Cost, peak_memory: int) -> None:
        self.problem, self.record = problem, record
        self.cost, self.peak_memory = cost, peak_memory


class Restoration(TypedDict):
    """What ``predict_step`` returns and callbacks read; images are in [−1, 1].

    ``id``: list of sample ids. ``restored``: (B, C, H, W), not clamped. ``measurement``: A⁺y
    (B, C, H, W), the measurement seen as an image. ``truth``: (B, C, H, W), or None for real
    measurements. ``draws``: (B, K, C, H, W), of which ``restored`` is the mean; None where K = 1.
    ``residual``: ‖y − A x̂‖ (B,) of ``restored``, ``residual_draws`` (B, K) of each draw, and
    ``noise_norm`` (B,) what noise alone leaves.
    ``failed``: why a sample was given up, by id. ``seconds``: sampling time per image. ``records``:
    what is kept of each sample, with its noise level ``sigma`` where samples have their own;
    callbacks add to it. ``details``: what else a callback may want.

    A batch that is another process's, or was finished by an earlier run, has no ids, no images and
    no details; of one that is so in part, only the rest is there.
    """

    id: list[str]
    restored: Tensor
    measurement: Tensor
    truth: Tensor | None
    draws: Tensor | None
    residual: Tensor
    residual_draws: Tensor
    noise_norm: Tensor
    failed: dict[str, str]
    seconds: float
    records: list[dict[str, Any]]
    details: Details


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
        noise: the measurement noise, with the image range it is meant in. (A standard deviation per
            measurement is :class:`cmi_lightning.Problem`'s, for use without Lightning.)
        seed: seed of all random numbers (Lightning's ``seed_everything`` has no part in them); see
            :class:`cmi_lightning.noise.SampleNoise`.
        clamp: clamp the x̂₀ that the solver uses to the prior's value range.
        samples_per_image: K draws from the posterior of each image, one after the other; the first
            is the one of K = 1. ``restored`` is then their mean.

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
        samples_per_image: int = 1,
    ) -> None:
        super().__init__()
        if samples_per_image < 1:
            raise InputError(f"samples_per_image must be at least 1, got {samples_per_image}.")
        self.samples_per_image = samples_per_image
        self.overwrite = False  # start afresh in a folder that has records
        self.run = Run()
        self._rows_that_fit: int | None = None  # learned from running out of memory
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
        size = size_text(shape) if shape else "any"
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
            **({"samples per image": str(k)} if (k := self.samples_per_image) > 1 else {}),
        }

    def setup(self, stage: str) -> None:
        """Check everything before any sampling, see :meth:`check`, and look up what is done."""
        trainer: Any = self.trainer
        datamodule = trainer.datamodule
        self.check(trainer, datamodule)
        # The batches are shared out by Run.share: Lightning's sampler would make other batches on
        # every number of processes, and refuses to have fewer samples than processes.
        trainer._accelerator_connector.use_distributed_sampler = False
        recorders = _recorders(trainer)
        identity = self.identity(trainer, datamodule) if recorders else {}
        self.run, self._rows_that_fit = Run(), None
        self.run.open(trainer, recorders, identity, self.overwrite)

    def identity(self, trainer: L.Trainer, datamodule: Any) -> dict[str, str]:
        """Return every option that decides the results, by name, with checksums of weights."""
        found = dict(options("model", self, weights=False))
        found.update(options("model.denoiser", self.denoiser))
        found.update({"model.noise": str(self.measurement_noise.std)})
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
        if not self.overwrite and _recorders(trainer):
            folder = Path(trainer.default_root_dir).expanduser()
            if (folder / "run.json").is_file():
                self.run.refuse_other(folder, self.identity(trainer, datamodule))
        if given := getattr(datamodule, "given", None):
            self._refuse_operator(f"the data are {given}")
        shape = getattr(datamodule, "image_shape", None)
        if shape is None:
            return
        self.denoiser.rehearse(tuple(shape))
        if isinstance(self.operator, OperatorFactory):
            self.operator.bind(shape, SampleNoise(self.seed, ["check"]), torch.zeros(1))

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

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Restoration:
        """Measure and restore one batch, or what of it is this process's to do."""
        dtype = None
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        with _plain_autograd(self.device.type):
            batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
            ids = list(batch["id"])
            rows, trainer = list(range(len(ids))), self._trainer
            checksums = [digest(*(v[i] for _, v in sorted(batch.items()))) for i in rows]
            if trainer is not None:
                batches = sum(trainer.num_predict_batches)  # type: ignore[attr-defined]
                rows = self.run.share(ids, trainer.world_size, trainer.global_rank, batches)
                for name, checksum in zip(ids, checksums, strict=True):
                    self.run.check_input(name, checksum)
            result = self._restore(_take(batch, rows), dtype) if rows else _nothing(batch)
        for i, name, record in zip(rows, result["id"], result["records"], strict=True):
            cost, failed = result["details"].cost, result["failed"].get(name)
            steps = self.samples_per_image * len(self.sampler().schedule)
            record.update(id=name, input=checksums[i], failed=failed, steps=steps, **vars(cost))
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

    def _restore(self, batch: dict[str, Any], dtype: torch.dtype | None) -> Restoration:
        """Restore a batch, in two halves (as all later ones) if memory does not hold the whole."""
        count = len(batch["id"])
        while True:
            size = min(self._rows_that_fit or count, count)
            parts = [range(i, min(i + size, count)) for i in range(0, count, size)]
            try:
                return _joined([self._restore_part(_take(batch, rows), dtype) for rows in parts])
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
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
        ids = list(batch["id"])
        noise = SampleNoise(self.seed, ids)
        truth = batch.get("x")
        problem, like = self._data().problem(
            batch, self.operator, self.measurement_noise.std, noise
        )
        if truth is None:
            self._refuse_operator("the batch holds measurements, which say how they were made")
        self.denoiser.check(tuple(like.shape[1:]))
        trainer: Any = self._trainer
        watchers = _watchers(trainer)
        draws, cost = [], Cost()
        failed: dict[str, str] = {}
        _reset_peak_memory(self.device)
        started = time.perf_counter()
        for k in range(self.samples_per_image):
            for watcher in watchers:
                watcher.on_sampling_start(trainer, self, ids, problem)
            keys = ids if k == 0 else [f"{name}#{k}" for name in ids]
            own = SampleNoise(self.seed, keys)
            for record in self.sampler(dtype).iterate(problem, own, like):
                record = replace(record, ids=ids)
                leave_if_orphaned()
                for watcher in watchers:
                    watcher.on_sampling_step(trainer, self, record)
            draws.append(record.x)
            cost.forwards += record.forwards
            cost.vjps += record.vjps
            cost.second_order += record.second_order
            for name, reason in _reasons(record).items():
                which = f"draw {k}: " if self.samples_per_image > 1 else ""
                failed.setdefault(name, which + reason)
        seconds = (time.perf_counter() - started) / len(ids)  # of sampling, without A⁺y
        restored = draws[0] if len(draws) == 1 else torch.stack(draws, 1).mean(1)
        return Restoration(
            id=ids,
            restored=restored,
            measurement=problem.operator.pinv(problem.y),
            truth=truth,
            draws=torch.stack(draws, 1) if len(draws) > 1 else None,
            residual=norm(problem.y - problem.operator(restored)),
            residual_draws=torch.stack([norm(problem.y - problem.operator(x)) for x in draws], 1),
            noise_norm=problem.noise_norm,
            failed=failed,
            seconds=seconds,
            records=_new_records(problem, len(ids)),
            details=Details(problem, record, cost, _peak_memory(self.device)),
        )

    def _data(self) -> RestorationData:
        """Return what knows the batches' problems."""
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, RestorationData) else LoaderData()

    def _refuse_operator(self, reason: str) -> None:
        """Refuse an operator that would not be used."""
        if not isinstance(self.operator, Identity):
            raise InputError(
                f"model.operator={type(self.operator).__name__} would not be used: {reason}. Set "
                "model.operator=Identity."
            )


def _watchers(trainer: Any) -> list[SamplingCallback]:
    """Return the callbacks with :class:`SamplingCallback`'s hooks, whatever their class."""
    hooks = ("on_sampling_start", "on_sampling_step")
    callbacks = getattr(trainer, "callbacks", ())
    return [c for c in callbacks if all(hasattr(c, hook) for hook in hooks)]


def _recorders(trainer: Any) -> list[SamplingCallback]:
    """Return the callbacks that keep something of every sample."""
    return [c for c in _watchers(trainer) if getattr(c, "key", None)]


def _take(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return some rows of a batch."""
    rows = list(rows)
    return {k: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for k, v in batch.items()}


def _nothing(batch: dict[str, Any]) -> Restoration:
    """Return the restoration of a batch of which nothing is to be done."""
    images = (batch["x"] if "x" in batch else batch["y_image"])[:0]
    none = images.new_zeros(0)
    return Restoration(
        id=[],
        restored=images,
        measurement=images,
        truth=images if "x" in batch else None,
        draws=None,
        residual=none,
        residual_draws=none[:, None],
        noise_norm=none,
        failed={},
        seconds=0.0,
        records=[],
        details=None,  # type: ignore[typeddict-item]
    )


def _joined(parts: list[Restoration]) -> Restoration:
    """Return the restorations of a batch's parts as one."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[-1].copy()
    for key in (
        *("restored", "measurement", "truth", "draws"),
        *("residual", "residual_draws", "noise_norm"),
    ):
        tensors = [part[key] for part in parts]
        whole[key] = None if tensors[0] is None else torch.cat(tensors)  # type: ignore[arg-type]
    whole["id"] = [name for part in parts for name in part["id"]]
    whole["records"] = [record for part in parts for record in part["records"]]
    whole["failed"] = {k: v for part in parts for k, v in part["failed"].items()}
    whole["seconds"] = sum(p["seconds"] * len(p["id"]) for p in parts) / len(whole["id"])
    whole["details"].peak_memory = max(part["details"].peak_memory for part in parts)
    return whole


def _new_records(problem: Problem, count: int) -> list[dict[str, Any]]:
    """Return the samples' records, each with its noise level if it has its own."""
    std = problem.noise_std
    if isinstance(std, Tensor) and std.numel() == count:
        return [{"sigma": value} for value in std.flatten().tolist()]
    return [{} for _ in range(count)]


def _reasons(record: Record) -> dict[str, str]:
    """Return why samples were given up."""
    reasons = {}
    for name, number in zip(record.ids, record.stopped.tolist(), strict=True):
        if number:
            what = "not a number" if number > 0 else "diverged"
            reasons[name] = f"{what} at step {abs(number)} of {record.num_steps}"
    return reasons


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short; the CPU's has no class of its own."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes in use: of the GPU since the reset, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def _plain_autograd(device: str) -> Iterator[None]:
    """Leave Lightning's inference mode and autocast: guidance needs gradients in full precision."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _name(part: object) -> str:
    """Return a short description: dataclasses print their options, others their class."""
    return repr(part) if hasattr(part, "__dataclass_fields__") else type(part).__name__
