"""SIGTERM ends a run as Ctrl-C does, not after the last batch as Lightning would."""

from __future__ import annotations

import signal
import threading
from typing import Any


def end_at_sigterm(trainer: Any) -> None:
    """Let SIGTERM raise SystemExit from now on; Lightning puts the old handler back."""
    if trainer.received_sigterm:
        raise SystemExit(128 + signal.SIGTERM)

    def terminate(signum: int, frame: Any) -> None:
        signal.signal(signum, signal.SIG_IGN)
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signum)
        raise SystemExit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
