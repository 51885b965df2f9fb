"""The processes of a run: signals that end them, and what the first one does for all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_parent = os.getppid()


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
