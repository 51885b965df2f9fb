"""Counter-based noise: a draw depends on (seed, sample, stream, step) and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleNoise:
    """Random numbers for a batch, each sample's own.

    Every draw is a function of the run's seed, the sample's id, a stream name ("solver", "mcg", …)
    and the step index. So neither batch size, order, device count nor resuming changes a sample's
    noise, and adding a guidance that draws from its own stream leaves all other draws as they were.
    Draws are made on the CPU in float32, so that every device and precision sees the same numbers.

    >>> both = SampleNoise(0, ["a", "b"]).normal("solver", 7, torch.empty(2, 3))
    >>> alone = SampleNoise(0, ["b"]).normal("solver", 7, torch.empty(1, 3))
    >>> torch.equal(both[1:], alone)
    True

    Args:
        seed: seed of the run.
        ids: stable sample ids, one per row of the batch.
    """

    seed: int
    ids: Sequence[str]

    def generator(self, row: int, stream: str, step: int = 0) -> torch.Generator:
        """Return the CPU generator that belongs to one sample, stream and step."""
        key = f"{self.seed}\0{self.ids[row]}\0{stream}\0{step}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))

    def normal(self, stream: str, step: int, like: Tensor) -> Tensor:
        """Return standard normal noise of the shape, dtype and device of ``like`` (B, *)."""
        rows = [
            torch.randn(
                like.shape[1:], generator=self.generator(row, stream, step), dtype=torch.float32
            )
            for row in range(len(like))
        ]
        return torch.stack(rows).to(like)

    def signs(self, stream: str, step: int, like: Tensor) -> Tensor:
        """Return Rademacher noise (±1 with equal probability), shaped like ``like`` (B, *)."""
        rows = [
            torch.randint(0, 2, like.shape[1:], generator=self.generator(row, stream, step))
            for row in range(len(like))
        ]
        return torch.stack(rows).to(like) * 2 - 1
