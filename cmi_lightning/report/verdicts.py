"""Verdicts on paired differences, and numbers as text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cmi_lightning.report.results import Cell, Difference, Metric, Results
from cmi_lightning.statistics import Estimate

MINUS = "−"


def fixed(value: float | None, digits: int, sign: bool = False) -> str:
    """Return a number with so many decimals and a true minus; "–" where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    if not text.strip("0."):
        return text  # no sign where all digits are zero
    return f"{MINUS if value < 0 else '+' if sign else ''}{text}"


def short(value: float | None) -> str:
    """Return a number with three significant digits, never as a power of ten."""
    if not value or not math.isfinite(value):
        return "0" if value == 0 else "–"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = fixed(value, min(decimals, 12))
    return text.rstrip("0").rstrip(".") if "." in text else text


def mean_text(estimate: Estimate | None, digits: int) -> str:
    """Return "18.80 ± 0.29", without what is absent."""
    if estimate is None or estimate.mean is None:
        return "–"
    error = "" if estimate.se is None else f" ± {fixed(estimate.se, digits)}"
    return fixed(estimate.mean, digits) + error


def percent(estimate: Estimate) -> str:
    """Return "41 %" or "41.2 ± 1.3 %"."""
    if estimate.mean is None or estimate.se is None:
        return "–" if estimate.mean is None else f"{100 * estimate.mean:.0f} %"
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.se:.1f} %"


# By name in style sheets: a triangle, up for better and filled if significant, and words.
LOOKS = {
    "better": ("▲", "significantly better"),
    "better-unsure": ("△", "better, not significantly"),
    "worse": ("▼", "significantly worse"),
    "worse-unsure": ("▽", "worse, not significantly"),
    "none": ("=", "no difference"),
}


@dataclass(frozen=True)
class Verdict:
    """A cell's paired difference of a metric, and whether it is for better or worse."""

    metric: Metric
    cell: Cell
    paired: Difference

    @property
    def name(self) -> str:
        """Its key in ``LOOKS``, which style sheets know."""
        gain = self.paired.difference * self.metric.sign
        if not abs(gain) > 0:
            return "none"
        return ("better" if gain > 0 else "worse") + "-unsure" * (not self.paired.significant)

    @property
    def symbol(self) -> str:
        """A triangle."""
        return LOOKS[self.name][0]

    @property
    def words(self) -> str:
        """The verdict in words, for those who do not see colours."""
        return LOOKS[self.name][1]

    @property
    def outcome(self) -> str:
        """What it counts as: "better", "worse" or "undecided"."""
        return self.name if self.name in ("better", "worse") else "undecided"

    @property
    def change(self) -> str:
        """The difference, "+0.050", with one digit more than the metric itself."""
        return fixed(self.paired.difference, self.metric.digits + 1, sign=True)

    @property
    def interval(self) -> str:
        """Its 95 % interval, "[−0.010, 0.110]"."""
        low, high = (fixed(v, self.metric.digits + 1) for v in (self.paired.low, self.paired.high))
        return f"[{low}, {high}]"

    @property
    def p(self) -> str:
        """Its p value."""
        return "p < 0.001" if self.paired.p < 0.001 else f"p = {self.paired.p:.3f}"

    @property
    def fewer(self) -> int | None:
        """The number of pairs, where the cell has more images than were compared."""
        return self.paired.pairs if self.paired.pairs < self.cell.images else None


def verdicts_of(cell: Cell, metric: Metric) -> dict[str, Verdict]:
    """Return the verdicts on a cell, by the variant that it was compared with."""
    paired = {against: found.get(metric.key) for against, found in cell.differences.items()}
    return {against: Verdict(metric, cell, p) for against, p in paired.items() if p}


def verdicts(results: Results, metric: Metric, against: str, variant: str = "cmi") -> list[Verdict]:
    """Return the verdicts on all cells of CMI, or of another variant, that were compared."""
    cells = [c for t in results.tasks for c in results.cells_of(t) if c.variant == variant]
    return [v for cell in cells if (v := verdicts_of(cell, metric).get(against))]
