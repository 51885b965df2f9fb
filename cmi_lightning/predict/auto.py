"""What is chosen by measuring: how many images at a time, and the network's precision.

Lightning's ``BatchSizeFinder`` would restore whole batches for every size it tries, and stops at
too little memory alone; three steps tell as much, and a CPU's limit is its speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.predict.batch import as_batch
from cmi_lightning.predict.folder import RunFolder
from cmi_lightning.predict.memory import (
    free_memory,
    keep_memory,
    no_memory,
    out_of_memory,
    peak_memory,
)
from cmi_lightning.predict.processes import by_the_first
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Level

if TYPE_CHECKING:
    from cmi_lightning.predict.module import PosteriorSampler

GAIN = 1.05  # images a second of twice the batch, over those of the batch, that are worth it
LOSS = 0.05  # dB of PSNR that bfloat16 may cost
FULL, HALF = "32-true", "bf16-mixed"
LOWERED = {HALF: torch.bfloat16, "16-mixed": torch.float16}  # what Lightning lowers the network to


@dataclass(frozen=True)
class Choice:
    """What "auto" stands for in a run; None where it is not asked for, or not chosen yet."""

    batch_size: int | None = None
    precision: str | None = None
    told: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast lowers the network to."""
        return LOWERED.get(self.precision or FULL)

    @property
    def kept(self) -> dict[str, str]:
        """What a folder keeps beside the options that decide its results."""
        return {} if self.batch_size is None else {"data.batch_size": str(self.batch_size)}


def earlier(module: PosteriorSampler, trainer: Any, data: Any) -> Choice:
    """Return what the folder's earlier run has chosen.

    Raises:
        InputError: if the trainer is told a precision too.
    """
    if module.precision is not None and str(trainer.precision) != FULL:
        raise InputError(
            f"model.precision=auto chooses the precision: leave out trainer.precision="
            f"{trainer.precision}."
        )
    folder = RunFolder(Path(trainer.default_root_dir).expanduser())
    before = {} if module.overwrite else folder.options
    size, precision = before.get("data.batch_size"), before.get("trainer.precision")
    return Choice(
        int(size) if size and _grows(data) else None,
        precision if module.precision and precision in (FULL, HALF) else None,
    )


def choose(module: PosteriorSampler, trainer: Any) -> Choice:
    """Return what is chosen, by the first process for all; a folder's earlier choice stays."""
    data = trainer.datamodule
    if not _grows(data) and module.precision is None:
        return Choice()
    choice = by_the_first(trainer, lambda: _measured(module, trainer, module.chosen))
    if _grows(data):
        data.at_once = choice.batch_size
    return choice


def _grows(data: Any) -> bool:
    return getattr(data, "batch_size", None) == "auto"


@torch.no_grad()
def _measured(module: PosteriorSampler, trainer: Any, choice: Choice) -> Choice:
    """Return a choice with what it lacks, measured on the device."""
    data, fixed = trainer.datamodule, module.operator.images
    module.to(trainer.strategy.root_device)
    if _grows(data) and choice.batch_size is None:
        dtype = LOWERED.get(str(trainer.precision))
        most = math.ceil(data.most_alike / trainer.world_size)
        size, why = batch_size(
            lambda n: Trial.of(module, data.some(n), dtype),
            fixed or most,
            fixed or 1,
            module.device,
        )
        choice = replace(choice, batch_size=size, told=(f"data.batch_size=auto: {why}.",))
    if module.precision is not None and choice.precision is None:
        batch = _batch(trainer, choice.batch_size)
        full, half = (Trial.of(module, batch, dtype) for dtype in (None, LOWERED[HALF]))
        precision, why = faster(full, half)
        told = (*choice.told, f"model.precision=auto: {why}.")
        choice = replace(choice, precision=precision, told=told)
    return choice


def _batch(trainer: Any, size: int | None) -> Any:
    """Return a batch of the run, of ``size`` images where the data can give it."""
    data = trainer.datamodule
    if hasattr(data, "some"):
        return data.some(size or min(data.batch_size, data.most_alike))
    loader = data and data.predict_dataloader()
    loader = loader or trainer.predict_loop._data_source.instance
    loader = loader[0] if isinstance(loader, (list, tuple)) else loader
    if (batches := iter(loader)) is loader:
        raise InputError("model.precision=auto needs a loader that can be read twice.")
    return next(batches)


class Trial(NamedTuple):
    """The first steps of a batch.

    Attributes:
        images: B.
        seconds: of one step.
        x0: its x̂₀ (B, *).
        noise: the random numbers.
        sampler: the chain.
    """

    images: int
    seconds: float
    x0: Tensor
    noise: SampleNoise
    sampler: Sampler

    @classmethod
    def of(cls, module: PosteriorSampler, batch: Any, dtype: torch.dtype | None) -> Trial:
        """Try a batch: the first step warms up, the faster one of the next two counts."""
        if module.device.type == "cpu":
            keep_memory()
        batch = as_batch(move_data_to_device(batch, module.device), 0)[0]
        problem, like = module.problem(batch)
        noise = SampleNoise(module.seed, batch["id"])
        sampler = module.sampler(dtype, tuple(like.shape[1:]))
        times = [time.perf_counter()]
        for record in islice(sampler.iterate(problem, noise, like), 3):
            record.x.sum().item()  # wait for the device
            times.append(time.perf_counter())
        seconds = min([b - a for a, b in pairwise(times)][-2:])
        return cls(len(like), seconds, record.x0, noise, sampler)

    def again(self, x: Tensor, level: Level, z: Tensor) -> Tensor:
        """Return x̂₀ of x, noised to a level."""
        return self.sampler.denoiser(level.alpha * x + level.sigma * z, level).x0


def batch_size(
    trial: Callable[[int], Trial], most: int, least: int, device: torch.device
) -> tuple[int, str]:
    """Return how many images to take at a time, and why: the last doubling that was worth it.

    Args:
        trial: tries a number of images.
        most: images there are.
        least: images to begin with.
        device: where.
    """
    rates: dict[int, float] = {}
    best, size, why = least, least, "there are no more"
    while True:
        before = peak_memory(device)
        try:
            found = trial(size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if not rates:
                raise no_memory(size) from error
            why = f"{size} do not fit into memory"
            break
        rates[size] = found.images / found.seconds
        if size > least and rates[size] < GAIN * rates[best]:
            why = f"{size} gain less than {GAIN - 1:.0%}"
            break
        best = size
        if size == most:
            break
        if device.type == "cpu" and 2 * (peak_memory(device) - before) > free_memory():
            why = f"{2 * size} might not fit into memory"
            break
        size = min(2 * size, most)
    if device.type == "cuda":  # outside of the handler: the error holds on to the tensors
        torch.cuda.empty_cache()
    measured = ", ".join(f"{n}: {rate:.3g}" for n, rate in rates.items())
    return best, f"{best} at a time; {why} (images a second and step: {measured})"


def faster(full: Trial, half: Trial) -> tuple[str, str]:
    """Return the precision to take, and why: the faster one of those that are near enough.

    x̃, float32's x̂₀ of the third step, is noised to three levels of the chain. bfloat16 is near
    enough if its PSNR of x̃ there, 20 log₁₀(2/rms(x̂₀ − x̃)), differs from float32's by at most
    0.05 dB, for each image.
    """
    x, loss = full.x0, 0.0
    if (limits := full.sampler.denoiser.value_range) is not None:
        x = x.clamp(*limits)
    schedule = full.sampler.schedule
    for k in {len(schedule) * part // 4 for part in (1, 2, 3)}:
        z = full.noise.normal("precision", k, x)
        errors = [norm(t.again(x, schedule[k], z) - x) for t in (full, half)]
        decibels = 20 * (errors[0] / errors[1].clamp_min(1e-30)).log10().abs()
        loss = max(loss, float(decibels.nan_to_num(math.inf).max()))
    times = f"{half.seconds:.3g} s a step in bfloat16, {full.seconds:.3g} s in float32"
    if loss > LOSS:
        return FULL, f"{FULL}; bfloat16 changes PSNR by {loss:.2g} dB, more than {LOSS} ({times})"
    best = HALF if half.seconds < full.seconds else FULL
    return best, f"{best}; {times}; PSNR differs by {loss:.2g} dB"
