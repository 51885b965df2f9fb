"""Why does CMI not help on the shipped prior?  Variants of the ascent, on validation images.

    python benchmarks/why.py                      run every variant; goes on where it was stopped
    python benchmarks/why.py --variants descent   some of them
    python benchmarks/why.py --report_only        print the tables of what is there

Each cell is the base of `configs/table/fashion.yaml` at its step size, plus one variant of CMI.
Images are the held-back training images that `tune` uses; test images are never touched.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from results_page import grid, interval

from cmi_lightning.information import Estimator, Information
from cmi_lightning.step import Step
from cmi_lightning.table.command import Teller, parse
from cmi_lightning.table.run import Job, records, run
from cmi_lightning.table.spec import Cell, Method, Table, safe
from cmi_lightning.table.statistics import bootstrap_interval, mean_and_error

ROWS = [
    ("super_resolution", "DPS"),
    ("super_resolution", "ΠGDM"),
    ("inpaint_box", "DPS"),
    ("inpaint_box", "ΠGDM"),
]
FOLDER = Path("runs/why")
LANCZOS = {"krylov": 6, "derivative": "difference"}


class RandomDirection(Estimator):
    """The control: a direction that knows nothing of y; the step is as long as the ascent's."""

    derivatives = 0

    def __call__(self, step: Step) -> Information:
        x = step.x.detach()
        return Information(x.new_full((len(x),), math.nan), step.normal("random direction"))


@dataclasses.dataclass(frozen=True)
class Variant:
    """CMI with other options than the table's; of a base with ``steps`` steps."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 0.1
    steps: int = 100
    estimator: tuple[str, dict[str, Any]] = ("cmi_lightning.information.Lanczos", LANCZOS)

    def config(self) -> dict[str, Any]:
        path, estimator_options = self.estimator
        options = {
            "scale": self.scale,
            "step_size": "noise",
            "max_step": 1.0,
            "interval": 6,
            **self.options,
            "estimator": {"class_path": path, "init_args": estimator_options},
        }
        cmi = {"class_path": "cmi_lightning.guidance.CMI", "init_args": options}
        return {"model": {"guidances+": [cmi]}}


INFORMATION = "cmi_lightning.information."
# The step is a share of the sampler's noise. 0.1 is the largest that `tune` tries: there an effect
# shows if there is one.
VARIANTS = {
    "none": Variant(scale=1e-9),  # measures I without moving anything
    "ascent 0.03": Variant(scale=0.03),
    "ascent": Variant(),
    "descent 0.03": Variant(scale=-0.03),
    "descent": Variant(scale=-0.1),
    "descent 0.3": Variant(scale=-0.3),
    "descent 1": Variant(scale=-1.0),
    "random": Variant(estimator=("why.RandomDirection", {})),
    "descent, early": Variant({"max_signal": 0.1, "interval": 3}, scale=-0.1),
    "descent, late": Variant({"min_signal": 0.1, "interval": 3}, scale=-0.1),
    "ascent, end": Variant({"min_signal": 0.9, "max_signal": 1.0, "interval": 3}),
    "ascent, paper's traces": Variant(estimator=(INFORMATION + "TwoTraces", LANCZOS)),
    "ascent, every step": Variant({"interval": 1}, scale=0.03),
    "descent, every step": Variant({"interval": 1}, scale=-0.03),
    "none, 25 steps": Variant({"interval": 2}, scale=1e-9, steps=25),
    "ascent, 25 steps": Variant({"interval": 2}, steps=25),
    "descent, 25 steps": Variant({"interval": 2}, scale=-0.1, steps=25),
}


def table(images: int, steps: int) -> Table:
    options = ["-c", "table/fashion", "--output", str(FOLDER / str(steps))]
    options += ["--steps", str(steps), "--images", str(images), "--round", str(images)]
    return parse(options, "table")[0]


def cell(spec: Table, row: tuple[str, str], name: str | None, size: float | None = None) -> Cell:
    """Return the base of a row, or with a variant of CMI on it, on the validation images."""
    task, method = row
    plain = spec.cell(task, method)
    sizes = dict(plain.step_sizes)
    option = spec.methods[method].option
    assert option is not None
    label = safe(method)
    if size is not None:
        sizes[option], label = size, f"{label}@{size:g}"
    folder = spec.folder / task / (label if name is None else f"{label}+{safe(name)}")
    variant = "base" if name is None else "cmi"
    return dataclasses.replace(
        plain, folder=folder, validation=True, variant=variant, step_sizes=sizes
    )


def with_variant(spec: Table, name: str) -> Table:
    path = FOLDER / "variants" / f"{safe(name)}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(VARIANTS[name].config(), sort_keys=False))
    return dataclasses.replace(spec, cmi=Method([str(path)]))


def metric(record: dict[str, Any], name: str) -> float:
    return float({**record["metrics"], **record.get("perceptual", {})}[name])


def by_id(folder: Path, name: str) -> dict[str, float]:
    return {r["id"]: metric(r, name) for r in records(folder) if not r["failed"]}


def tuned(spec: Table, row: tuple[str, str]) -> float | None:
    """Return the best step size of what was tried at another number of steps, if any is good."""
    scores = {}
    for size in spec.methods[row[1]].space:
        found = records(cell(spec, row, None, size).folder)
        if found and not any(
            r["failed"] for r in found
        ):  # a size that breaks an image is no choice
            scores[size] = sum(metric(r, "psnr") for r in found) / len(found)
    return max(scores, key=lambda s: scores[s]) if scores else None


def compute(images: int, names: Sequence[str], tune_images: int = 12) -> None:
    for steps in sorted({VARIANTS[name].steps for name in names}, reverse=True):
        spec = table(images, steps)
        found = {row: None for row in ROWS}
        if steps != usual_steps():
            trials = [cell(spec, row, None, s) for row in ROWS for s in spec.methods[row[1]].space]
            run(spec, [Job((c,), tune_images) for c in trials], Teller(len(trials)))
            found = {row: tuned(spec, row) for row in ROWS}
        own = [name for name in names if VARIANTS[name].steps == steps]
        run(spec, [Job((cell(spec, r, None, found[r]),), images) for r in ROWS], Teller(len(ROWS)))
        for name in own:
            other = with_variant(spec, name)
            jobs = [Job((cell(other, row, name, found[row]),), images) for row in ROWS]
            run(other, jobs, Teller(len(jobs)))
            print(f"{name}: done", flush=True)


@functools.cache
def usual_steps() -> int:
    """Return the steps for which `table/fashion` has step sizes."""
    return parse(["-c", "table/fashion"], "table")[0].steps


def information(folder: Path) -> float | None:
    """Return the mean over images and acting steps of I, in nats."""
    curves = [r.get("curves", {}).get("cmi/value", {}) for r in records(folder)]
    values = [float(v) for curve in curves for v in curve.values() if math.isfinite(float(v))]
    return sum(values) / len(values) if values else None


def comparison(base: Path, other: Path, name: str) -> dict[str, float | int | None]:
    before, after = by_id(base, name), by_id(other, name)
    differences = [after[i] - before[i] for i in before if i in after]
    low, high = bootstrap_interval(differences)
    return {"n": len(differences), **mean_and_error(differences), "low": low, "high": high}


def report(images: int) -> dict[str, Any]:
    """Collect and print what has been run; a row per variant, a column per cell."""
    results: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        spec = table(images, variant.steps)
        for row in ROWS:
            size = None if variant.steps == usual_steps() else tuned(spec, row)
            base, other = cell(spec, row, None, size), cell(spec, row, name, size)
            if not records(other.folder) or not records(base.folder):
                continue
            entry: dict[str, Any] = {
                "size": size if size is not None else next(iter(base.step_sizes.values())),
                "base": mean_and_error(list(by_id(base.folder, "psnr").values()))["mean"],
                "information": information(other.folder),
                "passes": records(other.folder)[0]["forwards"] + records(other.folder)[0]["vjps"],
            }
            for m in ("psnr", "ssim", "perceptual"):
                entry[m] = comparison(base.folder, other.folder, m)
            results.setdefault(name, {})[f"{row[0]}, {row[1]}"] = entry
    heads = [f"{task}, {method}" for task, method in ROWS]
    for title, show in (
        ("ΔPSNR, dB", lambda e: interval(e["psnr"], 3, "mean")),
        ("Δ perceptual distance", lambda e: interval(e["perceptual"], 4, "mean")),
        ("mean of I, nats", lambda e: f"{e['information']:.1f}" if e["information"] else ""),
    ):
        rows = [
            (name, [show(cells[h]) if h in cells else "" for h in heads])
            for name, cells in results.items()
        ]
        print(f"\n{grid(title, heads, rows)}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--report_only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report_only:
        compute(options.images, options.variants)
    if found := report(options.images):
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (FOLDER / "why.json").write_text(text, encoding="utf-8")
