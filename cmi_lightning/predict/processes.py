"""The processes of a run: signals that end them, and what the first one does for all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cmi_lightning.errors import InputError

T = TypeVar("T")
_parent = os.getppid()


def refuse_strategy(trainer: Any, forked: bool = False) -> None:
    """Refuse a strategy whose processes lack a whole network, or cannot hand back what they make.

    ``forked`` ones hand back a network, and not which images failed.
    """
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    launcher = trainer.strategy.launcher
    if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        why = f"{type(trainer.strategy).__name__} gives each process a part of the network alone"
    elif isinstance(launcher, _MultiProcessingLauncher) and not (
        forked and launcher._start_method == "fork"
    ):
        why = f"{launcher._start_method}ed processes cannot hand back what they make"
    else:
        return
    raise InputError(f"trainer.strategy: {why}; use trainer.strategy=ddp.")


def end_at_sigterm(trainer: Any) -> None:
    """Let SIGTERM raise SystemExit from now on, as Ctrl-C does; Lightning would end the last batch.

    Lightning puts the old handler back.
    """
    if trainer.received_sigterm:
        raise SystemExit(128 + signal.SIGTERM)

    def terminate(signum: int, frame: Any) -> None:
        signal.signal(signum, signal.SIG_IGN)
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signum)
        raise SystemExit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


def leave_if_orphaned() -> None:
    """End this process if the one that started it, as a further rank, is gone."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and os.getppid() != _parent:
        raise SystemExit(1)


def by_the_first(trainer: Any, work: Callable[[], T]) -> T:
    """Return what the first process makes, on every process; its error is all processes'."""
    made: Any = None
    problem: Exception | None = None
    if trainer.is_global_zero:
        try:
            made = work()
        except Exception as error:  # the others wait for an answer
            problem = error
    made, problem = trainer.strategy.broadcast((made, problem))
    if problem is not None:
        raise problem
    return made  # type: ignore[no-any-return]
