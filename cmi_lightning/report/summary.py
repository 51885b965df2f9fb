"""What the results say together: how often CMI is better, by how much, and at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmi_lightning.report.verdicts import AGAINST, Results, Verdict, fixed, median, number, short


def outcomes(known: Results) -> list[dict[str, Any]]:
    """Return, per metric, how often CMI is better, worse or undecided, and by how much."""
    rows = []
    for metric in known.metrics:
        sides = {against: _counts(known.verdicts(metric, against)) for against in AGAINST}
        if any(sides.values()):
            every = [v.difference for v in known.verdicts(metric, "base")]
            differences = [d for d in every if d is not None]
            rows.append({"metric": metric, "sides": sides, "spread": _spread(differences, metric)})
    return rows


def sentences(known: Results) -> list[str]:
    """Return what the counts of all metrics together say, in words."""
    said = []
    for against in AGAINST:
        verdicts = [known.verdicts(metric, against) for metric in known.metrics]
        counts = _counts([v for of_metric in verdicts for v in of_metric])
        if not counts or counts["all"] == counts["untested"]:
            continue
        cells = max(map(len, verdicts))
        first = (
            f"Over {_count(len(known.metrics), 'metric')} and {_count(cells, 'cell')}, "
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
        several = len(known.metrics) > 1
        pooled = "The counts pool the metrics; each metric and each" if several else "Each"
        said[0] += f" {pooled} kind of comparison has Holm’s correction for itself."
    return said


def cost(known: Results) -> str:
    """Return the sentence on network passes and seconds."""
    parts = []
    for key, name in (("passes", "network passes"), ("seconds", "seconds")):
        ratios = [
            a / b
            for cmi, base in known.pairs()
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


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int] | None:
    if not verdicts:
        return None
    names = ("better", "undecided", "worse", "untested")
    counts = {name: sum(v.outcome == name for v in verdicts) for name in names}
    return counts | {"all": len(verdicts)}


def _spread(differences: Sequence[float], metric: Mapping[str, Any]) -> str:
    if not differences:
        return ""
    digits = metric["digits"] + 1
    unit = f" {metric['unit']}" if metric["unit"] else ""
    if len(differences) == 1:
        return f"Difference from the base {fixed(differences[0], digits, True)}{unit}"
    middle, low, high = (
        fixed(v, digits, True) for v in (median(differences), min(differences), max(differences))
    )
    return f"Median difference from the base {middle}{unit}; the cells’ range from {low} to {high}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
