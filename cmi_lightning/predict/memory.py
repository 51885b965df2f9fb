"""Memory: what was used, and what is too little."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from cmi_lightning.errors import InputError, counted

T = TypeVar("T")
log = logging.getLogger(__name__)
# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes; 32 MiB is the last's limit.
MALLOC = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short; the CPU's has no class of its own.

    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 1 GiB."))
    True
    """
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@functools.cache
def keep_memory() -> None:
    """Let the process keep the memory that it frees, up to 2 GiB, for its next tensors.

    A step frees its graph and the next one takes as much: glibc would hand it to the system and
    fetch it again, page by page, for a tenth of a step's time (docs/speed.md). Other allocators,
    and other systems than Linux, are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in MALLOC.items():
            mallopt(option, value)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak of a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use: of the GPU since the reset, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> float:
    """Return the bytes that the machine can give; inf where it does not say (not Linux)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * int(next(line for line in lines if "MemAvailable" in line).split()[1])
    return math.inf


def no_memory(size: int) -> InputError:
    """Return what is told where memory does not hold ``size`` images."""
    return InputError(
        f"Out of memory with {counted(size, 'image')} at a time: set a lower data.batch_size or "
        "trainer.precision, or a guidance of fewer derivatives."
    )


class Parts:
    """Work on a batch in two halves, and so on all later ones, if memory does not hold the whole.

    >>> Parts().of(3, lambda rows: list(rows))
    [[0, 1, 2]]

    Attributes:
        size: rows that fit, learned from running out of memory; None where the whole does.
    """

    size: int | None = None

    def of(self, count: int, work: Callable[[range], T]) -> list[T]:
        """Return the results of the parts of a batch with ``count`` rows.

        Raises:
            InputError: if the halves do not fit either.
        """
        while True:
            size = min(self.size or count, count)
            try:
                return [work(range(i, min(i + size, count))) for i in range(0, count, size)]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if size == 1 or self.size is not None:
                    raise no_memory(size) from error
            # Outside of the handler: the error holds on to the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.size = -(-size // 2)
            log.warning(
                "Out of memory with %d images at a time: going on with %d. The results are the "
                "same; data.batch_size=%d spares the attempt.",
                *(size, self.size, self.size),
            )
