"""The report's panels: curves along the steps, and histograms of differences per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmi_lightning.report.charts import Series, curve_chart, histogram, reach, round_up
from cmi_lightning.report.verdicts import Results, cell_label, median, number

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


def curves(known: Results) -> list[dict[str, Any]]:
    """Return the charts of what happens along the steps, by task."""
    colours = {m: f"m{i % COLOURS}" for i, m in enumerate(known.methods)}
    found = []
    for task in known.tasks:
        panels: dict[str, list[Series]] = {key: [] for key in PANELS}
        for cell in known.cells(task):
            if cell["variant"] != "equal":  # its steps are others
                for key, series in _series(cell, colours[cell["method"]]):
                    panels.setdefault(key, []).append(series)
        steps = [n for lines in panels.values() for series in lines for n in series.values]
        if not steps:
            continue
        ends = min(steps), max(steps)
        titled = [(*PANELS.get(key, (key, "")), lines) for key, lines in panels.items()]
        charts = [chart for panel in titled if (chart := curve_chart(*panel, ends))]
        drawn = {line.group for chart in charts for line in chart.lines}
        methods = [{"key": m, "group": c} for m, c in colours.items() if c in drawn]
        found.append({"label": known.task_label(task), "charts": charts, "methods": methods})
    return found


def _series(cell: Mapping[str, Any], colour: str) -> Iterator[tuple[str, Series]]:
    """Yield a cell's curves, each with the key of its panel."""
    with_cmi, name = cell["variant"] == "cmi", cell_label(cell)
    for quantity, raw in (cell.get("curves") or {}).items():
        values = {float(n): v for n, r in raw.items() if (v := number(r)) is not None}
        hook, _, guidance = quantity.partition("/")
        if hook in HOOKS and guidance:
            style = "solid" if guidance == "CMI" else "dashed" if with_cmi else "dotted"
            yield "steps", Series(values, colour, style, f"{name}: {guidance}")
        else:
            yield quantity, Series(values, colour, "solid" if with_cmi else "dotted", name)


def histograms(known: Results) -> list[dict[str, Any]]:
    """Return the histograms of paired differences from the base, by metric and task."""
    found = []
    for metric in known.metrics:
        verdicts = {
            (task, method): verdict
            for task in known.tasks
            for method in known.methods
            if (verdict := known.verdict(task, method, metric, "cmi", "base")) and verdict.values
        }
        if not verdicts:
            continue
        halves, shared = _axes([verdict.values for verdict in verdicts.values()])
        tasks: dict[str, list[dict[str, Any]]] = {}
        beyond = 0
        for ((task, method), verdict), half in zip(verdicts.items(), halves, strict=True):
            drawing = histogram(verdict.values, half, metric["better"])
            beyond += drawing.beyond
            tasks.setdefault(task, []).append(
                {
                    "label": known.variant_labels(method)["cmi"],
                    "drawing": drawing,
                    "verdict": verdict,
                    "text": verdict.text(metric["digits"]).partition(" ")[::2],
                    "count": len(verdict.values),
                    "pairs": verdict.fewer(known.cell(task, method, "cmi") or {}),
                }
            )
        rows = [{"label": known.task_label(t), "entries": e} for t, e in tasks.items()]
        found.append({"metric": metric, "rows": rows, "shared": shared, "beyond": beyond})
    return found


def _axes(values: Sequence[Sequence[float]]) -> tuple[list[float], bool]:
    """Return half the width of each panel's axis, and whether all have the same."""
    halves = [reach(of_panel) for of_panel in values]
    wide = [half for half in halves if half > 0] or [1.0]
    shared = max(wide) <= APART * min(wide)
    common = round_up(min(max(wide), 2 * median(wide)))
    return [common if shared else half or common for half in halves], shared
