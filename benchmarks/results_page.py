"""Writes docs/results.md and docs/results/ from what the runs have left.

    python benchmarks/results_page.py

It reads runs/table/{fashion,descent,thousand} (`cmi-lightning tune` and `table`) and
runs/why/why.json (`benchmarks/why.py`). The prose is in results_page.md.j2 beside it; every table,
and every number that a run gives, is put in from here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cmi_lightning.table.run import records
from cmi_lightning.table.spec import CMI, safe
from cmi_lightning.table.statistics import bootstrap_interval

NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "perceptual": "perceptual distance",
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
}
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


class TablePage:
    """What one table's results and study say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = load(folder / "results.json")
        study = folder / "tune" / "study.json"
        self.whole_study = load(study) if study.is_file() else {"study": {}}
        self.study = self.whole_study["study"]
        self.metrics = {m["key"]: m for m in self.results["metrics"]}
        self.cells = {(c["task"], c["method"], c["variant"]): c for c in self.results["cells"]}
        self.compared = {
            (c["task"], c["method"], c["variant"], c["against"]): c["metrics"]
            for c in self.results["comparisons"]
        }
        tasks = {c["task"] for c in self.results["cells"]}
        methods = {c["method"] for c in self.results["cells"]}
        self.tasks = [(t["key"], t["label"]) for t in self.results["tasks"] if t["key"] in tasks]
        self.bases = [m for m in self.results["methods"] if m in methods and m != "none"]
        self.rows = [(task, base) for task, _ in self.tasks for base in self.bases]
        counts = sorted({c["images"] for c in self.results["cells"]})
        if counts[0] != counts[-1]:
            raise SystemExit(f"'{folder}': rows have {counts} images; set --images to cut them.")
        self.images = counts[0]
        self.commit = (self.results["commit"] or "a copy outside git").removesuffix("-dirty")

    def by_task(self, show: Callable[[str, str], str], corner: str = "task") -> str:
        rows = ((label, [show(task, m) for m in self.bases]) for task, label in self.tasks)
        return grid(corner, self.bases, rows)

    def difference(self, variant: str, against: str, metric: str, digits: int) -> str:
        """Return a metric's paired differences, task by base."""

        def show(task: str, method: str) -> str:
            entry = self.compared.get((task, method, variant, against), {}).get(metric)
            return interval(entry, digits) if entry else "–"

        return self.by_task(show)

    def row(self, task: str, method: str) -> str:
        """Return every metric of a base and what CMI changes of it."""
        rows = []
        for key, entry in self.compared[task, method, "cmi", "base"].items():
            digits = self.metrics[key]["digits"]
            mean = self.cells[task, method, "base"]["metrics"][key]["mean"]
            rows.append((NAMES[key], [f"{mean:.{digits}f}", interval(entry, digits)]))
        return grid("metric", [method, f"change by {CMI}"], rows)

    def counts(self, variant: str, against: str, metric: str) -> Counter[str]:
        """Count the cells of the bases by verdict."""
        found: Counter[str] = Counter()
        sign = 1 if self.metrics[metric]["better"] == "higher" else -1
        for row in self.rows:
            entry = self.compared.get((*row, variant, against), {}).get(metric)
            if entry is None:
                continue
            gain = sign * entry["difference"]
            if abs(gain) < UNCHANGED:
                found["same"] += 1
            else:
                lean = "" if entry["significant"] else "leaning "
                found[lean + ("better" if gain > 0 else "worse")] += 1
        return found

    def tally(self, variant: str, against: str) -> str:
        keys = ["better", "leaning better", "same", "leaning worse", "worse"]
        heads = ["better", "not told apart, leaning better", "unchanged", "leaning worse", "worse"]
        found = {m: self.counts(variant, against, m) for m in self.metrics}
        return grid(
            "metric", heads, ((NAMES[m], [str(c[k]) for k in keys]) for m, c in found.items())
        )

    def changes(self, variant: str, against: str, metric: str) -> list[float]:
        entries = (self.compared.get((*row, variant, against), {}) for row in self.rows)
        return sorted(e[metric]["difference"] for e in entries if metric in e)

    def ratio(self, what: str) -> float:
        """Return the median cost of CMI against its base."""
        return statistics.median(
            self.cells[*row, "cmi"][what] / self.cells[*row, "base"][what]
            for row in self.rows
            if (*row, "cmi") in self.cells
        )

    def mean_over(self, task: str, method: str, images: int) -> float:
        """Return the base's PSNR over the first images."""
        found = records(self.folder / "cells" / task / safe(method), images)
        return statistics.fmean(record["metrics"]["psnr"] for record in found)

    def means(self, metric: str = "psnr", digits: int = 2) -> str:
        """Return the bases' own means ± standard errors, and those of A⁺y."""

        def text(entry: Json) -> str:
            return f"{entry['mean']:.{digits}f} ± {entry['se']:.{digits}f}"

        def rows() -> Iterable[tuple[str, list[str]]]:
            for task, label in self.tasks:
                measured = self.results["measured"][task]["metrics"][metric]
                own = [self.cells[task, m, "base"]["metrics"][metric] for m in self.bases]
                yield label, [text(entry) for entry in (measured, *own)]

        return grid("task", ["A⁺y", *self.bases], rows())

    # The search for step sizes

    def scales(self) -> list[str]:
        trials = next(iter(self.study.values()))[f"{CMI}+{self.bases[0]}"]["trials"]
        return [scale for scale in trials if float(scale) != 0]

    def passes(self, task: str, method: str) -> float:
        return (
            self.cells[task, method, "cmi"]["passes"] / self.cells[task, method, "base"]["passes"]
        )

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
        return sum(
            not e["winner"] and len({s["mean"] for s in e["trials"].values()}) > 1 for e in entries
        )

    def information(self, scales: Sequence[str]) -> str:
        """Return the mean of I over validation images and steps, by scale."""

        def mean(task: str, method: str, scale: str) -> float:
            size = self.study[task][method]["chosen"]
            folder = self.folder / "tune" / task / f"{CMI}@{scale}+{safe(method)}@{size:g}"
            curves = [r["curves"]["cmi/value"] for r in records(folder)]
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
            for t, label in self.tasks
        )
        return grid("task", heads, rows)

    def posterior(self) -> str:
        """Return the quality of several draws, a row per cell; a calibrated sampler's first."""
        found = self.results["posterior"]
        if not found:
            return ""
        labels = dict(self.tasks)
        heads = ["coverage of 50 %", "of 90 %", "spread / skill", "residual / σ√m"]
        rows = [
            ("calibrated", [f"{found[0]['expected'][p]:.2f}" for p in ("50", "90")] + ["1", "1"])
        ]
        for entry in found:
            values = [entry["coverage"]["50"], entry["coverage"]["90"]]
            values += [entry["spread_skill"], entry["residual"]]
            errors = [entry["errors"][k] for k in ("50", "90", "spread_skill", "residual")]
            shown = [f"{v:.3f} ± {e:.3f}" for v, e in zip(values, errors, strict=True)]
            rows.append((f"{labels[entry['task']]}, {entry['label']}", shown))
        return grid("cell", heads, rows)

    def draws(self, task: str, method: str) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    tables = options.runs / "table"
    pages = {
        name: TablePage(tables / name)
        for name in ("fashion", "descent", "thousand")
        if (tables / name / "results.json").is_file()
    }
    if "fashion" not in pages:
        parser.error(f"'{tables / 'fashion'}' holds no results: run `cmi-lightning table` first")
    page = pages["fashion"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("results_page.md.j2").render(
        page=page,
        descent=pages.get("descent"),
        thousand=pages.get("thousand"),
        why=Why(options.runs / "why" / "why.json", dict(page.tasks)),
        signed=signed,
        median=statistics.median,
    )
    (options.docs / "results.md").write_text(text, encoding="utf-8")
    folder = options.docs / "results"
    folder.mkdir(exist_ok=True)
    for name, found in pages.items():
        prefix = "" if name == "fashion" else f"{name}-"
        for file in ("table.md", "table.csv"):
            shutil.copyfile(found.folder / file, folder / f"{prefix}{file}")
    study = json.dumps(page.whole_study, ensure_ascii=False, indent=1)
    (folder / "study.json").write_text(study + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
