"""What the results say together: how often CMI is better, by how much, and at which cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from cmi_lightning.report.results import ADDED, AGAINST, Metric, Results, Search
from cmi_lightning.report.verdicts import mean_text, short, verdicts
from cmi_lightning.statistics import Estimate

Counts = Mapping[str, int]
KINDS = tuple(itertools.product(ADDED, AGAINST))  # of comparisons: ("cmi", "base")


@dataclass(frozen=True)
class Outcome:
    """How often a variant is better, undecided or worse on a metric, by kind of comparison.

    ``differences`` are those of CMI from its base.
    """

    metric: Metric
    counts: Mapping[tuple[str, str], Counts]
    differences: list[float]


def outcomes(results: Results) -> list[Outcome]:
    """Return the outcome of every metric that was compared."""
    shown = []
    for metric in results.metrics:
        counts: dict[tuple[str, str], Counts] = {}
        for variant, against in KINDS:
            if names := [v.outcome for v in verdicts(results, metric, against, variant)]:
                every = {name: names.count(name) for name in ("better", "undecided", "worse")}
                counts[variant, against] = every | {"all": len(names)}
        if counts:
            differences = [v.paired.difference for v in verdicts(results, metric, "base")]
            shown.append(Outcome(metric, counts, differences))
    return shown


def totals(outcomes: list[Outcome]) -> dict[tuple[str, str], Counts]:
    """Return the counts of all metrics together, and of how many cells they are, by kind."""
    every = {kind: [o.counts[kind] for o in outcomes if kind in o.counts] for kind in KINDS}
    return {
        kind: {name: sum(count[name] for count in counts) for name in counts[0]}
        | {"cells": max(count["all"] for count in counts)}
        for kind, counts in every.items()
        if counts
    }


def cost(results: Results) -> str:
    """Return the sentence on network passes and seconds."""
    cells = [cell for cell in results.cells if cell.variant == "cmi"]
    pairs = [(cell, results.cell(cell.task, cell.method, "base")) for cell in cells]
    parts = []
    for name, words in (("passes", "network passes"), ("seconds", "seconds")):
        costs = [(getattr(cmi, name), getattr(base, name)) for cmi, base in pairs if base]
        if ratios := [a / b for a, b in costs if a is not None and b]:
            low, middle, high = (short(round(f(ratios), 2)) for f in (min, median, max))
            between = "" if low == high else f" ({low} to {high})"
            parts.append(f"{middle} times{between} the {words}")
    if not parts:
        return ""
    return f"Per image, CMI takes {' and '.join(parts)} of its base (median over the cells)."


def searched(results: Results, name: str) -> str:
    """Return how a row of the search is called: "CMI+DPS" as its cell."""
    for variant, word in ADDED.items():
        if name.startswith(f"{word}+") and name not in results.methods:
            return results.variant_labels(name.removeprefix(f"{word}+"))[variant]
    return name


def trials(search: Search) -> list[tuple[str, str, bool]]:
    """Return the step sizes tried, in order: the value, what it gave, whether it is used."""
    errors = [trial.standard_error for trial in search.trials.values() if trial.standard_error]
    digits = max(2, min(4, 1 - math.floor(math.log10(min(errors))))) if errors else 2
    told = []
    for value, trial in sorted(search.trials.items(), key=lambda item: float(item[0])):
        mean = mean_text(Estimate(trial.mean, trial.standard_error), digits)
        text = "broke an image" if trial.mean is None else mean
        told.append((value, text, float(value) == search.chosen))
    return told


def tried_on(results: Results) -> int | None:
    """Return on how many images every step size was tried, if on equally many."""
    searches = [search for rows in results.study.values() for search in rows.values()]
    counts = {t.images for s in searches for t in s.trials.values() if t.mean is not None}
    return counts.pop() if len(counts) == 1 else None


def remarks(name: str, search: Search) -> str:
    """Return what is remarkable about a search for a step size."""
    broken = [value for value, trial in search.trials.items() if trial.mean is None]
    added = name.startswith(tuple(f"{word}+" for word in ADDED.values()))
    told = {
        "at the edge of the values tried": search.at_edge,
        "zero was better": added and search.winner == 0,
        f"broke an image at {', '.join(sorted(broken, key=float))}": broken,
    }
    return "; ".join(text for text, true in told.items() if true)
