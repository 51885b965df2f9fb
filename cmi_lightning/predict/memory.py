"""Memory: what was used, and what is too little."""

from __future__ import annotations

import sys

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short; the CPU's has no class of its own.

    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 1 GiB."))
    True
    """
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


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
