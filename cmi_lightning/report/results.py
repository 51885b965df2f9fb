"""What a table's run has found: the types of ``results.json``, its writer and its reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cmi_lightning.errors import InputError
from cmi_lightning.files import write_json
from cmi_lightning.statistics import Estimate

SCHEMA = 3
Variant = Literal["base", "cmi", "descent", "equal"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
CMI = "CMI"  # the added guidance, in labels and in `step_sizes`: "CMI+DPS"
ADDED: dict[Variant, str] = {"cmi": CMI, "descent": "descent"}  # what variants add to their base
AGAINST: tuple[Variant, ...] = ("base", "equal")  # what the added guidance is compared with


@dataclass(frozen=True)
class Metric:
    """What is measured of restored images; ``per_image`` is false for distances of sets."""

    key: str
    label: str
    unit: str
    better: Literal["higher", "lower"]
    digits: int
    per_image: bool

    @property
    def sign(self) -> int:
        """1 where more is better, else −1."""
        return 1 if self.better == "higher" else -1

    @property
    def arrow(self) -> str:
        """The better direction."""
        return "↑" if self.better == "higher" else "↓"

    @property
    def heading(self) -> str:
        """Label, arrow of the better direction, unit."""
        return f"{self.label} {self.arrow}{f' ({self.unit})' if self.unit else ''}"


@dataclass(frozen=True)
class Difference:
    """Paired differences of one metric: mean, 95 % interval, p, and Holm's word on it.

    ``pairs`` counts the images. ``improved`` is the share of them that got better, and ``values``
    are the differences by the images' ids; a distance of sets has neither.
    """

    difference: float
    low: float
    high: float
    p: float
    pairs: int
    significant: bool
    improved: float | None
    values: dict[str, float]


@dataclass(frozen=True)
class Draws:
    """What several draws per image say: coverage by percentage, spread over skill, residual.

    ``white`` is the standard deviation on [−1, 1] that the maps of the draws show as white.
    """

    images: int
    draws: int
    coverage: dict[str, Estimate]
    expected: dict[str, float]
    spread_skill: Estimate
    residual: Estimate
    white: float
    folder: str


@dataclass(frozen=True)
class Cell:
    """A row of the table: a method on a task, or the measurements that all of them restore.

    ``passes`` and ``seconds`` are per image, and ``folder`` is relative to the table's.
    ``curves`` are means over the images of every quantity, by the number of the step.
    ``differences`` are the cell's minus another variant's, by that variant and by metric.
    """

    task: str
    method: str
    variant: str  # one of VARIANTS, or "measured"
    label: str
    steps: int
    images: int
    metrics: dict[str, Estimate]
    passes: float | None
    seconds: float | None = None
    failed: int = 0
    options: dict[str, float] = field(default_factory=dict)
    folder: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    draws: Draws | None = None

    @property
    def added(self) -> bool:
        """Whether the cell has CMI, so that its differences are verdicts on it."""
        return self.variant in ADDED


@dataclass(frozen=True)
class Trial:
    """The objective's mean at a step size; None where an image broke."""

    mean: float | None
    standard_error: float | None
    images: int


@dataclass(frozen=True)
class Search:
    """The step sizes tried for a method on a task, the best, and the one that is used."""

    trials: dict[str, Trial]
    winner: float | None
    chosen: float | None
    at_edge: bool


@dataclass(frozen=True)
class Results:
    """Everything that the report and the tables show.

    ``tasks`` are their names for people, by key. By task, ``measured`` are the metrics of its
    measurements, and ``examples`` are images' ids.
    The images themselves are in the cells' folders: ``truth``, ``measurement`` and ``restored``.
    """

    title: str
    command: str
    commit: str | None
    created: str
    config: str
    environment: dict[str, str]
    images: int
    steps: int
    notes: tuple[str, ...]
    study: dict[str, dict[str, Search]]
    objective: str
    protocol: dict[str, str]
    metrics: tuple[Metric, ...]
    tasks: dict[str, str]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    measured: dict[str, dict[str, Estimate]]
    examples: dict[str, tuple[str, ...]]

    @cached_property
    def _cells(self) -> Mapping[tuple[str, str, str], Cell]:
        return {(c.task, c.method, c.variant): c for c in self.cells}

    @cached_property
    def metric_labels(self) -> Mapping[str, str]:
        """How the metrics are called, by key."""
        return {metric.key: metric.label for metric in self.metrics}

    def cell(self, task: str, method: str, variant: str) -> Cell | None:
        """Return a cell, or None where it has not been run."""
        return self._cells.get((task, method, variant))

    def cells_of(self, task: str) -> list[Cell]:
        """Return a task's cells in the order of display."""
        keys = ((task, method, variant) for method in self.methods for variant in VARIANTS)
        return [self._cells[key] for key in keys if key in self._cells]

    def rows(self) -> dict[str, list[Cell]]:
        """Return the table's rows by task: its measurements first, which need no passes."""
        every = {task: self.cells_of(task) for task in self.tasks}
        for task, rows in every.items():
            if metrics := self.measured.get(task):
                row = Cell(task, "", "measured", "measurement A⁺y", 0, self.images, metrics, 0.0)
                rows.insert(0, row)
        return {task: rows for task, rows in every.items() if rows}

    def variant_labels(self, method: str) -> dict[str, str]:
        """Return how a method's variants are called: as in the first task that has them."""
        plain = {"base": method, "equal": f"{method}, equal passes"}
        plain |= {variant: f"{word}+{method}" for variant, word in ADDED.items()}
        run = [cell for cell in reversed(self.cells) if cell.method == method]
        return plain | {cell.variant: cell.label for cell in run}


def write_results(results: Results, path: Path) -> None:
    """Write ``results.json``: strict JSON, whole or absent."""
    write_json(path, {"schema": SCHEMA} | asdict(results))


def read_results(path: Path) -> Results:
    """Read ``results.json``.

    Raises:
        InputError: if another version wrote it.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        if content.pop("schema") == SCHEMA:
            results: Results = typed(Results, content)
            return results
    except (KeyError, TypeError, AttributeError):
        pass
    raise InputError(
        f"'{path}' is of another version: run its table again with --report_only=true."
    )


def typed(kind: Any, value: Any) -> Any:
    """Return a value of JSON as a declared type: a dataclass, tuple, dict or optional of them.

    Raises:
        TypeError: if a dataclass has other fields.
    """
    parts = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        if value.keys() != {field.name for field in fields(kind)}:
            raise TypeError(f"{kind} has other fields than {list(value)}")
        return kind(**{name: typed(hints[name], v) for name, v in value.items()})
    if get_origin(kind) is tuple:
        return tuple(typed(parts[0], v) for v in value)
    if get_origin(kind) is dict:
        key = int if parts[0] is int else str
        return {key(k): typed(parts[1], v) for k, v in value.items()}
    return typed(parts[0], value) if type(None) in parts and value is not None else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
