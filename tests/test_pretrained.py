"""Other people's networks: every wrapper against exact priors."""

import math

import pytest
import torch
from conftest import SHAPE
from torch import Tensor, nn

from cmi_lightning import PosteriorSampler
from cmi_lightning.denoisers import (
    AsGray,
    AsRGB,
    Denoiser,
    EDMDenoiser,
    NetworkDenoiser,
    Prediction,
    UNet,
)
from cmi_lightning.errors import InputError
from cmi_lightning.exact import DenseCovariance, GaussianMixture, GaussianPrior
from cmi_lightning.guidance import DPS
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers import DDPM

SCHEDULES = {
    "linear": Schedule.linear(),
    "cosine": Schedule.cosine(),
    "edm": Schedule.edm(),
    "vp": Schedule.vp(),
    "vp in t": Schedule.vp(num_levels=300, time_scale=1),
}


def oracle(prior: GaussianMixture, schedule: Schedule, prediction: str):
    """A function of (x_t, times) with a prior's exact answer, found by the time alone."""
    levels = {level.time: level for level in schedule}

    def network(x: Tensor, times: Tensor) -> Tensor:
        assert times.shape == (len(x),)
        _, sigma, _ = level = levels[times[0].item()]
        x0 = prior(x, level).x0
        epsilon = (x - level.alpha * x0) / sigma
        if prediction == "score":
            return torch.autograd.grad(prior.log_prob(x, level).sum(), x, create_graph=True)[0]
        return {"x0": x0, "epsilon": epsilon, "v": level.alpha * epsilon - sigma * x0}[prediction]

    return network


def edm_precond(prior: GaussianMixture):
    """D(x; σ) of a prior."""

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return prior(x, Level(1.0, sigma[0].item(), 0.0)).x0

    return network


def edm_raw(prior: GaussianMixture, s: float):
    """F of a prior, solved from Karras et al.'s D = c_skip x + c_out F(c_in x, c_noise)."""

    def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
        sigma = math.exp(4 * c_noise[0].item())
        x = scaled * (sigma**2 + s**2) ** 0.5
        c_skip = s**2 / (sigma**2 + s**2)
        c_out = sigma * s / (sigma**2 + s**2) ** 0.5
        return (prior(x, Level(1.0, sigma, 0.0)).x0 - c_skip * x) / c_out

    return network


def in_range(mixture: GaussianMixture, low: float, high: float) -> GaussianMixture:
    """The same images, in [low, high] instead of [−1, 1]."""
    gain = (high - low) / 2
    means = gain * mixture.means + (high + low) / 2
    return GaussianMixture(means, gain**2 * mixture.variances, mixture.log_weights.exp())


def assert_exact(denoiser: Denoiser, exact: Denoiser, x0: Tensor | None = None) -> None:
    """x̂₀ and a vector-Jacobian product are an exact prior's at every level, to 1e-6."""
    g = torch.Generator().manual_seed(0)
    x0 = exact.sample(3, g) if x0 is None else x0
    u = torch.randn(x0.shape, generator=g, dtype=x0.dtype)
    for level in denoiser.schedule.respace(100):
        x = level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=g, dtype=x0.dtype)
        x.requires_grad_()
        ours, truth = denoiser(x, level).x0, exact(x, level).x0
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-6)
        products = [torch.autograd.grad(y, x, u)[0] for y in (ours, truth)]
        torch.testing.assert_close(*products, rtol=1e-6, atol=1e-6)


predictions = pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "score"])


@predictions
@pytest.mark.parametrize("name", SCHEDULES)
def test_predictions_of_an_exact_prior(mixture, name, prediction):
    schedule = SCHEDULES[name]
    network = oracle(mixture, schedule, prediction)
    assert_exact(NetworkDenoiser(network, None, schedule, prediction, SHAPE), mixture)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0.0, 255.0), (-2.0, 1.0)])
@predictions
def test_other_ranges_of_an_exact_prior(mixture, value_range, prediction):
    # The network is exact for images in its own range, at the levels of its own schedule.
    theirs = in_range(mixture, *value_range)
    network = oracle(theirs, Schedule.linear(), prediction)
    denoiser = NetworkDenoiser(network, None, "linear", prediction, SHAPE, value_range)
    assert denoiser.value_range == (-1, 1)
    assert denoiser.schedule[7].sigma == pytest.approx(
        2 / (value_range[1] - value_range[0]) * Schedule.linear()[7].sigma
    )
    assert_exact(denoiser, mixture)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("preconditioned", [True, False])
def test_edm_networks_of_an_exact_prior(mixture, name, value_range, preconditioned):
    theirs = in_range(mixture, *value_range)
    network = edm_precond(theirs) if preconditioned else edm_raw(theirs, 0.7)
    denoiser = EDMDenoiser(network, None, SCHEDULES[name], preconditioned, 0.7, SHAPE, value_range)
    assert_exact(denoiser, mixture)


def test_continuous_vp_as_its_authors_call_it(mixture):
    # score_sde: the network receives 999 t and returns ε; the score is −ε/σ(t), with
    # σ² = 1 − exp(−∫β), β(s) = 0.1 + 19.9 s.
    def network(x, labels):
        t = labels[0].item() / 999
        s = torch.linspace(0, t, 20_001, dtype=torch.float64)
        integral = float(torch.trapezoid(0.1 + 19.9 * s, s))
        alpha = math.exp(-integral / 2)
        level = Level(alpha, math.sqrt(1 - alpha**2), t)
        return (x - alpha * mixture(x, level).x0) / level.sigma

    assert_exact(NetworkDenoiser(network, None, "vp", "epsilon", SHAPE), mixture)


@pytest.mark.parametrize(
    ("time", "told"),
    [
        ("time", 5.0),
        ("index", 5),
        ("sigma", 0.6),
        ("noise_to_signal", 0.75),
        ("c_noise", math.log(0.75) / 4),
        ("log_snr", math.log(0.64 / 0.36)),
    ],
)
def test_what_the_network_is_told(time, told):
    seen = []

    def network(x, times):
        seen.append(times)
        return x

    denoiser = NetworkDenoiser(network, None, time=time)
    denoiser(torch.zeros(2, 1, 4, 4), Level(0.8, 0.6, 5.0))
    assert seen[0].tolist() == pytest.approx([told] * 2)
    assert seen[0].dtype == (torch.int64 if time == "index" else torch.float32)


def test_images_of_other_channels():
    denoiser = NetworkDenoiser(lambda x, t: x, None, image_shape=(3, None, 8))
    level = denoiser.schedule[3]
    denoiser(torch.zeros(1, 3, 5, 8), level)
    with pytest.raises(InputError, match=r"shape \(2, 1, 8, 8\) .* \(batch, 3, .*AsGray"):
        denoiser(torch.zeros(2, 1, 8, 8), level)
    sampler = PosteriorSampler(denoiser)  # which also checks sizes
    with pytest.raises(InputError, match="the network takes 3×any×8"):
        sampler.predict_step({"x": torch.zeros(1, 3, 8, 5), "id": ["a"]})


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            lambda x, t: x.repeat(1, 2, 1, 1),
            r"returned \(2, 6, 4, 4\) .*set learns_variance to true",
        ),
        (lambda x, t: x[:, :1], "image_shape and the network's channels must agree"),
        (lambda x, t: x[..., 1:], "image_shape and the network's channels must agree"),
        (lambda x, t: (x, None), "returned tuple and must return a tensor"),
        (lambda x, t: x.detach(), "carries no gradient"),
    ],
)
def test_outputs_that_are_none(network, words):
    denoiser = NetworkDenoiser(network, None)
    with pytest.raises(InputError, match=words):
        denoiser(torch.zeros(2, 3, 4, 4, requires_grad=True), denoiser.schedule[3])


def test_learned_variance_is_declared_or_asked_for():
    def network(x, times):
        return torch.cat([torch.zeros_like(x), torch.full_like(x, -0.5)], dim=1)

    denoiser = NetworkDenoiser(network, None, learns_variance=True)
    assert denoiser.learns_variance
    fraction = denoiser(torch.ones(1, 3, 4, 4), denoiser.schedule[3]).variance_fraction
    assert fraction.unique().tolist() == [0.25]
    denoiser = NetworkDenoiser(lambda x, t: x, None, learns_variance=True)
    with pytest.raises(InputError, match="set learns_variance to false"):
        denoiser(torch.ones(1, 3, 4, 4), denoiser.schedule[3])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NetworkDenoiser(torch.sin, None, value_range=(1, 0)), "value_range must be"),
        (lambda: NetworkDenoiser(torch.sin, None, time="t"), "time must be one of time, index"),
        (
            lambda: EDMDenoiser(torch.sin, None, sigma_data=0),
            "sigma_data must be a number, above 0",
        ),
        (lambda: Schedule.from_betas([0.1, 1.0, 0.2]), "betas must lie between"),
    ],
)
def test_impossible_options(make, words):
    with pytest.raises(InputError, match=words):
        make()


# Sizes and channels


@pytest.mark.parametrize("shape", [(1, 16, 8), (3, 8, 24), (4, 16, 16)])
def test_channels_and_oblong_images_end_to_end(shape):
    torch.manual_seed(0)
    network = UNet(shape[0], 32, (1, 2, 2), attention_levels=(2,), num_head_channels=32)
    nn.init.normal_(network.out[2].weight, std=0.05)
    prior = NetworkDenoiser(network, None, image_shape=(shape[0], None, None))
    sampler = PosteriorSampler(prior, guidances=[DPS(1.0)], num_steps=4)
    x = torch.rand(2, *shape) * 2 - 1
    restored = sampler.predict_step({"x": x, "id": ["a", "b"]})["restored"]
    assert restored.shape == x.shape
    assert bool(torch.isfinite(restored).all())
    odd = sampler.predict_step({"x": x[..., :6], "id": ["a", "b"]})["restored"]  # in windows
    assert odd.shape == (*x.shape[:3], 6)
    with pytest.raises(InputError, match="multiples of 4"):
        sampler.predict_step({"x": x[..., :3], "id": ["a", "b"]})


@pytest.mark.parametrize("colour", [0.0, 0.3])
def test_gray_images_on_an_rgb_prior(colour):
    # RGB images of covariance (colour·I + 11ᵀ) ⊗ K; their gray means have (colour/3 + 1) K.
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64) / 2
    K = root @ root.T
    mean = torch.randn(1, 2, 2, generator=g, dtype=torch.float64)
    channels = colour * torch.eye(3, dtype=torch.float64) + 1
    rgb = GaussianPrior(mean.repeat(3, 1, 1), DenseCovariance(torch.kron(channels, K)))
    truth = GaussianPrior(mean, DenseCovariance((colour / 3 + 1) * K))
    gray = AsGray(rgb)
    assert gray.image_shape == (1, 2, 2)
    assert_exact(gray, truth, torch.randn(3, 1, 2, 2, generator=g, dtype=torch.float64))


def test_an_rgb_network_is_shown_noise_as_it_knows_it():
    seen = []

    class Look(Denoiser):
        schedule, learns_variance = Schedule.linear(), True

        def forward(self, x, level):
            seen.append((x, level))
            return Prediction(x, torch.full_like(x, 0.5))

    gray = AsGray(Look())
    level = gray.schedule[600]
    noise = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    prediction = gray(level.sigma * noise, level)
    assert prediction.variance_fraction.shape == prediction.x0.shape == noise.shape
    torch.testing.assert_close(prediction.x0, level.sigma * noise)
    x, theirs = seen[0]
    assert theirs.sigma == pytest.approx(Schedule.linear()[600].sigma)
    covariance = torch.cov(x.transpose(0, 1).flatten(1)) / theirs.sigma**2  # of the channels
    assert float((covariance - torch.eye(3)).abs().max()) < 0.05
    single = gray(level.sigma * noise[2:3], level)
    assert torch.equal(single.x0, prediction.x0[2:3])  # whatever the rest of the batch
    with pytest.raises(InputError, match="AsGray wraps a prior for images of 3 channels"):
        AsGray(AsRGB(gray, 4))


def test_rgb_images_on_a_gray_prior(mixture):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *SHAPE[1:], generator=g, dtype=torch.float64)
    rgb = AsRGB(mixture)
    assert rgb.image_shape == (3, *SHAPE[1:])
    level = rgb.schedule[300]
    x0 = rgb(x, level).x0
    for c in range(3):
        torch.testing.assert_close(x0[:, c : c + 1], mixture(x[:, c : c + 1], level).x0)
    with pytest.raises(InputError, match="AsRGB wraps a prior for images of 1 channels"):
        AsRGB(rgb)


def test_gray_sampling_end_to_end():
    torch.manual_seed(0)
    network = UNet(3, 32, (1, 2), attention_levels=(1,), num_head_channels=32, learn_variance=True)
    nn.init.normal_(network.out[2].weight, std=0.05)
    prior = AsGray(NetworkDenoiser(network, None, image_shape=(3, None, None)))
    sampler = PosteriorSampler(prior, None, DDPM("learned"), [DPS(1.0)], num_steps=4)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    restored = sampler.predict_step({"x": x, "id": ["a", "b"]})["restored"]
    assert restored.shape == x.shape
    assert bool(torch.isfinite(restored).all())
