"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cmi_lightning.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
# Called with every path before it is written: a run notes what it owns, and refuses what it
# does not.
claims: list[Callable[[Path], None]] = []
_held: dict[Path, Path] | None = None  # what files are named until they are published
T = TypeVar("T")


def write(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent, making its folders, and see it onto the disk.

    Between :func:`hold` and :func:`publish` that is left to `publish`.

    Raises:
        InputError: if the disk is full, or lets nobody write there.
    """
    temporary = path.with_name(f".{mark(path)}.{uuid.uuid4().hex}.tmp")
    try:
        with _refusals(path):
            for ask in claims:
                ask(path)
            if not os.path.isdir(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(data)
            if _held is None:
                _publish({temporary: path})
            else:
                _held[temporary] = path
    finally:
        if temporary not in (_held or ()):
            _discard({temporary: path})


def settle(path: Path) -> None:
    """See what was added to a file onto the disk, now or in :func:`publish`."""
    if _held is None:
        sync([path])
    else:
        _held[path] = path


def hold() -> None:
    """Let files that are written from now on appear together, in :func:`publish`."""
    global _held
    drop()
    _held = {}


def publish() -> None:
    """Let the held files appear, in the order of writing, and see them onto the disk.

    A power cut leaves none that is cut short: all their bytes are there before the first has its
    name. It costs two requests to the disk, whatever the number of files.

    Raises:
        InputError: as :func:`write`.
    """
    global _held
    held, _held = _held or {}, None
    try:
        with _refusals(next(iter(held.values()), Path())):
            _publish(held)
    finally:
        _discard(held)


def drop() -> None:
    """Forget the held files."""
    global _held
    _discard(_held or {})
    _held = None


def _publish(moves: dict[Path, Path]) -> None:
    sync(moves)
    for temporary, path in moves.items():
        if temporary != path:
            os.replace(temporary, path)
    sync({path.parent for path in moves.values()})


def _discard(moves: dict[Path, Path]) -> None:
    for temporary, path in moves.items():
        if temporary != path:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Tell in a sentence why a file cannot be written."""
    try:
        yield
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


def sync(paths: Collection[Path]) -> None:
    """See files or folders onto the disk: of several, their whole file system where it can be."""
    whole = {os.stat(path).st_dev: path for path in paths} if len(paths) > 1 else {}
    if whole and all(_with_handle(path, _syncfs()) for path in whole.values()):
        return
    for path in paths:
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            _with_handle(path, os.fsync)


def _with_handle(path: Path, call: Callable[[int], T]) -> T:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # as Windows wants it
    try:
        return call(handle)
    finally:
        os.close(handle)


@functools.cache
def _syncfs() -> Callable[[int], bool]:
    """Return Linux's syncfs, which is True if it worked; elsewhere what is False."""
    try:
        call = ctypes.CDLL(None).syncfs
    except (AttributeError, TypeError):
        return lambda handle: False
    return lambda handle: call(handle) == 0


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


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


def download(url: str, path: Path, start: str = "", timeout: float = 60.0) -> Path:
    """Download a file, from where an earlier try ended if the server can do so; return ``path``.

    Args:
        url: its address.
        path: the file, which is whole or absent.
        start: the first digits of its SHA-256.
        timeout: seconds without a byte after which the download is given up.

    Raises:
        OSError: if it cannot be had, ends early, or has another checksum.
    """
    import urllib.error
    import urllib.request

    path.parent.mkdir(parents=True, exist_ok=True)
    part, own = (path.with_name(f".{path.name}.{end}") for end in ("part", uuid.uuid4().hex))
    with contextlib.suppress(FileNotFoundError):
        part.rename(own)  # a second process begins anew
    try:
        done = own.stat().st_size if own.is_file() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=timeout) as source:
            going_on = source.status == 206
            with own.open("ab" if going_on else "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                length = source.headers.get("Content-Length")
                if length is not None and file.tell() < done * going_on + int(length):
                    raise OSError(f"the connection ended after {file.tell():,} bytes")
        if sha256(own).startswith(start.lower()):
            own.replace(path)
            return path
        own.unlink()
        raise OSError("the file that came is not the published one (SHA-256 differs)")
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: nothing follows what an earlier try has
            raise
        own.unlink()
        return download(url, path, start, timeout)
    finally:
        if own.is_file():
            own.replace(part)


def sha256(path: Path) -> str:
    """Return a file's SHA-256, as hexadecimal digits.

    >>> sha256(Path(os.devnull))[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
