"""Paths: files of a folder that are named by data, and what ships with the package."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from cmi_lightning.errors import UNSEEN, InputError, printable

LONGEST_PART, LONGEST = 200, 1000  # bytes; file systems allow 255 and 4096, with what is added
HASHED = re.compile(r"~[0-9a-f]{16}$")
ASSETS = Path(__file__).with_name("assets")
SHIPPED = {  # folders of images
    "fashion-mnist-test": ASSETS / "fashion_mnist_test",
    "fashion-mnist-table": ASSETS / "fashion_mnist_table",
    "fashion-mnist-validation": ASSETS / "fashion_mnist_validation",
    "photos-test": ASSETS / "photos" / "test",
    "photos-test-64": ASSETS / "photos" / "test-64",
    "photos-validation": ASSETS / "photos" / "validation",
    "photos-validation-64": ASSETS / "photos" / "validation-64",
}


def inside(folder: Path, name: str, suffix: str) -> Path:
    """Return ``folder/name<suffix>`` for a sample id, which may hold slashes.

    An id that would lead elsewhere (``..``, absolute), is too long for a file system or has
    characters that some refuse is changed, and ends in ``~`` and a checksum of the id, so that two
    ids never share a file. Other letters than ASCII stay (NFC).

    Raises:
        InputError: if a link in the folder leads out of it.
    """
    safe = safe_name(name, suffix)
    path, here = folder / f"{safe}{suffix}", folder
    below = [here := here / part for part in safe.split("/")[:-1]]
    linked = os.name == "nt" or any(map(os.path.islink, below))  # Windows has junctions, too
    if linked and not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"'{printable(path.parent)}' leads out of the folder '{printable(folder)}' by a link; "
            "remove that link."
        )
    return path


@lru_cache(2**12)
def safe_name(name: str, suffix: str = "") -> str:
    """Return a relative path with slashes that depends on the id alone; see :func:`inside`."""
    text = unicodedata.normalize("NFC", name)
    text = "".join("_" if c == "\\" or unicodedata.category(c) in UNSEEN else c for c in text)
    parts = [_cut(part) for part in text.split("/") if part not in ("", ".", "..")] or ["_"]
    if len("/".join(parts).encode()) > LONGEST:
        parts = parts[-1:]
    # A folder must not have the name that another id's file may have.
    parts[:-1] = [f"{p}_" if suffix and p.lower().endswith(suffix) else p for p in parts[:-1]]
    safe = "/".join(parts)
    if safe == name and not HASHED.search(name):
        return safe
    checksum = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{safe}~{checksum}"


def _cut(part: str) -> str:
    return part.encode()[:LONGEST_PART].decode(errors="ignore")


def example(name: str = "beach1") -> Path:
    """Return the path of a photograph that ships with the package.

    >>> example().name
    'beach1.jpg'

    Args:
        name: of a file of "photos-test", without its suffix.

    Raises:
        InputError: for another name.
    """
    found = examples()
    if name not in found:
        raise InputError(f"There is no example '{name}': use {', '.join(found)}.")
    return found[name]


def examples() -> dict[str, Path]:
    """Return the photographs that ship with the package, by name.

    >>> "beach1" in examples()
    True
    """
    return {path.stem: path for path in sorted(SHIPPED["photos-test"].glob("*.*"))}
