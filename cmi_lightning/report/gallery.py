"""The restored images that the report shows: examples by task, and the best and the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmi_lightning.report.pictures import SMALL, Picture, read_picture
from cmi_lightning.report.verdicts import VARIANTS, Results, fixed, in_order

LARGE = 96  # pixels: of images above this size only one best and one worst are embedded


# Examples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """An example image: its truth and measurement, and its restorations by method and variant."""

    id: str
    truth: Picture | None
    measurement: Picture | None
    restored: Mapping[str, Mapping[str, Picture]]

    @property
    def pictures(self) -> list[Picture]:
        """All that there are of it."""
        restored = [picture for found in self.restored.values() for picture in found.values()]
        return restored + [p for p in (self.truth, self.measurement) if p]


@dataclass(frozen=True)
class Gallery:
    """Example images: what Figure 1 and the sliders show, and what there is to choose.

    Attributes:
        rows: tasks by key and label, each with at least one example.
        methods: those with images, how their variants are called, and which is shown first.
        store: their pictures, each once.
    """

    rows: list[dict[str, Any]]
    methods: list[dict[str, Any]]
    store: list[Picture]

    @property
    def variants(self) -> list[str]:
        """The variants of which any image is shown."""
        examples = [e for row in self.rows for e in row["examples"]]
        shown = {v for e in examples for found in e.restored.values() for v in found}
        return [v for v in VARIANTS if v in shown]

    @property
    def count(self) -> int:
        """The most examples of a task."""
        return max(len(row["examples"]) for row in self.rows)

    @property
    def data(self) -> dict[str, Any]:
        """What the script needs: the pictures, and each example as their numbers."""
        index: dict[Picture | None, int | None] = {None: None}
        index |= {picture: i for i, picture in enumerate(self.store)}
        return {
            "images": [[p.uri, p.width, p.height] for p in self.store],
            "tasks": {
                row["key"]: [
                    {
                        "id": example.id,
                        "truth": index[example.truth],
                        "measurement": index[example.measurement],
                        "restored": {
                            method: {variant: index[picture] for variant, picture in found.items()}
                            for method, found in example.restored.items()
                        },
                    }
                    for example in row["examples"]
                ]
                for row in self.rows
            },
            "methods": self.methods,
            "small": SMALL,
        }


def examples(known: Results, folder: Path) -> Gallery | None:
    """Return the example images by task, or None without any restored one."""
    raw = known.raw.get("examples") or {}
    read = {
        task: (_example(entry, known, folder) for entry in raw[task] or ())
        for task in in_order(raw, known.tasks)
    }
    shown = {task: [e for e in found if e.restored] for task, found in read.items()}
    rows = [
        {"key": task, "label": known.task_label(task), "examples": found}
        for task, found in shown.items()
        if found
    ]
    if not rows:
        return None
    store = dict.fromkeys(p for found in shown.values() for e in found for p in e.pictures)
    methods = _methods(known, [example for found in shown.values() for example in found])
    return Gallery(rows, methods, list(store))


def _example(raw: Mapping[str, Any], known: Results, folder: Path) -> Example:
    restored: dict[str, dict[str, Picture]] = {}
    for method in in_order(raw.get("restored"), known.methods):
        paths = raw["restored"][method] or {}
        pictures = {str(v): read_picture(folder, paths.get(v)) for v in VARIANTS}
        if found := {variant: p for variant, p in pictures.items() if p}:
            restored[method] = found
    truth, measurement = (read_picture(folder, raw.get(n)) for n in ("truth", "measurement"))
    return Example(str(raw.get("id", "")), truth, measurement, restored)


def _methods(known: Results, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the methods whose images are shown; the first guided one with CMI as default."""
    restored = [(method, found) for e in examples for method, found in e.restored.items()]
    shown = {method for method, _ in restored}
    both = {method for method, found in restored if "cmi" in found and "base" in found}
    methods = [m for m in known.methods if m in shown] + sorted(shown - set(known.methods))
    likely = [m for m in methods if m in both]
    likely = [m for m in likely if m != "none"] or likely or methods
    return [{"key": m, "default": m == likely[0]} | known.variant_labels(m) for m in methods]


# The best and the worst ----------------------------------------------------------------------


def extremes(known: Results, folder: Path) -> list[dict[str, Any]]:
    """Return the best and the worst images by task."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    metrics = {m["key"]: m for m in known.metrics}
    for raw in known.raw.get("extremes") or ():
        if (metric := metrics.get(raw.get("metric"))) is None:
            continue
        names = known.variant_labels(str(raw["method"]))
        sides = {s: _side(raw.get(s) or (), metric, folder) for s in ("best", "worst")}
        if any(sides.values()):
            entry = {"metric": metric["label"], "names": names, "sides": sides}
            by_task.setdefault(str(raw["task"]), []).append(entry)
    return [
        {"label": known.task_label(task), "entries": by_task[task]}
        for task in in_order(by_task, known.tasks)
    ]


def _side(
    entries: Sequence[Mapping[str, Any]], metric: Mapping[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """Return the images of one side that are there: of large ones, the first alone."""
    unit = f" {metric['unit']}" if metric["unit"] else ""
    side: list[dict[str, Any]] = []
    for raw in entries:
        names = ("truth", "measurement", "base", "cmi")
        found = {name: read_picture(folder, raw.get(name)) for name in names}
        base, cmi = found["base"], found["cmi"]
        if not base or not cmi:
            continue
        difference = fixed(raw.get("difference"), metric["digits"], sign=True)
        side.append({"id": str(raw.get("id", "")), "difference": f"{difference}{unit}"} | found)
        if max(base.width, base.height, cmi.width, cmi.height) > LARGE:
            break
    return side
