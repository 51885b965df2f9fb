"""Counter-based noise: a draw depends on (seed, sample, stream, step) and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmi_lightning.checked import check

MOST = 8  # streams that are drawn ahead: each holds a batch in memory


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

    def __post_init__(self) -> None:
        check(self, "seed")

    def generator(self, row: int, stream: str, step: int = 0) -> torch.Generator:
        """Return the CPU generator that belongs to one sample, stream and step."""
        key = f"{self.seed}\0{self.ids[row]}\0{stream}\0{step}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))

    def rows(self, kind: str, stream: str, step: int, shape: Sequence[int]) -> Tensor:
        """Return "normal" numbers or "signs" (B, *) on the CPU."""
        count, *each = shape
        generators = [self.generator(row, stream, step) for row in range(count)]
        if kind == "normal":
            drawn = [torch.randn(each, generator=g, dtype=torch.float32) for g in generators]
        else:
            drawn = [torch.randint(0, 2, each, generator=g) * 2 - 1 for g in generators]
        return torch.stack(drawn)

    def _draw(self, kind: str, stream: str, step: int, like: Tensor) -> Tensor:
        return self.rows(kind, stream, step, like.shape).to(like)

    def normal(self, stream: str, step: int, like: Tensor) -> Tensor:
        """Return standard normal noise of the shape, dtype and device of ``like`` (B, *)."""
        return self._draw("normal", stream, step, like)

    def signs(self, stream: str, step: int, like: Tensor) -> Tensor:
        """Return Rademacher noise (±1 with equal probability), shaped like ``like`` (B, *)."""
        return self._draw("signs", stream, step, like)

    @contextmanager
    def ahead(self, device: torch.device) -> Iterator[SampleNoise]:
        """Draw ahead for the time of a chain, unless the chain itself runs on the CPU."""
        if device.type == "cpu":
            yield self
            return
        with ThreadPoolExecutor(1) as thread:
            yield NoiseAhead(self.seed, self.ids, thread, device.type == "cuda")


@dataclass(frozen=True)
class NoiseAhead(SampleNoise):
    """The same numbers; those of the next step are drawn in a thread while this one runs.

    A stream is expected again, in the same shape, one step lower. What comes otherwise is drawn
    when it is asked for.

    >>> with ThreadPoolExecutor(1) as thread:
    ...     noise, like = NoiseAhead(0, ["a"], thread), torch.empty(1, 3)
    ...     ahead = [noise.normal("solver", step, like) for step in (7, 6)]
    >>> torch.equal(ahead[1], SampleNoise(0, ["a"]).normal("solver", 6, like))
    True

    Args:
        seed: seed of the run.
        ids: stable sample ids.
        thread: where they are drawn.
        pin: keep them in memory that a GPU reads without waiting.
        expected: by kind and stream: the step and shape, and the numbers to come.
    """

    thread: ThreadPoolExecutor
    pin: bool = False
    expected: dict[tuple[str, str], tuple[Any, Future[Tensor]]] = field(default_factory=dict)

    def _draw(self, kind: str, stream: str, step: int, like: Tensor) -> Tensor:
        wanted, (coming, drawn) = (step, like.shape), self.expected.pop((kind, stream), (0, None))
        own = drawn is not None and coming == wanted
        numbers = drawn.result() if own else self.rows(kind, stream, *wanted)  # type: ignore[union-attr]
        if step > 0 and len(self.expected) < MOST:
            following = step - 1, like.shape
            future = self.thread.submit(self._pinned, kind, stream, *following)
            self.expected[kind, stream] = following, future
        return numbers.to(like.device, non_blocking=True).to(like.dtype)

    def _pinned(self, kind: str, stream: str, step: int, shape: Sequence[int]) -> Tensor:
        numbers = self.rows(kind, stream, step, shape)
        return numbers.pin_memory() if self.pin else numbers
