"""The folder of a run: what is done, and whose turn it is."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cmi_lightning import files
from cmi_lightning.data.files import natural
from cmi_lightning.errors import InputError, counted
from cmi_lightning.files import read_json, write_json
from cmi_lightning.paths import inside
from cmi_lightning.predict.fingerprint import digest
from cmi_lightning.predict.folder import RunFolder, afresh
from cmi_lightning.predict.processes import by_the_first, leave_if_orphaned

if TYPE_CHECKING:
    import lightning as L

    from cmi_lightning.predict.callback import SamplingCallback

# Seconds: between looks at the disk; for a network file system to show a new file; without a new
# record, which no batch takes. A process that fails is noticed much sooner, by what started it.
POLL, VISIBLE, PATIENCE = 0.5, 90.0, 6 * 3600.0


class Run:
    """The samples of one prediction run.

    Args:
        names: the samples that will come, in the order of the results; others follow as they come.

    Attributes:
        folder: where records are kept; None if no callback writes any.
        ids: the samples seen so far, in the loader's order, on every process the same.
        done: what was finished before this run: the checksum of its input, by id.
        failures: why a sample was given up, by id.
        options: the checksum of all options, which every record has.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.folder: Path | None = None
        self._order = {name: i for i, name in enumerate(names)}
        self.ids: list[str] = []
        self.done: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.options = ""
        self._position: dict[str, int] = {}
        self._turn = 0
        self._finished: set[str] = set()  # by this process
        self._collected: list[dict[str, Any]] | None = None
        self._files: RunFolder | None = None

    def record_path(self, name: str) -> Path:
        """Return the path of a sample's record."""
        assert self.folder is not None
        return inside(self.folder / "records", name, ".json")

    # Opening ---------------------------------------------------------------------------------

    def open(
        self,
        trainer: L.Trainer,
        recorders: Sequence[SamplingCallback],
        fingerprint: Mapping[str, str],
        overwrite: bool,
        chosen: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Look up what is done, on the first process for all: no process may see later records."""
        self.folder = Path(trainer.default_root_dir).expanduser() if recorders else None
        if self.folder is None:
            return
        self.options = digest(sorted(fingerprint.items()))
        self._files = RunFolder(self.folder, trainer.global_rank)
        try:
            self.done = by_the_first(
                trainer, lambda: self._look_up(recorders, fingerprint, overwrite, chosen)
            )
        except Exception:
            self.close()
            raise
        started = time.monotonic()
        while not (self.folder / "run.json").is_file():
            if time.monotonic() - started > VISIBLE:
                raise InputError(
                    f"'{self.folder}' is not shared by all processes: set trainer.default_root_dir "
                    "to a folder that is."
                )
            time.sleep(POLL)
        if not trainer.is_global_zero:
            self._files.read()
            self._files.open()

    def _look_up(
        self,
        recorders: Sequence[SamplingCallback],
        fingerprint: Mapping[str, str],
        overwrite: bool,
        chosen: Mapping[str, str],
    ) -> dict[str, str]:
        assert self._files is not None
        self._files.lock()
        self._files.open()
        if overwrite:
            self._files.remove_all()
        self._files.tidy()
        self._files.refuse_other(fingerprint)
        records = list(self._read_all())
        self._refuse_strangers(records, overwrite)
        write_json(self._files.path / "run.json", {**fingerprint, **chosen})
        done = [r for r in records if all(c.recorded(r) for c in recorders)]
        return {record["id"]: record["input"] for record in done}

    def close(self, finished: bool = False) -> None:
        """Let other runs into the folder."""
        if self._files is not None:
            self._files.close(finished)

    def _refuse_strangers(self, records: Sequence[Mapping[str, Any]], overwrite: bool) -> None:
        """Refuse records of other options, where no run.json tells which."""
        if strangers := [r for r in records if r.get("options") != self.options]:
            remedy = "" if overwrite else f", or {afresh()}"
            raise InputError(
                f"The folder '{self.folder}' has {len(strangers)} results of other options than "
                f"its run.json names. Set another trainer.default_root_dir{remedy}."
            )

    def _read_all(self) -> Iterable[dict[str, Any]]:
        assert self.folder is not None
        for path in sorted((self.folder / "records").rglob("*.json")):
            with contextlib.suppress(ValueError):  # a crash of the machine may have cut it short
                record = read_json(path)
                if isinstance(record, dict) and {"id", "input"} <= set(record):
                    yield record

    # Sharing ---------------------------------------------------------------------------------

    def share(self, ids: Sequence[str], world_size: int, rank: int, batches: float) -> list[int]:
        """Return the rows of a batch that are this process's to restore.

        A batch is one piece of work, or several where there are fewer batches than processes. Work
        that is not done yet goes round the processes. A piece with any sample missing is restored
        whole: a network's result depends, in its last digits, on what else is in the batch, and so
        a resumed run equals an uninterrupted one. Files that are written from now on appear
        with the records, in :meth:`finish`.

        Every process must be shown every batch; ``batches`` is their number, or inf.

        Raises:
            InputError: if an id occurs twice.
        """
        for name in ids:
            if name in self._position:
                raise InputError(f"Two samples have the id '{name}'; ids must be unique.")
            self._position[name] = self._order.get(name, len(self.ids))
            self.ids.append(name)
        if self.folder is not None:
            files.hold()
        pieces = math.ceil(world_size / batches) if 0 < batches < world_size else 1
        cuts = [round(i * len(ids) / pieces) for i in range(pieces + 1)]
        mine: list[int] = []
        for start, end in itertools.pairwise(cuts):
            if all(name in self.done for name in ids[start:end]):
                continue
            if self._turn % world_size == rank:
                mine += range(start, end)
            self._turn += 1
        return mine

    def position(self, name: str) -> int:
        """Return a sample's place among the results."""
        return self._position[name]

    def check_input(self, name: str, checksum: str) -> None:
        """Refuse a sample whose input is not what was restored before.

        Raises:
            InputError: naming the sample.
        """
        if self.done.get(name, checksum) != checksum:
            raise InputError(
                f"'{name}' is not the image that was restored in '{self.folder}' before; set "
                f"another trainer.default_root_dir, or {afresh()}."
            )

    # Records ---------------------------------------------------------------------------------

    def finish(self, records: Sequence[dict[str, Any]]) -> None:
        """Write a batch's records, and let them appear with the batch's files: it is done."""
        for record in records:
            if record["failed"]:
                self.failures[record["id"]] = record["failed"]
            if self.folder is not None:
                write_json(self.record_path(record["id"]), {**record, "options": self.options})
        files.publish()
        self._finished.update(record["id"] for record in records)

    def count(self) -> int:
        """Return how many records the folder has."""
        if self.folder is None:
            return 0
        return sum(1 for _ in (self.folder / "records").rglob("*.json"))

    def collect(self, trainer: L.Trainer, wait: bool = True) -> list[dict[str, Any]]:
        """Return the records of this run's samples, in order, on every process.

        What an earlier run of the same options did beyond them, as with a higher ``data.limit``,
        follows.

        Without ``wait`` for the other processes, these are the records that there are.

        Raises:
            InputError: if samples are left without a record.
        """
        if self.folder is None:
            return []
        if self._collected is None or not wait:
            if wait:
                self._wait(trainer)
            else:
                files.drop()  # an error broke the batch off
            records = []
            further = sorted(set(self.done) - set(self.ids), key=natural)
            for name in [*sorted(self.ids, key=self.position), *further]:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    records.append(read_json(self.record_path(name)))
            self.failures = {r["id"]: r["failed"] for r in records if r["failed"]}
            self._collected = records
        return self._collected

    def _wait(self, trainer: L.Trainer) -> None:
        """Wait until all samples have records.

        A barrier alone would not do: its timeout, minutes, may be less than a batch takes.
        """
        missing, news = set(self.ids) - self._finished, time.monotonic()
        while True:
            left = {name for name in missing if not self.record_path(name).is_file()}
            news = time.monotonic() if left < missing else news
            missing = left
            if not missing:
                break
            if trainer.world_size == 1 or time.monotonic() - news > PATIENCE:
                raise InputError(
                    f"No record of {counted(len(missing), 'sample')} in '{self.folder}' "
                    f"('{min(missing)}' "
                    "is one): is the folder shared by all processes? Run the same command again."
                )
            leave_if_orphaned()
            time.sleep(POLL)
        trainer.strategy.barrier()
