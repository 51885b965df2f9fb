"""What results say: cells and paired comparisons by name, their verdicts, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmi_lightning.table.spec import VARIANTS

AGAINST = ("base", "equal")
MINUS = "−"


def number(value: Any) -> float | None:
    """Return a finite number, or None for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: Any, digits: int, sign: bool = False) -> str:
    """Return a number with so many decimals and a true minus; "–" where there is none."""
    finite = number(value)
    if finite is None:
        return "–"
    text = f"{abs(finite):.{digits}f}"
    if not text.strip("0."):
        return text  # no sign where all digits are zero
    return f"{MINUS if finite < 0 else '+' if sign else ''}{text}"


def short(value: Any) -> str:
    """Return a number with three significant digits, never as a power of ten."""
    finite = number(value)
    if finite is None:
        return "–"
    if finite == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(finite))))
    text = fixed(finite, min(decimals, 12))
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Verdict:
    """A paired comparison of one metric: the run's value minus the other's.

    Attributes:
        difference: mean of the paired differences.
        low: lower end of their 95 % interval.
        high: upper end.
        p: its p value.
        improved: the part of images on which the run is better.
        direction: "better", "worse", or "same" for a difference of 0; "none" without one.
        significant: after Holm's correction; None if it was not tested.
        pairs: how many images were compared.
        values: differences per image.
    """

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    improved: float | None
    direction: str
    significant: bool | None
    pairs: int | None
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        """Its name in style sheets: "better", "better-unsure", "worse", "worse-unsure", "none"."""
        if self.direction in ("same", "none"):
            return "none"
        return self.direction if self.significant else f"{self.direction}-unsure"

    @property
    def symbol(self) -> str:
        """A triangle: up for better and down for worse, filled if significant."""
        return {
            "better": "▲",
            "worse": "▼",
            "better-unsure": "△",
            "worse-unsure": "▽",
            "none": "=" if self.direction == "same" else "",
        }[self.name]

    @property
    def words(self) -> str:
        """The verdict in words, for those who do not see colours."""
        return {
            "better": "significantly better",
            "worse": "significantly worse",
            "better-unsure": "better, not significantly",
            "worse-unsure": "worse, not significantly",
            "none": "no difference" if self.direction == "same" else "not compared",
        }[self.name]

    @property
    def outcome(self) -> str:
        """What it counts as: "better", "worse", "undecided" or "untested"."""
        if self.significant is None or self.direction == "none":
            return "untested"
        return self.direction if self.significant and self.direction != "same" else "undecided"

    def text(self, digits: int) -> str:
        """Return "+0.050 [−0.010, 0.110]", with one digit more than the metric itself."""
        first = fixed(self.difference, digits + 1, sign=True)
        if self.low is None or self.high is None:
            return first
        low, high = (fixed(v, digits + 1) for v in (self.low, self.high))
        return f"{first} [{low}, {high}]"

    def fewer(self, cell: Mapping[str, Any]) -> int | None:
        """Return the number of pairs where the cell has more images than were compared."""
        images = number(cell.get("images"))
        fewer = self.pairs is not None and images is not None and self.pairs < images
        return self.pairs if fewer else None


def judge(entry: Mapping[str, Any], better: str) -> Verdict:
    """Return the verdict on a comparison's entry of a metric whose ``better`` values are such."""
    difference = number(entry.get("difference"))
    direction = "none"
    if difference is not None:
        gain = difference if better == "higher" else -difference
        direction = "better" if gain > 0 else "worse" if gain < 0 else "same"
    significant = entry.get("significant")
    values = tuple(v for raw in entry.get("values") or () if (v := number(raw)) is not None)
    return Verdict(
        difference,
        number(entry.get("low")),
        number(entry.get("high")),
        number(entry.get("p")),
        number(entry.get("improved")),
        direction,
        None if significant is None else bool(significant),
        entry.get("pairs"),
        values,
    )


class Results:
    """Cells and comparisons of the results of ``cmi-lightning table`` by task, method, variant.

    Args:
        results: the table's results; parts that are absent or null are empty here.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.raw = results
        self.metrics = [_complete(m) for m in results.get("metrics") or ()]
        self._cells = {
            (c["task"], c["method"], c["variant"]): c for c in results.get("cells") or ()
        }
        self._comparisons = {
            (c["task"], c["method"], c["variant"], c.get("against", "base")): c
            for c in results.get("comparisons") or ()
        }
        self.labels: dict[str, str] = {
            t["key"]: str(t.get("label") or t["key"]) for t in results.get("tasks") or ()
        }
        self.tasks = _ordered(self.labels, (task for task, _, _ in self._cells))
        self.methods = _ordered(results.get("methods") or (), (m for _, m, _ in self._cells))

    def task_label(self, task: str) -> str:
        """Return how a task is called."""
        return self.labels.get(task, task)

    def cell(self, task: str, method: str, variant: str) -> Mapping[str, Any] | None:
        """Return a cell that has been run, or None."""
        return self._cells.get((task, method, variant))

    def cells(self, task: str) -> list[Mapping[str, Any]]:
        """Return a task's cells in the order of display."""
        keys = ((task, method, variant) for method in self.methods for variant in VARIANTS)
        return [self._cells[key] for key in keys if key in self._cells]

    def variant_labels(self, method: str) -> dict[str, str]:
        """Return how a method's variants are called: as in the first task that has them."""
        labels: dict[str, str] = {}
        for variant in VARIANTS:
            cells = (self.cell(task, method, variant) for task in self.tasks)
            cell = next((c for c in cells if c), {"method": method, "variant": variant})
            labels[variant] = cell_label(cell)
        return labels

    def pairs(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return CMI's cells, each with its base's."""
        return [
            (cmi, base)
            for task in self.tasks
            for method in self.methods
            if (cmi := self.cell(task, method, "cmi")) and (base := self.cell(task, method, "base"))
        ]

    def verdict(
        self, task: str, method: str, metric: Mapping[str, Any], variant: str, against: str
    ) -> Verdict | None:
        """Return how a cell compares on a metric, or None if it was not compared."""
        comparison = self._comparisons.get((task, method, variant, against)) or {}
        entry = (comparison.get("metrics") or {}).get(metric["key"])
        return judge(entry, metric["better"]) if entry else None

    def verdicts(self, metric: Mapping[str, Any], against: str) -> list[Verdict]:
        """Return CMI's verdicts on a metric in all cells that were compared."""
        every = (
            self.verdict(task, method, metric, "cmi", against)
            for task in self.tasks
            for method in self.methods
        )
        return [v for v in every if v is not None and v.direction != "none"]


def cell_label(cell: Mapping[str, Any]) -> str:
    """Return how a cell is called."""
    names = {"cmi": "CMI+{}", "equal": "{}, equal passes"}
    plain = names.get(cell["variant"], "{}").format(cell["method"])
    return str(cell.get("label") or plain)


def other_images(results: Mapping[str, Any], cell: Mapping[str, Any]) -> int | None:
    """Return a cell's number of images where it is another than the largest cell's."""
    images: int | None = cell.get("images")
    return images if images != results.get("images") else None


def heading(metric: Mapping[str, Any]) -> str:
    """Return a metric's label with the arrow of its better direction and its unit."""
    arrow = "↓" if metric["better"] == "lower" else "↑"
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    return f"{metric['label']} {arrow}{unit}"


def mean_text(entry: Mapping[str, Any] | None, digits: int) -> str:
    """Return "18.80 ± 0.29", without what is absent."""
    if not entry or number(entry.get("mean")) is None:
        return "–"
    se = number(entry.get("se"))
    return fixed(entry["mean"], digits) + (f" ± {fixed(se, digits)}" if se is not None else "")


def median(values: Sequence[float]) -> float:
    """Return the median of at least one number."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def in_order(found: Mapping[str, Any] | None, order: Sequence[str]) -> list[str]:
    """Return the keys in an order, those that it does not name last."""
    keys = found or {}
    return [k for k in order if k in keys] + [k for k in keys if k not in order]


def _complete(metric: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric with everything that is said of one."""
    plain = {"label": metric["key"], "unit": "", "better": "higher", "digits": 3}
    return plain | {name: value for name, value in metric.items() if value is not None}


def _ordered(first: Iterable[str], then: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *then]))
