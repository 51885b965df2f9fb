"""A run's folder: it owns what it wrote, and touches nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cmi_lightning import files
from cmi_lightning.errors import InputError, printable, wording
from cmi_lightning.files import make_folder, read_json
from cmi_lightning.predict.fingerprint import FREE, differences

# The folders that callbacks make in a run's folder.
RESULTS = (
    *("restored", "draws", "std", "truth", "measurement"),
    *("records", "features", "timings"),
)
LOCK, MANIFEST = ".lock", "manifest.txt"
PATIENCE = 10.0  # seconds: workers of a killed process hold its lock for a while


class RunFolder:
    """The files of one run, by a manifest that names each before it is written.

    Every process adds to a manifest of its own; the first one merges them.

    Args:
        path: the folder.
        rank: this process; the first holds the lock for all.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        self.owned: set[str] = set()
        self._lock = FileLock(path / LOCK)

    def lock(self) -> None:
        """Keep other runs out.

        Raises:
            InputError: if another run is at work, or nobody can write in the folder.
        """
        make_folder(self.path, "trainer.default_root_dir")
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise InputError(
                f"Another run is at work in '{printable(self.path)}': wait for it, or set another "
                "trainer.default_root_dir."
            ) from error
        except NotImplementedError:  # a file system without locks
            pass

    def read(self) -> None:
        """Learn what the run owns."""
        for path in self.path.glob(f"{MANIFEST}*"):
            self.owned.update(path.read_text("utf-8", "surrogateescape").splitlines())

    def tidy(self) -> None:
        """Merge the processes' manifests, and remove what killed processes left half-written."""
        self.read()
        if self.owned:
            text = "".join(f"{name}\n" for name in sorted(self.owned))
            files.write(self.path / MANIFEST, text.encode("utf-8", "surrogateescape"))
        for path in self.path.glob(f"{MANIFEST}.*"):
            path.unlink(missing_ok=True)
        files.remove_temporary([self.path / MANIFEST, *(self.path / name for name in self.owned)])

    def remove_all(self) -> None:
        """Remove every file that the run owns."""
        self.read()
        for name in self.owned:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (self.path / name).unlink()
        for path in self.path.glob(f"{MANIFEST}*"):
            path.unlink(missing_ok=True)
        self.owned.clear()

    def claim(self, path: Path) -> None:
        """Note a file as the run's own, before it is written.

        Raises:
            InputError: if it is there and the run did not write it.
        """
        start = f"{self.path}{os.sep}"
        name = str(path)
        name = name[len(start) :] if name.startswith(start) else os.path.relpath(path, self.path)
        if name == MANIFEST or name in self.owned:
            return
        if os.path.lexists(path):
            self.read()  # another process of the run may have written it
            if name in self.owned:
                return
            raise InputError(
                f"'{printable(path)}' is in the way: no run in '{printable(self.path)}' wrote it. "
                "Move it, or set another trainer.default_root_dir."
            )
        own = self.path / (MANIFEST if self.rank == 0 else f"{MANIFEST}.{self.rank}")
        with own.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{name}\n")
        files.settle(own)
        self.owned.add(name)

    def open(self) -> None:
        """Claim whatever is written from now on; a process has one run at a time."""
        files.claims[:] = [self.claim]

    def close(self, finished: bool = False) -> None:
        """Let others in; a finished run leaves one manifest."""
        files.drop()
        if self.claim in files.claims:
            files.claims.remove(self.claim)
            if finished and self.rank == 0:
                self.tidy()
        self._lock.release(force=True)

    @property
    def options(self) -> dict[str, str]:
        """The run's options, as its run.json has them; none where there is no such file."""
        with contextlib.suppress(OSError, ValueError):
            return dict(read_json(self.path / "run.json"))
        return {}

    def refuse_other(self, fingerprint: Mapping[str, str]) -> None:
        """Refuse results of other options.

        Raises:
            InputError: naming the options that differ.
        """
        before = {name: value for name, value in self.options.items() if name not in FREE}
        if before and (differ := differences(before, fingerprint)):
            raise InputError(
                f"The folder '{self.path}' holds the results of other options: {differ}. Set "
                f"another trainer.default_root_dir, or {afresh()}."
            )

    def refuse_foreign_logs(self, trainer: Any) -> None:
        """Refuse a logger that writes into another run's folder.

        Raises:
            InputError: naming that folder.
        """
        for logger in trainer.loggers:
            path = Path(getattr(logger, "save_dir", None) or self.path).expanduser()
            if path.resolve() != self.path.resolve() and (path / "run.json").is_file():
                raise InputError(
                    f"trainer.logger writes into '{path}', the folder of another run: set its "
                    "save_dir to trainer.default_root_dir."
                )

    def refuse_overlap(self, inputs: dict[str, Path]) -> None:
        """Refuse inputs, by option, that lie where the run writes.

        Raises:
            InputError: naming the option.
        """
        here = self.path.resolve()
        for option, given in inputs.items():
            path = given.resolve()
            inside = path.relative_to(here).parts if path.is_relative_to(here) else None
            if inside == () or (inside and inside[0] in RESULTS):
                raise InputError(
                    f"{option}: '{printable(given)}' is where trainer.default_root_dir="
                    f"'{printable(self.path)}' puts results, which would replace it. Set another "
                    "trainer.default_root_dir."
                )


def afresh() -> str:
    """Return how to start afresh, in the words of the one who asks."""
    return wording("start afresh with --overwrite", "start afresh with overwrite=True")
