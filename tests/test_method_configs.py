"""Every section of guidance.yaml and solver.yaml runs on every operator that it is defined for."""

import pytest
import torch
from conftest import configured
from omegaconf import OmegaConf
from test_contract import OPERATORS

from cmi_lightning import configs
from cmi_lightning.errors import InputError
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import CMI, Guidance
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import HDR, BoxMask, Gamma
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Solver

SECTIONS = [n for n in configs.summaries() if n.split("/")[0] in ("guidance", "solver")]
LINEAR = {
    *["ddnm_noiseless", "mcg", "ilvr", "repaint", "dmps", "cdps", "ddrm", "ddnm", "pnpdm", "fps"]
}
IDS = ["a", "b"]


@pytest.fixture(scope="module")
def prior() -> GaussianMixture:
    g = torch.Generator().manual_seed(0)
    return GaussianMixture(torch.randn(3, 1, 12, 8, generator=g).double(), 0.1)


@pytest.fixture(scope="module")
def images(prior) -> torch.Tensor:
    return prior.sample(2, torch.Generator().manual_seed(1))


def parts(name: str) -> tuple[Solver, list[Guidance]]:
    """Return what a section sets, made as the command line makes it."""
    collection, _, section = name.partition("/")
    text = (configs.FOLDER / f"{collection}.yaml").read_text(encoding="utf-8")
    model = OmegaConf.to_container(OmegaConf.create(text)[section].model, resolve=True)
    model.pop("num_steps", None)
    made = configured(model, solver=(Solver, DDPM()), guidances=(list[Guidance], []))
    return made.solver, made.guidances


def restored(sampler: Sampler, operator, x: torch.Tensor, ids: list[str]) -> torch.Tensor:
    noise = SampleNoise(0, ids)
    return sampler.run(Problem.simulate(x, operator, 0.05, noise), noise, x)


@pytest.mark.parametrize("name", SECTIONS)
def test_on_every_operator(prior, images, name):
    solver, guidances = parts(name)
    sampler = Sampler(prior, solver, guidances, 3)
    for i, operator in enumerate(OPERATORS):
        if name == "solver/ddrm" and "MotionBlur" in str(operator):
            with pytest.raises(InputError, match=r"no singular values.*solver/ddnm"):
                restored(sampler, operator, images, IDS)
            continue
        x = restored(sampler, operator, images, IDS)
        assert x.shape == images.shape
        assert bool(torch.isfinite(x).all())
        if i in (1, sum(map(ord, name)) % len(OPERATORS)):  # a batch is its samples; 1 is ragged
            alone = restored(sampler, operator, images[1:], IDS[1:])
            torch.testing.assert_close(x[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SECTIONS)
def test_on_nonlinear_operators(prior, images, name):
    solver, guidances = parts(name)
    sampler = Sampler(prior, solver, guidances, 2)
    for operator in (HDR(), Gamma()):
        if name.split("/")[1] in LINEAR:
            with pytest.raises(InputError, match="needs a linear operator"):
                restored(sampler, operator, images, IDS)
            break
        if name == "guidance/otode":
            with pytest.raises(InputError, match=r"Euler\.start_signal needs a linear operator"):
                restored(sampler, operator, images, IDS)
            break
        assert bool(torch.isfinite(restored(sampler, operator, images, IDS)).all())


@pytest.mark.parametrize("name", SECTIONS)
def test_with_cmi_or_refused_in_a_sentence(prior, images, name):
    solver, guidances = parts(name)
    cmi = CMI(scale=0.1, interval=1, min_signal=0.0, max_signal=1.0)
    if name in ("solver/pnpdm", "solver/reddiff", "solver/fps"):
        with pytest.raises(InputError, match="CMI moves the mean of a step, and"):
            Sampler(prior, solver, [*guidances, cmi])
        return
    x = restored(Sampler(prior, solver, [*guidances, cmi], 3), BoxMask(4, 1), images, IDS)
    assert bool(torch.isfinite(x).all())
