"""The images that the report embeds: examples by task, the best and the worst, and maps."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cmi_lightning.paths import safe_name
from cmi_lightning.report.results import (
    VARIANTS,
    Change,
    Draws,
    Example,
    Extremes,
    Results,
    Task,
    Variant,
)

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


class Album:
    """The PNG files below a folder, as pictures.

    Args:
        folder: the report's; no file outside it is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.picture = cache(self._read)

    def _read(self, path: str | None) -> Picture | None:
        """Return an image by its path from the folder, or None where there is none to read."""
        try:
            file = (self.folder / path).resolve() if path else self.folder
            data = file.read_bytes() if file.is_relative_to(self.folder) else b""
        except (OSError, ValueError):
            return None
        if not data.startswith(PNG) or len(data) < 24:
            return None
        width, height = struct.unpack(">II", data[16:24])
        return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)

    def pictures(self, example: Example) -> dict[str, dict[str, Picture]]:
        """Return an example's restorations that there are, by method and variant."""
        found = {
            method: {v: picture for v, path in paths.items() if (picture := self.picture(path))}
            for method, paths in example.restored.items()
        }
        return {method: pictures for method, pictures in found.items() if pictures}

    def side(self, changes: tuple[Change, ...]) -> list[Change]:
        """Return the images of one side that are there: of large ones, the first alone."""
        found = []
        for change in changes:
            base, cmi = self.picture(change.base), self.picture(change.cmi)
            if base and cmi:
                found.append(change)
                if max(base.width, base.height, cmi.width, cmi.height) > LARGE:
                    break
        return found

    def extremes(self, results: Results) -> dict[Task, list[Extremes]]:
        """Return the best and the worst images that there are, by task."""
        found: dict[Task, list[Extremes]] = {}
        for task in results.tasks:
            of_task = [e for e in results.extremes if e.task == task.key]
            shown = [e for e in of_task if self.side(e.best) or self.side(e.worst)]
            if shown:
                found[task] = shown
        return found

    def maps(self, results: Results, draws: Draws) -> list[dict[str, Any]]:
        """Return truth, mean and deviation of a few images: the examples', else the first."""
        truths = {e.id: e.truth for e in results.examples.get(draws.task, ())}
        root = self.folder / draws.folder / "std"
        stems = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.png"))]
        ids = {f"{safe_name(i, '.png')}.png": i for i in truths}
        paths = {path: i for path, i in ids.items() if path in stems}
        paths |= {path: path.removesuffix(".png") for path in stems if path not in ids}
        maps = []
        for path, name in list(paths.items())[:MAPS]:
            std, mean, own = (
                self.picture(f"{draws.folder}/{kind}/{path}")
                for kind in ("std", "restored", "truth")
            )
            if std:
                truth = self.picture(truths.get(name)) or own
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


def gallery(results: Results, album: Album) -> Gallery | None:
    """Return the example images by task, or None without any restored one."""
    tasks = {
        task: [e for e in results.examples.get(task.key, ()) if album.pictures(e)]
        for task in results.tasks
    }
    tasks = {task: examples for task, examples in tasks.items() if examples}
    shown = [album.pictures(example) for examples in tasks.values() for example in examples]
    if not shown:
        return None
    numbers: dict[Picture, int] = {}

    def number(picture: Picture | None) -> int | None:
        return None if picture is None else numbers.setdefault(picture, len(numbers))

    def entry(example: Example) -> dict[str, Any]:
        restored = {
            method: {variant: number(picture) for variant, picture in pictures.items()}
            for method, pictures in album.pictures(example).items()
        }
        truth, measurement = map(album.picture, (example.truth, example.measurement))
        return {
            "id": example.id,
            "truth": number(truth),
            "measurement": number(measurement),
            "restored": restored,
        }

    methods = [m for m in results.methods if any(m in restored for restored in shown)]
    both = [m for m in methods if any({"base", "cmi"} <= set(r.get(m, ())) for r in shown)]
    first = ([m for m in both if m != "none"] or both or methods)[0]
    labelled = [{"key": m, "default": m == first} | results.variant_labels(m) for m in methods]
    entries = {task.key: [entry(e) for e in examples] for task, examples in tasks.items()}
    data = {
        "images": [[p.uri, p.width, p.height] for p in numbers],
        "tasks": entries,
        "methods": labelled,
        "small": SMALL,
    }
    variants = [v for v in VARIANTS if any(v in r for restored in shown for r in restored.values())]
    names = {"base": "base", "descent": "base with descent", "equal": "base, equal passes"}
    sides = [("measurement", "measurement", True), ("base", "base", False)]
    sides += [(v, names[v], False) for v in ("descent", "equal") if v in variants]
    return Gallery(tasks, labelled, variants, [*sides, ("truth", "truth", False)], data)
