"""What an earlier run finished, read back from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmi_lightning.data.images import read_image
from cmi_lightning.files import read_json
from cmi_lightning.predict.restoration import Details, Restoration, judged
from cmi_lightning.problem import Problem
from cmi_lightning.step import Cost


def read_back(
    writer: Any, records: list[Path], problem: Problem, truth: Tensor | None
) -> Restoration | None:
    """Return a batch's restoration from the files of the run that finished it, if it kept images.

    Images are as fine as their files, of 8 or 16 bits. ``seconds`` is 0, and there is no last step.
    """
    kept = [read_json(path) for path in records]
    if writer is None or not all(record.get(writer.key) for record in kept):
        return None
    files = [[str(name) for name in record[writer.key]] for record in kept]

    def images(names: list[str]) -> Tensor:
        return torch.cat([read_image(writer.folder / name) for name in names]).to(problem.y)

    restored = torch.stack([images([n for n in names if _is(n, "restored")]) for names in files])
    each = [[images([n]) for n in names if _is(n, "draws")] for names in files]
    draws = [torch.stack(x) for x in zip(*each, strict=True)] if all(each) else [restored]
    return judged(
        problem,
        restored,
        draws,
        id=[record["id"] for record in kept],
        truth=truth,
        failed={record["id"]: record["failed"] for record in kept if record["failed"]},
        seconds=0.0,
        records=kept,
        details=Details(problem, None, Cost(), 0),  # type: ignore[arg-type]
    )


def _is(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")
