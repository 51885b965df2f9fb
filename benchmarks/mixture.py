"""Samplers against exact posteriors of Gaussian mixtures, with and without CMI.

    python benchmarks/mixture.py tune     choose settings on problems of their own
    python benchmarks/mixture.py run      sample 20 other problems per cell (tunes first if need be)
    python benchmarks/mixture.py table    print the results as Markdown
    python benchmarks/mixture.py run --quick    a small one, in about a minute

The problems are MCGdiff's (Cardoso et al., 2023); docs/mixture.md describes them and the results.
Results are saved after every problem, to mixture_results.json beside this file; a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, Guidance, MomentMatching, PiGDM
from cmi_lightning.information import Lanczos
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Dense
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition

RESULTS = Path(__file__).with_name("mixture_results.json")
SPACING = 8.0  # of the components
ETA = {20: 0.6, 100: 0.85}  # share of DDPM's noise, by the number of steps
DIRECTIONS = 100
FENCE = 1e3  # draws that leave this box have diverged; the prior's stay within ±25
CENTRAL = (0.5, 0.9)
PRIOR_VARIANCE = 2 * SPACING**2 + 1  # of a coordinate, with equal weights


class Cell(NamedTuple):
    """One row of the table: d, m = d_y, and the number of levels."""

    dim: int
    measured: int
    steps: int

    def __str__(self) -> str:
        return f"d={self.dim} m={self.measured} steps={self.steps}"


CELLS = [Cell(d, m, n) for n in (20, 100) for d in (8, 80, 800) for m in (1, 2, 4)]


@dataclass(frozen=True)
class Size:
    """How much is computed: problems per cell (in tuning: per m) and draws per problem.

    The cells of 800 dimensions and 100 steps cost half of it all; there the draws and the
    tuning problems are halved.
    """

    cells: Sequence[Cell] = tuple(CELLS)
    tuning_problems: int = 4
    tuning_draws: int = 250
    problems: int = 20
    draws: Mapping[int, int] = field(default_factory=lambda: {8: 2000, 80: 1000, 800: 500})

    def halved(self, cell: Cell, number: int) -> int:
        """Return the number for a cell."""
        return number // 2 if cell.dim == 800 and cell.steps == 100 else number


QUICK = Size([c for c in CELLS if c.dim == 8 and c.steps == 20], 1, 100, 3, {8: 300})


def generator(*key: object) -> torch.Generator:
    """Return a generator that belongs to a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


# The construction.


def alpha_bars() -> np.ndarray:
    """ᾱ of 1,000 levels: linear βs in *reverse*, 0.02 down to 1e-4, after ᾱ_0 = 1."""
    return np.cumprod(1 - np.concatenate([[0.0], np.linspace(0.02, 1e-4, 999)]))


def time_grid(steps: int, singular_values: Sequence[float], std: float) -> list[int]:
    """Return ``steps`` indices into :func:`alpha_bars`, from 0 (clean) to 999.

    They step down √ᾱ evenly until √ᾱ < 0.01, and the rest of them is spread evenly up to 999. One
    is put where a measured direction of the sample is as noisy as its measurement,
    ᾱ std² = (1 − ᾱ) s².

    Args:
        steps: how many, the clean level included.
        singular_values: s of the operator.
        std: of the measurement noise.
    """
    abar = alpha_bars()
    root, s = np.sqrt(abar), np.asarray(singular_values)
    gap = np.abs(std**2 * abar - (1 - abar) * s[:, None] ** 2).min(0)
    special = int(gap.argmin())
    end = int(np.flatnonzero(root < 1e-2)[0])
    stride = (1 - root[end]) / (steps - 1 - (special > 0))
    grid = [0]
    for i in range(1, end):
        if root[grid[-1]] - root[i] >= stride or i == special:
            grid.append(i)
    rest = np.ceil(np.linspace(grid[-1], len(abar) - 1, steps - len(grid) + 1))
    return grid + [int(i) for i in rest[1:]]


def schedule(grid: Sequence[int]) -> Schedule:
    """Return the noise levels of a grid; the clean one is where every chain ends."""
    abar = alpha_bars()[list(grid[1:])]
    return Schedule(
        np.sqrt(abar).tolist(), np.sqrt(1 - abar).tolist(), [float(i) for i in grid[1:]]
    )


def means(dim: int) -> Tensor:
    """Return (8i, 8j, 8i, 8j, …) for i, j in −2 … 2, (25, dim)."""
    ij = SPACING * torch.cartesian_prod(*[torch.arange(-2, 3, dtype=torch.float64)] * 2)
    return ij.repeat(1, dim // 2)


def weights(dim: int) -> Tensor:
    """Return the components' weights, ∝ χ²₁, drawn once per dimension."""
    w = torch.randn(25, generator=generator("weights", dim), dtype=torch.float64) ** 2
    return w / w.sum()


def measurement(cell: Cell, g: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Return A (m, d), its singular values (sorted uniform draws), and the noise's std.

    std is uniform between 0 and the largest singular value.
    """
    U, _, Vh = torch.linalg.svd(
        torch.randn(cell.measured, cell.dim, generator=g, dtype=torch.float64), full_matrices=False
    )
    s = torch.rand(cell.measured, generator=g, dtype=torch.float64).sort(descending=True).values
    std = float(torch.rand((), generator=g, dtype=torch.float64) * s.max())
    return U * s @ Vh, s, std


@dataclass(frozen=True)
class Instance:
    """One problem with draws of its exact posterior.

    Attributes:
        prior: the mixture, with the problem's noise levels.
        problem: y, A and the noise.
        truth: the x₀ (d,) that was measured.
            reference: its draws (n, d), which samplers are compared with.
        second: as many others, for the floor.
        directions: unit vectors (d, 100) of the metric.
        seed: of the samplers' noise.
    """

    prior: GaussianMixture
    problem: Problem
    truth: Tensor
    posterior: GaussianMixture
    reference: Tensor
    second: Tensor
    directions: Tensor
    seed: int


def instance(cell: Cell, role: str, index: int, count: int) -> Instance:
    """Return a problem; those of different roles or indices are independent.

    Those of 20 and of 100 steps are the same problems.
    """
    g = generator("problem", cell.dim, cell.measured, role, index)
    A, s, std = measurement(cell, g)
    levels = schedule(time_grid(cell.steps, s.tolist(), std))
    prior = GaussianMixture(means(cell.dim), 1.0, weights(cell.dim), levels)
    prior.fast = True  # rows need not be independent to the last bit here
    truth = prior.sample(1, g)
    y = truth @ A.mT + std * torch.randn(1, cell.measured, generator=g, dtype=torch.float64)
    posterior = prior.condition(A, y[0], std)
    directions = torch.randn(cell.dim, DIRECTIONS, generator=g, dtype=torch.float64)
    reference, second = (posterior.sample(count, g) for _ in range(2))
    seed = int(torch.randint(2**31, (), generator=g))
    dtype = torch.float64 if cell.dim == 8 else torch.float32  # single precision is twice as fast
    return Instance(
        prior.to(dtype),
        Problem(y.to(dtype).expand(count, -1), Dense(A.to(dtype)), std),
        truth[0],
        posterior,
        reference,
        second,
        directions / directions.norm(dim=0),
        seed,
    )


# The metrics.


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Return the mean over directions (d, k) of the Wasserstein-1 distance of the projections.

    For as many draws a (n, d) as b (n, d) it is the mean distance of the sorted ones.
    """
    a, b = (_sorted(x @ directions) for x in (a, b))
    return float((a - b).abs().mean())


def _sorted(x: Tensor) -> Tensor:
    """Return the columns in order; many times faster than torch.sort, which tracks indices."""
    return torch.from_numpy(np.sort(x.T.contiguous().numpy(), axis=1)).T


def coverage(draws: Tensor, truths: Tensor) -> list[float]:
    """Return the share of truths (k, d) in the central intervals of the draws (n, d).

    The mean over coordinates, for each of ``CENTRAL``.
    """
    ordered = _sorted(draws)
    shares = []
    for level in CENTRAL:
        low, high = (round(q * (len(draws) - 1)) for q in ((1 - level) / 2, (1 + level) / 2))
        inside = (truths >= ordered[low]) & (truths <= ordered[high])
        shares.append(float(inside.double().mean()))
    return shares


# The samplers.


class BatchNoise(SampleNoise):
    """Noise of a whole batch from one generator per stream and step.

    The draws of one problem need not stay the same in another batch, and 2,000 generators a step
    would take most of the time.
    """

    def normal(self, stream: str, step: int, like: Tensor) -> Tensor:
        g = self.generator(0, stream, step)
        return torch.randn(like.shape, generator=g, dtype=torch.float32).to(like)

    def signs(self, stream: str, step: int, like: Tensor) -> Tensor:
        g = self.generator(0, stream, step)
        return torch.randint(0, 2, like.shape, generator=g).to(like) * 2 - 1


@dataclass(frozen=True)
class ScaledDDPM(Solver):
    """DDPM's mean with η times its noise: the solver of MCGdiff's DPS.

    Unlike DDIM's, its marginals are narrower than the chain's for η < 1.
    """

    eta: float
    stochastic = True  # type: ignore[assignment]

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        chain = step.coefficients
        mean = chain.from_x * step.x.detach() + chain.from_x0 * guided_x0(step)
        return Transition(mean, self.eta * math.sqrt(chain.variance), step.normal("solver"))


class Fence(Guidance):
    """Keeps diverging draws in a large box, so that they count as far off and not as missing."""

    differentiable = False

    def guide_sample(self, step: Step, x: Tensor) -> Tensor:
        if float(x.abs().max()) <= FENCE:  # false for NaN
            return x
        return x.nan_to_num(nan=FENCE).clamp(-FENCE, FENCE)


def draw(task: Instance, guidances: Sequence[Guidance], eta: float) -> Tensor:
    """Return a sampler's draws (n, d), float64."""
    sampler = Sampler(task.prior, ScaledDDPM(eta), [*guidances, Fence()], clamp=False)
    like = task.reference.to(task.problem.y)
    return sampler.run(task.problem, BatchNoise(task.seed, ["batch"]), like).double()


# What is compared. Every grid has six settings.


def bases(measured: int) -> dict[str, dict[str, Guidance]]:
    """Return the settings of each base method, by label."""
    scales = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
    v = PRIOR_VARIANCE
    pigdm = {"v=1": PiGDM()} | {f"scale={s:g}": PiGDM(v, "canonical", s) for s in (1.0, 2.0, 4.0)}
    pigdm |= {f"posterior, scale={s:g}": PiGDM(v, "posterior", s) for s in (0.5, 1.0)}
    return {
        "DPS": {f"scale={s:g}": DPS(s) for s in scales},
        "ΠGDM": pigdm,
        "MCG": {f"scale={s:g}": MCG(s) for s in scales},
        "DSG": {f"rate={r:g}": DSG(r) for r in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)},
        "MomentMatching": {
            f"scale={s:g}": MomentMatching(measured, s) for s in (0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
        },
    }


def estimator(measured: int) -> Lanczos:
    """Return CMI's estimator; its space ends at m."""
    return Lanczos(krylov=min(3, measured))


def unlimited(c: float, measured: int) -> list[Guidance]:
    """Return CMI with steps of c·β_t at every level, however long; c < 0 descends."""
    return [CMI(c, "beta", math.inf, 0.0, 1.0, estimator=estimator(measured))]


def cmis(measured: int) -> dict[str, list[Guidance]]:
    """Return the settings of CMI that are tried, by label.

    They are none, the library's defaults, and multiples c of β_t. The defaults limit CMI to short
    steps and to a range of levels, for images; the others do not.
    """
    tried: dict[str, list[Guidance]] = {"off": [], "defaults": [CMI(estimator=estimator(measured))]}
    return tried | {f"c={c:g}": unlimited(c, measured) for c in (0.1, 0.3, 1.0, 3.0)}


RULE = "DPS, scale=0.2"  # MCGdiff's: 0.1/‖r‖ ∇‖r‖²
FIXED = {"c=1": 1.0, "c=-1": -1.0}  # not tuned: ascent, and descent, which tuning never tries


class Scores(NamedTuple):
    """One sampler on one problem."""

    distance: float
    inside: list[float]  # shares of exact posterior draws in the central intervals
    truth: list[float]  # the same of the truth
    diverged: float  # share of draws at the fence


def score(draws: Tensor, task: Instance) -> Scores:
    """Compare draws (n, d) with the exact posterior."""
    return Scores(
        round(sliced_wasserstein(draws, task.reference, task.directions), 4),
        [round(c, 4) for c in coverage(draws, task.reference)],
        [round(c, 4) for c in coverage(draws, task.truth[None])],
        round(float((draws.abs().amax(1) >= FENCE).double().mean()), 4),
    )


Results = dict[str, Any]


class Bench:
    """Fills the file of results, and reads it.

    The file holds, under "tuned", for d and the number of steps the trials of each method (mean
    distance by label) and the best; and, under "scores", for each cell and method a list with one
    entry per problem.
    """

    def __init__(self, size: Size, path: Path) -> None:
        self.size, self.path = size, path
        self.results: Results = {"tuned": {}, "scores": {}}
        if path.exists():
            self.results = json.loads(path.read_text())

    def save(self) -> None:
        """Write the file, one line per list, whole or not at all."""
        lines = ["{"]
        for part, groups in self.results.items():
            lines.append(f' "{part}": {{')
            for name, entries in groups.items():
                rows = [
                    f"   {json.dumps(key, ensure_ascii=False)}: "
                    f"{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
                    for key, value in entries.items()
                ]
                lines += [f'  "{name}": {{', ",\n".join(rows), "  },"]
            lines[-1] = lines[-1].removesuffix(",")
            lines.append(" },")
        lines[-1] = " }"
        draft = self.path.with_suffix(".part")
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text("\n".join([*lines, "}", ""]))
        draft.replace(self.path)

    def tuned(self, cell: Cell) -> dict[str, Any]:
        """Return {method: {"best": label, "trials": {label: mean distance}}} of d and steps.

        A setting serves every m. Each base is tuned first, and CMI then on top of it.
        """
        key = f"d={cell.dim} steps={cell.steps}"
        if key in self.results["tuned"]:
            found: dict[str, Any] = self.results["tuned"][key]
            return found
        tasks = [
            (m, instance(Cell(cell.dim, m, cell.steps), "tune", i, self.size.tuning_draws))
            for m in sorted({c.measured for c in self.size.cells if c[::2] == cell[::2]})
            for i in range(self.size.halved(cell, self.size.tuning_problems))
        ]

        def trial(method: str, base: str, cmi: str = "off") -> float:
            distances = [
                sliced_wasserstein(
                    draw(task, [bases(m)[method][base], *cmis(m)[cmi]], ETA[cell.steps]),
                    task.reference,
                    task.directions,
                )
                for m, task in tasks
            ]
            return round(sum(distances) / len(distances), 4)

        def best(trials: dict[str, float]) -> dict[str, Any]:
            return {"best": min(trials, key=lambda label: trials[label]), "trials": trials}

        chosen: dict[str, Any] = {}
        for method, grid in bases(1).items():
            trials = {label: trial(method, label) for label in grid}
            chosen[method] = best(trials)
            base = chosen[method]["best"]
            added = {
                label: trials[base] if label == "off" else trial(method, base, label)
                for label in cmis(1)
            }
            chosen[f"CMI+{method}"] = best(added)
            print(f"{key} {method}: {chosen[method]} CMI: {chosen[f'CMI+{method}']}", flush=True)
        self.results["tuned"][key] = chosen
        self.save()
        return chosen

    def variants(self, cell: Cell) -> Iterator[tuple[str, list[Guidance], str | None]]:
        """Yield (name, guidances, name of a variant before it that is the same)."""
        tuned = self.tuned(cell)
        yield RULE, [DPS(0.2)], None
        fixed = {
            label: unlimited(c, cell.measured) for label, c in FIXED.items() if cell.steps == 20
        }
        for label, added in fixed.items():
            yield f"CMI+{RULE}, {label}", [DPS(0.2), *added], None
        for method, grid in bases(cell.measured).items():
            base, cmi = grid[tuned[method]["best"]], tuned[f"CMI+{method}"]["best"]
            yield method, [base], RULE if base == DPS(0.2) else None
            best = [base, *cmis(cell.measured)[cmi]]
            yield f"CMI+{method}", best, method if cmi == "off" else None
            for label, added in fixed.items():
                same = f"CMI+{method}" if cmi == label else None
                yield f"CMI+{method}, {label}", [base, *added], same

    def run(self) -> None:
        """Score every variant on every problem that is not done yet."""
        for cell in self.size.cells:
            variants = list(self.variants(cell))
            lists = self.results["scores"].setdefault(str(cell), {})
            started = time.perf_counter()
            for index in range(self.size.problems):
                todo = [v for v in variants if len(lists.get(v[0], [])) <= index]
                if not todo:
                    continue
                count = self.size.halved(cell, self.size.draws[cell.dim])
                task = instance(cell, "report", index, count)
                if len(lists.setdefault("exact", [])) <= index:
                    lists["exact"].append(score(task.second, task))
                for name, guidances, same in todo:
                    scores = (
                        lists[same][index]
                        if same
                        else score(draw(task, guidances, ETA[cell.steps]), task)
                    )
                    lists.setdefault(name, []).append(scores)
                self.save()
            print(f"{cell}: {time.perf_counter() - started:.0f} s", flush=True)


# The tables.


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
    v = np.asarray(values, dtype=float)
    error, mean = v.std(ddof=1) / len(v) ** 0.5, v.mean()
    if error == 0:
        return Estimate(float(mean), 0.0, float(mean == 0))
    t = stats.t(len(v) - 1)
    return Estimate(float(mean), float(t.ppf(0.975) * error), float(2 * t.sf(abs(mean / error))))


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which hypotheses Holm's procedure rejects at a family-wise level."""
    rejected = [False] * len(p)
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        if p[k] > level / (len(p) - rank):
            break
        rejected[k] = True
    return rejected


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
        self.methods = list(bases(1))

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
            "Mean ratio": self.ratio_table(),
            "Counts": self.counts(),
            "Coverage of exact draws, 50 % / 90 %": self.coverage_table("inside"),
            "Coverage of the truth, 50 % / 90 %": self.coverage_table("truth"),
            "Change of coverage of exact draws, 20 levels": self.coverage_change_table(),
        }
        return "\n\n".join(f"### {title}\n\n{body}" for title, body in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("tune", "run", "table"))
    parser.add_argument("--quick", action="store_true", help="d = 8, 20 steps, 3 problems a cell")
    parser.add_argument("--results", type=Path, help="the file to fill or to read")
    args = parser.parse_args()
    path = args.results or (Path("runs/mixture_quick.json") if args.quick else RESULTS)
    bench = Bench(QUICK if args.quick else Size(), path)
    if args.command == "tune":
        for cell in bench.size.cells:
            bench.tuned(cell)
    elif args.command == "run":
        bench.run()
    else:
        print(Report(bench.results, bench.size).text())


if __name__ == "__main__":
    main()
