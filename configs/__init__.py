"""The packaged configurations; ``cmi-lightning predict -c NAME`` finds them by name.

A name is a file, ``prior/ffhq``, or a section of one: ``guidance/dps`` is ``dps`` in guidance.yaml.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BASE = FOLDER / "base.yaml"
COLLECTIONS = ("guidance", "paper", "solver", "table", "task")  # files of sections
SECTION = re.compile(r"^(\w+):(?: &\w+)?(?:  # (.*))?$", re.MULTILINE)


def summaries() -> dict[str, str]:
    """Return {name: its first line of comment}, sorted by name.

    >>> summaries()["solver/heun"]
    'Deterministic; two network evaluations per step.'
    """
    found: dict[str, str] = {}
    for path in FOLDER.rglob("*.yaml"):
        name = path.relative_to(FOLDER).with_suffix("").as_posix()
        text = path.read_text(encoding="utf-8")
        if name in COLLECTIONS:
            found |= {f"{name}/{m[1]}": m[2] or "" for m in SECTION.finditer(text)}
        else:
            found[name] = text.partition("\n")[0].removeprefix("# ")
    return dict(sorted(found.items()))


@functools.cache
def find(name: str) -> str | None:
    """Return a packaged configuration as ``-c`` takes it: a file's path, or a section's text.

    The name may be a path below ``configs/``, with or without ``.yaml``. Another one gives None.

    >>> find("solver/heun")
    '{"model": {"solver": {"class_path": "cmi_lightning.solvers.Heun"}}}'
    """
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in summaries():
        return None
    collection, _, section = name.rpartition("/")
    if collection not in COLLECTIONS:
        return str(FOLDER / f"{name}.yaml")
    return json.dumps(sections(collection)[section], ensure_ascii=False)


def sections(collection: str) -> dict[str, Any]:
    """Return {section: its options} of a file of sections, in the file's order.

    >>> next(iter(sections("guidance")))
    'none'
    """
    import yaml

    text = (FOLDER / f"{collection}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
