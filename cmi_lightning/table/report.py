"""The report of a table: one HTML file that holds everything it shows, and the table as text."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cmi_lightning.paths import safe_name
from cmi_lightning.runs import write
from cmi_lightning.table.charts import (
    Chart,
    Histogram,
    Series,
    curve_chart,
    histogram,
    label,
    reach,
    round_up,
)
from cmi_lightning.table.spec import CMI
from cmi_lightning.table.tables import MEASURED, csv, latex, markdown, write_tables
from cmi_lightning.table.verdicts import (
    AGAINST,
    VARIANTS,
    Results,
    Verdict,
    cell_label,
    fixed,
    mean_text,
    median,
    number,
    short,
)

__all__ = ["csv", "latex", "markdown", "render", "write_report", "write_tables"]

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 128  # pixels: images up to this size are enlarged without smoothing
LARGE = 96  # pixels: of images above this size only one best and one worst are embedded
MAPS = 4  # images of an uncertainty map per row
APART = 8.0  # ratio of spreads from which histograms have an axis each
COLOURS = 8  # of lines
HOOKS = ("denoised", "step", "sample")
PANELS = {
    "residual": ("Residual ‖y − A x̂₀‖", "image units"),
    "cmi/value": ("Conditional mutual information", "nats"),
    "cmi/gradient": ("Gradient norm ‖∇I‖", "nats per image unit"),
    "steps": ("Step norms", "image units"),
    "cmi/residual": ("Relative residual of CMI’s linear solver", ""),
}


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.html``: whole or absent, and without need of any other file.

    Args:
        results: the table's results; what is absent or null is left out.
        folder: where it is written, and what the results' image paths are relative to.
    """
    write(folder / "report.html", render(results, folder).encode("utf-8", "replace"))


def render(results: Mapping[str, Any], folder: Path) -> str:
    """Return the report's HTML."""
    environment = _environment()
    style, script = (
        Markup(f"\n{environment.get_template(name).render()}\n")
        for name in ("report.css.j2", "report.js.j2")
    )
    return environment.get_template("report.html.j2").render(
        View(results, folder).context(),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cmi_lightning.table"),
        autoescape=True,  # labels and ids come from users' files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _hash(text: str) -> str:
    """Return what the page's policy calls its one script or style by; nothing else may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# Images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """An embedded image: its number in the store, its data URI and its size in pixels."""

    index: int
    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen as such."""
        return max(self.width, self.height) <= SMALL


@dataclass
class Pictures:
    """The images of a report, each read once; only PNG files inside its folder are."""

    folder: Path
    store: list[Picture] = field(default_factory=list)
    _known: dict[str, Picture | None] = field(default_factory=dict)

    def get(self, path: Any) -> Picture | None:
        """Return an image, or None where there is none to read."""
        if not isinstance(path, str) or not path:
            return None
        if path not in self._known:
            self._known[path] = self._read(path)
        return self._known[path]

    def _read(self, path: str) -> Picture | None:
        try:
            file = (self.folder / path).resolve()
            if not file.is_relative_to(self.folder.resolve()):
                return None
            data = file.read_bytes()
        except (OSError, ValueError):
            return None
        if not data.startswith(PNG) or len(data) < 24:
            return None
        width, height = struct.unpack(">II", data[16:24])
        uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        same = next((p for p in self.store if p.uri == uri), None)
        if same is None:
            same = Picture(len(self.store), uri, width, height)
            self.store.append(same)
        return same


# The view ------------------------------------------------------------------------------------


class View:
    """Everything that the template shows, from results and the images beside them."""

    def __init__(self, results: Mapping[str, Any], folder: Path) -> None:
        self.results, self.known = results, Results(results)
        self.folder, self.pictures = folder, Pictures(folder)

    def context(self) -> dict[str, Any]:
        """Return the template's variables."""
        gallery, groups = self.gallery(), self.groups()
        entries = [entry for group in groups for row in group["rows"] for entry in row["entries"]]
        verdicts = [verdict for entry in entries for verdict in entry["verdicts"].values()]
        store = [[p.uri, p.width, p.height] for p in self.pictures.store]  # only the gallery's
        return {
            "title": self.results.get("title") or "Results",
            "facts": self.facts(),
            "command": self.results.get("command"),
            "metrics": self.known.metrics,
            "outcomes": self.outcomes(),
            "sentences": self.sentences(),
            "cost": self.cost(),
            "notes": list(self.results.get("notes") or ()),
            "groups": groups,
            "fewer_pairs": any(verdict["pairs"] is not None for verdict in verdicts),
            "against_equal": any(self.known.verdicts(m, "equal") for m in self.known.metrics),
            "gallery": gallery,
            "gallery_variants": self.gallery_variants(gallery),
            "gallery_data": self.gallery_data(gallery),
            "gallery_methods": self.gallery_methods(gallery),
            "gallery_count": max((len(row["examples"]) for row in gallery), default=0),
            "curves_by_task": self.curves(),
            "histograms": self.histograms(),
            "extremes": self.extremes(),
            "posterior": self.posterior(),
            "chosen": self.chosen(),
            "study": self.study(),
            "study_images": self.study_images(),
            "objective": self.objective(),
            "protocol": self.protocol(),
            "environment": dict(self.results.get("environment") or {}),
            "config": self.results.get("config"),
            "store": store,
            "small": SMALL,
        }

    def facts(self) -> list[str]:
        """Return the line under the title."""
        images, steps = self.results.get("images"), self.results.get("steps")
        commit, created = self.results.get("commit"), self.results.get("created")
        return [
            *([f"{images} images"] if images else []),
            *([f"{steps} steps"] if steps else []),
            *([str(created)] if created else []),
            *([f"commit {str(commit)[:12]}"] if commit else []),
        ]

    # What it says ----------------------------------------------------------------------------

    def outcomes(self) -> list[dict[str, Any]]:
        """Return, per metric, how often CMI is better, worse or undecided, and by how much."""
        rows = []
        for metric in self.known.metrics:
            sides = {a: self._counts(self.known.verdicts(metric, a)) for a in AGAINST}
            if not any(sides.values()):
                continue
            differences = [
                v.difference
                for v in self.known.verdicts(metric, "base")
                if v.difference is not None
            ]
            rows.append(
                {
                    "metric": metric,
                    "sides": sides,
                    "spread": self._spread(differences, metric),
                }
            )
        return rows

    def sentences(self) -> list[str]:
        """Return what the counts of all metrics together say, in words."""
        said = []
        for against in AGAINST:
            counts = self._counts(
                [v for m in self.known.metrics for v in self.known.verdicts(m, against)]
            )
            if not counts or counts["all"] == counts["untested"]:
                continue
            cells = max(len(self.known.verdicts(m, against)) for m in self.known.metrics)
            first = (
                f"Over {_count(len(self.known.metrics), 'metric')} and {_count(cells, 'cell')}, "
                "CMI is significantly better than the same method without it"
                if against == "base"
                else "Against the method given as many network passes as CMI takes, with the step "
                "sizes found for the shorter run, it is significantly better"
            )
            untested = f"; {counts['untested']} are not tested" if counts["untested"] else ""
            said.append(
                f"{first} in {counts['better']} of {_count(counts['all'], 'comparison')}, worse in "
                f"{counts['worse']}, and {counts['undecided']} are undecided{untested}."
            )
        if said:
            several = len(self.known.metrics) > 1
            pooled = "The counts pool the metrics; each metric and each" if several else "Each"
            said[0] += f" {pooled} kind of comparison has Holm’s correction for itself."
        return said

    @staticmethod
    def _counts(verdicts: Sequence[Verdict]) -> dict[str, int] | None:
        if not verdicts:
            return None
        names = ("better", "undecided", "worse", "untested")
        counts = {name: sum(v.outcome == name for v in verdicts) for name in names}
        return counts | {"all": len(verdicts)}

    @staticmethod
    def _spread(differences: Sequence[float], metric: Mapping[str, Any]) -> str:
        if not differences:
            return ""
        digits = metric["digits"] + 1
        unit = f" {metric['unit']}" if metric["unit"] else ""
        if len(differences) == 1:
            return f"Difference from the base {fixed(differences[0], digits, True)}{unit}"
        middle, low, high = (
            fixed(v, digits, True)
            for v in (median(differences), min(differences), max(differences))
        )
        return (
            f"Median difference from the base {middle}{unit}; the cells’ range from {low} to {high}"
        )

    def cost(self) -> str:
        """Return the sentence on network passes and seconds."""
        parts = []
        for key, name in (("passes", "network passes"), ("seconds", "seconds")):
            ratios = [
                a / b
                for cmi, base in self.known.pairs()
                if (a := number(cmi.get(key))) is not None
                and (b := number(base.get(key))) is not None
                and b > 0
            ]
            if ratios:
                low, middle, high = (
                    short(round(v, 2)) for v in (min(ratios), median(ratios), max(ratios))
                )
                between = "" if low == high else f" ({low} to {high})"
                parts.append(f"{middle} times{between} the {name}")
        if not parts:
            return ""
        return f"Per image, CMI takes {' and '.join(parts)} of its base (median over the cells)."

    # The table -------------------------------------------------------------------------------

    def groups(self) -> list[dict[str, Any]]:
        """Return the table's rows by task."""
        groups = []
        for task in self.known.tasks:
            measured = (self.results.get("measured") or {}).get(task) or {}
            rows = [self._row(cell) for cell in self.known.cells(task)]
            if metrics := measured.get("metrics"):
                plain = {"task": task, "method": "", "variant": "measured", "label": MEASURED}
                rows.insert(0, self._row(plain | {"metrics": metrics, "passes": 0}))
            if rows:
                groups.append({"key": task, "label": self.known.task_label(task), "rows": rows})
        return groups

    def _row(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        entries = []
        for metric in self.known.metrics:
            entry = (cell.get("metrics") or {}).get(metric["key"])
            digits = metric["digits"]
            verdicts = {}
            for against in AGAINST:
                verdict = self.known.verdict(
                    cell["task"], cell["method"], metric, cell["variant"], against
                )
                if verdict and verdict.direction != "none":
                    verdicts[against] = {
                        "name": verdict.name if cell["variant"] == "cmi" else "none",
                        "symbol": verdict.symbol,
                        "words": verdict.words,
                        "text": verdict.text(digits).partition(" ")[::2],
                        "p": _p(verdict.p),
                        "pairs": verdict.fewer(cell),
                    }
            entries.append(
                {
                    "text": mean_text(entry, digits),
                    "value": number((entry or {}).get("mean")),
                    "verdicts": verdicts,
                }
            )
        images = cell.get("images")
        fewer = images is not None and images != self.results.get("images")
        return {
            "label": cell_label(cell),
            "variant": cell["variant"],
            "failed": cell.get("failed") or 0,
            "images": images if fewer else None,
            "entries": entries,
            "passes": {"text": short(cell.get("passes")), "value": number(cell.get("passes"))},
            "seconds": {"text": short(cell.get("seconds")), "value": number(cell.get("seconds"))},
        }

    # Images ----------------------------------------------------------------------------------

    def gallery(self) -> list[dict[str, Any]]:
        """Return the example images by task."""
        rows = []
        for task in _ordered_keys(self.results.get("examples"), self.known.tasks):
            examples = []
            for raw in self.results["examples"][task] or ():
                restored = {}
                for method in _ordered_keys(raw.get("restored"), self.known.methods):
                    paths = raw["restored"][method] or {}
                    found = {v: self.pictures.get(paths.get(v)) for v in VARIANTS}
                    if any(found.values()):
                        restored[method] = {v: p for v, p in found.items() if p}
                example = {
                    "id": str(raw.get("id", "")),
                    "truth": self.pictures.get(raw.get("truth")),
                    "measurement": self.pictures.get(raw.get("measurement")),
                    "restored": restored,
                }
                if restored:
                    examples.append(example)
            if examples:
                rows.append(
                    {"key": task, "label": self.known.task_label(task), "examples": examples}
                )
        return rows

    @staticmethod
    def gallery_variants(gallery: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the variants of which any image is shown."""
        shown = {
            v for row in gallery for e in row["examples"] for f in e["restored"].values() for v in f
        }
        return [v for v in VARIANTS if v in shown]

    @staticmethod
    def gallery_data(gallery: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the gallery for the script: numbers of images in the store."""
        return {
            row["key"]: [
                {
                    "id": example["id"],
                    "truth": example["truth"] and example["truth"].index,
                    "measurement": example["measurement"] and example["measurement"].index,
                    "restored": {
                        method: {variant: picture.index for variant, picture in found.items()}
                        for method, found in example["restored"].items()
                    },
                }
                for example in row["examples"]
            ]
            for row in gallery
        }

    def gallery_methods(self, gallery: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the methods whose images are shown; the first guided one with CMI as default."""
        shown = {m for row in gallery for e in row["examples"] for m in e["restored"]}
        with_cmi = {
            m
            for row in gallery
            for e in row["examples"]
            for m, found in e["restored"].items()
            if "cmi" in found and "base" in found
        }
        methods = [m for m in self.known.methods if m in shown]
        methods += sorted(shown - set(methods))
        likely = [m for m in methods if m in with_cmi]
        likely = [m for m in likely if m != "none"] or likely or methods
        return [{"key": m, "default": m == likely[0]} | self._names(m) for m in methods]

    def _names(self, method: str) -> dict[str, str]:
        """Return how a method's variants are called."""
        names: dict[str, str] = {}
        for variant in VARIANTS:
            cells = (self.known.cell(task, method, variant) for task in self.known.tasks)
            cell = next((c for c in cells if c), {"method": method, "variant": variant})
            names[variant] = cell_label(cell)
        return names

    def extremes(self) -> list[dict[str, Any]]:
        """Return the best and the worst images by task."""
        by_task: dict[str, list[dict[str, Any]]] = {}
        metrics = {m["key"]: m for m in self.known.metrics}
        for raw in self.results.get("extremes") or ():
            if (metric := metrics.get(raw.get("metric"))) is None:
                continue
            names = self._names(str(raw["method"]))
            sides = {}
            for side in ("best", "worst"):
                sides[side] = self._side(raw.get(side) or (), metric)
            if any(sides.values()):
                by_task.setdefault(str(raw["task"]), []).append(
                    {
                        "method": str(raw["method"]),
                        "metric": metric["label"],
                        "names": names,
                        "sides": sides,
                    }
                )
        return [
            {"key": task, "label": self.known.task_label(task), "entries": by_task[task]}
            for task in _ordered_keys(by_task, self.known.tasks)
        ]

    def _side(
        self, entries: Sequence[Mapping[str, Any]], metric: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the images of one side that are there: of large ones, the first alone."""
        found: list[dict[str, Any]] = []
        for raw in entries:
            entry = self._extreme(raw, metric)
            base, cmi = entry["base"], entry["cmi"]
            if not base or not cmi:
                continue
            found.append(entry)
            if max(base.width, base.height, cmi.width, cmi.height) > LARGE:
                break
        return found

    def _extreme(self, raw: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
        unit = f" {metric['unit']}" if metric["unit"] else ""
        found = {n: self.pictures.get(raw.get(n)) for n in ("truth", "measurement", "base", "cmi")}
        difference = fixed(raw.get("difference"), metric["digits"], sign=True)
        return {"id": str(raw.get("id", "")), "difference": f"{difference}{unit}"} | found

    def posterior(self) -> dict[str, Any] | None:
        """Return coverage and uncertainty maps of repeated draws, or None without any."""
        rows: list[dict[str, Any]] = []
        levels: list[str] = []
        for raw in self.results.get("posterior") or ():
            coverage, expected = raw.get("coverage") or {}, raw.get("expected") or {}
            errors = raw.get("errors") or {}
            levels += [level for level in coverage if level not in levels]
            plain = {"method": str(raw["method"]), "variant": raw.get("variant", "base")}
            cell = self.known.cell(str(raw["task"]), plain["method"], plain["variant"]) or plain
            rows.append(
                {
                    "task": self.known.task_label(str(raw["task"])),
                    "label": cell_label(cell),
                    "images": short(raw.get("images")),
                    "draws": short(raw.get("draws")),
                    "coverage": {n: _percent(v, errors.get(n)) for n, v in coverage.items()},
                    "expected": {n: _percent(v) for n, v in expected.items()},
                    "spread_skill": _with_error(
                        raw.get("spread_skill"), errors.get("spread_skill")
                    ),
                    "residual": _with_error(raw.get("residual"), errors.get("residual")),
                    "maps": self._maps(raw.get("folder"), str(raw["task"])),
                }
            )
        if not rows:
            return None
        from cmi_lightning.callbacks.images import WHITE_STD

        expected = {n: t for row in reversed(rows) for n, t in row["expected"].items()}
        return {"rows": rows, "levels": levels, "expected": expected, "white": label(WHITE_STD)}

    def _maps(self, folder: Any, task: str) -> list[dict[str, Any]]:
        """Return mean and standard deviation of a few images: the examples', else the first."""
        if not isinstance(folder, str):
            return []
        examples = (self.results.get("examples") or {}).get(task) or ()
        truths = {str(e.get("id")): e.get("truth") for e in examples}
        root = self.folder / folder
        stems = [p.relative_to(root / "std") for p in sorted((root / "std").rglob("*.png"))]
        ids = {i: Path(f"{safe_name(i, '.png')}.png") for i in truths}
        paths = {p: i for i, p in ids.items() if p in stems} | {
            p: p.with_suffix("").as_posix() for p in stems if p not in ids.values()
        }
        maps = []
        for path, name in list(paths.items())[:MAPS]:
            spread = self.pictures.get(f"{folder}/std/{path.as_posix()}")
            mean = self.pictures.get(f"{folder}/restored/{path.as_posix()}")
            if spread:
                truth = self.pictures.get(truths.get(name))
                maps.append({"id": name, "truth": truth, "mean": mean, "std": spread})
        return maps

    # Drawings --------------------------------------------------------------------------------

    def curves(self) -> list[dict[str, Any]]:
        """Return the charts of what happens along the steps, by task."""
        found = []
        for task in self.known.tasks:
            panels: dict[str, list[Series]] = {key: [] for key in PANELS}
            for cell in self.known.cells(task):
                if cell["variant"] != "equal":  # its steps are others
                    self._add_curves(panels, cell)
            numbers = [n for series in panels.values() for s in series for n in s.values]
            charts: list[Chart] = []
            for key, series in panels.items():
                chart = (
                    curve_chart(*PANELS.get(key, (key, "")), series, (min(numbers), max(numbers)))
                    if numbers
                    else None
                )
                if chart:
                    charts.append(chart)
            if charts:
                groups = {line.group for chart in charts for line in chart.lines}
                methods = [
                    {"key": m, "group": self._group(m)}
                    for m in self.known.methods
                    if self._group(m) in groups
                ]
                entry = {"key": task, "label": self.known.task_label(task), "charts": charts}
                found.append(entry | {"methods": methods})
        return found

    def _group(self, method: str) -> str:
        return f"m{self.known.methods.index(method) % COLOURS}"

    def _add_curves(self, panels: dict[str, list[Series]], cell: Mapping[str, Any]) -> None:
        with_cmi = cell["variant"] == "cmi"
        for quantity, raw in (cell.get("curves") or {}).items():
            values = {float(n): v for n, r in raw.items() if (v := number(r)) is not None}
            group, name = self._group(cell["method"]), cell_label(cell)
            hook, _, guidance = quantity.partition("/")
            if hook in HOOKS and guidance:
                style = "solid" if guidance == "CMI" else "dashed" if with_cmi else "dotted"
                panels["steps"].append(Series(values, group, style, f"{name}: {guidance}"))
            else:
                style = "solid" if with_cmi else "dotted"
                panels.setdefault(quantity, []).append(Series(values, group, style, name))

    def histograms(self) -> list[dict[str, Any]]:
        """Return the histograms of paired differences from the base, by metric and task."""
        found = []
        for metric in self.known.metrics:
            cells = [
                (task, method, verdict)
                for task in self.known.tasks
                for method in self.known.methods
                if (verdict := self.known.verdict(task, method, metric, "cmi", "base"))
                and verdict.values
            ]
            if not cells:
                continue
            halves = [reach(v.values) for _, _, v in cells]
            wide = [half for half in halves if half > 0] or [1.0]
            shared = max(wide) <= APART * min(wide)
            common = round_up(min(max(wide), 2 * median(wide)))
            tasks: dict[str, list[dict[str, Any]]] = {}
            beyond = 0
            for (task, method, verdict), half in zip(cells, halves, strict=True):
                axis = common if shared else half or common
                drawing: Histogram = histogram(verdict.values, axis, metric["better"])
                beyond += drawing.beyond
                tasks.setdefault(task, []).append(
                    {
                        "label": self._names(method)["cmi"],
                        "drawing": drawing,
                        "verdict": verdict,
                        "text": verdict.text(metric["digits"]).partition(" ")[::2],
                        "improved": _percent(verdict.improved),
                        "count": len(verdict.values),
                        "pairs": verdict.fewer(self.known.cell(task, method, "cmi") or {}),
                    }
                )
            rows = [{"label": self.known.task_label(t), "entries": e} for t, e in tasks.items()]
            found.append({"metric": metric, "rows": rows, "shared": shared, "beyond": beyond})
        return found

    # The rest --------------------------------------------------------------------------------

    def chosen(self) -> list[dict[str, Any]]:
        """Return the options of every cell."""
        return [
            {
                "task": self.known.task_label(task),
                "label": cell_label(cell),
                "options": ", ".join(f"{k} = {v}" for k, v in (cell.get("options") or {}).items()),
                "steps": short(cell.get("steps")),
                "images": short(cell.get("images")),
                "failed": short(cell.get("failed")),
            }
            for task in self.known.tasks
            for cell in self.known.cells(task)
        ]

    def study(self) -> list[dict[str, Any]]:
        """Return, by task, which step sizes were tried for each method, and what came of them."""
        found = []
        study = {str(task): rows for task, rows in (self.results.get("study") or {}).items()}
        for task in _ordered_keys(study, self.known.tasks):
            rows = [self._searched(str(name), entry) for name, entry in (study[task] or {}).items()]
            columns = max((len(row["trials"]) for row in rows), default=0)
            if columns:
                entry = {"key": task, "label": self.known.task_label(task)}
                found.append(entry | {"rows": rows, "columns": columns})
        return found

    def _searched(self, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        plus, method = f"{CMI}+", name.removeprefix(f"{CMI}+")
        with_cmi = name.startswith(plus) and name not in self.known.methods
        trials = {float(v): s or {} for v, s in (entry.get("trials") or {}).items()}
        winner, chosen = number(entry.get("winner")), number(entry.get("chosen"))
        errors = [e for s in trials.values() if (e := number(s.get("standard_error")))]
        digits = max(2, min(4, 1 - math.floor(math.log10(min(errors))))) if errors else 2
        broken = [v for v, s in sorted(trials.items()) if number(s.get("mean")) is None]
        return {
            "label": self._names(method)["cmi"] if with_cmi else name,
            "trials": [
                {
                    "value": _size(value),
                    "text": "broke an image"
                    if value in broken
                    else mean_text({"mean": s.get("mean"), "se": s.get("standard_error")}, digits),
                    "chosen": value == chosen,
                }
                for value, s in sorted(trials.items())
            ],
            "winner": _size(winner),
            "chosen": _size(chosen),
            "flags": [
                *(["at the edge of the values tried"] if entry.get("at_edge") else []),
                *(["zero was better"] if with_cmi and winner == 0 else []),
                *([f"broke an image at {', '.join(map(_size, broken))}"] if broken else []),
            ],
        }

    def study_images(self) -> int | None:
        """Return on how many images every step size was tried, if on equally many."""
        counts = {
            score.get("images")
            for rows in (self.results.get("study") or {}).values()
            for entry in (rows or {}).values()
            for score in (entry.get("trials") or {}).values()
            if score and number(score.get("mean")) is not None
        }
        return counts.pop() if len(counts) == 1 else None

    def objective(self) -> str:
        """Return how the metric is called by which step sizes were chosen, if it is known."""
        labels = {m["key"]: m["label"] for m in self.known.metrics}
        key = self.results.get("objective") or ""
        return labels.get(key, key)

    def protocol(self) -> list[tuple[str, str]]:
        """Return how each metric is measured."""
        labels = {m["key"]: m["label"] for m in self.known.metrics}
        texts = self.results.get("protocol") or {}
        return [(labels.get(key, key), text) for key, text in texts.items()]


def _ordered_keys(mapping: Mapping[str, Any] | None, order: Sequence[str]) -> list[str]:
    found = mapping or {}
    return [k for k in order if k in found] + [k for k in found if k not in order]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _percent(value: Any, error: Any = None) -> str:
    """Return "41 %" or "41.2 ± 1.3 %"."""
    finite, se = number(value), number(error)
    if finite is None:
        return "–"
    return f"{100 * finite:.0f} %" if se is None else f"{100 * finite:.1f} ± {100 * se:.1f} %"


def _with_error(value: Any, error: Any) -> str:
    """Return "0.80", or "0.803 ± 0.021" where there is an error."""
    return mean_text({"mean": value, "se": error}, 2 if number(error) is None else 3)


def _size(value: float | None) -> str:
    """Return a step size as it is written in a configuration."""
    return "–" if value is None else f"{value:g}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
