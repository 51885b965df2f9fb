"""The Lightning shell around the sampler."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from cmi_lightning import checked
from cmi_lightning.data.base import LoaderData, RestorationData
from cmi_lightning.denoisers.base import Autocast, Denoiser
from cmi_lightning.denoisers.tiled import Tiled, suited
from cmi_lightning.denoisers.wrapped import compile_networks
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance, refuse_unfit
from cmi_lightning.measurement_noise import GaussianNoise, MeasurementNoise
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity, Operator
from cmi_lightning.predict.auto import Choice, choose
from cmi_lightning.predict.batch import as_batch, checksums, images_of, take
from cmi_lightning.predict.callback import recorders, tell
from cmi_lightning.predict.checks import check, refuse_operator
from cmi_lightning.predict.describe import DRAWS, described
from cmi_lightning.predict.fingerprint import of_run
from cmi_lightning.predict.memory import Parts
from cmi_lightning.predict.processes import end_at_sigterm
from cmi_lightning.predict.records import Run
from cmi_lightning.predict.restoration import (
    Restoration,
    fits,
    joined,
    misfit,
    nothing,
    read_back,
    restoring,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver


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
        guidances: the likelihood; an empty list draws from the prior; None does too, and says so.
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
        precision: of the network. None is the trainer's. "auto" measures a few steps and takes the
            faster of float32 and bfloat16 (:func:`cmi_lightning.predict.auto.faster`).
        compile: run the network through ``torch.compile``; docs/speed.md says what that gains.

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
        precision: Literal["auto"] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(noise, MeasurementNoise):
            raise InputError(
                f"noise must be a measurement noise such as GaussianNoise(0.05), got {noise!r}."
            )
        self.samples_per_image, self.seed = samples_per_image, seed
        self.overwrite, self.precision, self.compiled = overwrite, precision, compile
        checked.check(self, "precision", "seed", samples_per_image="[1, inf)")
        checked.check_value("PosteriorSampler.tile", tile, int | None, "[1, inf)")
        self.chosen = Choice()
        self.run = Run()
        self.fits: list[float] = []  # ‖y − A x̂‖ / (σ√m) of what was restored
        self.parts: dict[torch.Size, Parts] = {}  # by the shape of an image
        self.shapes: dict[tuple[int, ...], None] = {}  # of the images, as far as they are known
        self._said: set[str] = set()
        self._done: dict[str, Any] | None = None  # a batch that was finished before
        self.denoiser = denoiser if tile is None else Tiled(denoiser, tile)
        self.operator = operator or Identity()
        self.solver = solver or DDPM()
        self.guidances = None if guidances is None else list(guidances)
        self.num_steps, self.clamp = num_steps, clamp
        self.measurement_noise = noise
        self.sampler()  # refuses parts that do not fit
        parts: tuple[Any, ...] = (self.solver, *(g for g in self.guidances or () if g.active))
        refuse_unfit(parts, self.operator, noise.present)
        for part in parts:
            if compile and getattr(part, "derivatives", 1) > 1:
                name = type(part).__name__
                raise InputError(
                    f"model.compile=true has first derivatives alone, and {name} takes second "
                    "ones: leave compile out, or choose differences (CMI's default)."
                )

    def sampler(
        self, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
    ) -> Sampler:
        """Return the sampler for images (C, H, W), with the network under autocast to ``dtype``."""
        denoiser = self.denoiser if shape is None else suited(self.denoiser, shape)
        if self.compiled and shape is not None:
            compile_networks(denoiser)
        denoiser = denoiser if dtype is None else Autocast(denoiser, dtype)
        return Sampler(denoiser, self.solver, self.guidances or (), self.num_steps, self.clamp)

    def describe(self) -> dict[str, str]:
        """Return what will be run, for people."""
        return described(self)

    def __repr__(self) -> str:
        """Return what will be run, a line for each part."""
        lines = "".join(f"  {name}: {text}\n" for name, text in self.describe().items())
        return f"{type(self).__name__}(\n{lines})"

    def setup(self, stage: str) -> None:
        """Check everything before any sampling, and look up what is done."""
        trainer: Any = self.trainer
        self.run.close()
        check(self, trainer, trainer.datamodule)
        if not any(isinstance(c, _Close) for c in trainer.callbacks):
            trainer.callbacks.append(_Close())
        # The batches are shared out by Run.share: Lightning's sampler would make other batches on
        # every number of processes, and refuses to have fewer samples than processes. A Trainer
        # that was made without use_distributed_sampler=False has no public way to change it.
        trainer._accelerator_connector.use_distributed_sampler = False
        self.run = Run(getattr(trainer.datamodule, "ids", ()))
        self.fits, self.parts, self._said = [], {}, set()
        self.chosen, kept = choose(self, trainer), recorders(trainer)
        fingerprint = of_run(self, trainer, trainer.datamodule) if kept else {}
        self.run.open(trainer, kept, fingerprint, self.overwrite, self.chosen.kept)
        self._say(self.chosen.told)

    def on_predict_start(self) -> None:
        """Let SIGTERM end the run as Ctrl-C does."""
        end_at_sigterm(self.trainer)
        if self.guidances is None and not self.solver.conditional:
            self._say([f"guidances: {DRAWS}, and restore nothing (guidances=[] if that is meant)."])

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Restoration:
        """Measure and restore one batch, or what of it is this process's to do."""
        dtype = self.chosen.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        with _plain_autograd(self.device.type):
            batch, notes = as_batch(batch, len(self.run.ids))
            self._say(notes)
            batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
            ids = batch["id"]
            rows, trainer = list(range(len(ids))), self._trainer
            checks = checksums(batch)
            if trainer is not None:
                batches = sum(trainer.num_predict_batches)  # type: ignore[attr-defined]
                rows = self.run.share(ids, trainer.world_size, trainer.global_rank, batches)
                for name, checksum in zip(ids, checks, strict=True):
                    self.run.check_input(name, checksum)
            whole, batch = batch, take(batch, rows)
            result, steps = nothing(batch), 0
            self._done = None if rows else whole
            if rows:
                work = lambda part: self._restore(take(batch, part), dtype)  # noqa: E731
                parts = self.parts.setdefault(images_of(batch).shape[1:], Parts())
                result = joined(parts.of(len(rows), work))
                steps = self.samples_per_image * len(self.sampler().schedule)
        for i, name, record in zip(rows, result["id"], result["records"], strict=True):
            cost, failed = result["details"].cost, result["failed"].get(name)
            record.update(id=name, input=checks[i], failed=failed, steps=steps, **vars(cost))
        if rows and any(guidance.active for guidance in self.guidances or ()):
            self.fits += fits(result)
            self.given = result["truth"] is None
        return result

    def on_predict_batch_end(  # type: ignore[override]
        self, outputs: Restoration, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the records, after all callbacks' files; return what was finished before too."""
        self.run.finish(outputs["records"])
        batch, self._done = self._done, None
        if batch and self.trainer.predict_loop.return_predictions:
            with _plain_autograd(self.device.type):
                outputs.update(self._read_back(batch) or {})  # type: ignore[typeddict-item]

    def on_predict_epoch_end(self) -> None:
        """Learn how the other processes' samples went."""
        self.run.collect(self.trainer)

    def on_predict_end(self) -> None:
        """Say so if the restorations cannot be right."""
        if self.fits and (told := misfit(self.fits, self.given)):
            self._say([told])

    def teardown(self, stage: str) -> None:
        """Let the next run into the folder."""
        self.run.close(finished=True)

    def problem(self, batch: dict[str, Any]) -> tuple[Problem, Tensor]:
        """Return a batch's problem, and a tensor like its images."""
        data = getattr(self._trainer, "datamodule", None)
        data = data if isinstance(data, RestorationData) else LoaderData()
        noise = SampleNoise(self.seed, batch["id"])
        return data.problem(batch, self.operator, self.measurement_noise, noise)

    def _restore(self, batch: dict[str, Any], dtype: torch.dtype | None) -> Restoration:
        """Restore a batch that fits into memory."""
        problem, like = self.problem(batch)
        if "x" not in batch and "y" not in batch:
            reason = "the batch holds measurements, which say how they were made"
            refuse_operator(self.operator, reason)
        shape = tuple(like.shape[1:])
        suited(self.denoiser, shape).check(shape)
        self.shapes |= {shape: None}
        sampler, ids = self.sampler(dtype, shape), batch["id"]
        draws = {"seed": self.seed, "draws": self.samples_per_image}
        steps = restoring(problem, like, batch.get("x"), ids, sampler=sampler, **draws)
        while True:
            try:
                record = next(steps)
            except StopIteration as end:
                return end.value
            tell(self._trainer, self, ids, problem, record)

    def _read_back(self, batch: dict[str, Any]) -> Restoration | None:
        """Return a batch that was finished before; None where its images were not kept."""
        if not set(batch["id"]) <= set(self.run.done):
            return None  # another process's
        writer = next((c for c in recorders(self.trainer) if c.key == "images"), None)
        records = [self.run.record_path(name) for name in batch["id"]]
        result = read_back(writer, records, self.problem(batch)[0], batch.get("x"))
        remedy = "overwrite=True restores it again"
        if result is None:
            remedy = f"ImageWriter, which keeps images, was not among the callbacks; {remedy}"
        how = "comes from the files" if result else "is not returned"
        self._say([f"What was finished before in '{self.run.folder}' {how}; {remedy}."])
        return result

    def _say(self, notes: Iterable[str]) -> None:
        """Print each note once."""
        for note in notes:
            if note not in self._said and getattr(self._trainer, "is_global_zero", True):
                print(f"cmi-lightning: {note}", file=sys.stderr)
            self._said.add(note)


class _Close(L.Callback):
    """Lets the next run into the folder after an error."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pl_module.run.close()


@contextlib.contextmanager
def _plain_autograd(device: str) -> Iterator[None]:
    """Leave Lightning's inference mode and autocast: guidance needs gradients in full precision."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
