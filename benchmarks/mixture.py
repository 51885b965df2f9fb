"""Samplers against exact posteriors of Gaussian mixtures, with and without CMI.

    python benchmarks/mixture.py tune     choose settings on problems of their own
    python benchmarks/mixture.py run      sample 20 other problems per cell (tunes first if need be)
    python benchmarks/mixture.py others   add the methods that have no setting, at 20 levels
    python benchmarks/mixture.py table    print the results as Markdown
    python benchmarks/mixture.py run --quick    a small one, in about a minute

The problems are MCGdiff's (Cardoso et al., 2023); docs/mixture.md describes them and the results.
Results are saved after every problem, to mixture_results.json beside this file; a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixture_problems import (
    ETA,
    FIXED,
    PRIOR_VARIANCE,
    QUICK,
    RULE,
    Cell,
    Results,
    Size,
    instance,
)  # fmt: skip
from mixture_samplers import draw, score, sliced_wasserstein
from mixture_tables import Report

from cmi_lightning.guidance import (
    CADPS,
    CDPS,
    CMI,
    DMPS,
    DPS,
    DSG,
    MCG,
    TMPD,
    AnnealedDPS,
    DiffPIR,
    Guidance,
    MomentMatching,
    PiGDM,
)
from cmi_lightning.information import Lanczos
from cmi_lightning.solvers import (
    DAPS,
    DDPM,
    DDRM,
    FPS,
    DDNMPlus,
    PnPDM,
    REDDiff,
    Renoise,
    Solver,
)

RESULTS = Path(__file__).with_name("mixture_results.json")


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
    return [CMI(c, "beta", math.inf, 0.0, 1.0, 1, estimator=estimator(measured))]


def cmis(measured: int) -> dict[str, list[Guidance]]:
    """Return the settings of CMI that are tried, by label.

    They are none, the library's defaults, and multiples c of β_t. The defaults limit CMI to short
    steps and to a range of levels, for images; the others do not.
    """
    tried: dict[str, list[Guidance]] = {
        "off": [],
        "defaults": [CMI(interval=1, estimator=estimator(measured))],
    }
    return tried | {f"c={c:g}": unlimited(c, measured) for c in (0.1, 0.3, 1.0, 3.0)}


def others(measured: int) -> dict[str, tuple[Solver | None, list[Guidance]]]:
    """Return methods without a setting to choose, as (own solver, guidances), by label."""
    v = PRIOR_VARIANCE
    return {
        "line search": (None, [MomentMatching(1)]),
        "MomentMatching, exact": (DDPM(), [MomentMatching(measured)]),
        "TMPD": (DDPM(), [TMPD()]),
        "CA-DPS": (DDPM(), [CADPS(shrink=0.0)]),
        "annealed DPS": (DDPM(), [AnnealedDPS()]),
        "DMPS": (DDPM(), [DMPS()]),
        "C-DPS": (DDPM(), [CDPS()]),
        "DiffPIR": (Renoise(0.3), [DiffPIR(prior_variance=v)]),
        "DDRM": (DDRM(), []),
        "DDNM+": (DDNMPlus(), []),
        "DAPS, x̂₀": (DAPS(0, spread=1.0), []),
        "DAPS": (DAPS(5, spread=1.0), []),
        "FPS": (FPS(5), []),
        "PnP-DM": (PnPDM(low=0.3, inner=25), []),
        "RED-diff": (REDDiff(), []),
    }


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

    def run_others(self, steps: int, dim: int) -> None:
        """Score the methods without settings in the cells of a number of levels and dimensions."""
        for cell in (c for c in self.size.cells if (c.steps, c.dim) == (steps, dim)):
            lists = self.results["scores"].setdefault(str(cell), {})
            for index in range(self.size.problems):
                task = instance(
                    cell, "report", index, self.size.halved(cell, self.size.draws[cell.dim])
                )
                for name, (solver, guidances) in others(cell.measured).items():
                    if len(lists.setdefault(name, [])) <= index:
                        draws = draw(task, guidances, ETA[cell.steps], solver)
                        lists[name].append(score(draws, task))
            self.save()
            print(cell, flush=True)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("tune", "run", "others", "table"))
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
    elif args.command == "others":
        for dim in (8,) if args.quick else (8, 80):
            bench.run_others(20, dim)
    else:
        print(Report(bench.results, bench.size).text())


if __name__ == "__main__":
    main()
