"""One line of the table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A figure and what it should be.

    >>> Check("⟨Ax, y⟩ = ⟨x, Aᵀy⟩", figure=0.3, bar=1e-9).verdict
    'FAIL'

    Args:
        name: what was checked, for people.
        figure: what came out.
        bar: the most that ``figure`` may be; None for a figure to be read, which cannot fail.
        remark: what the figure means, where the name does not say it.
    """

    name: str
    figure: float
    bar: float | None
    remark: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is a number, and within the bar if there is one."""
        return self.bar is None or (math.isfinite(self.figure) and self.figure <= self.bar)

    @property
    def verdict(self) -> str:
        """Return "ok", "FAIL", or "note" where there is no bar."""
        return "note" if self.bar is None else "ok" if self.passed else "FAIL"
