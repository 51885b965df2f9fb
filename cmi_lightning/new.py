"""``cmi-lightning new guidance NAME``: a class of one's own, with a test that passes."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from cmi_lightning.errors import InputError
from cmi_lightning.files import write

GUIDANCE = '''"""A guidance: what pulls a sample towards its measurement."""

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.guidance import Guidance
from cmi_lightning.linalg import norm
from cmi_lightning.step import Step


@dataclass(frozen=True)
class {name}(Guidance):
    """x_s ← x_s − scale ∇‖y − A x̂₀‖: change this line, and the method below."""

    scale: float = 1.0

    def guide_sample(self, step: Step, x: Tensor) -> Tensor:
        """Return x_s (B, C, H, W), moved."""
        return x - self.scale * step.grad(norm(step.residual))
'''
GUIDANCE_TEST = """import torch

from cmi_lightning import Problem, Sampler
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.solvers import DDPM
from {module} import {name}


def residual(scale: float) -> torch.Tensor:
    x, noise = torch.full((2, 1, 8, 8), 0.5), SampleNoise(0, ["a", "b"])
    problem = Problem.simulate(x, Identity(), 0.1, noise)
    sampler = Sampler(GaussianPrior(torch.zeros(1, 8, 8)), DDPM(), [{name}(scale)], num_steps=20)
    return (problem.y - sampler.run(problem, noise, x)).flatten(1).norm(dim=1)


def test_it_brings_samples_nearer_to_their_measurement():
    assert (residual(1.0) < residual(0.0)).all()
"""
OPERATOR = '''"""A forward model: what was done to the image."""

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.operators import LinearOperator


@dataclass(frozen=True)
class {name}(LinearOperator):
    """A x = gain · x: change this line, and the method below. (Not linear? Use Operator.)"""

    gain: float = 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return A x, (B, C, H, W) → (B, *m)."""
        return self.gain * x
'''
OPERATOR_TEST = """import torch

from cmi_lightning import Problem
from cmi_lightning.noise import SampleNoise
from {module} import {name}


def test_the_adjoint_is_the_adjoint():
    x, noise = torch.randn(2, 3, 8, 8), SampleNoise(0, ["a", "b"])
    problem = Problem.simulate(x, {name}(), 0.1, noise)
    A, y = problem.operator, torch.randn_like(problem.y)
    left, right = (A(x) * y).sum(), (x * A.adjoint(y)).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
"""
METRIC = '''"""A metric: a number for every restored image."""

from typing import Any

from cmi_lightning.callbacks.base import RecordingCallback
from cmi_lightning.predict.restoration import Restoration


class {name}(RecordingCallback):
    """The mean absolute error, on [−1, 1]: change this line, and the first method below."""

    key, summary = "{module}", "{module}.json"

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        """Return what is kept of each image; all of it is in records/."""
        if outputs["truth"] is None:
            return [{{self.key: None}} for _ in outputs["id"]]
        errors = (outputs["restored"] - outputs["truth"]).abs().flatten(1).mean(1)
        return [{{self.key: float(error)}} for error in errors]

    def summarise(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what is written to the summary."""
        known = [r[self.key] for r in records if r[self.key] is not None]
        return {{"mean": sum(known) / len(known) if known else None, "images": len(known)}}
'''
METRIC_TEST = """import torch

from {module} import {name}


def test_it_is_the_mean_absolute_error():
    restored, truth = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    entries = {name}().measure({{"id": ["a", "b"], "restored": restored, "truth": truth}})
    assert [entry["{module}"] for entry in entries] == [1.0, 1.0]
    assert {name}().summarise(entries) == {{"mean": 1.0, "images": 2}}
"""
KINDS = {
    "guidance": (GUIDANCE, GUIDANCE_TEST, "-c guidance/none --model.guidances+={module}.{name}"),
    "operator": (OPERATOR, OPERATOR_TEST, "-c guidance/dps --model.operator={module}.{name}"),
    "metric": (METRIC, METRIC_TEST, "-c demo --trainer.callbacks+={module}.{name}"),
}


def new(args: list[str]) -> int:
    """Write ``name.py`` and ``test_name.py`` into this folder."""
    if args[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: cmi-lightning new {{{','.join(KINDS)}}} NAME\n\nWrite it and its test here.")
        return 0
    if len(args) != 2 or args[0] not in KINDS:
        raise InputError(f"new: give {', '.join(KINDS)} and a name, such as new guidance Mine.")
    kind, given = args
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", given) or keyword.iskeyword(given.lower()):
        raise InputError(f"new: '{given}' is no name of a class; use letters and digits.")
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", given).lower()
    name = "".join(part[:1].upper() + part[1:] for part in given.split("_"))
    code, test, use = (text.format(name=name, module=module) for text in KINDS[kind])
    made = {Path(f"{module}.py"): code, Path(f"test_{module}.py"): test}
    for path in made:
        if path.exists():
            raise InputError(f"new: '{path}' is there; choose another name, or move it.")
    for path, text in made.items():
        write(path, text.encode())
    print(f"wrote {' and '.join(map(str, made))}; try them:\n  python -m pytest test_{module}.py")
    print(f"  cmi-lightning predict {use}")
    return 0
