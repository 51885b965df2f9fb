"""Tables of docs/methods.md from the cells of table/methods; nothing is run.

    cmi-lightning table -c table/photos -c table/methods --output FOLDER
    python benchmarks/methods.py FOLDER

Per metric a row a method and a column a task: bold is the best, and what a paired 95 % interval
does not tell from it. Then how far the methods without a step size are from DPS with a searched
one, and the coverage of draws, where there are some.
"""

from __future__ import annotations

import sys
from statistics import fmean

from cmi_lightning.report.results import Metric
from cmi_lightning.table.cells import METRICS, StartedCell, started_cells
from cmi_lightning.table.command import parse
from cmi_lightning.table.records import passes, read_json
from cmi_lightning.table.resampling import bootstrap_interval
from cmi_lightning.table.spec import Table

SHOWN = [metric for metric in METRICS if metric.key in ("psnr", "ssim", "lpips")]
AGAINST = "DPS"
Cells = dict[str, dict[str, StartedCell]]  # by task, then by label


def difference(one: StartedCell, other: StartedCell, metric: str) -> tuple[float, float, float]:
    """Return the mean of one minus the other over the images of both, and its 95 % interval."""
    mine, theirs = one.values(metric), other.values(metric)
    ids = [name for name in mine if name in theirs]
    values = [mine[name] - theirs[name] for name in ids]
    return fmean(values), *bootstrap_interval(values, one.clusters_of(ids))


def means(cells: Cells, metric: Metric) -> dict[str, list[str]]:
    """Return each method's means, one a task."""
    text: dict[str, list[str]] = {name: [] for row in cells.values() for name in row}
    for row in cells.values():
        mean = {name: fmean(cell.values(metric.key).values()) for name, cell in row.items()}
        best = max(mean, key=lambda name: metric.sign * mean[name])
        for name, column in text.items():
            if name not in row:
                column.append("–")
                continue
            _, low, high = difference(row[name], row[best], metric.key)
            number = f"{mean[name]:.{min(metric.digits, 3)}f}"
            column.append(f"**{number}**" if name == best or low <= 0 <= high else number)
    return text


def print_table(head: list[str], rows: dict[str, list[str]]) -> None:
    print("\n| method | " + " | ".join(head) + " |\n|---|" + "---:|" * len(head))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row) + " |")


def costs(cells: Cells) -> dict[str, list[str]]:
    """Return each method's passes and seconds an image, over the tasks."""
    every: dict[str, list[StartedCell]] = {}
    for row in cells.values():
        for name, cell in row.items():
            every.setdefault(name, []).append(cell)
    return {
        name: [
            str(own[0].cell.steps),
            f"{fmean(passes(cell.all) or 0 for cell in own):.0f}",
            f"{fmean(cell.seconds() or 0 for cell in own):.1f}",
        ]
        for name, own in every.items()
    }


def unsearched(table: Table, cells: Cells) -> dict[str, list[str]]:
    """Return PSNR minus that of DPS with a searched step, of methods that have no step size."""
    free = [m for m, method in table.methods.items() if method.option is None]
    rows: dict[str, list[str]] = {}
    for name in free:
        for row in cells.values():
            column = rows.setdefault(name, [])
            if name in row and AGAINST in row:
                mean, low, high = difference(row[name], row[AGAINST], "psnr")
                column.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−"))
            else:
                column.append("–")
    return {name: column for name, column in rows.items() if set(column) != {"–"}}


def coverage(table: Table) -> dict[str, list[str]]:
    """Return the shares of pixels inside central intervals of the draws, by cell."""
    read = {c.label: read_json(c.folder / "posterior.json") for c in table.posterior_cells()}
    return {
        name: [f"{e['value']:.2f} ({e['expected']:.2f})" for e in summary["coverage"].values()]
        for name, summary in read.items()
        if summary
    }


def main() -> None:
    table, _ = parse(
        ["-c", "table/photos", "-c", "table/methods", f"--output={sys.argv[1]}"], "table"
    )
    cells: Cells = {}
    for (task, _, _), cell in started_cells(table).items():
        label = cell.cell.label if cell.cell.variant != "equal" else f"{AGAINST}, as dear as CMI"
        cells.setdefault(task, {})[label] = cell
    tasks = [table.tasks[task].label for task in cells]
    for metric in SHOWN:
        print(f"\n{metric.heading}")
        print_table(tasks, means(cells, metric))
    print_table(["levels", "passes", "seconds"], costs(cells))
    print(f"\nPSNR minus that of {AGAINST}, whose step was searched")
    print_table(tasks, unsearched(table, cells))
    if rows := coverage(table):
        print("\nCoverage (expected)")
        print_table(["50 %", "90 %"][: len(next(iter(rows.values())))], rows)


if __name__ == "__main__":
    main()
