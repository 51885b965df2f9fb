"""Guidances against deepinv's data-fidelity gradients, sample by sample.

deepinv's x̄ explodes in variance: x̄ = x_t/α with noise σ̄ = σ/α, and D(x̄, σ̄) = x̂₀(x_t). So
∇_{x_t} = ∇_x̄/α, and Σ = (σ²/α) ∂x̂₀/∂x_t = σ̄² ∂D/∂x̄. Its gradients are of −log p(y | x̄).

Inside, deepinv casts x̄ to float32. The adapter goes on in float64, from an x̄ that float32 holds
exactly, so that all that is left of the cast is one rounding of the gradient, 6e-8.
"""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_step
from reference_problems import (
    BATCH,
    IDS,
    SHAPE,
    kernels,
    mixture,
    per_row,
    problem_step,
    unequal_mask,
)
from torch import Tensor, nn

from cmi_lightning.denoisers import Denoiser, NetworkDenoiser
from cmi_lightning.guidance import (
    DPS,
    AnnealedDPS,
    MomentMatching,
    PiGDM,
    residual_gradient,
)
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    BoxMask,
    Convolution,
    Downsample,
    GaussianBlur,
    LinearOperator,
    PixelMask,
)
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers import DDPM
from cmi_lightning.step import Step

pytest.importorskip("deepinv", reason="needs deepinv: pip install 'cmi-lightning[reference]'")
from deepinv.physics import BlurFFT, DecomposablePhysics, GaussianNoise, Inpainting, LinearPhysics
from deepinv.sampling import DPSDataFidelity, MomentMatchingDataFidelity, PiGDMDataFidelity

UNIT = 1000.0
STD = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)  # measurement noise, each sample's own

at_levels = pytest.mark.parametrize(
    ("schedule", "index"), [("linear", 20), ("linear", 300), ("linear", 700), ("edm", 60)]
)
on_operators = pytest.mark.parametrize(
    "name",
    [
        "identity",
        "pixels",
        "box",
        "gaussian-reflect",
        "motion-circular",
        "convolution-reflect",
        "downsample",
    ],
)


class Exploding(nn.Module):
    """D(x̄, σ̄) of one of our priors, at one level."""

    def __init__(self, denoiser: Denoiser, level: Level) -> None:
        super().__init__()
        self.denoiser, self.level = denoiser, level

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        own = torch.full_like(sigma, self.level.sigma / self.level.alpha)
        torch.testing.assert_close(sigma, own, rtol=1e-6, atol=0)
        return self.denoiser(self.level.alpha * x.double(), self.level).x0


def exploding(step: Step) -> tuple[Step, Tensor, Exploding, Tensor]:
    """Return the step at an x_t whose x̄ float32 holds, then x̄, D and σ̄."""
    x = (step.x.detach() / step.t.alpha).float().double()
    step = replace(step, x=step.t.alpha * x)
    sigma = torch.tensor(step.t.sigma / step.t.alpha, dtype=torch.float64)
    return step, x, Exploding(step.denoiser, step.t), sigma


def physics_of(problem: Problem) -> tuple[LinearPhysics, Tensor]:
    """Return our operator as deepinv's physics, and y.

    deepinv's conjugate gradients add 1e-8 to every denominator. In a unit of y that is a thousand
    times smaller, which changes p(y | x) by a constant alone, that is nothing.
    """
    operator = problem.operator
    physics = LinearPhysics(
        A=lambda x: UNIT * operator(x.double()),  # from products that deepinv casts to float32
        A_adjoint=lambda y: operator.adjoint(UNIT * y),
        noise_model=GaussianNoise(UNIT * torch.as_tensor(problem.noise_std)),
    )
    return physics, UNIT * problem.y


@on_operators
@at_levels
def test_dps(name, schedule, index):
    """∇_{x_t} ‖y − A x̂₀‖ is deepinv's gradient (guidance "norm", no clipping) over α."""
    step, x, denoiser, sigma = exploding(problem_step(name, index, Schedule.named(schedule)))
    physics = LinearPhysics(A=step.problem.operator.forward)
    gradient = DPSDataFidelity(denoiser).grad(x, step.problem.y, physics, sigma) / step.t.alpha
    assert per_row(residual_gradient(step), gradient) < 1e-6
    before = DDPM().transition(step, lambda s: s.x0.detach())
    after = DPS(0.7).guide_transition(step, before)
    assert per_row(after.mean - before.mean, -0.7 * gradient) < 1e-6


@on_operators
@pytest.mark.parametrize("index", [20, 700])
def test_annealed_dps(name, index):
    """x̂₀ moves along deepinv's gradient (guidance "annealed"), which has a² = 1 in its variance."""
    step, x, denoiser, sigma = exploding(problem_step(name, index))
    physics = LinearPhysics(
        A=step.problem.operator.forward, noise_model=GaussianNoise(step.problem.noise_std)
    )
    fidelity = DPSDataFidelity(denoiser, guidance="annealed")
    gradient = fidelity.grad(x, step.problem.y, physics, sigma)
    moved = AnnealedDPS().guide_denoised(step, step.x0.detach()) - step.x0.detach()
    expected = -(sigma**2) * gradient
    longer = (moved * expected).flatten(1).sum(1) / expected.square().flatten(1).sum(1)
    assert per_row(moved, longer.reshape(-1, 1, 1, 1) * expected) < 1e-5
    noise = step.problem.noise_std**2
    found = ((noise + sigma**2) / longer - noise) / sigma**2
    zero = torch.zeros_like(x)
    dense = torch.autograd.functional.jacobian(step.problem.operator.forward, zero)
    dense = dense.reshape(len(x), -1, len(x), zero[0].numel())
    for row, a2 in enumerate(found.tolist()):  # eight power iterations come near, from below
        largest = float(torch.linalg.matrix_norm(dense[row, :, row], 2)) ** 2
        assert 0.8 * largest < a2 < 1.0001 * largest


@on_operators
@at_levels
def test_pigdm(name, schedule, index):
    """g = −(r²/α) · deepinv's gradient, with r² = σ̄²/(1 + σ̄²) in both; E[x₀ | x_t, y] by Tweedie.

    Our solves are closed forms (conjugate gradients for "convolution-reflect"), deepinv's are
    conjugate gradients.
    """
    step, x, denoiser, sigma = exploding(
        problem_step(name, index, Schedule.named(schedule), sigma=STD)
    )
    physics, y = physics_of(step.problem)
    fidelity = PiGDMDataFidelity(denoiser, cg_max_iter=500, cg_tol=1e-10)
    gradient, x0 = fidelity.grad(x, y, physics, sigma, get_model_outputs=True)
    r2 = float(sigma**2 / (1 + sigma**2))
    assert per_row(PiGDM().direction(step), -r2 / step.t.alpha * gradient) < 1e-5
    moved = PiGDM(weight="posterior").guide_denoised(step, step.x0.detach())
    assert per_row(moved - x0, -(sigma**2) * gradient) < 1e-5


def own_physics(kind: str) -> tuple[LinearOperator, DecomposablePhysics]:
    """Our operator, and deepinv's of the same kind, which it solves in closed form."""
    if kind == "mask":
        mask = unequal_mask(BATCH, *SHAPE[1:])
        ours = PixelMask.from_mask(mask, torch.empty(BATCH, *SHAPE))
        return ours, Inpainting(SHAPE, mask[:, None].double())
    kernel = kernels(1, 3, 5)
    # deepinv convolves where we correlate, so the kernel is flipped.
    theirs = BlurFFT(SHAPE, kernel.flip(1, 2)[None])
    return Convolution(kernel, "circular").bind(SHAPE, SampleNoise(0, IDS), kernel), theirs


@pytest.mark.parametrize("kind", ["mask", "blur"])
@pytest.mark.parametrize("index", [20, 300, 700])
def test_pigdm_with_the_operators_and_closed_forms_of_deepinv(kind, index):
    """As above, with no part of ours in deepinv's: its operator, its y, its singular values.

    A mask's y is an image with zeros there, and the list of known pixels here.
    """
    operator, physics = own_physics(kind)
    step, x, denoiser, sigma = exploding(make_step(mixture(), operator, index, BATCH, STD))
    physics.noise_model = GaussianNoise(STD)
    y = operator.adjoint(step.problem.y) if kind == "mask" else step.problem.y
    gradient = PiGDMDataFidelity(denoiser).grad(x, y, physics, sigma)
    r2 = float(sigma**2 / (1 + sigma**2))
    assert per_row(PiGDM().direction(step), -r2 / step.t.alpha * gradient) < 1e-5


@on_operators
@at_levels
def test_moment_matching(name, schedule, index):
    """x̂₀ moves by −σ̄² · deepinv's gradient; both solve S = A Σ Aᵀ + Σ_n in a full Krylov space."""
    step, x, denoiser, sigma = exploding(
        problem_step(name, index, Schedule.named(schedule), sigma=STD)
    )
    physics, y = physics_of(step.problem)
    fidelity = MomentMatchingDataFidelity(denoiser, cg_max_iter=200, cg_tol=1e-6)
    gradient, x0 = fidelity.grad(x, y, physics, sigma, get_model_outputs=True)
    moved = MomentMatching(krylov=60).guide_denoised(step, step.x0.detach())
    assert per_row(moved - x0, -(sigma**2) * gradient) < 1e-5


@pytest.fixture(scope="module")
def network(prior: NetworkDenoiser) -> NetworkDenoiser:
    """The shipped prior in float64, for smaller images: it is convolutional, and this is faster."""
    network = copy.deepcopy(prior).double()
    network.image_shape = None
    return network


@pytest.mark.parametrize("recipe", [BoxMask(8, 2), GaussianBlur(9, 1.5), Downsample(4)], ids=str)
@pytest.mark.parametrize("index", [50, 400, 800])
def test_dps_and_pigdm_on_the_shipped_network(network, shipped_images, recipe, index):
    """The same equalities on a Jacobian that is not symmetric."""
    images = shipped_images[:BATCH, :, 8:24, 8:24].double()
    noise = SampleNoise(0, IDS)
    t, s = network.schedule[index], network.schedule[index - 1]
    x = t.alpha * images + t.sigma * noise.normal("test", 0, images)
    problem = Problem.simulate(images, recipe, STD, noise)
    step, x, denoiser, sigma = exploding(Step(index, x, t, s, problem, network, noise))
    physics = LinearPhysics(A=problem.operator.forward)
    gradient = DPSDataFidelity(denoiser).grad(x, problem.y, physics, sigma) / t.alpha
    assert per_row(residual_gradient(step), gradient) < 1e-6
    physics, y = physics_of(problem)
    fidelity = PiGDMDataFidelity(denoiser, cg_max_iter=500, cg_tol=1e-10)
    gradient = fidelity.grad(x, y, physics, sigma)
    r2 = float(sigma**2 / (1 + sigma**2))
    assert per_row(PiGDM().direction(step), -r2 / t.alpha * gradient) < 1e-5
