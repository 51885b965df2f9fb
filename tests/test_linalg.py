"""Per-sample linear algebra against dense solutions."""

import traceback

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmi_lightning import Problem, Sampler
from cmi_lightning.exact import DenseCovariance, GaussianMixture, GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM
from cmi_lightning.information import ImageProbes, Lanczos, Ridge, TraceLimit, TwoTraces
from cmi_lightning.linalg import conjugate_gradient, dot, krylov, norm, per_sample, unit
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Downsample, GaussianBlur, MotionBlur
from cmi_lightning.solvers import DDPM


@pytest.fixture
def spd():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(3, 8, 8, generator=g, dtype=torch.float64)
    return M @ M.mT + 0.1 * torch.eye(8, dtype=torch.float64)


@pytest.fixture
def b():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def matvec_of(M):
    return lambda v: (M * v[:, None]).sum(2)


def test_conjugate_gradient_solves_each_sample(spd, b):
    z, residual = conjugate_gradient(matvec_of(spd), b, 30, 1e-12)
    torch.testing.assert_close(z, torch.linalg.solve(spd, b), rtol=1e-8, atol=1e-8)
    assert float(residual.max()) < 1e-11


def test_conjugate_gradient_of_a_batch_is_that_of_its_samples(spd, b):
    spd = spd * torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)[:, None, None]
    b = b * torch.tensor([1.0, 0.0, 1e6], dtype=torch.float64)[:, None]
    z, _ = conjugate_gradient(matvec_of(spd), b, 5, 1e-3)
    for i in range(3):
        alone, _ = conjugate_gradient(matvec_of(spd[i : i + 1]), b[i : i + 1], 5, 1e-3)
        assert torch.equal(z[i], alone[0])
    assert bool((z[1] == 0).all())


def test_conjugate_gradient_stops_at_an_indefinite_direction(spd, b):
    z, _ = conjugate_gradient(matvec_of(-spd), b, 10)
    assert bool((z == 0).all())


@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["positive", "indefinite"])
def test_full_krylov_space_gives_functions_of_a_matrix(spd, b, shift):
    M = spd + shift * torch.eye(8, dtype=torch.float64)
    space = krylov(matvec_of(M), b, 8)
    values, vectors = torch.linalg.eigh(M)

    def f(x):
        return torch.tanh(x) + x**2

    exact = (vectors * f(values)[:, None]) @ vectors.mT
    applied, _ = space.apply(f)
    torch.testing.assert_close(applied, (exact @ b[..., None])[..., 0], rtol=1e-8, atol=1e-8)
    quadratic = (b[:, None] @ exact @ b[..., None])[:, 0, 0]
    torch.testing.assert_close(space.quadratic(f), quadratic, rtol=1e-8, atol=1e-8)


def test_krylov_space_ends_at_an_invariant_subspace(b):
    M = torch.diag_embed(torch.tensor([[2.0, 2, 2, 2, 5, 5, 5, 5]], dtype=torch.float64))
    M = M.expand(3, 8, 8)
    space = krylov(matvec_of(M), b, 6)  # only two distinct eigenvalues: dimension two
    applied, residual = space.apply(lambda s: torch.where(s > 1, 1 / s.clamp_min(1), 0.0))
    torch.testing.assert_close(applied, b / M[:, range(8), range(8)], rtol=1e-12, atol=1e-12)
    assert float(residual.max()) == 0
    assert bool((krylov(matvec_of(M), 0 * b, 4).apply(torch.cos)[0] == 0).all())


def test_krylov_residual_is_that_of_the_solve(spd, b):
    space = krylov(matvec_of(spd), b, 4)
    w, residual = space.apply(lambda s: 1 / s)
    true = norm(matvec_of(spd)(w) - b) / norm(b)
    torch.testing.assert_close(residual, true, rtol=1e-8, atol=1e-10)


def test_krylov_of_a_diverged_sample_leaves_the_others_alone(spd, b):
    broken = b.clone()
    broken[1] = torch.nan
    good, bad = (krylov(matvec_of(spd), v, 4) for v in (b, broken))
    clipped = lambda s: torch.where(s > 1, 1 / s.clamp_min(1), 0.0)  # noqa: E731
    for value, expected in (
        (bad.apply(clipped)[0], good.apply(clipped)[0]),
        (bad.quadratic(clipped), good.quadratic(clipped)),
    ):
        assert torch.equal(value[[0, 2]], expected[[0, 2]])
        assert bool(value[1].isnan().all())


def test_small_helpers():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert norm(a).tolist() == [5, 0]
    torch.testing.assert_close(unit(a), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert dot(a, a).tolist() == [25, 0]
    assert per_sample(torch.ones(2), a).shape == (2, 1)
    assert per_sample(2.0, a).shape == ()


class NoFloat64(TorchDispatchMode):
    """Refuses float64 in our code, but in lines that go to the CPU first: an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (kwargs or {}).get("dtype") is torch.float64 and isinstance((args or (0,))[0], Tensor):
            stack = [f for f in traceback.extract_stack()[:-1] if "site-packages" not in f.filename]
            assert "cpu()" in str(stack[-1].line), f"{stack[-1].filename}:{stack[-1].lineno}"
        return func(*args, **(kwargs or {}))


def test_the_emulation_catches_float64():
    with NoFloat64(), pytest.raises(AssertionError, match="test_linalg"):
        torch.ones(2).double()


@pytest.mark.parametrize(
    "guidance",
    [
        DPS(),
        PiGDM(),
        MCG(),
        DSG(),
        MomentMatching(),
        *(
            CMI(interval=1, estimator=e(derivative=d), min_signal=0.0, max_signal=1.0)
            for e in (Lanczos, ImageProbes, TwoTraces, Ridge, TraceLimit)
            for d in ("autograd", "difference")
        ),
    ],
    ids=str,
)
def test_sampling_needs_no_float64_on_the_accelerator(guidance):
    prior = GaussianMixture(torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4), 0.1)
    noise = SampleNoise(0, ["a", "b"])
    with NoFloat64():
        for operator in (BoxMask(2, 1), GaussianBlur(3, 0.5), MotionBlur(3), Downsample(2)):
            problem = Problem.simulate(torch.zeros(2, 1, 4, 4), operator, 0.1, noise)
            x = Sampler(prior, DDPM(), [guidance], 2).run(problem, noise, torch.zeros(2, 1, 4, 4))
            assert bool(x.isfinite().all())


def test_exact_posteriors_need_no_float64_on_the_accelerator():
    with NoFloat64():
        prior = GaussianPrior(torch.zeros(2), DenseCovariance(torch.eye(2)))
        posterior = prior.condition(torch.ones(1, 2), torch.ones(1), 0.1)
    assert float(posterior.mean().sum()) == pytest.approx(2 / 2.01)
