"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from cmi_lightning.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)


def write(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent, making its folders, and see it onto the disk.

    Raises:
        InputError: if the disk is full.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise InputError(
                f"The disk of '{path.parent}' is full; what was finished is kept: make room and "
                "run the same command again."
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
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
