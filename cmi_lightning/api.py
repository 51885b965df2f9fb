"""Restore a photograph in one call: no Trainer, no folder, no configuration."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch

from cmi_lightning.checked import as_python, check_value
from cmi_lightning.data.pictures import Picture
from cmi_lightning.denoisers import Denoiser
from cmi_lightning.denoisers.tiled import suited
from cmi_lightning.errors import InputError, counted
from cmi_lightning.guidance.base import Guidance, refuse_unfit
from cmi_lightning.methods import Method, sizes_of, step_sizes
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity, Operator
from cmi_lightning.predict.damaged import for_channels, given_channels, problem_of
from cmi_lightning.predict.messages import nearest
from cmi_lightning.predict.restoration import Restoration, restoring
from cmi_lightning.predict.restored import Restored
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver
from cmi_lightning.step import Record
from cmi_lightning.zoo import load_prior

Drawing = Generator[Record | None, None, Restoration]


class StoppedError(Exception):
    """A restoration was stopped by its ``stop``."""


@dataclass(frozen=True)
class Progress:
    """Where a restoration is: step ``done`` of ``total``, and in the end its ``result``.

    Attributes:
        done: steps done, of all draws.
        total: steps of all draws.
        record: what the sampler says of the step.
        result: the restoration, after the last step.
    """

    done: int
    total: int
    record: Record
    picture: Picture
    result: Restored | None = None

    @property
    def image(self) -> Any:
        """x̂₀, what the network takes the image for at this step, in the kind of the input."""
        return self.picture.back(self.record.x0)


class Restorer:
    """Restores photographs with one prior and one method, which it keeps for many calls.

    A call holds all its state: one restorer may work in several threads at once. Its pixels are
    those of ``cmi-lightning predict`` for the same options, seed and name of the image.

    >>> import numpy as np
    >>> from cmi_lightning.operators import Downsample
    >>> restorer = Restorer(steps=2)
    >>> restorer(np.full((16, 24, 3), 128, np.uint8), Downsample(2)).image.shape
    (32, 48, 3)

    Args:
        prior: by name, such as "photos-64" (``cmi-lightning priors`` lists them), or a
            :class:`Denoiser`. A prior of colour images also takes gray ones, and the reverse.
        method: a packaged guidance, or a packaged solver that needs none, such as "pigdm", which
            has no step size, "dps+cmi" or "ddrm" (``cmi-lightning configs`` lists them); or
            guidances.
        solver: a packaged solver such as "ddim", or a solver; None takes the method's, else DDPM.
        steps: see ``num_steps`` of :class:`cmi_lightning.PosteriorSampler`, and "all"; None takes
            the method's, else 100.
        step_sizes: of the method by name, {"dps": 4.0}; None takes those of the packaged task with
            this operator, where it has some.
        device: where the network runs; None takes a GPU where there is one.

    Raises:
        InputError: for a name that is unknown, or parts that do not fit together.
    """

    def __init__(
        self,
        prior: str | Denoiser = "photos-64",
        method: str | Sequence[Guidance] = "pigdm",
        *,
        solver: str | Solver | None = None,
        steps: int | str | None = None,
        step_sizes: Mapping[str, float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _of_kind("prior", prior, (str, Denoiser), "a name such as photos-64, or a Denoiser")
        _of_kind("method", method, (str, Sequence), "a name such as dps, or a list of guidances")
        for part in () if isinstance(method, str) else method:
            _of_kind("method", part, Guidance, "a name such as dps, or a list of guidances")
        _of_kind("solver", solver, (str, Solver, NoneType), "a name such as ddim, or a Solver")
        _of_kind("step_sizes", step_sizes, (Mapping, NoneType), 'numbers by name, {"dps": 4.0}')
        try:
            self.device = torch.device(device or _best_device())
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device must be cpu, cuda or mps, as this machine has; got {device!r}."
            ) from error
        self.prior = (load_prior(prior) if isinstance(prior, str) else prior).to(self.device)
        self.method, self.solver, self.num_steps = method, solver, steps
        for size, value in (step_sizes or {}).items():
            check_value(f"step_sizes.{size}", value, float)
        self.step_sizes = step_sizes and {k: as_python(v) for k, v in step_sizes.items()}
        self._sampler(self.prior, Identity())  # refuses names and parts that do not fit
        read = sizes_of(method) if isinstance(method, str) else set()
        if unread := set(self.step_sizes or ()) - read:
            names = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
            raise InputError(f"The method has no step size '{min(unread)}': {names}.")

    def __call__(
        self,
        image: Any,
        operator: Operator | None = None,
        *,
        progress: bool | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Restored:
        """Restore an image; the options are those of :meth:`steps`.

        ``progress`` shows a bar on stderr; None does in terminals and notebooks. Once ``stop`` is
        set, from another thread, the call ends with :class:`StoppedError`.
        """
        from tqdm import tqdm

        known = [*inspect.signature(self.steps).parameters, "progress", "stop"]
        for unknown in set(options) - set(known):
            right = nearest(unknown, [*known, *inspect.signature(Restorer).parameters])
            raise InputError(f"restore has no argument '{unknown}'{right}")
        shown = _watched() if progress is None else progress
        with tqdm(desc="restore", unit="step", disable=not shown) as bar:
            for step in self.steps(image, operator, **options):
                bar.total = step.total
                bar.update(step.done - bar.n)
                if step.result is not None:
                    bar.refresh()
                if stop is not None and stop.is_set() and step.result is None:
                    raise StoppedError(f"Stopped after {step.done} of {step.total} steps.")
        assert step.result is not None
        return step.result

    def steps(
        self,
        image: Any,
        operator: Operator | None = None,
        *,
        sigma: float | str = 0.025,
        samples: int = 1,
        seed: int = 0,
        name: str | Sequence[str] | None = None,
        simulate: bool = False,
        trajectory: int = 0,
    ) -> Iterator[Progress]:
        """Restore an image step by step; leave the loop to stop.

        Args:
            image: the damaged image: a path, a PIL image, an array (H, W, C) or a tensor (C, H, W),
                uint8 or float in [0, 1]; or a batch of them in one array or tensor.
            operator: what was done to it: ``Inpaint(mask)``, ``GivenKernel(kernel)``,
                ``Downsample(factor)`` or another of :mod:`cmi_lightning.operators`; None: noise.
            sigma: standard deviation of its noise, on [0, 1], or "estimate", by wavelets.
            samples: draws of each image; the result is their mean.
            seed: of all random numbers.
            name: of the image, which its random numbers depend on; default: the file's name.
            simulate: the image is sound: damage it first.
            trajectory: how many x̂₀ of the first draw to keep, at equal distances.

        Raises:
            InputError: for an image of another kind or range, one that the prior or the operator
                cannot take, or options out of range.
        """
        check_value("samples", samples, int, "[1, inf)")
        check_value("trajectory", trajectory, int, "[0, inf)")
        check_value("seed", seed, int)
        kinds = "an operator such as Inpaint(mask), GivenKernel(kernel) or Downsample(4)"
        _of_kind("operator", operator, (Operator, NoneType), kinds)
        picture = Picture.of(image, given_channels(self.prior))
        names = [name] if isinstance(name, str) else list(name or picture.names)
        if len(names) != len(picture.x):
            raise InputError(f"Got {len(names)} names for {counted(len(picture.x), 'image')}.")
        operator, noise = operator or Identity(), SampleNoise(seed, names)
        x = picture.x.to(self.device)
        problem, like, notes = problem_of(x, operator, sigma, noise, simulate)
        shape = tuple(like.shape[1:])
        prior = suited(for_channels(self.prior, shape[0]), shape)
        prior.rehearse(shape)
        sampler = self._sampler(prior, operator, problem)
        truth = x if simulate else None
        drawing = restoring(problem, like, truth, names, sampler=sampler, seed=seed, draws=samples)
        count = len(sampler.schedule)
        kept = {round((i + 1) * count / trajectory) for i in range(trajectory)}
        return _progress(drawing, picture, samples * count, kept, seed, notes)

    def _sampler(
        self, prior: Denoiser, operator: Operator, problem: Problem | None = None
    ) -> Sampler:
        """Return the sampler of one call."""
        sizes = step_sizes(operator) if self.step_sizes is None else self.step_sizes
        method = Method.of(self.method, sizes)
        solver = self.solver if self.solver is not None else method.solver
        if isinstance(solver, str):
            solver = Method.of(f"solver/{solver}", {}).solver
        steps = method.steps if self.num_steps is None else self.num_steps
        made = Sampler(prior, solver or DDPM(), method.guidances, None if steps == "all" else steps)
        refuse_unfit((made.solver, *made.guidances), operator, problem is None or problem.noisy)
        return made


def restore(
    image: Any,
    operator: Operator | None = None,
    prior: str | Denoiser = "photos-64",
    method: str | Sequence[Guidance] = "pigdm",
    *,
    solver: str | Solver | None = None,
    steps: int | str | None = None,
    step_sizes: Mapping[str, float] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Restored:
    """Restore an image in one call; see :class:`Restorer` and :meth:`Restorer.steps`.

    >>> import numpy as np
    >>> photograph = np.full((16, 16, 3), 0.5)
    >>> restore(photograph, steps=2, sigma=0.1, samples=2)
    Restored(1 image of 16×16 pixels, 2 draws, seed 0)

    Args:
        image: a path, a PIL image, an array or a tensor; the same kind comes out.
        operator: what damaged it; None: noise.
        prior: see :class:`Restorer`.
        method: see :class:`Restorer`.
        solver: see :class:`Restorer`.
        steps: see :class:`Restorer`.
        step_sizes: see :class:`Restorer`.
        device: see :class:`Restorer`.
        **options: sigma, samples, seed, name, simulate, trajectory, progress and stop.

    Raises:
        InputError: in one sentence, for what does not work.
    """
    made = Restorer(prior, method, solver=solver, steps=steps, step_sizes=step_sizes, device=device)
    return made(image, operator, **options)


def _progress(
    drawing: Drawing, picture: Picture, total: int, wanted: set[int], seed: int, notes: list[str]
) -> Iterator[Progress]:
    """Yield the steps of a restoration, keep some x̂₀, and yield the result."""
    done = 0
    kept: list[Any] = []
    while True:
        try:
            record = next(drawing)
        except StopIteration as end:
            result = Restored.of(end.value, picture, seed, kept, notes)
            break
        if record is not None:
            last, done = record, done + 1
            if done in wanted:
                kept.append(picture.back(record.x0))
            yield Progress(done, total, record, picture)
    yield Progress(done, total, last, picture, result)


def _of_kind(argument: str, value: Any, kinds: Any, wanted: str) -> None:
    """Refuse an argument of another kind."""
    if not isinstance(value, kinds):
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)[:60]
        raise InputError(f"{argument} must be {wanted}; got {got}.")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _watched() -> bool:
    """Whether somebody sees stderr: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
