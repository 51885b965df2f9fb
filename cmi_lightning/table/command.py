"""``cmi-lightning table`` and ``tune``."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

from filelock import FileLock, Timeout

from cmi_lightning.errors import InputError
from cmi_lightning.files import make_folder
from cmi_lightning.predict.messages import explain
from cmi_lightning.predict.options import resolved, text_of
from cmi_lightning.report.page import write_report
from cmi_lightning.report.results import ADDED, read_results, write_results
from cmi_lightning.report.tables import write_tables
from cmi_lightning.table.aggregate import aggregate
from cmi_lightning.table.records import Cell
from cmi_lightning.table.run import Job, ProgressPrinter, first_process, run
from cmi_lightning.table.spec import Table
from cmi_lightning.table.tune import check as check_tuning
from cmi_lightning.table.tune import count_trials, probes, read_searches
from cmi_lightning.table.tune import tune as search


def parse(args: Sequence[str], command: str) -> tuple[Table, str]:
    """Return the table that configurations and options describe, and its YAML.

    Raises:
        InputError: for a wrong key or value, in one sentence.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = ArgumentParser(
        prog=f"cmi-lightning {command}", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file, or a name")
    parser.add_class_arguments(Table, fail_untyped=True)
    try:
        parsed = parser.parse_args(resolved(args))
    except ArgumentError as error:
        raise InputError(explain(str(error), parser.get_defaults().keys())) from error
    parsed.pop("config", None)
    text = parser.dump(parsed, skip_validation=True)
    return Table(**vars(parser.instantiate_classes(parsed))), text


def tune(args: Sequence[str]) -> int:
    """Choose step sizes on the validation images of a table's configuration."""
    spec, _ = parse(args, "tune")
    check_tuning(spec)
    check(spec, probes(spec))
    with _at_work(spec):
        search(spec, ProgressPrinter(count_trials(spec)))
    if not first_process():
        return 0
    print(f"study: {spec.folder / 'tune' / 'study.json'}")
    print(f"winners: {spec.folder / 'step_sizes.yaml'}; give it to `table` as a further -c")
    return 0


def rounds(table: Table) -> list[list[Job]]:
    """Return a table's work: rounds over all cells that want more images, then repeated draws."""
    work: list[list[Job]] = []
    for before in range(0, table.images, table.round):
        images = min(before + table.round, table.images)
        work.append([])
        for task, method in table.rows():
            cells = (table.cell(task, method, v, images) for v in table.variants(method))
            work[-1].append(tuple(cell for cell in cells if cell.images > before))
    return [*work, [(cell,) for cell in table.posterior_cells()]] if table.posterior else work


def check(table: Table, cells: Iterable[Cell]) -> None:
    """Check, before any work, that cells' configurations are there and read the step sizes.

    Raises:
        InputError: naming the configuration or the option.
    """
    for cell in cells:
        option = table.descent.option if table.descent and cell.variant == "descent" else None
        if option and not cell.validation and cell.step_sizes.get(option, 0.0) >= 0:
            raise InputError(
                f"step_sizes.{cell.task}: give '{ADDED['descent']}+{cell.method}' a value below "
                "zero; `cmi-lightning tune` finds one."
            )
        arguments = resolved(table.arguments(cell))
        configs = [value for flag, value in itertools.pairwise(arguments) if flag == "-c"]
        text = "".join(map(text_of, configs))
        for name in cell.step_sizes:
            if f"step_sizes.{name}" not in text:
                raise InputError(
                    f"{cell.task}, {cell.label}: none of its configurations reads the step size "
                    f"'{name}' (${{oc.select:step_sizes.{name},1.0}}); mend its method's option."
                )


def table(args: Sequence[str]) -> int:
    """Run a table in rounds, and write its report after each."""
    spec, text = parse(args, "table")
    command = shlex.join(["cmi-lightning", "table", *args])
    first = first_process()
    work = rounds(spec)
    check(spec, {cell.folder: cell for part in work for job in part for cell in job}.values())
    others = [s for *_, s, used in read_searches(spec) if s.chosen is not None and not used]
    if first and others:
        print(f"The step sizes that were found are not used: add -c {spec.folder}/step_sizes.yaml")
    work = [[]] if spec.report_only else work
    jobs = [job for part in work for job in part]
    printer = ProgressPrinter(sum(map(len, jobs)))
    printer.expect(jobs)
    with _at_work(spec):
        for part in work:
            try:
                run(spec, part, printer)
            finally:  # what is done is shown, whatever became of the rest
                if first:
                    publish(spec, text, command)
    if not first:
        return 0  # Lightning takes any other code of a further process for a crash
    print(f"report: {spec.folder / 'report.html'}; numbers: {spec.folder / 'table.csv'}")
    return 3 if any(cell.failed for cell in read_results(spec.folder / "results.json").cells) else 0


def publish(table: Table, config: str, command: str) -> None:
    """Write what the finished images say: results.json, the report and the tables."""
    results = aggregate(table, config, command)
    write_results(results, table.folder / "results.json")
    write_report(results, table.folder)
    write_tables(results, table.folder)


@contextlib.contextmanager
def _at_work(table: Table) -> Iterator[None]:
    """Keep a second command out of the folder, and say how to go on after Ctrl-C or SIGTERM.

    Both end a cell with their exit codes.

    Raises:
        InputError: if a command is at work there.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    lock = FileLock(table.folder / ".lock")
    if not table.report_only and first_process():  # files are written whole: a look is safe
        make_folder(table.folder, "output")
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise InputError(
                    f"Another command is at work in '{table.folder}': wait for it, or set another "
                    "output."
                ) from error
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        print(
            f"cmi-lightning: stopped; what is done is in '{table.folder}'. Run the same command "
            "again to go on.",
            file=sys.stderr,
        )
        raise SystemExit(stop.code if isinstance(stop, SystemExit) else 130) from None
    finally:
        lock.release()
