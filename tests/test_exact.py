"""Exact priors, exact posteriors and the exact conditional mutual information."""

import math

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from cmi_lightning import exact
from cmi_lightning.cli import main
from cmi_lightning.denoisers import Denoiser, Prediction
from cmi_lightning.errors import InputError
from cmi_lightning.exact import (
    DenseCovariance,
    DiagonalCovariance,
    GaussianMixture,
    GaussianPrior,
    StationaryCovariance,
    load_mixture,
    power_law_prior,
)
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Downsample, GaussianBlur, Identity, PixelMask
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import CLEAN, Level, Schedule
from cmi_lightning.solvers import DDIM, DDPM

SHAPE = (1, 2, 3)
N = 6
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
EYE = torch.eye(N, dtype=torch.float64)
A = torch.randn(3, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
LEVELS = [Schedule.linear()[100], Schedule.linear()[600], Level(1.0, 0.7, 0.7)]
KINDS = ["isotropic", "diagonal", "dense", "shared", "stationary", "degenerate"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_level = pytest.mark.parametrize("level", LEVELS, ids=["low", "high", "exploding"])
STDS = [0.2, torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64)]


def positive(count: int, size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """Random covariances (count, size, size) of a rank."""
    factor = torch.randn(count, size, rank or size, generator=generator, dtype=torch.float64)
    return 0.3 * factor @ factor.mT + (0.0 if rank else 0.05) * torch.eye(size).double()


def make(kind: str, count: int = 3) -> tuple[GaussianMixture, Tensor]:
    """A mixture and its covariances (K, n, n), written down without the class."""
    g = torch.Generator().manual_seed(7)
    means = torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)
    weights = WEIGHTS[:count]
    eye = EYE.expand(count, N, N)
    if kind == "isotropic":
        return GaussianMixture(means, 0.3, weights.tolist()), 0.3 * eye
    if kind == "diagonal":
        v = 0.05 + torch.rand(count, *SHAPE, generator=g, dtype=torch.float64)
        return GaussianMixture(means, v, weights), torch.diag_embed(v.flatten(1))
    if kind == "stationary":
        full = [positive_circulant(seed) for seed in range(count)]
        spectrum = torch.stack([s for s, _ in full])
        covariance = StationaryCovariance(spectrum)
        return GaussianMixture(means, covariance, weights), torch.stack([c for _, c in full])
    matrix = positive(1 if kind == "shared" else count, N, g, 4 if kind == "degenerate" else None)
    mixture = GaussianMixture(means, DenseCovariance(matrix), weights)
    return mixture, matrix.expand(count, N, N)


def positive_circulant(seed: int) -> tuple[Tensor, Tensor]:
    """A spectrum (1, 2, 3) and the block-circulant matrix of its autocovariance, entry by entry."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=SHAPE[1:])
    spectrum = np.abs(np.fft.fft2(kernel)) ** 2 + 0.05  # of a real kernel: the same at f and −f
    autocovariance = np.fft.ifft2(spectrum).real
    height, width = SHAPE[1:]
    pixels = list(np.ndindex(height, width))
    matrix = np.array(
        [[autocovariance[(a - c) % height, (b - d) % width] for c, d in pixels] for a, b in pixels]
    )
    return torch.tensor(spectrum)[None], torch.tensor(matrix)


def points(mixture: GaussianMixture, level: Level, count: int = 5) -> Tensor:
    """Draws of x_t (count, *shape)."""
    g = torch.Generator().manual_seed(11)
    x0 = mixture.sample(count, g)
    return level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=g, dtype=x0.dtype)


def autograd_jacobian(f, x: Tensor) -> Tensor:
    """The Jacobian (B, m, n) of a per-sample function of one image at a time."""
    rows = [
        torch.autograd.functional.jacobian(lambda z: f(z[None]).flatten(), row).flatten(1)
        for row in x
    ]
    return torch.stack(rows)


def close(a: Tensor, b: Tensor, relative: float = 1e-9) -> None:
    """Assert equality to ``relative`` of the largest entry."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= relative * float(b.abs().max())


# Priors


@each_kind
@each_level
def test_density_is_that_of_torch_distributions(kind, level):
    mixture, covariances = make(kind)
    x = points(mixture, level)
    noisy = level.alpha**2 * covariances + level.sigma**2 * EYE
    components = torch.distributions.MultivariateNormal(
        level.alpha * mixture.means.flatten(1), noisy
    )
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(WEIGHTS), components
    )
    close(mixture.log_prob(x, level), truth.log_prob(x.flatten(1)))


@each_kind
@each_level
def test_score_and_x0_are_derivatives_of_the_density(kind, level):
    mixture, _ = make(kind)
    x = points(mixture, level).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_prob(x, level).sum(), x)
    close(mixture.score(x, level), score)
    tweedie = (x.detach() + level.sigma**2 * score) / level.alpha
    close(mixture(x, level).x0, tweedie)


@each_kind
@each_level
def test_jacobian_is_that_of_autograd(kind, level):
    mixture, _ = make(kind)
    x = points(mixture, level)
    truth = autograd_jacobian(lambda z: mixture(z, level).x0, x)
    close(mixture.jacobian(x, level), truth)


@each_kind
@each_level
def test_tweedie_is_the_law_of_total_covariance(kind, level):
    mixture, covariances = make(kind)
    x = points(mixture, level)
    covariance = mixture.covariance(x, level)
    close(exact.covariance(mixture, x, level), covariance)
    # and both are the mixture formula with plain inverses
    precision = torch.linalg.inv(level.alpha**2 * covariances + level.sigma**2 * EYE)
    centred = x.flatten(1)[:, None] - level.alpha * mixture.means.flatten(1)
    log_r = mixture.log_weights - 0.5 * (
        torch.einsum("bki,kij,bkj->bk", centred, precision, centred) - torch.logdet(precision)
    )
    r = torch.softmax(log_r, 1)
    gain = level.alpha * covariances @ precision
    m = mixture.means.flatten(1) + torch.einsum("kij,bkj->bki", gain, centred)
    x0 = torch.einsum("bk,bki->bi", r, m)
    second = torch.einsum("bk,kij->bij", r, covariances - level.alpha * gain @ covariances)
    second = second + torch.einsum("bk,bki,bkj->bij", r, m, m)
    close(covariance, second - x0[:, :, None] * x0[:, None])
    assert float(torch.linalg.eigvalsh(covariance).min()) > -1e-12


def on_a_grid(seed: int, weights: Tensor) -> tuple[GaussianMixture, Tensor, Tensor]:
    """A mixture in two dimensions, a grid (g, 2) around it, and scipy's density there."""
    g = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(3, 2, generator=g, dtype=torch.float64)
    covariances = positive(3, 2, g)
    nodes = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(nodes, nodes)
    density = sum(
        float(w) * multivariate_normal(m.numpy(), c.numpy()).pdf(grid.numpy())
        for w, m, c in zip(weights, means, covariances, strict=True)
    )
    mixture = GaussianMixture(means, DenseCovariance(covariances), weights)
    return mixture, grid, torch.as_tensor(density)


@pytest.mark.parametrize("dimension", [1, 2])
def test_posterior_moments_match_numerical_integration(dimension):
    mixture, grid, density = on_a_grid(2, torch.ones(3))
    if dimension == 1:  # its first coordinate
        C = mixture.covariances.matrix()[:, :1, :1]
        mixture, grid = GaussianMixture(mixture.means[:, :1], DenseCovariance(C)), grid[:, :1]
    level = Schedule.linear()[300]
    x = points(mixture, level, 3)
    for row in range(3):
        off = ((x[row] - level.alpha * grid) ** 2).sum(1)
        weight = density * torch.exp(-off / (2 * level.sigma**2))
        mean = (weight[:, None] * grid).sum(0) / weight.sum()
        apart = grid - mean
        covariance = torch.einsum("g,gi,gj->ij", weight, apart, apart) / weight.sum()
        close(mixture(x, level).x0[row], mean, 1e-8)
        close(mixture.covariance(x, level)[row], covariance, 1e-8)
        if dimension == 1:  # (σ²/α) ∇Cov is the third central moment
            skew = (weight * apart[:, 0] ** 3).sum() / weight.sum()
            _, slope = third_order(mixture, x, level)
            third = level.sigma**2 / level.alpha * slope[row].flatten()[0]
            assert float(third) == pytest.approx(float(skew), rel=1e-6)


def test_descriptions_of_one_covariance_agree():
    g = torch.Generator().manual_seed(3)
    means = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64)
    level = LEVELS[0]
    same = [
        0.4,
        torch.full((3,), 0.4, dtype=torch.float64),
        torch.full((3, *SHAPE), 0.4, dtype=torch.float64),
        DiagonalCovariance(torch.full((1, *SHAPE), 0.4, dtype=torch.float64)),
        DenseCovariance(0.4 * EYE),
        StationaryCovariance(torch.full((3, *SHAPE), 0.4, dtype=torch.float64)),
    ]
    mixtures = [GaussianMixture(means, c) for c in same]
    x = points(mixtures[0], level)
    prior = GaussianPrior(means[0], torch.full(SHAPE, 0.4, dtype=torch.float64))
    close(prior(x, level).x0, GaussianMixture(means[:1], 0.4)(x, level).x0, 1e-12)
    for mixture in mixtures[1:]:
        close(mixture.log_prob(x, level), mixtures[0].log_prob(x, level), 1e-12)
        close(mixture(x, level).x0, mixtures[0](x, level).x0, 1e-12)
        close(mixture.jacobian(x, level), mixtures[0].jacobian(x, level), 1e-12)
        close(mixture.variances, mixtures[0].variances, 1e-12)


@each_kind
def test_moments_and_draws(kind):
    mixture, covariances = make(kind)
    means = mixture.means.flatten(1)
    mean = WEIGHTS @ means
    second = torch.einsum("k,kij->ij", WEIGHTS, covariances)
    second = second + torch.einsum("k,ki,kj->ij", WEIGHTS, means, means)
    close(mixture.mean().flatten(), mean)
    close(mixture.covariance(), second - torch.outer(mean, mean))
    close(mixture.variances.flatten(1), covariances.diagonal(dim1=1, dim2=2))
    draws = mixture.sample(40_000, torch.Generator().manual_seed(0)).flatten(1)
    assert draws.shape == (40_000, N)
    error = (draws.mean(0) - mean) / (draws.std(0) / 200)
    assert float(error.abs().max()) < 4.5
    spread = torch.cov(draws.T)
    scale = spread.diagonal().max()
    assert float((spread - mixture.covariance()).abs().max()) < 0.05 * scale
    if kind == "degenerate":  # draws stay in their component's plane
        one = GaussianPrior(mixture.means[0], DenseCovariance(covariances[0]))
        flat = (one.sample(50, torch.Generator().manual_seed(1)) - one.means).flatten(1)
        assert int(torch.linalg.matrix_rank(flat)) == 4


@pytest.mark.parametrize("kind", ["isotropic", "shared", "stationary"])
@pytest.mark.parametrize("level", [*LEVELS, CLEAN])
def test_matrix_product_path_equals_the_plain_one(kind, level):
    if kind == "stationary":
        means = make("isotropic")[0].means
        mixture = GaussianMixture(means, StationaryCovariance(positive_circulant(0)[0][None]))
    else:
        mixture, _ = make(kind)
    x = points(mixture, level).requires_grad_()
    assert not mixture.fast
    plain = mixture.log_prob(x, level), mixture.score(x, level), mixture(x, level).x0
    slope = torch.autograd.grad((plain[2] ** 2).sum(), x)[0]
    mixture.fast = True
    fast = mixture.log_prob(x, level), mixture.score(x, level), mixture(x, level).x0
    for a, b in zip(fast, plain, strict=True):
        close(a, b, 1e-12)
    close(torch.autograd.grad((fast[2] ** 2).sum(), x)[0], slope, 1e-10)


def test_many_large_components_take_the_matrix_product():
    g = torch.Generator().manual_seed(0)
    means = 8 * torch.randint(-2, 3, (25, 80), generator=g).double()
    mixture = GaussianMixture(means, 1.0, torch.rand(25, generator=g).double())
    assert mixture.fast
    level = mixture.schedule[500]
    x = points(mixture, level, 50)
    fast = mixture.log_prob(x, level), mixture(x, level).x0, mixture.score(x, level)
    separate = GaussianMixture(means, torch.ones(25, 80).double(), mixture.log_weights.exp())
    assert not separate.fast
    truth = separate.log_prob(x, level), separate(x, level).x0, separate.score(x, level)
    for a, b in zip(fast, truth, strict=True):
        close(a, b, 1e-12)


def test_a_large_common_offset_costs_no_digits_in_single_precision():
    g = torch.Generator().manual_seed(0)
    means = 300 + torch.randn(4, 2, 20, 20, generator=g).double()
    double = GaussianMixture(means, 0.01)
    assert double.fast
    single = GaussianMixture(means.float(), 0.01)
    level = double.schedule[20]
    x = points(double, level)
    close(single(x.float(), level).x0.double(), double(x, level).x0, 1e-6)


@each_kind
def test_single_precision_is_close_to_double(kind):
    double, _ = make(kind)
    single, _ = make(kind)
    single = single.float()
    assert single.means.dtype == torch.float32
    level = LEVELS[1]
    x = points(double, level)
    for name in ("log_prob", "score", "jacobian", "covariance"):
        value = getattr(single, name)(x.float(), level)
        assert value.dtype == torch.float32
        close(value.double(), getattr(double, name)(x, level), 1e-4)
    close(single(x.float(), level).x0.double(), double(x, level).x0, 1e-5)
    # the other dtype comes back as it went in
    assert single(x, level).x0.dtype == torch.float64
    assert double(x.float(), level).x0.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "fast"),
    [
        ("diagonal", False),
        ("dense", False),
        ("stationary", False),
        ("shared", False),
        ("shared", True),
        ("isotropic", True),
    ],
)
def test_derivatives_of_the_closed_forms(kind, fast):
    mixture, _ = make(kind)
    mixture.fast = fast
    level = LEVELS[1]
    x = points(mixture, level, 1).requires_grad_()
    for f in (
        lambda z: mixture(z, level).x0,
        lambda z: mixture.log_prob(z, level),
        lambda z: mixture.score(z, level),
    ):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)
    assert torch.autograd.gradcheck(lambda z: mixture.jacobian(z, level), x)


def test_rows_of_a_batch_are_independent_to_the_last_bit():
    for mixture in (make("isotropic")[0], make("diagonal")[0]):
        for level in LEVELS:
            x = points(mixture, level, 7)
            whole = mixture(x, level).x0
            assert all(torch.equal(whole[i], mixture(x[i : i + 1], level).x0[0]) for i in range(7))


def test_low_precision_does_not_reach_an_exact_prior():
    mixture, _ = make("shared")
    mixture.fast = True
    x = points(mixture, LEVELS[1]).float()
    single = mixture.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = single(x, LEVELS[1]).x0
    assert torch.equal(low, single(x, LEVELS[1]).x0)


def test_degenerate_density_is_refused_without_noise():
    mixture, _ = make("degenerate")
    with pytest.raises(InputError, match="degenerate"):
        mixture.log_prob(mixture.means, CLEAN)
    zero = GaussianPrior(mixture.means[0], 0.0)  # a point
    x = points(zero, LEVELS[1])
    close(zero(x, LEVELS[1]).x0, zero.means.expand(5, *SHAPE), 1e-12)
    assert float(zero.jacobian(x, LEVELS[1]).abs().max()) == 0


@each_kind
def test_saved_and_loaded(kind, tmp_path):
    mixture, _ = make(kind)
    mixture.schedule = Schedule.edm()
    path = tmp_path / "prior.safetensors"
    mixture.save(path)
    loaded = load_mixture(str(path))
    assert (loaded.schedule, loaded.image_shape) == (mixture.schedule, SHAPE)
    x = points(mixture, LEVELS[1])
    assert torch.equal(loaded(x, LEVELS[1]).x0, mixture(x, LEVELS[1]).x0)
    assert torch.equal(loaded.log_prob(x, LEVELS[1]), mixture.log_prob(x, LEVELS[1]))


def test_files_that_hold_no_mixture(tmp_path):
    with pytest.raises(InputError, match="No mixture at"):
        load_mixture(str(tmp_path / "absent.safetensors"))
    (tmp_path / "garbage.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a file that"):
        load_mixture(str(tmp_path / "garbage.safetensors"))
    from cmi_lightning.zoo.cards import shipped

    with pytest.raises(InputError, match="not a file that"):
        load_mixture(str(shipped()["fashion-mnist"]))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda m: GaussianMixture(m, torch.ones(2, N)), "variances must be"),
        (lambda m: GaussianMixture(m, DiagonalCovariance(torch.ones(2, N))), "must agree"),
        (lambda m: GaussianMixture(m, DenseCovariance(torch.eye(5))), "must agree"),
        (lambda m: GaussianMixture(m, -1.0), "at least 0"),
        (lambda m: GaussianMixture(m, math.nan), "finite"),
        (lambda m: GaussianMixture(m, 1.0, torch.tensor([1.0, -1.0, 1.0])), "weights"),
        (lambda m: GaussianMixture(m, 1.0, torch.ones(2)), "weights"),
        (lambda m: DenseCovariance(torch.ones(2, 3)), r"\(n, n\)"),
        (lambda m: DenseCovariance(torch.tensor([[1.0, 0.2], [0.1, 1.0]])), "symmetric"),
        (lambda m: DenseCovariance(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "semidefinite"),
        (lambda m: StationaryCovariance(torch.tensor([[1.0, 2.0, 3.0]]), 1), "f and −f"),
        (lambda m: StationaryCovariance(torch.ones(3, 4)), "grid"),
        (lambda m: power_law_prior([1, 8]), "image_shape"),
        (lambda m: power_law_prior([1, 8, 8], std=0.0), "std"),
        (lambda m: GaussianMixture(m).condition(torch.ones(2, 5), torch.ones(2), 1.0), "matrix"),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(InputError, match=words):
        build(torch.zeros(3, N))


# Stationary priors


def test_power_law_prior_has_its_spectrum_and_variance():
    prior = power_law_prior([2, 8, 12], exponent=3.0, std=0.4, mean=-0.25)
    assert isinstance(prior, GaussianPrior)
    torch.testing.assert_close(prior.variances, torch.full((1, 2, 8, 12), 0.16))
    torch.testing.assert_close(prior.mean(), torch.full((2, 8, 12), -0.25))
    spectrum = prior.covariances.values.reshape(2, 8, 12)
    assert float(spectrum[1, 0, 2] / spectrum[1, 0, 4]) == pytest.approx(8.0, rel=1e-5)
    assert float(spectrum[0, 2, 0] / spectrum[0, 0, 3]) == pytest.approx(1.0, rel=1e-5)
    assert power_law_prior([1, 4, 4], schedule="cosine").schedule == Schedule.cosine()


def test_vectors_may_be_stationary_too():
    spectrum = torch.tensor([[3.0, 1.0, 0.5, 0.5, 1.0]], dtype=torch.float64)
    covariance = StationaryCovariance(spectrum, grid=1)
    row = torch.fft.ifft(spectrum[0]).real
    circulant = torch.stack([row.roll(i) for i in range(5)])
    close(covariance.matrix()[0], circulant, 1e-12)


def sampled_variance(spectrum: Tensor, schedule: Schedule, eta: float) -> Tensor:
    """Variance of each coefficient after DDIM's steps, which are linear for a Gaussian prior."""
    last = schedule[len(schedule) - 1]
    variance = torch.full_like(spectrum, last.alpha**2 + last.sigma**2)
    for _, t, s in schedule.pairs():
        gain = t.alpha * spectrum / (t.alpha**2 * spectrum + t.sigma**2)
        added = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
        noise = eta**2 * added * s.sigma**2 / t.sigma**2
        epsilon = (1 - t.alpha * gain) / t.sigma
        factor = s.alpha * gain + max(s.sigma**2 - noise, 0.0) ** 0.5 * epsilon
        variance = factor**2 * variance + noise
    return variance


@pytest.mark.parametrize("solver", [DDPM(), DDIM(), DDIM(1.0)], ids=str)
def test_unguided_sampling_reproduces_the_prior(solver):
    prior = power_law_prior([1, 16, 16], exponent=2.0, std=0.5, mean=0.2)
    noise = SampleNoise(0, [f"sample/{i}" for i in range(128)])
    like = torch.zeros(128, 1, 16, 16)
    problem = Problem.simulate(like, Identity(), 0.1, noise)
    x = Sampler(prior, solver, (), 100).run(problem, noise, like) - 0.2
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean(0)[0]
    rows, columns = torch.meshgrid(*[torch.fft.fftfreq(16)] * 2, indexing="ij")
    band = (rows**2 + columns**2).sqrt().mul(16).round().long()
    spectrum = prior.covariances.values.reshape(16, 16).double()
    # 100 steps lose some variance; 1000 steps hardly any
    eta = solver.eta if isinstance(solver, DDIM) else 1.0
    ratio = power / sampled_variance(spectrum, prior.schedule.respace(100), eta)
    for k in range(12):
        inside = band == k
        # a complex coefficient and its mirror image are one draw of two degrees of freedom
        error = math.sqrt(2 / (128 * int(inside.sum())))
        assert abs(float(ratio[inside].mean()) - 1) < 4 * error, k
    fine = sampled_variance(spectrum, prior.schedule, eta) / spectrum
    assert float((fine - 1).abs().max()) < 0.05
    error = float(spectrum[0, 0]) ** 0.5 / (16 * 128**0.5)  # of the mean of all pixels
    assert abs(float(x.mean())) < 4 * error


@pytest.mark.parametrize("prior", ["power_law_prior", "load_mixture"])
def test_exact_priors_from_the_command_line(tmp_path, prior):
    path, own, out = (tmp_path / name for name in ("prior.safetensors", "own.yaml", "out"))
    g = torch.Generator().manual_seed(0)
    GaussianMixture(torch.rand(4, 1, 32, 32, generator=g), 0.1).save(path)
    mixture = {"class_path": "cmi_lightning.exact.load_mixture", "init_args": {"path": str(path)}}
    own.write_text(yaml.safe_dump({"model": {"denoiser": mixture}}))
    config = "prior/power_law" if prior == "power_law_prior" else str(own)
    options = ["--data.limit=2", "--data.batch_size=2", "--model.num_steps=3"]
    root = f"--trainer.default_root_dir={out}"
    assert main(["predict", "-c", "demo/garments", "-c", config, *options, root]) == 0
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["model"]["denoiser"]["class_path"].endswith(prior)
    assert (out / "restored/00001.png").is_file()
    assert (out / "metrics.csv").is_file()


# Posteriors


@each_kind
@pytest.mark.parametrize("std", [0.2, (0.1, 0.4, 1.5), 0.0], ids=str)
def test_posterior_is_dense_gaussian_conditioning(kind, std):
    mixture, covariances = make(kind)
    g = torch.Generator().manual_seed(5)
    y = torch.randn(3, generator=g, dtype=torch.float64)
    std = torch.tensor(std, dtype=torch.float64)
    posterior = mixture.condition(A, y, std)
    # numpy's, from the joint covariance of (x₀, y)
    noise = np.diag(np.broadcast_to(std.numpy() ** 2, 3))
    evidence, means, shrunk = [], [], []
    for w, mu, C in zip([0.5, 0.3, 0.2], mixture.means.flatten(1), covariances, strict=True):
        CA = (C @ A.T).numpy()
        joint = np.block([[C.numpy(), CA], [CA.T, A.numpy() @ CA + noise]])
        solved = joint[:N, N:] @ np.linalg.inv(joint[N:, N:])
        means.append(mu.numpy() + solved @ (y - A @ mu).numpy())
        shrunk.append(joint[:N, :N] - solved @ joint[N:, :N])
        evidence.append(w * multivariate_normal((A @ mu).numpy(), joint[N:, N:]).pdf(y.numpy()))
    close(posterior.log_weights.exp(), torch.tensor(np.array(evidence) / sum(evidence)), 1e-9)
    close(posterior.means.flatten(1), torch.tensor(np.stack(means)), 1e-9)
    close(posterior.covariances.matrix().expand(3, N, N), torch.tensor(np.stack(shrunk)), 1e-9)
    assert len(posterior.covariances.values) == len(mixture.covariances.values)
    assert posterior.image_shape == SHAPE
    draws = posterior.sample(200, torch.Generator().manual_seed(0)).flatten(1)
    if float(std.max()) == 0:  # noiseless measurements are met exactly, and leave no density
        close(draws @ A.T, y.expand(200, 3), 1e-9)
        with pytest.raises(InputError, match="degenerate"):
            posterior.log_prob(posterior.means, CLEAN)


def test_posterior_density_is_bayes_on_a_grid():
    mixture, grid, density = on_a_grid(6, torch.tensor([0.2, 0.5, 0.3]))
    A = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    y = torch.tensor([0.8], dtype=torch.float64)
    posterior = mixture.condition(A, y, 0.3)
    density = density * torch.exp(-((y - grid @ A.T)[:, 0] ** 2) / (2 * 0.3**2))
    density = density / (density.sum() * float(grid[1, 1] - grid[0, 1]) ** 2)
    mine = posterior.log_prob(grid, CLEAN).exp()
    close(mine, density, 1e-6)
    weight = density / density.sum()
    mean = weight @ grid
    close(posterior.mean(), mean, 1e-6)
    apart = grid - mean
    close(posterior.covariance(), torch.einsum("g,gi,gj->ij", weight, apart, apart), 1e-6)


@each_kind
@pytest.mark.parametrize("std", [0.01, 0.0])
def test_single_precision_priors_are_conditioned_too(kind, std):
    double, single = make(kind)[0], make(kind)[0].float()
    y = torch.tensor([0.3, -0.2])
    posterior = single.condition(A[:2].float(), y, std)
    assert posterior.means.dtype == posterior.covariances.values.dtype == torch.float32
    truth = double.condition(A[:2], y.double(), std)
    close(posterior.mean().double(), truth.mean(), 1e-4)
    close(posterior.covariance().double(), truth.covariance(), 1e-4)


def test_redundant_measurements_need_noise():
    mixture, _ = make("dense")
    A = torch.ones(2, N, dtype=torch.float64)
    with pytest.raises(InputError, match="determine one another"):
        mixture.condition(A, torch.zeros(2).double(), 0.0)
    one = GaussianPrior(mixture.means[0], 0.3)
    for seed in range(20):  # rounding hides some of them from the factorisation
        g = torch.Generator().manual_seed(seed)
        rows = torch.randn(2, N, generator=g, dtype=torch.float64)
        with pytest.raises(InputError, match="determine one another"):
            one.condition(torch.cat([rows, rows.sum(0)[None]]), torch.zeros(3).double(), 0.0)
    scales = torch.tensor([[1e-9], [1e6]], dtype=torch.float64)  # units are no redundancy
    assert mixture.condition(scales * EYE[:2], torch.zeros(2).double(), 0.0).means.shape
    assert mixture.condition(A, torch.zeros(2).double(), 0.1).means.shape == (3, *SHAPE)


@pytest.mark.parametrize("operator", [GaussianBlur(5, 1.0), Downsample(2), BoxMask(3, 1)], ids=str)
def test_operators_become_matrices(operator):
    noise = SampleNoise(0, ["a", "b"])
    x = noise.normal("test", 0, torch.zeros(2, 2, 8, 8, dtype=torch.float64))
    bound = operator.bind((2, 8, 8), noise, x)
    y = bound(x)
    for row in range(2):
        A = exact.as_matrix(bound, y, row)
        close(A @ x[row].flatten(), y[row].flatten(), 1e-12)


def test_ragged_masks_lose_their_padding():
    noise = SampleNoise(0, ["a", "b"])
    known = torch.zeros(2, 2, 3)
    known[0, 0], known[1, 1, 2] = 1, 1
    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    operator = PixelMask.from_mask(known, like).bind(SHAPE, noise, like)
    x = noise.normal("test", 0, like)
    problem = Problem.simulate(x, operator, torch.tensor([0.1, 0.3], dtype=torch.float64), noise)
    a, b = exact.as_dense(problem, 0), exact.as_dense(problem, 1)
    assert torch.equal(a.matrix, EYE[:3])
    assert torch.equal(b.matrix, EYE[5:])
    assert (a.std.tolist(), b.std.tolist()) == ([0.1] * 3, [0.3])
    assert torch.equal(b.y, problem.y[1, 0, :1])
    mixture, _ = make("dense")
    posterior = exact.exact_posterior(mixture, problem, 1)
    close(posterior.means, mixture.condition(b.matrix, b.y, 0.3).means, 1e-12)


# Conditional mutual information


class Twisted(nn.Module):
    """Some x̂₀ whose Jacobian is neither symmetric nor that of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.first, self.second = 0.4 * torch.randn(2, N, N, generator=g, dtype=torch.float64)

    def forward(self, x):
        return x + torch.tanh(x @ self.first) @ self.second


class Network(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.network = Schedule.linear(), Twisted()

    def forward(self, x, level):
        return Prediction(self.network(x.flatten(1)).reshape(x.shape))


def third_order(denoiser, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """P (B, n, n) and ∇P (B, n, n, n), the last dimension being that of x_t."""

    def covariance(z: Tensor) -> Tensor:
        return exact.covariance(denoiser, z, level, create_graph=True)

    slopes = autograd_jacobian(covariance, x)
    return covariance(x).detach(), slopes.unflatten(1, (x[0].numel(),) * 2)


def white(x: Tensor, A: Tensor, std: Tensor | float) -> Tensor:
    """Σ_n^{-1/2} A (B, m, n)."""
    A = A.expand(len(x), *A.shape[-2:])
    return A / torch.as_tensor(std, dtype=x.dtype).expand(A.shape[:2])[..., None]


def information_theorem_1(denoiser, x, level, A, std) -> Tensor:
    """½ log det P − ½ log det Q with Q = (P⁻¹ + Aᵀ Σ_n⁻¹ A)⁻¹ (Hamidi & Yang 2025, Theorem 1)."""
    P, W = exact.covariance(denoiser, x, level), white(x, A, std)
    return 0.5 * torch.logdet(P) - 0.5 * torch.logdet((P.inverse() + W.mT @ W).inverse())


def gradient_theorem_2(denoiser, x, level, A, std) -> Tensor:
    """∂_k I = ½ tr[P⁻¹ ∂_k P] − ½ tr[Q⁻¹ ∂_k Q] by the whole ∇P (Theorem 2 and Eq. 14).

    ∂_k Q = Q P⁻¹ (∂_k P) P⁻¹ Q.
    """
    P, dP = third_order(denoiser, x, level)
    W = white(x, A, std)
    Q = (P.inverse() + W.mT @ W).inverse()
    dQ = torch.einsum("bij,bjlk,blm->bimk", Q @ P.inverse(), dP, P.inverse() @ Q)
    traces = [torch.einsum("bij,bjik->bk", E.inverse(), F) for E, F in ((P, dP), (Q, dQ))]
    return 0.5 * (traces[0] - traces[1]).reshape(x.shape)


def gradient_autograd(denoiser, x, level, A, std, spectral=False) -> Tensor:
    """∇_{x_t} of the information, or of its spectral form, by autograd of its value."""
    W = white(x, A, std)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        P = exact.covariance(denoiser, x, level, create_graph=True)
        S = torch.eye(W.shape[1], dtype=P.dtype) + W @ P @ W.mT
        value = 0.5 * torch.logdet(S)
        if spectral:
            value = 0.5 * torch.linalg.eigvalsh(0.5 * (S + S.mT)).clamp_min(1).log().sum(1)
        if not value.requires_grad:
            return torch.zeros_like(x)
        return torch.autograd.grad(value.sum(), x, materialize_grads=True)[0]


def slope_along(f, x: Tensor, direction: Tensor, h: float = 1e-5) -> Tensor:
    """The central difference of f (B,) along a direction."""
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


@pytest.mark.parametrize("std", STDS, ids=["one std", "stds"])
@each_level
@pytest.mark.parametrize("kind", ["dense", "shared", "diagonal", "stationary"])
def test_the_forms_of_value_and_gradient_agree(kind, level, std):
    mixture, _ = make(kind)
    x = points(mixture, level)
    value = exact.information(mixture, x, level, A, std)
    assert float(value.min()) > 0
    close(information_theorem_1(mixture, x, level, A, std), value)
    close(exact.spectral_information(mixture, x, level, A, std), value)
    # numpy's, from the law of total covariance
    P = mixture.covariance(x, level).numpy()
    noise = np.diag(np.broadcast_to(np.asarray(std) ** 2, 3))
    S = A.numpy() @ P @ A.numpy().T + noise
    truth = 0.5 * (np.linalg.slogdet(S)[1] - np.linalg.slogdet(noise)[1])
    close(value, torch.tensor(truth))

    gradient = exact.gradient(mixture, x, level, A, std)
    assert gradient.shape == x.shape
    assert float(gradient.abs().max()) > 1e-4
    close(gradient_theorem_2(mixture, x, level, A, std), gradient)
    close(gradient_autograd(mixture, x, level, A, std), gradient)
    close(gradient_autograd(mixture, x, level, A, std, spectral=True), gradient)
    slope = slope_along(lambda z: exact.information(mixture, z, level, A, std), x, gradient)
    square = gradient.square().flatten(1).sum(1)
    torch.testing.assert_close(slope, square, rtol=1e-5, atol=1e-8)


def test_closed_form_jacobian_and_autograd_agree():
    mixture, _ = make("dense")

    class Plain(Denoiser):  # the same x̂₀, but only x̂₀
        schedule = mixture.schedule

        def forward(self, x, level):
            return mixture(x, level)

    level = LEVELS[1]
    x = points(mixture, level)
    for f in (exact.information, exact.gradient, gradient_theorem_2):
        close(f(Plain(), x, level, A, 0.2), f(mixture, x, level, A, 0.2))
    P, slopes = third_order(Plain(), x, level)
    close(slopes, third_order(mixture, x, level)[1])
    truth = autograd_jacobian(lambda z: mixture.covariance(z, level), x)
    close(slopes, truth.unflatten(1, (N, N)))
    assert not P.requires_grad


def test_a_network_needs_no_symmetry():
    network, level = Network(), Level(0.9, 0.4, 0.0)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    J = exact.jacobian(network, x, level)
    close(J, autograd_jacobian(lambda z: network(z, level).x0, x))
    assert float((J - J.mT).abs().max()) > 0.1
    value = exact.information(network, x, level, A, 0.5)
    assert bool(torch.isfinite(value).all())
    gradient = exact.gradient(network, x, level, A, 0.5)
    close(gradient_autograd(network, x, level, A, 0.5), gradient)
    close(gradient_theorem_2(network, x, level, A, 0.5), gradient)
    spectral = gradient_autograd(network, x, level, A, 0.5, spectral=True)
    for f, d in ((exact.information, gradient), (exact.spectral_information, spectral)):
        slope = slope_along(lambda z, f=f: f(network, z, level, A, 0.5), x, d)
        torch.testing.assert_close(slope, d.square().flatten(1).sum(1), rtol=1e-5, atol=1e-8)


def test_spectral_form_of_an_indefinite_covariance():
    class Crossed(Network):
        def forward(self, x, level):
            return Prediction(torch.sin(3 * super().forward(x, level).x0))

    network, level = Crossed(), Level(0.9, 0.4, 0.0)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P = level.sigma**2 / level.alpha * autograd_jacobian(lambda z: network(z, level).x0, x)
    S = np.eye(3) + (A @ P @ A.T / 0.3**2).numpy()
    values = np.linalg.eigvalsh(0.5 * (S + S.transpose(0, 2, 1)))
    assert values.min() < -0.5  # log |λ| would be another number
    assert values.max() > 1.5
    truth = 0.5 * np.log(np.maximum(values, 1)).sum(1)
    close(exact.spectral_information(network, x, level, A, 0.3), torch.tensor(truth))


def test_a_subclass_with_another_x0_has_another_jacobian():
    class Doubled(GaussianMixture):
        def forward(self, x, level):
            return Prediction(2 * super().forward(x, level).x0)

    mixture, _ = make("diagonal")
    doubled = Doubled(mixture.means, mixture.variances, mixture.log_weights.exp())
    x = points(mixture, LEVELS[0])
    close(exact.jacobian(doubled, x, LEVELS[0]), 2 * mixture.jacobian(x, LEVELS[0]))


@each_level
def test_gaussian_prior_has_no_gradient(level):
    mixture, covariances = make("dense", count=1)
    prior = GaussianPrior(mixture.means[0], DenseCovariance(covariances[0]))
    x = points(prior, level)
    for f in (exact.gradient, gradient_theorem_2, gradient_autograd):
        assert float(f(prior, x, level, A, 0.2).abs().max()) < 1e-12

    class Linear(Denoiser):  # J does not even depend on x_t in its graph
        schedule = prior.schedule

        def forward(self, x, level):
            return Prediction(x * 0.5)

    for f in (exact.gradient, gradient_theorem_2, gradient_autograd):
        assert float(f(Linear(), x, level, A, 0.2).abs().max()) == 0


def test_each_sample_may_have_its_own_operator_and_noise():
    mixture, _ = make("dense")
    x = points(mixture, LEVELS[1], 2)
    g = torch.Generator().manual_seed(1)
    own = torch.randn(2, 3, N, generator=g, dtype=torch.float64)
    std = torch.rand(2, 3, generator=g, dtype=torch.float64) + 0.1
    for f in (exact.information, exact.gradient, gradient_theorem_2):
        whole = f(mixture, x, LEVELS[1], own, std)
        for i in range(2):
            close(f(mixture, x[i : i + 1], LEVELS[1], own[i], std[i]), whole[i : i + 1])


def test_unfit_information_problems_are_named():
    mixture, _ = make("dense")
    x = points(mixture, LEVELS[0])
    with pytest.raises(InputError, match="needs measurement noise"):
        exact.information(mixture, x, LEVELS[0], A, 0.0)
    with pytest.raises(InputError, match=r"\(m, 6\)"):
        exact.gradient(mixture, x, LEVELS[0], A[:, :5], 0.1)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_gradient_mode_and_tensors_stay(enabled):
    mixture, _ = make("dense")
    x = points(mixture, LEVELS[0])
    with torch.set_grad_enabled(enabled):
        for f in (exact.information, exact.gradient, gradient_theorem_2):
            assert not f(mixture, x, LEVELS[0], A, 0.1).requires_grad
            assert torch.is_grad_enabled() is enabled
    assert not x.requires_grad


def test_covariances_take_the_dtype_of_the_means():
    covariance = DenseCovariance(torch.eye(6, dtype=torch.float64))
    prior = GaussianMixture(torch.zeros(2, 1, 2, 3), covariance)
    x = torch.ones(1, 1, 2, 3)
    assert prior(x, prior.schedule[300]).x0.dtype == torch.float32
    assert covariance.values.dtype == torch.float64
