"""The report's panels: curves along the steps, and histograms of differences per image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from cmi_lightning.report import plots
from cmi_lightning.report.results import ADDED, CMI, Cell, Metric, Results
from cmi_lightning.report.verdicts import Verdict, verdicts

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


def curves(results: Results) -> dict[str, tuple[list[plots.Plot], dict[str, str]]]:
    """Return by task the plots along the steps, and the colours of the methods in them."""
    colours = {m: f"m{i % COLOURS}" for i, m in enumerate(results.methods)}
    every = {}
    for task in results.tasks:
        panels: dict[str, list[plots.Series]] = {key: [] for key in PANELS}
        for cell in results.cells_of(task):
            if cell.variant != "equal":  # its steps are others
                for key, series in _series(cell, colours[cell.method]):
                    panels.setdefault(key, []).append(series)
        steps = [n for lines in panels.values() for series in lines for n in series.values]
        if not steps:
            continue
        ends = min(steps), max(steps)
        titled = [(*PANELS.get(key, (key, "")), lines) for key, lines in panels.items()]
        drawn = [plot for panel in titled if (plot := plots.curves(*panel, ends))]
        styles = {word for plot in drawn for mark in plot.marks for word in mark.style.split()}
        methods = {m: colour for m, colour in colours.items() if colour in styles}
        every[task] = drawn, methods
    return every


def _series(cell: Cell, colour: str) -> Iterator[tuple[str, plots.Series]]:
    """Yield a cell's curves, each with the key of its panel."""
    alone = {"cmi": "solid", "descent": "dashdot"}.get(cell.variant, "dotted")
    for quantity, values in cell.curves.items():
        hook, _, guidance = quantity.partition("/")
        if hook in HOOKS and guidance:
            style = "dashed" if cell.variant in ADDED and guidance != CMI else alone
            name = f"{cell.label}: {guidance}"
            yield "steps", plots.Series(values, f"{colour} {style}", name)
        else:
            yield quantity, plots.Series(values, f"{colour} {alone}", cell.label)


@dataclass(frozen=True)
class Histograms:
    """The histograms of a metric with their verdicts, by task; ``shared`` if they have one axis."""

    metric: Metric
    shared: bool
    tasks: dict[str, list[tuple[Verdict, plots.Plot]]]

    @property
    def beyond(self) -> bool:
        """Whether any has values beyond its axis."""
        return any(plot.beyond for drawn in self.tasks.values() for _, plot in drawn)


def histograms(results: Results) -> list[Histograms]:
    """Return the histograms of paired differences from the base, by metric."""
    every = []
    for metric in results.metrics:
        every_variant = [v for added in ADDED for v in verdicts(results, metric, "base", added)]
        if not (shown := [verdict for verdict in every_variant if verdict.paired.values]):
            continue
        values = [list(verdict.paired.values.values()) for verdict in shown]
        halves, shared = _axes(values)
        tasks = defaultdict(list)
        for verdict, changes, half in zip(shown, values, halves, strict=True):
            plot = plots.histogram(changes, half, metric.sign)
            tasks[results.tasks[verdict.cell.task]].append((verdict, plot))
        every.append(Histograms(metric, shared, tasks))
    return every


def _axes(values: Sequence[Sequence[float]]) -> tuple[list[float], bool]:
    """Return half the width of each panel's axis, and whether all have the same."""
    halves = [plots.reach(of_panel) for of_panel in values]
    wide = [half for half in halves if half > 0] or [1.0]
    shared = max(wide) <= APART * min(wide)
    common = plots.round_up(min(max(wide), 2 * median(wide)))
    return [common if shared else half or common for half in halves], shared
