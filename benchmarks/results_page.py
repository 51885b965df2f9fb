"""Writes docs/results.md and docs/results/ from what the runs have left.

    python benchmarks/results_page.py

It reads runs/table/{fashion,descent,thousand} (`cmi-lightning tune` and `table`) and
runs/why/why.json (`benchmarks/why.py`). Not all of these need be there, as each takes hours: the
tables of a run are copied to docs/results, from where the pages are made, and a page that needs
more of a run that is gone stays as it was. The prose is in results_templates/ beside this script;
tables, and the numbers that they give, are put in from here. What results.md quotes of the other
pages (random direction, ascent with 1,000 steps, exact denoisers) is typed there.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cmi_lightning.report.verdicts import fixed
from cmi_lightning.table.cells import OF_SETS, PER_IMAGE
from cmi_lightning.table.command import parse
from cmi_lightning.table.run import records
from cmi_lightning.table.spec import CMI, Table, safe
from cmi_lightning.table.statistics import bootstrap_interval

NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "perceptual": "perceptual distance",
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
}
METRICS = PER_IMAGE | OF_SETS
TABLES = ("fashion", "descent", "thousand")
UNCHANGED = 1e-9
Json = dict[str, Any]


def load(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(entry: Json, digits: int, key: str = "difference") -> str:
    mean, low, high = (signed(entry[k], digits) for k in (key, "low", "high"))
    bold = "**" if entry.get("significant") else ""
    return f"{bold}{mean}{bold} [{low}, {high}]"


def grid(corner: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    lines = [f"| {corner} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def table_file(name: str, suffix: str) -> str:
    """Return the name in docs/results of a run's table."""
    return f"table{suffix}" if name == "fashion" else f"{name}-table{suffix}"


class ByTask:
    """Grids of tasks and bases; ``rows`` are those that there are."""

    def __init__(self, spec: Table, rows: Sequence[tuple[str, str]]) -> None:
        self.rows = rows
        self.tasks = {t: spec.tasks[t].label for t in dict.fromkeys(task for task, _ in rows)}
        self.bases = list(dict.fromkeys(method for _, method in rows))

    def by_task(self, show: Callable[[str, str], str], corner: str = "task") -> str:
        rows = ((label, [show(task, m) for m in self.bases]) for task, label in self.tasks.items())
        return grid(corner, self.bases, rows)


class TablePage(ByTask):
    """What a table's ``table.csv`` says.

    Args:
        path: the file.
        spec: tasks and methods, in their order.
    """

    def __init__(self, path: Path, spec: Table) -> None:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self.metrics = list(dict.fromkeys(row["metric"] for row in rows))
        self.cells = {(r["task"], r["method"], r["variant"], r["metric"]): r for r in rows}
        both = [(t, m) for t, m in spec.rows() if (t, m, "cmi", "psnr") in self.cells]
        super().__init__(spec, [row for row in both if row[1] != "none"])
        remedy = f"'{path}': rows have {{}} {{}}; cut them, `cmi-lightning table --report_only true"
        self.images = self._same("images", ("base", "cmi"), remedy + " --images …`.")
        self.equal_images = self._same("images", ("equal",), remedy + " --equal_images …`.")
        self.equal_steps = self._same("steps", ("equal",), f"'{path}': rows have {{}} {{}}.")

    def _same(self, column: str, variants: Sequence[str], refusal: str) -> int | None:
        """Return what all rows of some variants have in a column, or None without rows."""
        found = {row[column] for key, row in self.cells.items() if key[2] in variants}
        if len(found) > 1:
            raise SystemExit(refusal.format(", ".join(sorted(found)), column))
        return int(found.pop()) if found else None

    def value(self, task: str, method: str, variant: str, metric: str, column: str) -> float:
        return float(self.cells[task, method, variant, metric][column])

    def compared(self, task: str, method: str, variant: str, against: str, metric: str) -> Json:
        """Return a paired difference; empty where the table has none."""
        row = self.cells.get((task, method, variant, metric), {})
        if not row.get(f"difference_{against}"):
            return {}
        entry: Json = {k: float(row[f"{k}_{against}"]) for k in ("difference", "low", "high")}
        return entry | {"significant": row[f"significant_{against}"] == "true"}

    def difference(self, variant: str, against: str, metric: str, digits: int) -> str:
        """Return a metric's paired differences, task by base."""

        def show(task: str, method: str) -> str:
            entry = self.compared(task, method, variant, against, metric)
            return interval(entry, digits) if entry else "–"

        return self.by_task(show)

    def row(self, task: str, method: str) -> str:
        """Return every metric of a base and what CMI changes of it."""
        rows = []
        for metric in self.metrics:
            digits = METRICS[metric][3]
            mean = fixed(self.value(task, method, "base", metric, "mean"), digits)
            entry = self.compared(task, method, "cmi", "base", metric)
            rows.append((NAMES[metric], [mean, interval(entry, digits)]))
        return grid("metric", [method, f"change by {CMI}"], rows)

    def counts(self, variant: str, against: str, metric: str) -> Counter[str]:
        """Count the cells of the bases by verdict."""
        found: Counter[str] = Counter()
        sign = 1 if METRICS[metric][2] == "higher" else -1
        for row in self.rows:
            entry = self.compared(*row, variant, against, metric)
            if not entry:
                continue
            gain = sign * entry["difference"]
            if abs(gain) < UNCHANGED:
                found["same"] += 1
            else:
                lean = "" if entry["significant"] else "leaning "
                found[lean + ("better" if gain > 0 else "worse")] += 1
        return found

    def better(self, variant: str, against: str) -> int:
        """Count what is significantly better, over all cells of the bases and all metrics."""
        return sum(self.counts(variant, against, metric)["better"] for metric in self.metrics)

    def tally(self, variant: str, against: str) -> str:
        keys = ["better", "leaning better", "same", "leaning worse", "worse"]
        heads = ["better", "not told apart, leaning better", "unchanged", "leaning worse", "worse"]
        found = {m: self.counts(variant, against, m) for m in self.metrics}
        return grid(
            "metric", heads, ((NAMES[m], [str(c[k]) for k in keys]) for m, c in found.items())
        )

    def changes(self, variant: str, against: str, metric: str) -> list[float]:
        found = (self.compared(*row, variant, against, metric) for row in self.rows)
        return sorted(entry["difference"] for entry in found if entry)

    def passes(self, task: str, method: str) -> float:
        """Return the cost of CMI against its base, in network passes."""
        one, other = (self.value(task, method, v, "psnr", "passes") for v in ("cmi", "base"))
        return one / other

    def ratio(self) -> float:
        """Return the median cost of CMI against its base, in network passes."""
        return statistics.median(self.passes(*row) for row in self.rows)

    def means(self, metric: str = "psnr", digits: int = 2) -> str:
        """Return the bases' own means ± standard errors, and those of A⁺y."""

        def text(task: str, method: str, variant: str) -> str:
            mean, error = (self.value(task, method, variant, metric, c) for c in ("mean", "se"))
            return f"{mean:.{digits}f} ± {error:.{digits}f}"

        rows = (
            (label, [text(task, "", "measured"), *(text(task, m, "base") for m in self.bases)])
            for task, label in self.tasks.items()
        )
        return grid("task", ["A⁺y", *self.bases], rows)


class Search(ByTask):
    """What ``cmi-lightning tune`` has found: its study.json.

    Args:
        study: the file.
        spec: tasks and methods, in their order.
    """

    def __init__(self, study: Path, spec: Table) -> None:
        self.study = load(study)["study"]
        rows = [(t, m) for t, m in spec.rows() if m != "none" and m in self.study.get(t, {})]
        super().__init__(spec, rows)

    def scales(self) -> list[str]:
        trials = next(iter(self.study.values()))[f"{CMI}+{self.bases[0]}"]["trials"]
        return [scale for scale in trials if float(scale) != 0]

    def response(self) -> str:
        """Return the change of the objective by each scale of CMI, on validation images."""

        def show(task: str, method: str) -> str:
            trials = self.study[task][f"{CMI}+{method}"]["trials"]
            none = trials["0"]["mean"]
            return " / ".join(signed(trials[s]["mean"] - none, 2) for s in self.scales())

        return self.by_task(show)

    def lower_at_the_largest(self) -> int:
        last = self.scales()[-1]
        trials = [self.study[t][f"{CMI}+{m}"]["trials"] for t, m in self.rows]
        return sum(t[last]["mean"] < t["0"]["mean"] - UNCHANGED for t in trials)

    def none_preferred(self) -> int:
        """Count the cells where the search preferred no CMI, those that cannot change apart."""
        entries = [self.study[t][f"{CMI}+{m}"] for t, m in self.rows]
        return sum(not e["winner"] and self._matters(e) for e in entries)

    def at_the_edge(self) -> int:
        """Count the bases whose step size is at an edge of those tried, where it has an effect."""
        entries = [self.study[t][m] for t, m in self.rows]
        return sum(e["at_edge"] and self._matters(e) for e in entries)

    @staticmethod
    def _matters(entry: Json) -> bool:
        """Whether what was tried made any difference."""
        return len({trial["mean"] for trial in entry["trials"].values()}) > 1

    def information(self, folder: Path, scales: Sequence[str]) -> str:
        """Return the mean of I over validation images and steps, by scale."""

        def mean(task: str, method: str, scale: str) -> float:
            size = self.study[task][method]["chosen"]
            trial = folder / task / f"{CMI}@{scale}+{safe(method)}@{size:g}"
            curves = [r["curves"]["cmi/value"] for r in records(trial)]
            return statistics.fmean(float(v) for curve in curves for v in curve.values())

        return self.by_task(
            lambda task, method: " / ".join(f"{mean(task, method, s):.1f}" for s in scales),
            f"task, at scales {' / '.join(scales)}",
        )

    def sizes(self) -> str:
        def show(task: str, method: str) -> str:
            entry = self.study[task][method]
            return f"{entry['chosen']:g}" + ("*" if entry["at_edge"] else "")

        def scale(task: str, method: str) -> str:
            entry = self.study[task][f"{CMI}+{method}"]
            return f"{entry['chosen']:g}" + ("" if entry["winner"] else "°")

        heads = [*self.bases, f"{CMI} on {' / '.join(self.bases)}"]
        rows = (
            (
                label,
                [show(t, m) for m in self.bases] + [" / ".join(scale(t, m) for m in self.bases)],
            )
            for t, label in self.tasks.items()
        )
        return grid("task", heads, rows)


class Draws:
    """What a table's cells with several draws per image say.

    Args:
        folder: of the table.
        labels: of tasks, by key.
    """

    def __init__(self, folder: Path, labels: Json) -> None:
        self.folder, self.labels = folder, labels
        self.found = load(folder / "results.json")["posterior"]

    def images(self) -> int:
        return int(self.found[0]["images"])

    def quality(self) -> str:
        """Return coverage, spread and residual, a row per cell; a calibrated sampler's first."""
        heads = ["coverage of 50 %", "of 90 %", "spread / skill", "residual / σ√m"]
        expected = [f"{self.found[0]['expected'][p]:.2f}" for p in ("50", "90")]
        rows = [("calibrated", [*expected, "1", "1"])]
        for entry in self.found:
            values = [entry["coverage"]["50"], entry["coverage"]["90"]]
            values += [entry["spread_skill"], entry["residual"]]
            errors = [entry["errors"][k] for k in ("50", "90", "spread_skill", "residual")]
            shown = [f"{v:.3f} ± {e:.3f}" for v, e in zip(values, errors, strict=True)]
            rows.append((f"{self.labels[entry['task']]}, {entry['label']}", shown))
        return grid("cell", heads, rows)

    def change(self, task: str, method: str) -> str:
        """Return what CMI changes, paired, of single draws and of the mean of all of an image."""
        base, other = (
            {r["id"]: {**r["metrics"], **r.get("perceptual", {})} for r in records(folder)}
            for name in (safe(method), f"{safe(method)}-cmi")
            if (folder := self.folder / "posterior" / task / name)
        )
        rows = []
        for metric, digits in (("psnr", 2), ("ssim", 3), ("perceptual", 3)):
            cells = []
            for key in (f"{metric}_draws", metric):
                values = [other[i][key] - base[i][key] for i in base]
                low, high = bootstrap_interval(values)
                entry = {"difference": statistics.fmean(values), "low": low, "high": high}
                before = statistics.fmean(row[key] for row in base.values())
                cells += [f"{before:.{digits}f}", interval(entry, digits)]
            rows.append((NAMES[metric], cells))
        heads = ["one draw, without", "change", "mean of all draws, without", "change"]
        return grid("metric", heads, rows)


class Why:
    """What `benchmarks/why.py` has found.

    Args:
        path: its results.
        labels: of tasks, by key.
    """

    def __init__(self, path: Path, labels: Json) -> None:
        self.found = load(path)
        self.cells = list(dict.fromkeys(c for row in self.found.values() for c in row))
        parts = (cell.split(", ") for cell in self.cells)
        self.heads = [f"{labels[task]}, {method}" for task, method in parts]

    def images(self) -> int:
        return min(e["psnr"]["n"] for row in self.found.values() for e in row.values())

    def table(self, names: Sequence[str], show: Callable[[Json], str]) -> str:
        rows = (
            (name, [show(row[c]) if c in row else "–" for c in self.cells])
            for name in names
            if (row := self.found.get(name))
        )
        return grid("variant", self.heads, rows)

    def difference(self, metric: str, digits: int, names: Sequence[str]) -> str:
        return self.table(names, lambda entry: interval(entry[metric], digits, "mean"))

    def information(self, names: Sequence[str]) -> str:
        return self.table(names, lambda entry: f"{entry['information']:.1f}")


def mean_over(folder: Path, images: int) -> float:
    """Return a cell's PSNR over its first images."""
    found = [record["metrics"]["psnr"] for record in records(folder, images)]
    if len(found) < images:
        raise SystemExit(f"'{folder}' has {len(found)} images, and {images} are compared.")
    return statistics.fmean(found)


def collect(tables: Path, docs: Path, spec: Table) -> None:
    """Copy the runs' tables to docs/results, with the commits that tabulated them.

    A run that has not come as far as what is there is refused, before anything is copied.
    """
    study = tables / "fashion" / "tune" / "study.json"
    parts = {n: tables / n for n in TABLES if (tables / n / "results.json").is_file()}
    for name, folder in parts.items():
        check_rows(TablePage, folder / "table.csv", docs / table_file(name, ".csv"), spec)
    if study.is_file():
        check_rows(Search, study, docs / study.name, spec)
        text = json.dumps(load(study), ensure_ascii=False, indent=1)
        (docs / study.name).write_text(text + "\n", encoding="utf-8")
    commits = load(docs / "commits.json") if (docs / "commits.json").is_file() else {}
    for name, folder in parts.items():
        for suffix in (".md", ".csv"):
            shutil.copyfile(folder / f"table{suffix}", docs / table_file(name, suffix))
        commits[name] = load(folder / "results.json")["commit"] or "none: a copy outside git"
    (docs / "commits.json").write_text(json.dumps(commits, indent=1) + "\n", encoding="utf-8")


def check_rows(kind: type[ByTask], new: Path, old: Path, spec: Table) -> None:
    """Refuse a file with fewer rows than the one that it is to replace."""
    if old.is_file() and (missing := set(kind(old, spec).rows) - set(kind(new, spec).rows)):
        task, method = min(missing)
        raise SystemExit(
            f"'{new}' has no row {task}, {method}, which '{old}' has: run it, or give other --runs."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    tables, docs = options.runs / "table", options.docs / "results"
    docs.mkdir(exist_ok=True)
    spec, _ = parse(["-c", "table/fashion"], "table")
    collect(tables, docs, spec)
    labels = {key: task.label for key, task in spec.tasks.items()}
    pages = {n: TablePage(docs / table_file(n, ".csv"), spec) for n in TABLES}
    values: Json = {
        "ascent": pages["fashion"],
        "descent": pages["descent"],
        "thousand": pages["thousand"],
        "search": Search(docs / "study.json", spec),
        "commits": load(docs / "commits.json"),
        "signed": signed,
        "median": statistics.median,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "results_templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def write(name: str, needs: Sequence[Path] = (), **more: Callable[[], Any]) -> None:
        target = options.docs / name
        if missing := [str(path) for path in needs if not path.exists()]:
            print(f"{target}: as it was, without {', '.join(missing)}")
            return
        template = environment.get_template(f"{Path(name).stem}.md.j2")
        text = template.render(**values, **{key: make() for key, make in more.items()})
        target.write_text(text, encoding="utf-8")
        print(target)

    write("results.md")
    write("results/descent.md")
    why = options.runs / "why" / "why.json"
    write("results/variants.md", [why], why=lambda: Why(why, labels))
    drawn = [tables / "descent" / "results.json"]
    drawn += [
        tables / "descent" / "posterior" / "super_resolution" / cell / "posterior.json"
        for cell in ("DPS", "DPS-cmi")
    ]
    write("results/draws.md", drawn, draws=lambda: Draws(tables / "descent", labels))
    tried = tables / "fashion" / "tune"
    write("results/search.md", [tried / key for key in labels], trials=lambda: tried)
    long = tables / "thousand" / "tune" / "study.json"
    usual = tables / "fashion" / "cells" / "super_resolution" / "DPS"
    write(
        "results/thousand.md",
        [long, usual],
        long=lambda: Search(long, spec),
        usual=lambda: mean_over(usual, pages["thousand"].images or 0),
    )


if __name__ == "__main__":
    main()
