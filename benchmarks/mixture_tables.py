"""The mixture benchmark's tables, in Markdown; see mixture.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mixture_problems import CENTRAL, FIXED, RULE, Cell, Results, Size
from mixture_samplers import Scores
from scipy import stats

from cmi_lightning.statistics import mean_and_error
from cmi_lightning.table.resampling import holm


class Estimate(NamedTuple):
    """A mean with its 95 % interval, mean ± half, and the p-value of mean = 0 (Student's t)."""

    mean: float
    half: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}"

    @property
    def sign(self) -> int:
        """±1 where the interval excludes 0, else 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of independent values, with its interval."""
    found = mean_and_error([float(v) for v in values])
    mean, error = found.mean or 0.0, found.se
    if not error:
        return Estimate(mean, 0.0, float(mean == 0))
    t = stats.t(len(values) - 1)
    return Estimate(mean, float(t.ppf(0.975) * error), float(2 * t.sf(abs(mean / error))))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


class Report:
    """Tables of finished results, in Markdown."""

    def __init__(self, results: Results, size: Size) -> None:
        self.tuned = results["tuned"]
        full = results["scores"]
        self.cells = [
            c
            for c in size.cells
            if str(c) in full and all(len(v) >= size.problems for v in full[str(c)].values())
        ]
        self.scores = {
            c: {name: [Scores(*s) for s in entries] for name, entries in full[str(c)].items()}
            for c in self.cells
        }
        tuned = next(iter(self.tuned.values()), {})
        self.methods = [name for name in tuned if not name.startswith("CMI+")]

    def distances(self, cell: Cell, name: str) -> np.ndarray:
        return np.array([s.distance for s in self.scores[cell][name]])

    def change(self, cell: Cell, method: str, suffix: str = "") -> Estimate:
        """Return what CMI changes, paired."""
        with_cmi = self.distances(cell, f"CMI+{method}{suffix}")
        return estimate(with_cmi - self.distances(cell, method))

    def main_table(self) -> str:
        names = ["exact", RULE, *self.methods]
        rows = [[*c, *(estimate(self.distances(c, n)) for n in names)] for c in self.cells]
        return markdown(["d", "m", "steps", "exact (floor)", RULE, *self.methods], rows)

    def cmi_table(self, suffix: str = "") -> str:
        """Return what CMI changes in each cell: as tuned, or as fixed, e.g. ", c=1"."""
        methods = [RULE, *self.methods] if suffix else self.methods
        rows = []
        for c in self.cells:
            row: list[object] = list(c)
            for method in methods:
                if f"CMI+{method}{suffix}" not in self.scores[c]:
                    break
                change = self.change(c, method, suffix)
                share = 100 * change.mean / self.distances(c, method).mean()
                text = f"{change.mean:+.3f} ± {change.half:.3f} ({share:+.0f} %)"
                off = not suffix and self.setting(c, f"CMI+{method}") == "off"
                row.append("off" if off else f"**{text}**" if change.sign else text)
            else:
                rows.append(row)
        return markdown(["d", "m", "steps", *methods], rows)

    def setting(self, cell: Cell, name: str) -> str:
        best: str = self.tuned[f"d={cell.dim} steps={cell.steps}"][name]["best"]
        return best

    def settings_table(self) -> str:
        rows = []
        for c in self.cells:
            if c.measured == 1:
                pairs = [(self.setting(c, m), self.setting(c, f"CMI+{m}")) for m in self.methods]
                rows.append([c.dim, c.steps, *(f"{base}; {cmi}" for base, cmi in pairs)])
        return markdown(["d", "steps", *self.methods], rows)

    def ratio(self, pairs: Sequence[tuple[Cell, str, Cell, str]]) -> str:
        """Return the geometric mean, over pairs and problems, of one distance over another.

        As a change in percent with its 95 % interval.
        """
        logs = [np.log(self.distances(a, m) / self.distances(b, n)) for a, m, b, n in pairs]
        r = estimate(np.concatenate(logs))
        mid, low, high = (100 * math.expm1(x) for x in (r.mean, r.mean - r.half, r.mean + r.half))
        return f"{mid:+.1f} % ({low:+.1f} to {high:+.1f})"

    def ratio_table(self) -> str:
        """Return what CMI changes on average, and what five times as many levels do."""
        by_steps = {n: [c for c in self.cells if c.steps == n] for n in (20, 100)}
        methods = [RULE, *self.methods]
        rows: list[list[object]] = []
        for steps, label, suffix in (
            (20, "CMI, tuned", ""),
            (100, "CMI, tuned", ""),
            *((20, f"CMI, {fixed}", f", {fixed}") for fixed in FIXED),
        ):
            if cells := by_steps[steps]:
                rows.append([steps, label])
                for m in methods:
                    pairs = [(c, f"CMI+{m}{suffix}", c, m) for c in cells]
                    rows[-1].append(self.ratio(pairs) if suffix or m != RULE else "not tuned")
        twice = [(c, c._replace(steps=20)) for c in by_steps[100]]
        if twice and all(b in self.cells for _, b in twice):
            rows.append(["20 → 100", "no CMI"])
            rows[-1] += [self.ratio([(a, m, b, m) for a, b in twice]) for m in methods]
        return markdown(["steps", "change", *methods], rows)

    def coverage_table(self, field: str) -> str:
        """Return mean shares in the intervals, over the m and problems of a d and step count.

        Args:
            field: "inside", of exact posterior draws, or "truth".
        """
        rows = []
        for d, steps in dict.fromkeys((c.dim, c.steps) for c in self.cells):

            def shares(name: str, d: int = d, steps: int = steps) -> str:
                values = [
                    getattr(s, field)
                    for c in self.cells
                    if (c.dim, c.steps) == (d, steps)
                    for s in self.scores[c][name]
                ]
                return " / ".join(f"{100 * x:.0f}" for x in np.mean(values, axis=0))

            pairs = [f"{shares(m)} → {shares(f'CMI+{m}')}" for m in self.methods]
            rows.append([d, steps, shares("exact"), *pairs])
        return markdown(["d", "steps", "exact", *self.methods], rows)

    def coverage_change_table(self) -> str:
        """Return what fixed CMI changes in the coverage of exact draws, in points, paired."""
        cells = [c for c in self.cells if c.steps == 20]
        methods = [RULE, *self.methods]

        def shares(name: str, which: int) -> np.ndarray:
            return np.array([100 * s.inside[which] for c in cells for s in self.scores[c][name]])

        rows: list[list[object]] = []
        for which, level in enumerate(CENTRAL):
            interval = f"{100 * level:.0f} %"
            rows.append([interval, "no CMI"])
            rows[-1] += [f"{shares(m, which).mean():.1f}" for m in methods]
            for label in FIXED:
                rows.append([interval, f"CMI, {label}"])
                for m in methods:
                    e = estimate(shares(f"CMI+{m}, {label}", which) - shares(m, which))
                    rows[-1].append(f"{e.mean:+.1f} ± {e.half:.1f}")
        return markdown(["interval", "share, change", *methods], rows)

    def others_table(self) -> str:
        """Return the distances of the methods without settings, beside those of the tuned ones.

        The last column is their coverage of exact draws, 50 % / 90 %, over all of the cells.
        """
        known = {"exact", RULE, *self.methods}
        cells = [
            c
            for c in self.cells
            if any(n not in known and not n.startswith("CMI+") for n in self.scores[c])
        ]
        if not cells:
            return "none yet"
        found = self.scores[cells[0]]
        names = [n for n in found if n not in known and not n.startswith("CMI+")]
        rows = []
        for name in ["exact", *self.methods, *names]:
            inside = np.mean([s.inside for c in cells for s in self.scores[c][name]], axis=0)
            distances = [estimate(self.distances(c, name)) for c in cells]
            label = f"{name}, tuned" if name in self.methods else name
            rows.append([label, *distances, " / ".join(f"{100 * x:.0f}" for x in inside)])
        return markdown(["method", *(f"d={c.dim} m={c.measured}" for c in cells), "coverage"], rows)

    def counts(self) -> str:
        """Return in how many cells tuned CMI helps and hurts, and how many draws diverged."""
        changes = {
            f"{method} at {c}": self.change(c, method)
            for c in self.cells
            for method in self.methods
            if self.setting(c, f"CMI+{method}") != "off"
        }
        better, worse = (sum(e.sign == s for e in changes.values()) for s in (-1, 1))
        sure = holm([e.p for e in changes.values()])
        left = [
            f"{name} ({'better' if e.mean < 0 else 'worse'})"
            for (name, e), kept in zip(changes.items(), sure, strict=True)
            if kept
        ]
        total = len(self.cells) * len(self.methods)
        diverged = {
            name: sum(s.diverged for c in self.cells for s in self.scores[c].get(name, []))
            for name in dict.fromkeys(n for c in self.cells for n in self.scores[c])
        }
        runs = "; ".join(f"{n} {x:.2f}" for n, x in diverged.items() if x) or "none"
        return (
            f"Tuning switched CMI off in {total - len(changes)} of {total} comparisons. In the "
            f"other {len(changes)} the 95 % interval of the paired change lies below zero {better} "
            f"times and above zero {worse} times; after Holm's correction at 5 %, what remains is: "
            f"{', '.join(left) or 'nothing'}.\n\nDiverged draws, in units of whole runs: {runs}."
        )

    def text(self) -> str:
        """Return all tables."""
        parts = {
            "Settings": self.settings_table(),
            "Distance": self.main_table(),
            "Change by CMI, tuned": self.cmi_table(),
            **{f"Change by CMI, {label}": self.cmi_table(f", {label}") for label in FIXED},
            "Methods without settings, 20 levels": self.others_table(),
            "Mean ratio": self.ratio_table(),
            "Counts": self.counts(),
            "Coverage of exact draws, 50 % / 90 %": self.coverage_table("inside"),
            "Coverage of the truth, 50 % / 90 %": self.coverage_table("truth"),
            "Change of coverage of exact draws, 20 levels": self.coverage_change_table(),
        }
        return "\n\n".join(f"### {title}\n\n{body}" for title, body in parts.items())
