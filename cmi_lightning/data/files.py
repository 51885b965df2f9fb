"""Files of a folder, with every complaint made before any sampling."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from cmi_lightning.data.images import (
    FOREIGN,
    SUFFIXES,
    Decoding,
    Note,
    UnreadableError,
    read_image,
)
from cmi_lightning.errors import InputError, counted, printable

T = TypeVar("T")
MAX_PIXELS = 1024**3 // 12  # Pillow's default limit of an image, for images made here as well
NUM_REPORTED = 5
MAX_KEPT = 2**30
Shape = tuple[int, int, int]


def local_path(given: str, option: str) -> Path:
    """Return the path of an option, with ``~`` resolved.

    Raises:
        InputError: if it is empty, or there can be no such path on this machine.
    """
    try:
        if not given:
            raise ValueError("it is empty")
        path = Path(given).expanduser()
        path.is_dir()  # asks the system, which refuses some names
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option}: '{printable(given)}' is no path here ({reason}).") from error
    return path


def by_id(
    folder: Path, suffixes: Iterable[str], apart: Path | None = None
) -> dict[str, list[Path]]:
    """Return {id: files} of a folder and its subfolders, for files of some suffixes.

    An id is the path relative to the folder, with slashes and without suffix, as
    :func:`printable` gives it. Hidden files and folders are passed over. A file may be a symbolic
    link to anywhere; folders that are links are not entered. A run's folder within holds results,
    and is passed over, as is ``apart``, a file or folder within. Suffixes are in lower case; those
    of files may be in capitals.
    """
    paths = []
    for here, folders, names in os.walk(folder):
        if "run.json" in names and here != str(folder):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(here, name) for name in names if not name.startswith(".")]
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in paths if path.suffix.lower() in suffixes):
        if apart is not None and (path.resolve() == apart or apart in path.resolve().parents):
            continue
        if path.is_file() or (path.is_symlink() and not path.exists()):  # that cannot be read
            relative = path.relative_to(folder).with_suffix("")
            found.setdefault(printable(relative.as_posix()), []).append(path)
    return found


def find_images(
    folder: Path,
    option: str,
    strict: bool = False,
    apart: Path | None = None,
    arrays: tuple[str, ...] = (),
) -> tuple[dict[str, Path], list[str]]:
    """Return {id: file} in natural order ("2" before "10"), and what to say of other files.

    Files of the suffixes ``arrays`` are measurements too. See :func:`by_id`.

    Raises:
        InputError: if the folder is missing or holds no image, two files share an id, or, with
            ``strict``, an image is of a kind that is not read here.
    """
    if not folder.is_dir():
        raise InputError(
            f"{option}: there is no folder '{printable(folder)}'; give a folder with image files."
        )
    searched = by_id(folder, (*FOREIGN, *arrays, *SUFFIXES), apart)
    foreign = [p for paths in searched.values() for p in paths if p.suffix.lower() in FOREIGN]
    passed = ""
    if foreign:
        kinds = ", ".join(sorted({path.suffix.lower() for path in foreign}))
        passed = (
            f"{counted(len(foreign), 'image')} of kinds that are not read here ({kinds}), such as "
        )
        passed += f"'{printable(foreign[0])}'; convert them to PNG"
    found: dict[str, Path] = {}
    for name, paths in searched.items():
        read = [path for path in paths if path.suffix.lower() not in FOREIGN]
        if len(read) > 1:
            raise InputError(
                f"{option}: '{printable(read[0])}' and '{printable(read[1])}' would share the id "
                f"'{name}'; rename one."
            )
        if read:
            found[name] = read[0]
    if not found:
        kinds = f"measurement ({', '.join(arrays)}, or an image)"
        kinds = kinds if arrays else f"image ({', '.join(SUFFIXES)})"
        raise InputError(
            f"{option}: the folder '{printable(folder)}' holds no {kinds}; "
            f"{passed or 'give a folder that does'}."
        )
    if foreign and strict:
        raise InputError(f"{option}: {passed}.")
    return {name: found[name] for name in sorted(found, key=natural)}, [passed] * bool(foreign)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names with numbers as people do: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


class Kept:
    """Reads files once: what was read is kept while it takes no more than :data:`MAX_KEPT` bytes.

    A copy in a loader's worker process starts empty.

    >>> from cmi_lightning.data.images import read_image
    >>> from cmi_lightning.paths import SHIPPED
    >>> kept, path = Kept(read_image), SHIPPED["fashion-mnist-test"] / "00000.png"
    >>> kept(path) is kept(path)
    True

    Args:
        read: returns the tensor of a file; it may take more arguments.
    """

    def __init__(self, read: Callable[..., Tensor]) -> None:
        self.read, self.held, self.room = read, dict[Path, Tensor](), MAX_KEPT

    def __call__(self, path: Path, **further: Any) -> Tensor:
        """Return what a file holds, kept or read."""
        if path in self.held:
            return self.held[path]
        x = self.read(path, **further)
        if x.nbytes <= self.room:
            self.held[path] = x
            self.room -= x.nbytes
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": {}, "room": 0}


class Survey(NamedTuple, Generic[T]):
    """What was read by id, why other files were not, by file, and what a person should know."""

    read: dict[str, T]
    skipped: dict[str, str]
    notes: list[str]


def read_all(
    files: Mapping[str, Path],
    read: Callable[[str, Path, Note], T],
    strict: bool,
    option: str,
) -> Survey[T]:
    """Read every file: by ``read``, of its id, itself and what takes notes, "the images …".

    Raises:
        UnreadableError: with ``strict``, for the first unreadable file.
        InputError: if none is readable.
    """
    result: dict[str, T] = {}
    skipped: dict[str, str] = {}
    noted: dict[str, list[str]] = {}
    for name, path in files.items():
        shown = printable(path)
        notes: dict[str, None] = {}
        try:
            result[name] = read(name, path, notes.setdefault)
        except UnreadableError as error:
            if strict:
                raise
            skipped[shown] = str(error)
        for note in notes:
            noted.setdefault(note, []).append(shown)
    if not result:
        count = (
            f"none of {counted(len(skipped), 'image')} can be read. " if len(skipped) > 1 else ""
        )
        raise InputError(f"{option}: {count}{next(iter(skipped.values()))}")
    said = [
        f"{len(names)} of {len(files)} images {note} (such as '{names[0]}')"
        for note, names in noted.items()
    ]
    return Survey(result, skipped, said)


class FolderFiles(Dataset):
    """The readable files of a folder, as ``{key: tensor, "id": "sub/name"}`` in natural order.

    Every file is decoded by :meth:`look`, so that no bad file can stop a long run half-way, and the
    first GiB is kept: a run decodes each of them once.

    Args:
        data: the module with the options, such as :class:`cmi_lightning.data.ImageFolderData`.
        folder: the folder that it names.
        apart: a file or folder within that holds something else.

    Raises:
        InputError: as the module has it.
    """

    key: str
    option: str  # that names the folder
    arrays: tuple[str, ...] = ()  # suffixes of files that are no images

    def __init__(self, data: Any, folder: Path, apart: Path | None = None) -> None:
        self.strict, self.read = data.strict, Kept(self._read)
        self.how = Decoding(data.channels, data.background, data.white_level, data.range)
        self.found, self.passed = find_images(folder, self.option, self.strict, apart, self.arrays)
        self.wanted = dict(islice(self.found.items(), data.limit))

    def look(self) -> None:
        """Read all files: those that cannot be read are left out, or refused."""
        self.survey = read_all(self.wanted, self._measure, self.strict, self.option)
        self.survey.notes.extend(self.passed)
        self.files = [(name, self.wanted[name]) for name in self.survey.read]
        self.shapes = list(self.survey.read.values())

    def _read(self, file: Path, note: Note = bool) -> Tensor:
        return read_image(file, self.how, note)

    def _measure(self, name: str, file: Path, note: Note) -> Any:
        return tuple(self.read(file, note=note).shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, file = self.files[index]
        return {self.key: self.read(file), "id": name}


def report(skipped: dict[str, str], left: int, notes: Iterable[str]) -> None:
    """Print notes, and why files were left out: the first five, and how many there are."""
    lines = [f"data: {note}" for note in notes]
    lines += [f"skipped: {reason}" for reason in list(skipped.values())[:NUM_REPORTED]]
    if skipped:
        lines.append(
            f"skipped {len(skipped)} of {counted(len(skipped) + left, 'image')}, which cannot be "
            f"read "
            "(data.strict=true refuses them)"
        )
    print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr)


def check_channels(shapes: dict[str, Shape], what: str) -> None:
    """Refuse a folder, the option ``what``, whose images (C, H, W) differ in channels.

    Raises:
        InputError: naming the first two that differ.
    """
    first, (channels, *_) = next(iter(shapes.items()))
    for name, (other, *_) in shapes.items():
        if other != channels:
            raise InputError(
                f"{what}: '{first}' has {channels} channels and '{name}' {other}; set "
                "data.channels to 1, 3 or 4."
            )


def check_pixels(height: int, width: int, what: str, remedy: str) -> None:
    """Raise InputError if an image to be made would have more pixels than Pillow lets one have."""
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{what} would make images of {height}×{width} (height×width), more than {MAX_PIXELS} "
            f"pixels; {remedy}."
        )
