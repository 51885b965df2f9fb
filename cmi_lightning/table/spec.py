"""What a table is made of: tasks, methods, step sizes, and the cells that follow from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cmi_lightning.checked import check_value
from cmi_lightning.errors import InputError
from cmi_lightning.report.results import ADDED, VARIANTS, Variant
from cmi_lightning.table.clusters import clusters_by
from cmi_lightning.table.records import Cell, folder_name, passes, records


@dataclass
class Task:
    """A degradation: how it is called, and the configurations that set it.

    Attributes:
        label: for people.
        configs: configurations, as after ``-c``.
    """

    label: str
    configs: list[str]


@dataclass
class Method:
    """A guidance: the configurations that set it, and its step size.

    Attributes:
        configs: configurations, as after ``-c``.
        option: the name under ``step_sizes`` that those configurations read; None has none.
        space: the step sizes that ``cmi-lightning tune`` tries.
        steps: reverse steps. Default: the table's.
        cmi: whether the rows with CMI, its descent and of equal cost are run.
    """

    configs: list[str]
    option: str | None = None
    space: list[float] = field(default_factory=list)
    steps: int | None = None
    cmi: bool = True


@dataclass
class Posterior:
    """Cells of which several samples are drawn per image.

    Attributes:
        images: how many images.
        draws: samples of each.
        tasks: keys of tasks; None for all.
        methods: names of methods; None for all.
    """

    images: int = 50
    draws: int = 16
    tasks: list[str] | None = None
    methods: list[str] | None = None


@dataclass
class Table:
    """Bases with and without CMI on tasks, from one YAML file.

    Every cell is a run of ``cmi-lightning predict`` in a folder of its own, so a table goes on
    where it was stopped. All cells see the same measurements, and at equal steps the same noise.

    Attributes:
        title: heading of the report.
        common: configurations of every cell, on top of its task's.
        tasks: the tasks, by a key that serves as a folder's name.
        methods: the bases, by name.
        cmi: the guidance that is added to each base.
        descent: CMI downhill, by step sizes below zero, in rows of its own. Default: no such rows.
        output: folder of the cells, the report and the tables.
        images: how many images.
        round: images that every cell restores before any does more.
        batch_size: images at a time; ``round`` is a multiple of it. Default: ``round``.
        steps: reverse steps.
        seed: seed of all noise.
        processes: cells at a time, each in a process of its own with its share of the CPU's cores.
            For CPUs: on GPUs leave it 1.
        equal_cost: also run each base (but one without a step size, which is no guidance) with as
            many steps as CMI's network passes would pay for, at the same step size.
        equal_images: how many images the rows of equal cost restore, the first ones. Default: all.
            A multiple of ``batch_size`` is best: a batch that is cut is restored again.
        only_tasks: run these tasks alone.
        only_methods: run these methods alone.
        step_sizes: by key of the task, then name of the method ("CMI+DPS" for CMI on DPS,
            "descent+DPS" for its descent); what is missing is as the configurations have it.
            ``cmi-lightning tune`` finds them.
        validation: configurations that select other images, for ``tune``, on top of ``common``.
        tune_images: how many of these are used.
        objective: the metric by which ``tune`` chooses.
        cluster: takes an image's id to its cluster, such as the photograph that a crop is of.
            Standard errors, intervals and tests then take clusters as the independent units. A
            separator, such as "/", leaves what is before the last one; a regular expression with
            a group in parentheses leaves the group. Default: every image is its own.
        posterior: cells of which several samples are drawn per image; None for none.
        examples: images in the report's figure, per task.
        report_only: restore nothing; write the report of what is there.

    Raises:
        InputError: for a number out of range or a name that is none.
    """

    title: str
    common: list[str]
    tasks: dict[str, Task]
    methods: dict[str, Method]
    cmi: Method
    descent: Method | None = None
    output: str = "runs/table"
    images: int = 200
    round: int = 50
    batch_size: int | None = None
    steps: int = 100
    seed: int = 0
    processes: int = 1
    equal_cost: bool = True
    equal_images: int | None = None
    only_tasks: list[str] | None = None
    only_methods: list[str] | None = None
    step_sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    validation: list[str] = field(default_factory=list)
    tune_images: int = 16
    objective: Literal["psnr", "ssim", "perceptual", "lpips"] = "psnr"
    cluster: str | None = None
    posterior: Posterior | None = None
    examples: int = 3
    report_only: bool = False

    def __post_init__(self) -> None:
        posterior = self.posterior or Posterior()
        names = ("images", "round", "batch_size", "steps", "processes", "tune_images")
        numbers = {name: getattr(self, name) for name in (*names, "equal_images")}
        numbers |= {f"methods.{name}.steps": method.steps for name, method in self.methods.items()}
        numbers |= {"posterior.images": posterior.images, "posterior.draws": posterior.draws}
        for name, value in numbers.items():
            least = 2 if name == "posterior.draws" else 1
            other = "; to run no rows of equal cost set equal_cost to false"
            more = other if name == "equal_images" else ""
            check_value(name, value, int | None, f"[{least}, inf)", more)
        check_value("seed", self.seed, int)
        check_value("examples", self.examples, int, "[0, inf)")
        if self.round % (self.batch_size or 1):
            raise InputError(f"round must be a multiple of batch_size, got {self.round}.")
        if self.cluster is not None:
            clusters_by(self.cluster)
        self._check_folders()
        added = [f"{word}+{method}" for word in ADDED.values() for method in self.methods]
        choices: list[tuple[str, Iterable[str] | None, Iterable[str]]] = [
            ("only_tasks", self.only_tasks, self.tasks),
            ("only_methods", self.only_methods, self.methods),
            ("posterior.tasks", posterior.tasks, self.tasks),
            ("posterior.methods", posterior.methods, self.methods),
            ("step_sizes", self.step_sizes, self.tasks),
            *((f"step_sizes.{t}", s, [*self.methods, *added]) for t, s in self.step_sizes.items()),
        ]
        for option, chosen, known in choices:
            if unknown := set(chosen or ()).difference(known):
                raise InputError(f"{option}: there is no '{min(unknown)}'; use {', '.join(known)}.")
        if not self.rows():
            raise InputError("only_tasks and only_methods leave nothing to do: name one of each.")

    def _check_folders(self) -> None:
        """Refuse names that cannot be folders of their own."""
        for option, names in (("tasks", self.tasks), ("methods", self.methods)):
            if not names:
                raise InputError(f"{option}: name at least one.")
        for key in self.tasks:
            if not key.replace("_", "").replace("-", "").isalnum():
                raise InputError(
                    f"tasks: '{key}' names a folder; use letters, digits, '-' and '_', and a label."
                )
        taken: set[str] = set()
        for name, variant in itertools.product(self.methods, VARIANTS):
            folder = folder_name(name, variant)
            if folder in taken or folder.startswith("."):
                raise InputError(
                    f"methods: '{name}' would have '{folder}', another one's folder; rename it."
                )
            taken.add(folder)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output).expanduser()

    def cluster_of(self, image: str) -> str | None:
        """Return the cluster of an image, by its id; None where every image is its own."""
        return None if self.cluster is None else clusters_by(self.cluster)(image)

    def rows(self) -> list[tuple[str, str]]:
        """Return the (task, method) pairs that are wanted."""
        every = itertools.product(self.tasks, self.methods)
        return [(t, m) for t, m in every if _in(t, self.only_tasks) and _in(m, self.only_methods)]

    def variants(self, method: str) -> tuple[Variant, ...]:
        """Return what is run of a base: draws from the prior alone get no nearer by more steps."""
        base = self.methods[method]
        equal = self.equal_cost and base.option is not None
        wanted = {"cmi": True, "descent": self.descent is not None, "equal": equal}
        return tuple(v for v in VARIANTS if v == "base" or (base.cmi and wanted[v]))

    def steps_of(self, method: str) -> int:
        """Return the reverse steps of a base."""
        return self.methods[method].steps or self.steps

    def added(self, variant: Variant) -> Method | None:
        """Return what a variant adds to its base."""
        return {"cmi": self.cmi, "descent": self.descent}.get(variant)

    def cell(
        self, task: str, method: str, variant: Variant = "base", images: int | None = None
    ) -> Cell:
        """Return a cell as it is reported, or as it is after the round up to ``images``."""
        images = images or self.images
        images = min(images, self.equal_images or images) if variant == "equal" else images
        sizes = self.step_sizes.get(task, {})
        parts = {method: self.methods[method]}
        if (added := self.added(variant)) is not None:
            parts[f"{ADDED[variant]}+{method}"] = added
        chosen = {m.option: sizes[name] for name, m in parts.items() if m.option and name in sizes}
        folder = self.folder / "cells" / task / folder_name(method, variant)
        return Cell(task, method, variant, chosen, self.steps_of(method), images, folder)

    def at_equal_cost(self, cell: Cell) -> Cell:
        """Return a cell of equal cost with its number of steps, or any other cell as it is.

        The steps are those whose network passes come nearest to what the cell with CMI costs, or
        those that the cell has been run with.
        """
        if cell.variant != "equal":
            return cell
        if own := records(cell.folder, 1):
            return replace(cell, steps=own[0]["steps"])
        base, cmi = (
            passes(records(self.cell(cell.task, cell.method, v).folder, 1)) for v in ("base", "cmi")
        )
        steps = round(cell.steps * cmi / base) if base and cmi else 0
        return replace(cell, steps=max(cell.steps, steps))

    def posterior_cells(self) -> Iterator[Cell]:
        """Yield the cells of which several samples are drawn."""
        if (wanted := self.posterior) is None:
            return
        for task, method in self.rows():
            if _in(task, wanted.tasks) and _in(method, wanted.methods):
                for variant in (v for v in self.variants(method) if v in ("base", "cmi")):
                    cell = self.cell(task, method, variant)
                    folder = self.folder / "posterior" / task / cell.folder.name
                    yield replace(cell, images=wanted.images, folder=folder, draws=wanted.draws)

    def arguments(self, cell: Cell) -> list[str]:
        """Return the arguments of ``cmi-lightning predict`` that restore a cell's images."""
        added = self.added(cell.variant)
        configs = [*self.tasks[cell.task].configs, *self.common]
        configs += self.validation if cell.validation else []
        configs += self.methods[cell.method].configs + (added.configs if added else [])
        arguments = [part for config in configs for part in ("-c", config)]
        for name, value in cell.step_sizes.items():
            arguments += [f"--step_sizes.{name}", json.dumps(value)]
        arguments += [
            f"--model.num_steps={cell.steps}",
            f"--model.seed={self.seed}",
            f"--data.limit={cell.images}",
            f"--data.batch_size={self.batch_size or self.round}",
            f"--trainer.default_root_dir={cell.folder}",
        ]
        if cell.draws > 1:
            arguments += [f"--model.samples_per_image={cell.draws}"]
            arguments += ["--trainer.callbacks+=cmi_lightning.callbacks.PosteriorQuality"]
        return arguments


def _in(name: str, chosen: list[str] | None) -> bool:
    return chosen is None or name in chosen
