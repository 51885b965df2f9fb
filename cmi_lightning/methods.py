"""The packaged methods by name: their guidances, solver, number of steps and step sizes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmi_lightning import configs
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.operators import Operator
from cmi_lightning.solvers import Solver

# The packaged task whose step sizes suit an operator that no task has.
LIKE = {"Inpaint": "RandomMask", "GivenKernel": "GaussianBlur", "AveragePool": "Downsample"}


def step_sizes(operator: Operator) -> dict[str, float]:
    """Return the step sizes of the first packaged task with this operator that has some, or {}.

    >>> from cmi_lightning.operators import Downsample, PhaseRetrieval
    >>> sorted(step_sizes(Downsample(4))), step_sizes(PhaseRetrieval())
    (['dps', 'dsg', 'mcg', 'pigdm'], {})
    """
    kind = type(operator).__name__
    for task in configs.sections("task").values():
        path: str = task["model"]["operator"]["class_path"]
        if "step_sizes" in task and path.rpartition(".")[2] == LIKE.get(kind, kind):
            return dict(task["step_sizes"])
    return {}


@dataclass
class Method:
    """The guidances, solver and number of steps of a method.

    >>> Method.of("dps", {"dps": 4.0}).guidances[0].scale
    4.0
    """

    guidances: list[Guidance]
    solver: Solver | None = None
    steps: int | str = 100

    @classmethod
    def of(cls, method: str | Sequence[Guidance], sizes: Mapping[str, float]) -> Method:
        """Return what ``-c guidance/dps -c add_cmi`` makes of "dps+cmi".

        Args:
            method: names of packaged configurations with + between them, or guidances.
            sizes: step sizes, by the names that the configurations read.

        Raises:
            InputError: for an unknown name.
        """
        if not isinstance(method, str):
            return cls(list(method))
        made = cls([])
        for name in method.split("+"):
            model = _packaged(name, sizes)
            made.guidances += _made(model.get("guidances", []) + model.get("guidances+", []))
            made.solver = _made(model["solver"]) if "solver" in model else made.solver
            made.steps = model.get("num_steps", made.steps)
        return made


def sizes_of(method: str) -> set[str]:
    """Return the names of the step sizes that a packaged method reads.

    >>> sizes_of("dps+cmi")
    {'dps'}
    """
    from omegaconf import OmegaConf

    texts = [OmegaConf.to_yaml(_configuration(name)) for name in method.split("+")]
    return {name for text in texts for name in re.findall(r"step_sizes\.(\w+)", text)}


def methods() -> list[str]:
    """Return the names of the methods that ship with the package.

    >>> {"dps", "pigdm", "ddrm"} <= set(methods())
    True
    """
    names = [name for name in configs.summaries() if name.startswith(("guidance/", "solver/"))]
    alone = [n for n in names if n.startswith("guidance/") or _conditional(n)]
    return list(dict.fromkeys(n.partition("/")[2] for n in alone if n != "guidance/none"))


def _conditional(name: str) -> bool:
    return bool(_made(_packaged(name, {})["solver"]).conditional)


def _packaged(name: str, sizes: Mapping[str, float]) -> dict[str, Any]:
    """Return the model's options in a packaged configuration, of a short name or a whole one."""
    from omegaconf import OmegaConf

    whole: Any = OmegaConf.merge({"step_sizes": dict(sizes)}, _configuration(name))
    model: dict[str, Any] = OmegaConf.to_container(whole, resolve=True)["model"]  # type: ignore[index, call-overload, assignment]
    return model


def _configuration(name: str) -> Any:
    from omegaconf import OmegaConf

    places = {"cmi": ["add_cmi"]}.get(name, [name, f"guidance/{name}", f"solver/{name}"])
    text = next((found for place in places if "/" in place or place == "add_cmi"
                 if (found := configs.find(place))), None)  # fmt: skip
    if text is None:
        kind, _, short = name.rpartition("/")
        known = methods() if kind != "solver" else [
            n.partition("/")[2] for n in configs.summaries() if n.startswith("solver/")
        ]  # fmt: skip
        raise InputError(
            f"There is no {kind or 'method'} '{short}': use {', '.join(known)}"
            f"{', each also with +cmi' if not kind else ''}."
        )
    return OmegaConf.create(text) if text.startswith("{") else OmegaConf.load(text)


def _made(spec: Any) -> Any:
    """Return the objects of a packaged configuration: class_path and init_args, as LightningCLI."""
    if isinstance(spec, list):
        return [_made(part) for part in spec]
    if isinstance(spec, dict) and "class_path" in spec:
        module, _, name = spec["class_path"].rpartition(".")
        options = {k: _made(v) for k, v in spec.get("init_args", {}).items()}
        return getattr(importlib.import_module(module), name)(**options)
    return spec
