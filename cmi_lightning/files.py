"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cmi_lightning.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
# Called with every path before it is written: a run notes what it owns, and refuses what it
# does not.
claims: list[Callable[[Path], None]] = []


def write(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent, making its folders, and see it onto the disk.

    Raises:
        InputError: if the disk is full, or lets nobody write there.
    """
    temporary = path.with_name(f".{mark(path)}.{uuid.uuid4().hex}.tmp")
    try:
        for ask in claims:
            ask(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise InputError(
                f"The disk of '{path.parent}' is full; what was finished is kept: make room and "
                "run the same command again."
            ) from error
        if error.errno in CLOSED:
            raise InputError(
                f"Cannot write '{path}' ({error.strerror}): choose another folder."
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def claim(path: Path) -> None:
    """Refuse a file that is there and that the run did not write.

    Raises:
        InputError: naming the file.
    """
    if os.path.lexists(path):
        for ask in claims:
            ask(path)


def remove(path: Path) -> None:
    """Remove a file of the run; a file that it did not write stays."""
    with contextlib.suppress(InputError):
        claim(path)
        path.unlink(missing_ok=True)


def mark(path: Path) -> str:
    """Return what the temporary files of a path have in their names."""
    return hashlib.blake2b(path.name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def remove_temporary(paths: Iterable[Path]) -> None:
    """Remove the temporary files that killed processes left of these paths, and no others."""
    marks: dict[Path, set[str]] = {}
    for path in paths:
        marks.setdefault(path.parent, set()).add(mark(path))
    for folder, known in marks.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for left in os.scandir(folder):
                found = re.fullmatch(r"\.([0-9a-f]{16})\.[0-9a-f]{32}\.tmp", left.name)
                if found and found[1] in known:
                    Path(left.path).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """See a new name onto the disk, where the system can."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; see :func:`write`."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write(path, f"{text}\n".encode())


def make_folder(folder: Path, option: str) -> None:
    """Make a folder to write to.

    Raises:
        InputError: naming the option, if nobody can write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{option}: cannot write in '{folder}' ({reason}); choose another folder."
        ) from error


def sha256(path: Path) -> str:
    """Return a file's SHA-256, as hexadecimal digits.

    >>> sha256(Path(os.devnull))[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
