"""A cell of a table: one run of ``cmi-lightning predict``, and the records that it has left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmi_lightning.data.files import natural
from cmi_lightning.report.results import ADDED, Variant


@dataclass(frozen=True)
class Cell:
    """One run of ``cmi-lightning predict``.

    Attributes:
        task: key of the task.
        method: name of the base.
        variant: the base alone, with CMI, with its descent, or alone with as many passes.
        step_sizes: by the names that the configurations read.
        steps: reverse steps.
        images: how many of the first images are restored.
        folder: the run's folder.
        draws: samples per image.
        validation: restore the validation images.
    """

    task: str
    method: str
    variant: Variant
    step_sizes: dict[str, float]
    steps: int
    images: int
    folder: Path
    draws: int = 1
    validation: bool = False

    @property
    def label(self) -> str:
        """How the cell is called."""
        if word := ADDED.get(self.variant):
            return word if self.method == "none" else f"{word}+{self.method}"
        return self.method if self.variant == "base" else f"{self.method}, {self.steps} steps"


def safe(name: str) -> str:
    """Return a method's name as a folder's."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)


def folder_name(method: str, variant: Variant) -> str:
    """Return the name of a cell's folder."""
    return safe(method) if variant == "base" else f"{safe(method)}-{variant}"


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's content; empty where it is absent, or a crash of the machine cut it short."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}


def records(folder: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's folder, in the order in which it restores its images."""
    root = folder / "records"
    names = {p: natural(p.relative_to(root).as_posix()) for p in root.rglob("*.json")}
    return [r for p in sorted(names, key=lambda p: names[p])[:limit] if (r := read_json(p))]


def measured(record: dict[str, Any]) -> dict[str, float]:
    """Return an image's metrics by name."""
    return {**record.get("metrics", {}), **record.get("perceptual", {})}


def passes(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the network passes per image: forwards and vector-Jacobian products."""
    counts = [record["forwards"] + record["vjps"] for record in records]
    return sum(counts) / len(counts) if counts else None
