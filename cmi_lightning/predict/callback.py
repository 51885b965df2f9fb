"""What callbacks see of a prediction beside Lightning's own hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L

from cmi_lightning.predict.processes import leave_if_orphaned

if TYPE_CHECKING:
    from cmi_lightning.predict.module import PosteriorSampler
    from cmi_lightning.problem import Problem
    from cmi_lightning.step import Record


class SamplingCallback(L.Callback):
    """A Lightning callback that watches sampling, and may keep something of every sample.

    Attributes:
        key: the field of a sample's record that is its own; None if it keeps nothing. It fills
            ``outputs["records"]``, a dict a sample, in ``on_predict_batch_end``. The module then
            writes the records, so that a record says that all the sample's files are there.

    Example:
        >>> class Watch(SamplingCallback):
        ...     def on_sampling_step(self, trainer, pl_module, record):
        ...         print(record.index)
        >>> Watch().key is None
        True
    """

    key: str | None = None

    def on_sampling_start(
        self, trainer: L.Trainer, pl_module: PosteriorSampler, ids: list[str], problem: Problem
    ) -> None:
        """Called once per batch and draw, after the measurement and before the first step."""

    def on_sampling_step(
        self, trainer: L.Trainer, pl_module: PosteriorSampler, record: Record
    ) -> None:
        """Called after every reverse step."""

    def recorded(self, record: Mapping[str, Any]) -> bool:
        """Whether a sample's record and files hold what this callback would write."""
        return True


def watchers(trainer: Any) -> list[SamplingCallback]:
    """Return the callbacks with :class:`SamplingCallback`'s hooks, whatever their class."""
    hooks = ("on_sampling_start", "on_sampling_step")
    callbacks = getattr(trainer, "callbacks", ())
    return [c for c in callbacks if all(hasattr(c, hook) for hook in hooks)]


def recorders(trainer: Any) -> list[SamplingCallback]:
    """Return the callbacks that keep something of every sample."""
    return [c for c in watchers(trainer) if getattr(c, "key", None)]


def tell(
    trainer: Any, module: PosteriorSampler, ids: list[str], problem: Problem, record: Record | None
) -> None:
    """Tell the callbacks of a step, or of a draw's start where there is no record."""
    leave_if_orphaned()
    for callback in watchers(trainer):
        if record is None:
            callback.on_sampling_start(trainer, module, ids, problem)
        else:
            callback.on_sampling_step(trainer, module, record)
