"""``cmi-lightning table`` and ``tune``."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence

from cmi_lightning.cli import one_sentence, resolved
from cmi_lightning.errors import InputError
from cmi_lightning.runs import write_json
from cmi_lightning.table.report import write_report
from cmi_lightning.table.results import aggregate
from cmi_lightning.table.run import Done, Job, run
from cmi_lightning.table.spec import Table
from cmi_lightning.table.tables import write_tables
from cmi_lightning.table.tune import tune as search


def parse(args: Sequence[str], command: str) -> tuple[Table, str]:
    """Return the table that configurations and options describe, and its YAML.

    Raises:
        InputError: for a wrong key or value, in one sentence.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = ArgumentParser(prog=f"cmi-lightning {command}", exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file, or a name")
    parser.add_class_arguments(Table, fail_untyped=True)
    try:
        parsed = parser.parse_args(resolved(args))
    except ArgumentError as error:
        raise InputError(one_sentence(str(error))) from error
    parsed.pop("config", None)
    text = parser.dump(parsed, skip_validation=True)
    return Table(**vars(parser.instantiate_classes(parsed))), text


class Teller:
    """Prints a line per finished cell, with the time left."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.started = time.monotonic()

    def __call__(self, done: Done) -> None:
        """Print one cell."""
        self.count += 1
        spent = time.monotonic() - self.started
        left = spent / self.count * (self.total - self.count)
        print(
            f"{time.strftime('%H:%M:%S')}  {self.count}/{self.total}  {done.cell.task}, "
            f"{done.cell.label}, {done.images} images, {done.seconds:.0f} s; "
            f"{left / 60:.0f} min left",
            flush=True,
        )


def tune(args: Sequence[str]) -> int:
    """Choose step sizes on the validation images of a table's configuration."""
    table, _ = parse(args, "tune")
    rows = table.rows()
    trials = sum(len(table.methods[m].space) for _, m in rows) + len(rows) * len(table.cmi.space)
    search(table, Teller(trials))
    print(f"study: {table.folder / 'tune' / 'study.json'}")
    print(f"winners: {table.folder / 'step_sizes.yaml'}; use it as a further -c of the table")
    return 0


def rounds(table: Table) -> list[list[Job]]:
    """Return the work of a table, in rounds that each go over all cells."""
    found = []
    for images in range(table.round, table.images + table.round, table.round):
        rows = [
            tuple(table.cell(task, method, v) for v in table.variants(method))
            for task, method in table.rows()
        ]
        found.append([Job(cells, min(images, table.images)) for cells in rows])
    return found


def table(args: Sequence[str]) -> int:
    """Run a table in rounds, and write its report after each."""
    spec, text = parse(args, "table")
    command = shlex.join(["cmi-lightning", "table", *args])
    work = [] if spec.report_only else rounds(spec)
    cells = list(spec.posterior_cells())
    if cells and spec.posterior is not None and not spec.report_only:
        work.append([Job((cell,), spec.posterior.images) for cell in cells])
    teller = Teller(sum(len(job.cells) for part in work for job in part))
    for part in work:
        run(spec, part, teller)
        publish(spec, text, command)
    if not work:
        publish(spec, text, command)
    print(f"report: {spec.folder / 'report.html'}; numbers: {spec.folder / 'table.csv'}")
    failed = json.loads((spec.folder / "results.json").read_text(encoding="utf-8"))["cells"]
    return 3 if any(cell["failed"] for cell in failed) else 0


def publish(table: Table, config: str, command: str) -> None:
    """Write what the finished images say: results.json, the report and the tables."""
    results = aggregate(table, config, command)
    write_json(table.folder / "results.json", results)
    write_report(results, table.folder)
    write_tables(results, table.folder)
