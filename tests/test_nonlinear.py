"""Forward models that are not linear: derivatives, linearisation, and every guidance on them."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE, AllSigns, configured, dense_information, make_step, randn
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from cmi_lightning import GaussianNoise, InputError, PosteriorSampler, Problem, Sampler, configs
from cmi_lightning.exact import GaussianMixture, GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM, residual_gradient
from cmi_lightning.guidance.base import NONLINEAR
from cmi_lightning.information import Lanczos, TraceLimit
from cmi_lightning.information.base import CURVATURE
from cmi_lightning.measurement_noise import MeasurementNoise
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    HDR,
    JPEG,
    Dense,
    Gamma,
    Identity,
    LinearOperator,
    NonlinearBlur,
    Operator,
    PhaseRetrieval,
    Quantize,
    RandomMask,
)
from cmi_lightning.solvers import DDPM


class Cubed(Operator):
    """y = x + 0.3 x³ of every second pixel; smooth, and not linear."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.flatten(1)[:, ::2]
        return half + 0.3 * half**3


class Wrapped(Operator):
    """A linear operator that does not say so."""

    def __init__(self, inner: LinearOperator) -> None:
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_derivatives_are_the_dense_ones():
    x, u, v = randn(2, *SHAPE), randn(2, *SHAPE, seed=1), randn(2, 3, seed=2)
    A = Cubed()
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: A(z)[0], x[b : b + 1])[:, 0] for b in (0, 1)]
    ).flatten(2)
    torch.testing.assert_close(A.vjp(x, v).flatten(1), (v[:, None] @ J)[:, 0])
    torch.testing.assert_close(A.jvp(x, u), (J @ u.flatten(1)[..., None])[..., 0])
    linear = A.linearize(x)
    shift = torch.tensor([0.1, 2.0], dtype=torch.float64)
    system = J @ J.mT + shift[:, None, None] * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(linear.solve(v, shift), torch.linalg.solve(system, v))
    assert linear.linearize(x) is linear
    assert linear.value is not None
    torch.testing.assert_close(linear.value, A(x))


def test_composition_follows_the_chain_rule(dense):
    x, v = randn(2, *SHAPE), randn(2, 3, seed=1)

    class Square(Operator):
        def forward(self, x: Tensor) -> Tensor:
            return x**2

    for A in (dense @ Square(), Square() @ dense, Square() @ Square()):
        assert not isinstance(A, LinearOperator)
        z = x.clone().requires_grad_()
        w = v if A(x).shape == v.shape else randn(*A(x).shape, seed=1)
        expected = torch.autograd.grad(A(z), z, w)[0]
        torch.testing.assert_close(A.vjp(x, w), expected)
        linear = A.linearize(x)
        torch.testing.assert_close((linear(x) * w).sum(), (linear.adjoint(w) * x).sum())
        assert linear.value is not None
        torch.testing.assert_close(linear.value, A(x))
    both = Dense(randn(2, 3, seed=3)) @ dense
    assert isinstance(both, LinearOperator)
    matrix = both.outer.matrix @ dense.matrix
    whole = Dense(matrix, SHAPE)
    torch.testing.assert_close(
        both.pinv(randn(2, 2)), whole.pinv(randn(2, 2)), rtol=1e-5, atol=1e-6
    )


def test_composition_binds_both_and_keeps_measured_entries():
    noise, x = SampleNoise(0, ["a", "b"]), randn(2, 1, 8, 8)
    problem = Problem.simulate(x, RandomMask(0.5) @ Identity(), 0.1, noise)
    alone = Problem.simulate(x, RandomMask(0.5), 0.1, noise)
    assert torch.equal(problem.y, alone.y)
    assert torch.equal(problem.operator.guess(problem.y), alone.operator.guess(alone.y))


@pytest.mark.parametrize("guidances", [[DPS()], [DSG()], [CMI(), DPS()], [PiGDM()]], ids=str)
def test_a_linear_operator_that_does_not_say_so_gives_the_same_run(dense, guidances):
    prior = GaussianPrior(randn(*SHAPE))
    noise, x = SampleNoise(0, ["a", "b"]), randn(2, *SHAPE, seed=1)
    runs = [
        Sampler(prior, DDPM(), guidances, 20).run(
            Problem.simulate(x, operator, 0.1, noise), noise, x
        )
        for operator in (dense, Wrapped(dense))
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-6)


def test_residual_gradient_is_autograds(mixture):
    step = make_step(mixture, Cubed())
    norms = torch.linalg.vector_norm(step.problem.y - Cubed()(step.x0), dim=1)
    torch.testing.assert_close(residual_gradient(step), step.grad(norms))
    assert step.residual.requires_grad


def test_every_guidance_runs_or_refuses(mixture):
    noise, x = SampleNoise(0, ["a", "b"]), randn(2, *SHAPE)
    problem = Problem.simulate(x, Cubed(), 0.1, noise)
    for guidances in (
        [DPS()],
        [DSG()],
        [PiGDM()],
        [MomentMatching()],
        *(
            [CMI(interval=1, estimator=e(derivative=d)), DPS()]
            for e in (Lanczos, TraceLimit)
            for d in DERIVED
        ),
    ):
        out = Sampler(mixture, DDPM(), guidances, 6).run(problem, noise, x)
        assert bool(out.isfinite().all())
    with pytest.raises(InputError, match="MCG needs a linear operator and Cubed is none; use"):
        Sampler(mixture, DDPM(), [MCG()], 6).run(problem, noise, x)
    with pytest.raises(InputError, match="MCG needs a linear operator"):
        PosteriorSampler(mixture, Cubed(), guidances=[MCG()])
    text = (Path(__file__).parent.parent / "docs/methods.md").read_text()
    named = re.search(r"^\| a nonlinear operator \|(.*?)\|", text, re.MULTILINE)[1]
    named = [n.replace("_", "") for n in re.findall(r"/(\w+)`", named)]
    assert named == re.split(", | or ", NONLINEAR.lower())


DERIVED = ("autograd", "difference")


class Mixing(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Spread(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean().sqrt()


class Infinite(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Short(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


class Detached(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().detach()


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (Mixing(), "Mixing mixes the images of a batch"),
        (Spread(), "Spread mixes the images of a batch"),
        (Infinite(), "Infinite gives values that are no numbers"),
        (Short(), "Short maps 2 images to .* one row an image"),
        (Detached(), "Detached is not differentiable: its result has no gradient. Write"),
    ],
)
def test_operators_that_cannot_be_used(mixture, operator, words):
    noise, x = SampleNoise(0, ["a", "b"]), randn(2, *SHAPE)
    with pytest.raises(InputError, match=words):
        Sampler(mixture, DDPM(), [DPS()], 6).run(
            Problem.simulate(x, operator, 0.1, noise), noise, x
        )
    with pytest.raises(InputError, match=words):
        Sampler(mixture, DDPM(), [DPS()], 6).run(Problem(x, operator, 0.1), noise, x)


def test_operators_are_bound_where_they_meet_images(mixture):
    noise, x = SampleNoise(0, ["a", "b"]), randn(2, *SHAPE)
    sampler = Sampler(mixture, DDPM(), [DPS()], 6)
    problem = Problem.simulate(x, RandomMask(0.5), 0.1, noise)
    unbound = Problem(problem.y, RandomMask(0.5), 0.1)
    assert torch.equal(sampler.run(unbound, noise, x), sampler.run(problem, noise, x))


# The operators that ship.

SMOOTH: dict[str, Operator] = {
    "hdr": HDR(),  # but where it clips
    "gamma": Gamma(2.2),
    "gamma-bright": Gamma(0.45),
    "phase": PhaseRetrieval(),
    "phase-signed": PhaseRetrieval(4.0, "signed"),
    "nonlinear-blur": NonlinearBlur(sd=1.0),
    "nonlinear-motion": NonlinearBlur(sd=None, padding="circular"),
}
ROUNDED: dict[str, Operator] = {
    "quantize": Quantize(3),
    "jpeg": JPEG(30),
    "jpeg-full": JPEG(95, False),
}
SHIPPED = {**SMOOTH, **ROUNDED}
SHAPES = [(1, 9, 6), (3, 8, 8), (4, 5, 7)]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(name, shape):
    """Derivatives against finite differences, dtype, shape of the guess, and samples apart."""
    x = 0.9 * torch.tanh(randn(2, *shape))
    noise = SampleNoise(0, ["a", "b"])
    A = SHIPPED[name].bind(shape, noise, x)
    y, linear, u = A(x), A.linearize(x), randn(2, *shape, seed=1)
    v = randn(*y.shape, seed=2)
    left, right = (linear(u) * v).sum(), (linear.adjoint(v) * u).sum()
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    if name in SMOOTH:
        h = 1e-6
        slope = (A(x + h * u) - A(x - h * u)) / (2 * h)
        torch.testing.assert_close(linear(u), slope, rtol=1e-5, atol=1e-5)
    else:  # straight through: rounding has the gradient of what is rounded
        assert float(linear(u).norm()) > 0
    guess = A.guess(y)
    assert guess.shape == x.shape
    assert bool(guess.isfinite().all())
    for row, sample in enumerate(noise.ids):
        alone = SHIPPED[name].bind(shape, SampleNoise(0, [sample]), x)(x[row : row + 1])
        torch.testing.assert_close(alone[0], y[row], rtol=1e-9, atol=1e-9)
    single = SHIPPED[name].bind(shape, noise, x.float())(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), y, rtol=1e-3, atol=2e-2 if name in ROUNDED else 1e-3
    )


TASKS = [name for name in configs.summaries() if name.startswith("task/")]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_with_dps_dsg_and_cmi(task):
    """Every section of task.yaml, made as the command line makes it, on an exact prior."""
    text = (configs.FOLDER / "task.yaml").read_text(encoding="utf-8")
    model = OmegaConf.to_container(OmegaConf.create(text)[task.removeprefix("task/")].model)
    assert isinstance(model, dict)
    made = configured(model, operator=(Operator, None), noise=(MeasurementNoise, GaussianNoise()))
    for channels in (1, 3):
        g = torch.Generator().manual_seed(0)
        prior = GaussianMixture(0.4 * torch.randn(2, channels, 8, 16, generator=g), 0.1)
        x, noise = prior.sample(2, g), SampleNoise(0, ["a", "b"])
        problem = Problem.simulate(x, made.operator, made.noise, noise)
        everywhere = CMI(interval=1, min_signal=0.0, max_signal=1.0, estimator=Lanczos(krylov=2))
        for guidances in ([DPS()], [DSG()], [everywhere, DPS()]):
            restored = Sampler(prior, DDPM(), guidances, 3).run(problem, noise, x)
            assert restored.shape == x.shape
            assert bool(restored.isfinite().all())


def test_definitions():
    x = 0.9 * torch.tanh(randn(1, 1, 8, 8))
    u = (x + 1) / 2
    assert torch.equal(HDR(2.0)(x), (2 * x).clamp(-1, 1))
    inside = x.abs() < 0.5
    assert torch.equal(HDR(2.0).guess(HDR(2.0)(x))[inside], x[inside])
    torch.testing.assert_close(Gamma(2.2)(x), 2 * u**2.2 - 1)
    for exponent in (0.45, 2.2):
        wide = torch.linspace(-1.2, 1.2, 97, dtype=torch.float64)[None]
        torch.testing.assert_close(Gamma(exponent).guess(Gamma(exponent)(wide)), wide)
    y = Quantize(2)(x)
    assert set(((y + 1) * 1.5).round(decimals=9).unique().tolist()) <= {0, 1, 2, 3}
    assert float((y - x).abs().max()) <= 1 / 3 + 1e-9
    torch.testing.assert_close(Quantize(2).vjp(x, x), x)
    amplitudes = PhaseRetrieval()(x)
    assert amplitudes.shape == (1, 1, 12, 12)
    torch.testing.assert_close(amplitudes.norm(), u.norm())
    torch.testing.assert_close(PhaseRetrieval()(x.rot90(2, (2, 3))), amplitudes)
    padded = torch.nn.functional.pad(u, (2, 2, 2, 2))
    expected = torch.fft.fftshift(torch.fft.fft2(padded).abs() / 12, dim=(2, 3))
    torch.testing.assert_close(amplitudes, expected)


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_is_pillows(quality):
    """Gray images within a level of libjpeg's, colours within its other filter for chroma."""
    place = torch.linspace(0, 3, 24, dtype=torch.float64)
    smooth = (place[:, None].sin() * place.cos() * 0.8)[None, None]
    colours = torch.cat([smooth, smooth.flip(2), smooth.flip(3)], 1)
    for x, mode, thin, bar in (
        (smooth, "L", False, 0.6),
        (colours, "RGB", False, 1.5),
        (colours, "RGB", True, 5.0),  # libjpeg interpolates chroma, and we repeat it
    ):
        pixels = ((x[0] + 1) * 127.5).round()
        image = Image.fromarray(pixels.byte().permute(1, 2, 0).squeeze(2).numpy())
        assert image.mode == mode
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling=2 if thin else 0)
        theirs = torch.from_numpy(np.array(Image.open(file), dtype=np.float64))
        theirs = theirs.reshape(24, 24, -1).permute(2, 0, 1)
        ours = (JPEG(quality, thin)(pixels[None] / 127.5 - 1)[0] + 1) * 127.5
        assert float((ours - theirs).abs().mean()) < bar
        # A coefficient at a tie may be rounded the other way, which moves its block.
        assert thin or float((ours - theirs).abs().quantile(0.9)) <= 3.01


def test_jpeg_leaves_its_own_images_and_fine_quality_alone():
    x = 0.5 * torch.tanh(randn(1, 3, 16, 16))
    assert float((JPEG(100, False)(x) - x).abs().max()) < 3 / 127.5
    once = JPEG(50)(0 * x + x.mean())
    assert torch.equal(JPEG(50)(once), once)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HDR(0.0), "HDR.gain must be a number, above 0"),
        (lambda: Gamma(-1.0), "Gamma.exponent"),
        (lambda: Quantize(0), "Quantize.bits"),
        (lambda: JPEG(0), "JPEG.quality"),
        (lambda: PhaseRetrieval(-1.0), "oversample"),
        (lambda: PhaseRetrieval(range="both"), "one of unit, signed"),
        (lambda: NonlinearBlur(sd=0.0), "NonlinearBlur.sd"),
        (lambda: JPEG()(torch.zeros(1, 2, 8, 8)), "1, 3 or 4 channels, not 2"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(InputError, match=words):
        make()


class Sum(Operator):
    """One curved measurement of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.3 * x**3).flatten(1).sum(1, keepdim=True)


def test_information_is_that_of_the_linearised_operator(mixture):
    step = make_step(mixture, Cubed(), sigma=0.3)
    step.noise = AllSigns(step.noise)
    found = Lanczos(probes=4, krylov=3)(step).value
    exact = [float(dense_information(step, row, 0.3)[0]) for row in range(4)]
    assert found.tolist() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("derivative", DERIVED)
def test_cmi_takes_the_change_of_the_derivative_in(mixture, derivative):
    """∇I is autograd's of the dense I, where one probe is exact: one measurement."""
    step = make_step(mixture, Sum(), 300, batch=4, sigma=0.3)
    found = Lanczos(krylov=1, derivative=derivative)(step)
    for row in range(4):
        value, whole = dense_information(step, row, 0.3)
        _, held = dense_information(step, row, 0.3, hold=True)
        assert float(found.value[row]) == pytest.approx(float(value))
        error = (found.gradient[row].flatten() - whole).norm() / whole.norm()
        assert float(error) < (1e-8 if derivative == "autograd" else 1e-2)
        assert float((whole - held).norm() / whole.norm()) > 0.1


@pytest.mark.parametrize("estimator", [Lanczos(krylov=1), TraceLimit(derivative="forward")])
def test_the_change_of_the_derivative_costs_nothing_where_there_is_none(mixture, estimator):
    passes = {}
    for operator in (Identity(), HDR(), Quantize(), Cubed()):
        step = make_step(mixture, operator, 300, sigma=0.3)
        estimator(step)
        passes[type(operator)] = step.cost.forwards + step.cost.vjps
    assert passes[HDR] == passes[Quantize] == passes[Identity]
    assert passes[Cubed] == passes[Identity] + CURVATURE


def test_what_estimators_in_image_space_drop():
    """They hold ∂A/∂x fixed: nothing for a linear A or one of linear pieces (docs/method.md)."""
    g = torch.Generator().manual_seed(3)
    prior = GaussianMixture(
        torch.randn(3, *SHAPE, generator=g, dtype=torch.float64),
        0.05 + 0.3 * torch.rand(3, *SHAPE, generator=g, dtype=torch.float64),
    )

    def dropped(operator: Operator) -> float:
        step = make_step(prior, operator, 500, batch=4, sigma=0.3)
        shares = []
        for row in range(4):
            whole, held = (
                dense_information(step, row, 0.3, hold=hold)[1] for hold in (False, True)
            )
            shares.append((whole - held).norm() / whole.norm())
        return float(np.median(shares))

    assert dropped(Identity()) < 1e-9
    assert dropped(HDR()) < 1e-9
    assert 0.5 < dropped(Cubed()) < 2
    step = make_step(prior, HDR(), 300, sigma=0.3)
    assert bool(TraceLimit()(step).gradient.isfinite().all())
