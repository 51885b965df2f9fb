"""The images that the report embeds: examples by task, the best and the worst, and maps."""

from __future__ import annotations

import base64
import struct
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cmi_lightning.paths import safe_name
from cmi_lightning.report.results import VARIANTS, Change, Draws, Extremes, Results, Task, Variant

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 128  # pixels: images up to this size are enlarged without smoothing
LARGE = 96  # pixels: of images above this size only one best and one worst are embedded
MAPS = 4  # images of an uncertainty map per row


@dataclass(frozen=True)
class Picture:
    """An embedded image: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen as such."""
        return max(self.width, self.height) <= SMALL


@dataclass(frozen=True)
class Example:
    """An image's pictures that there are, the restorations by method and variant."""

    id: str
    truth: Picture | None
    measurement: Picture | None
    restored: Mapping[str, Mapping[Variant, Picture]]


class Album:
    """The pictures of a table's results.

    Args:
        results: the table's.
        folder: the report's; no file outside it is read.
    """

    def __init__(self, results: Results, folder: Path) -> None:
        self.results, self.folder = results, folder.resolve()
        self.picture = cache(self._read)

    def _read(self, path: str) -> Picture | None:
        """Return an image by its path from the folder, or None where there is none to read."""
        try:
            file = (self.folder / path).resolve()
            data = file.read_bytes() if file.is_relative_to(self.folder) else b""
        except (OSError, ValueError):
            return None
        if not data.startswith(PNG) or len(data) < 24:
            return None
        width, height = struct.unpack(">II", data[16:24])
        return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)

    def example(self, task: str, name: str, methods: Collection[str]) -> Example:
        """Return an image's pictures by a task's cells; truth and measurement are the first's."""
        cells = self.results.cells_of(task)
        path = f"{safe_name(name, '.png')}.png"
        restored: dict[str, dict[Variant, Picture]] = defaultdict(dict)
        for cell in (cell for cell in cells if cell.method in methods):
            if (picture := self.picture(f"{cell.folder}/restored/{path}")) is not None:
                restored[cell.method][cell.variant] = picture
        truth, measurement = (
            self.picture(f"{cells[0].folder}/{kind}/{path}") if cells else None
            for kind in ("truth", "measurement")
        )
        return Example(name, truth, measurement, restored)

    def extremes(
        self,
    ) -> dict[Task, list[tuple[Extremes, dict[str, list[tuple[Change, Example]]]]]]:
        """Return the best and the worst images that there are, by task, row and side."""
        shown = defaultdict(list)
        for task in self.results.tasks:
            for entry in self.results.extremes:
                if entry.task == task.key:
                    sides = {"best": entry.best, "worst": entry.worst}
                    there = {k: self._side(entry, v) for k, v in sides.items()}
                    if any(there.values()):
                        shown[task].append((entry, {k: v for k, v in there.items() if v}))
        return shown

    def _side(self, entry: Extremes, changes: tuple[Change, ...]) -> list[tuple[Change, Example]]:
        """Return the images of one side that are there: of large ones, the first alone."""
        shown = []
        for change in changes:
            image = self.example(entry.task, change.id, [entry.method])
            both = image.restored.get(entry.method, {})
            if "base" in both and "cmi" in both:
                shown.append((change, image))
                if max(max(p.width, p.height) for p in both.values()) > LARGE:
                    break
        return shown

    def maps(self, draws: Draws) -> list[dict[str, Any]]:
        """Return truth, mean and deviation of a few images: the examples', else the first."""
        root = self.folder / draws.folder / "std"
        paths = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.png"))]
        ids = {f"{safe_name(i, '.png')}.png": i for i in self.results.examples.get(draws.task, ())}
        ordered = [path for path in ids if path in paths] + [p for p in paths if p not in ids]
        maps = []
        for path in ordered[:MAPS]:
            std, mean, truth = (
                self.picture(f"{draws.folder}/{kind}/{path}")
                for kind in ("std", "restored", "truth")
            )
            name = ids.get(path, path.removesuffix(".png"))
            if std and path in ids:
                truth = self.example(draws.task, name, ()).truth or truth
            if std:
                maps.append({"id": name, "truth": truth, "mean": mean, "std": std})
        return maps


@dataclass(frozen=True)
class Gallery:
    """What Figure 1 and the sliders show, and what there is to choose.

    Attributes:
        tasks: their examples, at least one each.
        methods: those with images: their variants' labels, and which is shown first.
        variants: those of which any image is shown.
        sides: what the sliders compare CMI with: value, label, whether it is shown first.
        data: for the script: the pictures, each once, and the examples as their numbers.
    """

    tasks: Mapping[Task, list[Example]]
    methods: list[dict[str, Any]]
    variants: list[Variant]
    sides: list[tuple[str, str, bool]]
    data: dict[str, Any]

    @property
    def count(self) -> int:
        """The most examples of a task."""
        return max(map(len, self.tasks.values()))


def gallery(album: Album) -> Gallery | None:
    """Return the example images by task, or None without any restored one."""
    results = album.results
    every = {
        task: [
            album.example(task.key, n, results.methods) for n in results.examples.get(task.key, ())
        ]
        for task in results.tasks
    }
    tasks = {
        t: shown for t, examples in every.items() if (shown := [e for e in examples if e.restored])
    }
    restorations = [example.restored for examples in tasks.values() for example in examples]
    if not restorations:
        return None
    numbers: dict[Picture, int] = {}

    def number(picture: Picture | None) -> int | None:
        return None if picture is None else numbers.setdefault(picture, len(numbers))

    def entry(example: Example) -> dict[str, Any]:
        restored = {
            method: {variant: number(picture) for variant, picture in pictures.items()}
            for method, pictures in example.restored.items()
        }
        truth, measurement = number(example.truth), number(example.measurement)
        return {"id": example.id, "truth": truth, "measurement": measurement, "restored": restored}

    methods = [m for m in results.methods if any(m in restored for restored in restorations)]
    both = [m for m in methods if any({"base", "cmi"} <= set(r.get(m, ())) for r in restorations)]
    first = ([m for m in both if m != "none"] or both or methods)[0]
    labelled = [{"key": m, "default": m == first} | results.variant_labels(m) for m in methods]
    entries = {task.key: [entry(e) for e in examples] for task, examples in tasks.items()}
    data = {
        "images": [[p.uri, p.width, p.height] for p in numbers],
        "tasks": entries,
        "methods": labelled,
        "small": SMALL,
    }
    variants = [
        v for v in VARIANTS if any(v in r for restored in restorations for r in restored.values())
    ]
    names = {"base": "base", "descent": "base with descent", "equal": "base, equal passes"}
    sides = [("measurement", "measurement", True), ("base", "base", False)]
    sides += [(v, names[v], False) for v in ("descent", "equal") if v in variants]
    return Gallery(tasks, labelled, variants, [*sides, ("truth", "truth", False)], data)
