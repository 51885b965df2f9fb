"""The images that the report embeds: examples by task, the best and the worst, and maps."""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cmi_lightning.paths import safe_name
from cmi_lightning.report.results import VARIANTS, Cell, Metric, Results, Variant

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 128  # pixels: images up to this size are enlarged without smoothing
LARGE = 96  # pixels: of images above this size only one best and one worst are embedded
MAPS = 4  # images of an uncertainty map per row
EXTREMES = 3  # best and worst images of a cell


@dataclass(frozen=True)
class Picture:
    """An embedded image: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def side(self) -> int:
        """The longer side."""
        return max(self.width, self.height)

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen as such."""
        return self.side <= SMALL


@dataclass(frozen=True)
class Example:
    """An image's pictures that there are; the restorations by method and variant."""

    id: str
    truth: Picture | None
    measurement: Picture | None
    restored: Mapping[tuple[str, str], Picture]


# A cell, the metric that tells, and its "best" and "worst" images.
Extremes = tuple[Cell, Metric, dict[str, list[Example]]]


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
        restored = {
            (cell.method, cell.variant): picture
            for cell in cells
            if cell.method in methods
            if (picture := self.picture(f"{cell.folder}/restored/{path}")) is not None
        }
        truth, measurement = (
            self.picture(f"{cells[0].folder}/{kind}/{path}") if cells else None
            for kind in ("truth", "measurement")
        )
        return Example(name, truth, measurement, restored)

    def extremes(self) -> dict[str, list[Extremes]]:
        """Return the images that CMI changed most, by task, where there are any."""
        every = {t: map(self._changed, self.results.cells_of(t)) for t in self.results.tasks}
        return {task: there for task, found in every.items() if (there := [f for f in found if f])}

    def _changed(self, cell: Cell) -> Extremes | None:
        """Return the images that a cell with CMI changed most, by the first metric it has."""
        paired = cell.differences.get("base", {}) if cell.variant == "cmi" else {}
        metric = next((m for m in self.results.metrics if m.per_image and m.key in paired), None)
        if metric is None:
            return None
        changes = paired[metric.key].values
        order = sorted(changes, key=lambda name: -metric.sign * changes[name])
        sides = {"best": self._side(cell, order), "worst": self._side(cell, order[::-1])}
        return (cell, metric, sides) if any(sides.values()) else None

    def _side(self, cell: Cell, ids: Sequence[str]) -> list[Example]:
        """Return those of the first images that are there: of large ones, one alone."""
        shown = []
        for image in (self.example(cell.task, name, [cell.method]) for name in ids[:EXTREMES]):
            if all((cell.method, variant) in image.restored for variant in ("base", "cmi")):
                shown.append(image)
                if any(picture.side > LARGE for picture in image.restored.values()):
                    break
        return shown

    def maps(self, cell: Cell) -> list[dict[str, Any]]:
        """Return truth, mean and deviation of a few images: the examples', else the first."""
        if (draws := cell.draws) is None:
            return []
        root = self.folder / draws.folder / "std"
        paths = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.png"))]
        ids = {f"{safe_name(i, '.png')}.png": i for i in self.results.examples.get(cell.task, ())}
        ordered = [path for path in ids if path in paths] + [p for p in paths if p not in ids]
        maps = []
        for path in ordered[:MAPS]:
            kinds = {"truth": "truth", "mean": "restored", "std": "std"}
            shown = {k: self.picture(f"{draws.folder}/{v}/{path}") for k, v in kinds.items()}
            name = ids.get(path, path.removesuffix(".png"))
            truth = self.example(cell.task, name, ()).truth if path in ids else None
            if shown["std"]:
                maps.append({"id": name} | shown | ({"truth": truth} if truth else {}))
        return maps


@dataclass(frozen=True)
class Gallery:
    """What Figure 1 and the sliders show, and what there is to choose.

    Attributes:
        tasks: their examples, at least one each.
        methods: those with images, and how their variants are called.
        first: the method that is shown first.
        variants: those of which any image is shown.
        sides: what the sliders compare CMI with, and how it is called.
    """

    tasks: Mapping[str, list[Example]]
    methods: Mapping[str, Mapping[str, str]]
    first: str
    variants: list[Variant]
    sides: Mapping[str, str]

    @property
    def count(self) -> int:
        """The most examples of a task."""
        return max(map(len, self.tasks.values()))


def gallery(album: Album) -> Gallery | None:
    """Return the example images by task, or None without any restored one."""
    results, tasks = album.results, {}
    for task in results.tasks:
        names = results.examples.get(task, ())
        examples = [album.example(task, name, results.methods) for name in names]
        if shown := [example for example in examples if example.restored]:
            tasks[task] = shown
    if not tasks:
        return None
    images = [example.restored for examples in tasks.values() for example in examples]
    there = [cell for restored in images for cell in restored]
    methods = [m for m in results.methods if m in dict(there)]
    both = [m for m in methods if any((m, "base") in r and (m, "cmi") in r for r in images)]
    sides = {"descent": "base with descent", "equal": "base, equal passes"}
    variants = [v for v in VARIANTS if v in {variant for _, variant in there}]
    others = {variant: name for variant, name in sides.items() if variant in variants}
    return Gallery(
        tasks,
        methods={method: results.variant_labels(method) for method in methods},
        first=([m for m in both if m != "none"] or both or methods)[0],
        variants=variants,
        sides={"measurement": "measurement", "base": "base"} | others | {"truth": "truth"},
    )
