"""Geometry of the report's drawings: axes, lines, histograms. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmi_lightning.report.verdicts import MINUS

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38
POINTS = 250  # of a line, at most
LOG_FROM = 30.0  # ratio of largest to smallest from which an axis is logarithmic
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Curve = Mapping[float, float]


@dataclass(frozen=True)
class Tick:
    """A tick: where it is on the drawing, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve as an SVG path; ``group`` is its colour, ``style`` solid, dashed or dotted."""

    path: str
    group: str
    style: str
    name: str


@dataclass(frozen=True)
class Chart:
    """Lines over steps, with the ticks of both axes."""

    title: str
    unit: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    zero: float | None
    logarithmic: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Series:
    """A curve to draw: values by the number of the step."""

    values: Curve
    group: str
    style: str
    name: str


def curve_chart(
    title: str, unit: str, series: Sequence[Series], steps: tuple[float, float]
) -> Chart | None:
    """Return the chart of curves from the first to the last step, or None without any curve."""
    series = [s for s in series if s.values]
    if not series:
        return None
    ys = [y for s in series for y in s.values.values()]
    logarithmic = min(ys) > 0 and max(ys) > LOG_FROM * min(ys)
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if logarithmic else (min(ys), max(ys))
    if not logarithmic and 0 < low < high / 2:
        low = 0.0
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    margin = 0.04 * (high - low)
    low, high = (low if low == 0 else low - margin), high + margin
    first, last = steps
    if first == last:
        first, last = first - 0.5, last + 0.5

    def place_x(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        y = math.log10(y) if logarithmic else y
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    y_values = log_ticks(low, high) if logarithmic else ticks(low, high, 5)
    return Chart(
        title,
        unit,
        "step",
        [Tick(round(place_x(x), 1), label(x)) for x in step_ticks(first, last)],
        [
            Tick(round(place_y(y), 1), power(y) if logarithmic else text)
            for y, text in zip(y_values, labels(y_values), strict=True)
        ],
        [Line(_path(s.values, place_x, place_y), s.group, s.style, s.name) for s in series],
        round(place_y(0.0), 1) if not logarithmic and low < 0 < high else None,
        logarithmic,
    )


def _path(values: Curve, place_x, place_y) -> str:
    points = sorted(values.items())
    if len(points) > POINTS:
        points = [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]
    placed = [f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in points]
    return f"M{placed[0]}h0" if len(placed) == 1 else f"M{'L'.join(placed)}"


# Ticks ---------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / max(count, 1)
    power_of_ten = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power_of_ten for m in (1, 2, 5, 10) if m * power_of_ten >= rough * 0.999)
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
    apart = (last - first) / 8
    whole = first == int(first)
    return sorted({*([first] if whole else []), *(x for x in inner if x - first > apart)})


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


def label(value: float) -> str:
    """Return one number's label."""
    return labels([value])[0]


def power(value: float) -> str:
    """Return 10² for a power of ten out of the ordinary, else the number."""
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = round(value / 10.0**exponent)
    if -2 <= exponent <= 3:
        return label(lead * 10.0**exponent)
    return f"{'' if lead == 1 else f'{lead}·'}10{str(exponent).translate(SUPERSCRIPT)}"


# Histograms ----------------------------------------------------------------------------------

HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT, BINS = 200, 96, 20  # an even number of bins: 0 is an edge


@dataclass(frozen=True)
class Bar:
    """A bar: its left edge, top, width and height, and its verdict ("better" or "worse")."""

    x: float
    y: float
    width: float
    height: float
    verdict: str


@dataclass(frozen=True)
class Histogram:
    """Differences per image around 0, those beyond the axis in its outermost bars."""

    bars: list[Bar]
    mean: float
    ticks: list[Tick]
    beyond: int
    width: int = HISTOGRAM_WIDTH
    height: int = HISTOGRAM_HEIGHT
    bottom: int = HISTOGRAM_HEIGHT - 18


def reach(values: Sequence[float]) -> float:
    """Return the half width of an axis around 0 that holds 98 % of the values; 0 for only zeros."""
    sizes = sorted(abs(v) for v in values)
    wanted = sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1]
    return round_up(wanted) if wanted > 0 else 0.0


def round_up(value: float) -> float:
    """Return the next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    power_of_ten = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return next(m * power_of_ten for m in steps if m * power_of_ten >= value * (1 - 1e-9))


def histogram(values: Sequence[float], half: float, better: str) -> Histogram:
    """Return the histogram of differences on [−half, half].

    Args:
        values: differences, at least one.
        half: half the axis' width, > 0.
        better: "higher" or "lower": which side is coloured as better.
    """
    counts, edge = [0] * BINS, 2 * half / BINS
    for value in values:
        counts[min(BINS - 1, max(0, math.floor((value + half) / edge)))] += 1
    width, floor, most = HISTOGRAM_WIDTH / BINS, HISTOGRAM_HEIGHT - 18, max(counts)
    bars = []
    for i, count in enumerate(counts):
        height = round(count / most * (floor - 8), 1)
        right = i >= BINS // 2
        verdict = "better" if right == (better != "lower") else "worse"
        if count:
            bars.append(Bar(i * width + 0.5, round(floor - height, 1), width - 1, height, verdict))

    def place(value: float) -> float:
        return round((max(-half, min(half, value)) + half) / (2 * half) * HISTOGRAM_WIDTH, 1)

    texts = labels([-half, 0.0, half])
    return Histogram(
        bars,
        place(math.fsum(values) / len(values)),
        [Tick(place(v), t) for v, t in zip((-half, 0.0, half), texts, strict=True)],
        sum(abs(v) > half for v in values),
    )
