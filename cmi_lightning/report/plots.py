"""The report's drawings, curves and histograms alike: axes, ticks, and marks as SVG paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cmi_lightning.report.verdicts import MINUS

POINTS = 250  # of a line, at most
LOG_FROM = 30.0  # ratio of largest to smallest from which an axis is logarithmic
BINS = 20  # an even number: 0 is an edge
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    """A tick: where it is on the drawing, what stands there, and on which side of it."""

    at: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Mark:
    """A line or a bar: its class in the style sheet, its SVG path, its name."""

    style: str
    path: str
    name: str = ""


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``; logarithmic: log₁₀s."""

    low: float
    high: float
    start: int
    end: int
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value is."""
        value = math.log10(value) if self.logarithmic else value
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Plot:
    """A drawing of so many pixels, with its axes inside; ``beyond`` counts values outside them."""

    width: int
    height: int
    x: Axis
    y: Axis
    x_ticks: list[Tick]
    marks: list[Mark]
    y_ticks: list[Tick] = field(default_factory=list)
    title: str = ""
    unit: str = ""
    x_label: str = ""
    beyond: int = 0


@dataclass(frozen=True)
class Series:
    """A curve to draw: values by the number of the step."""

    values: Mapping[int, float]
    style: str
    name: str


def curves(
    title: str, unit: str, series: Sequence[Series], steps: tuple[float, float]
) -> Plot | None:
    """Return the plot of curves from the first to the last step, or None without any curve."""
    values = [y for s in series for y in s.values.values()]
    if not values:
        return None
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > LOG_FROM * low
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    elif 0 < low < high / 2:
        low = 0.0
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    margin = 0.04 * (high - low)
    low, high = (low if low == 0 else low - margin), high + margin
    first, last = steps if steps[0] < steps[1] else (steps[0] - 0.5, steps[0] + 0.5)
    x, y = Axis(first, last, 54, 388), Axis(low, high, 192, 10, logarithmic)
    at = log_ticks(low, high) if logarithmic else ticks(low, high, 5)
    texts = [power(v) for v in at] if logarithmic else labels(at)
    zero = not logarithmic and low < 0 < high
    return Plot(
        *(400, 230, x, y),
        x_ticks=[Tick(x(v), labels([v])[0]) for v in step_ticks(first, last)],
        marks=[
            *([Mark("zero", f"M{x.start} {y(0.0)}H{x.end}")] if zero else []),
            *(Mark(f"curve {s.style}", _line(s.values, x, y), s.name) for s in series if s.values),
        ],
        y_ticks=[Tick(y(v), text) for v, text in zip(at, texts, strict=True)],
        title=title,
        unit=f"{unit}, logarithmic" if unit and logarithmic else unit,
        x_label="step",
    )


def _line(values: Mapping[int, float], x: Axis, y: Axis) -> str:
    points = sorted(values.items())
    if len(points) > POINTS:
        points = [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]
    placed = [f"{x(step)} {y(value)}" for step, value in points]
    return f"M{placed[0]}h0" if len(placed) == 1 else f"M{'L'.join(placed)}"


def histogram(values: Sequence[float], half: float, sign: int) -> Plot:
    """Return the histogram of differences on [−half, half].

    Args:
        values: differences, at least one; those beyond the axis are in its outermost bars.
        half: half the axis' width, > 0.
        sign: 1 where positive differences are better, −1 where negative ones are.
    """
    x, width, counts = Axis(-half, half, 0, 200), 200 / BINS, [0] * BINS
    for value in values:
        counts[min(BINS - 1, max(0, math.floor((value + half) / (2 * half / BINS))))] += 1
    y, marks = Axis(0, max(counts), 78, 8), []
    for i, count in enumerate(counts):
        verdict = "better" if (i >= BINS // 2) == (sign > 0) else "worse"
        if count:
            box = f"M{i * width + 0.5} {y.start}V{y(count)}h{width - 1}V{y.start}z"
            marks.append(Mark(verdict, box))
    mean = x(max(-half, min(half, math.fsum(values) / len(values))))
    marks.append(Mark("mean", f"M{mean} 2V{y.start}"))
    at, anchors = (-half, 0.0, half), ("start", "middle", "end")
    texts = zip(at, labels(at), anchors, strict=True)
    beyond = sum(abs(v) > half for v in values)
    return Plot(200, 96, x, y, [Tick(x(v), *rest) for v, *rest in texts], marks, beyond=beyond)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    apart = round_up((high - low) / count * 0.999, (1, 2, 5, 10))
    start = math.ceil(low / apart - 1e-9)
    return [i * apart for i in range(start, math.floor(high / apart + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between 10^low and 10^high, and 2 and 5 times them if they are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.ceil((high - low) / 5))
    multiples = (1, 2, 5) if high - low < 2.2 else (1,)
    values = [m * 10.0**d for d in decades if d % every == 0 for m in multiples]
    return [v for v in values if low <= math.log10(v) <= high]


def step_ticks(first: float, last: float) -> list[float]:
    """Return whole steps for the axis, from the first to the last one."""
    inner = [x for x in ticks(first, last, 4) if x == int(x)]
    far = {x for x in inner if x - first > (last - first) / 8}
    return sorted(far | {first} if first == int(first) else far)


def round_up(value: float, steps: Sequence[float] = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)) -> float:
    """Return the next of these times a power of ten."""
    power_of_ten = 10.0 ** math.floor(math.log10(value))
    return next(m * power_of_ten for m in steps if m * power_of_ten >= value * (1 - 1e-9))


def reach(values: Sequence[float]) -> float:
    """Return the half width of an axis around 0 that holds 98 % of the values; 0 for only zeros."""
    sizes = sorted(abs(v) for v in values)
    wanted = sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1]
    return round_up(wanted) if wanted > 0 else 0.0


def labels(values: Sequence[float]) -> list[str]:
    """Return the numbers with as few decimals as tell them all apart."""
    for decimals in range(9):
        texts = [f"{v:.{decimals}f}" for v in values]
        near = all(abs(float(t) - v) <= 1e-6 * abs(v) for t, v in zip(texts, values, strict=True))
        if len(set(texts)) == len(texts) and near:
            break
    if any(abs(v) >= 1e5 or 0 < abs(v) < 1e-4 for v in values):
        texts = [f"{v:.3g}" for v in values]
    return [t.replace("-", MINUS) for t in texts]


def power(value: float) -> str:
    """Return 10² for a power of ten out of the ordinary, else the number."""
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = round(value / 10.0**exponent)
    if -2 <= exponent <= 3:
        return labels([lead * 10.0**exponent])[0]
    return f"{'' if lead == 1 else f'{lead}·'}10{str(exponent).translate(SUPERSCRIPT)}"
