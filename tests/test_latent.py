"""Priors of latents: a linear decoder against exact answers, and autoencoders of diffusers."""

import pytest
import torch
from conftest import assert_two_derivatives, randn
from tiny import autoencoder, unet2d
from torch import Tensor, nn

from cmi_lightning import PosteriorSampler, Problem, Sampler
from cmi_lightning.denoisers import (
    AsGray,
    Autocast,
    Autoencoder,
    Decoder,
    DiffusersDenoiser,
    LatentPrior,
    NetworkDenoiser,
    Tiled,
)
from cmi_lightning.errors import InputError
from cmi_lightning.exact import DenseCovariance, GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, PSLD, MomentMatching, PiGDM, ReSample
from cmi_lightning.information import Lanczos
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Dense, Gamma
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers import DDIM, DDPM
from cmi_lightning.step import Step
from cmi_lightning.zoo import load_prior

LATENTS, IMAGES = (2, 2, 2), (1, 4, 4)  # 8 numbers for 16 pixels


class Matrix(Decoder):
    """x = M z, and Mᵀ x as the encoder."""

    factor, channels, latent_channels = 2, 1, 2

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.matrix.T).unflatten(1, IMAGES)

    def encode(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix).unflatten(1, LATENTS)


M, MEASURE = randn(16, 8, seed=1) / 3, randn(5, 16, seed=2)
ROOT = randn(8, 8, seed=3) / 2
COVARIANCE, MEAN = ROOT @ ROOT.T + 0.1, randn(*LATENTS, seed=4)
LATENT = GaussianPrior(MEAN, DenseCovariance(COVARIANCE))
PRIOR = LatentPrior(LATENT, Matrix(M))
NOISE = SampleNoise(0, ["a", "b"])


def problem(matrix: Tensor = M) -> Problem:
    x = Matrix(matrix)(LATENT.sample(2, torch.Generator().manual_seed(5)))
    return Problem.simulate(x, Dense(MEASURE, IMAGES), 0.2, NOISE)


GUIDANCES = [
    DPS(0.3),
    DSG(0.1),
    PiGDM(),
    MomentMatching(),
    CMI(0.1, interval=1),
    CMI(0.1, interval=1, estimator=Lanczos()),
]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
def test_a_linear_decoder_is_a_factor_of_the_operator(guidance):
    y = problem()
    lifted = Problem(y.y, Dense(MEASURE @ M, LATENTS), 0.2)
    ours, latents = (
        Sampler(prior, DDPM(), [guidance], num_steps=12).run(q, NOISE, q.y.new_zeros(2, *shape))
        for prior, q, shape in ((PRIOR, y, IMAGES), (LATENT, lifted, LATENTS))
    )
    torch.testing.assert_close(ours, Matrix(M)(latents), rtol=1e-6, atol=1e-7)


def test_psld_with_an_orthogonal_decoder_is_dps():
    # x = Q z with square Q and A Aᵀ = 1: the second term's length is that of the residual.
    class Square(Matrix):
        factor, latent_channels = 1, 1

        def encode(self, x):
            return (x.flatten(1) @ self.matrix).unflatten(1, IMAGES)

    Q = torch.linalg.qr(randn(16, 16, seed=6))[0]
    prior = LatentPrior(GaussianPrior(randn(*IMAGES, seed=7), 0.5), Square(Q))
    x = randn(2, *IMAGES, seed=8)
    y = Problem.simulate(x, BoxMask(2, margin=1), 0.1, NOISE)
    runs = [
        Sampler(prior, DDPM(), [guidance], num_steps=10).run(y, NOISE, x)
        for guidance in (PSLD(0.2, 0.1), PSLD(0.3, 0.0), DPS(0.3))
    ]
    for other in runs[1:]:
        torch.testing.assert_close(runs[0], other, rtol=1e-8, atol=1e-8)


def test_resample_fits_the_measurement_and_draws_the_product_of_two_gaussians():
    y = problem()
    lifted, _ = PRIOR.state(y.bind(NOISE, y.y.new_zeros(2, *IMAGES)), y.y.new_zeros(2, *IMAGES))
    t, s = LATENT.schedule[400], LATENT.schedule[390]
    step = Step(10, randn(2, *LATENTS, seed=9), t, s, lifted, LATENT, NOISE, num_steps=40)
    method = ReSample(iterations=1500, rate=0.02)
    z = method.consistent(step)
    limit = lifted.noise_norm
    residual = (lifted.y - lifted.operator(z)).flatten(1).norm(dim=1)
    before = (lifted.y - lifted.operator(step.x0)).flatten(1).norm(dim=1)
    assert bool((before > 2 * limit).all())  # then it stops as soon as it may
    assert bool(((residual <= limit) & (residual > 0.9 * limit)).all())
    x = randn(2, *LATENTS, seed=10)
    q = 40 * step.coefficients.variance
    precision = 1 / s.sigma**2 + 1 / q
    mean = (s.alpha * z / s.sigma**2 + x / q) / precision
    found = method.guide_sample(step, x)
    torch.testing.assert_close(found, mean + precision**-0.5 * step.normal("resample"))
    for index, num_steps in ((11, 40), (30, 40)):  # not every step, and not at the start
        other = Step(index, step.x, t, s, lifted, LATENT, NOISE, num_steps=num_steps)
        assert method.guide_sample(other, x) is x
    runs = [
        Sampler(PRIOR, DDIM(), guidances, num_steps=6).run(y, NOISE, y.y.new_zeros(2, *IMAGES))
        for guidances in ([], [ReSample(1, 1.0, iterations=200, rate=0.03)])
    ]
    errors = [(y.y - y.operator(run)).flatten(1).norm(dim=1) for run in runs]
    assert bool((errors[1] < errors[0] / 5).all())


def test_what_the_shell_sees_are_images():
    y = problem()
    *_, first, last = Sampler(PRIOR, DDIM(), [DPS(0.1)], num_steps=4).iterate(
        y, NOISE, y.y.new_zeros(2, *IMAGES)
    )
    assert (tuple(first.x.shape[1:]), tuple(last.x.shape[1:])) == (LATENTS, IMAGES)
    assert first.image.shape == last.image.shape == (2, *IMAGES)
    assert (PRIOR.image_shape, PRIOR.value_range) == (IMAGES, None)
    PRIOR.rehearse(IMAGES)
    low = Autocast(PRIOR, torch.bfloat16)
    assert low.image(randn(1, *LATENTS)).shape == (1, *IMAGES)


def test_what_does_not_go_with_latents():
    y = problem()
    like = y.y.new_zeros(2, *IMAGES)
    with pytest.raises(InputError, match=r"MCG needs a linear operator"):
        Sampler(PRIOR, DDPM(), [MCG()], num_steps=4).run(y, NOISE, like)
    with pytest.raises(InputError, match=r"PSLD compares latents .* needs a LatentPrior"):
        Sampler(LATENT, DDPM(), [PSLD()])
    nonlinear = Problem.simulate(like, Gamma(2.0), 0.1, NOISE)
    with pytest.raises(InputError, match="PSLD needs a linear operator and Gamma is none"):
        Sampler(PRIOR, DDPM(), [PSLD()], num_steps=4).run(nonlinear, NOISE, like)
    for wrapper in (AsGray, Tiled):
        with pytest.raises(InputError, match=rf"LatentPrior\({wrapper.__name__}\(denoiser\)"):
            wrapper(PRIOR)
    with pytest.raises(InputError, match="latents of 3 channels and the decoder has 2"):
        LatentPrior(NetworkDenoiser(lambda z, t: z, None, image_shape=(3, 2, 2)), Matrix(M))
    with pytest.raises(InputError, match="Linear is no autoencoder"):
        LatentPrior(LATENT, nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"takes 1×4×4; set data"):
        PRIOR.check((1, 8, 8))


# Autoencoders of diffusers


def test_scale_and_shift_are_those_of_the_configuration():
    model = autoencoder("AutoencoderKL", scaling_factor=0.5, shift_factor=0.2).half()
    decoder = Autoencoder(model)
    z, x = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 8, 8)
    whole = autoencoder("AutoencoderKL")
    whole.load_state_dict(model.float().state_dict())
    torch.testing.assert_close(decoder(z), whole.eval().decode(z / 0.5 + 0.2).sample)
    torch.testing.assert_close(
        decoder.encode(x), (whole.encode(x).latent_dist.mode() - 0.2) * 0.5, rtol=1e-4, atol=1e-5
    )
    assert (decoder.factor, decoder.channels, decoder.latent_channels) == (2, 3, 4)
    assert all(p.dtype == torch.float32 for p in decoder.parameters())


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_autoencoders_stay_as_they_are(kind):
    model = autoencoder(kind)
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    Autoencoder(model).double()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_derivatives_through_a_decoder_are_right_and_need_no_graph():
    model = autoencoder("AutoencoderKL")
    plain, saving = (Autoencoder(model, checkpoint=c).double() for c in (False, True))
    z, p = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    u, found = randn(1, 3, 4, 4, seed=2), []
    for decoder in (plain, saving):
        assert_two_derivatives(decoder, z, u, p)
        at = z.clone().requires_grad_()
        (first,) = torch.autograd.grad(decoder(at), at, u, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad((first * p).sum(), at)))
    torch.testing.assert_close(*found)
    names = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: names.append(t.numel()) or t, lambda t: t
    ):
        saving(z.clone().requires_grad_())
    assert sum(names) == z.numel()  # its input alone is kept


@pytest.fixture(scope="module")
def latent_pipeline():
    diffusers = pytest.importorskip("diffusers")
    network = unet2d(
        True, 4, sample_size=4, in_channels=4, block_out_channels=(8, 8), attention_head_dim=4
    )
    scheduler = diffusers.DDIMScheduler(40, beta_end=0.2, clip_sample=False)
    vqvae = autoencoder("VQModel", scaling_factor=0.7)
    return diffusers.LDMPipeline(vqvae=vqvae, unet=network, scheduler=scheduler)


@pytest.mark.parametrize("saved", [False, True])
def test_latent_diffusion_samples_as_its_pipeline(tmp_path, latent_pipeline, monkeypatch, saved):
    if saved:
        latent_pipeline.save_pretrained(tmp_path)
    prior = load_prior(str(tmp_path) if saved else latent_pipeline)
    assert isinstance(prior, LatentPrior)
    assert prior.image_shape == (3, 8, 8)
    like = torch.zeros(2, 3, 8, 8)
    y = Problem(like.flatten(1), Dense(torch.eye(192), (3, 8, 8)), 1.0)
    ours = Sampler(prior, DDIM(0.0), num_steps="ddim10").run(y, NOISE, like)
    start = NOISE.normal("start", 0, torch.zeros(2, 4, 4, 4))
    module = type(latent_pipeline).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: start.clone())
    latent_pipeline.set_progress_bar_config(disable=True)
    images = latent_pipeline(2, num_inference_steps=10, output_type="np").images
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-4)
    assert float(theirs.std()) > 0.05
    with pytest.raises(InputError, match=r"has an autoencoder \(vqvae\).*load_prior"):
        DiffusersDenoiser(str(tmp_path) if saved else latent_pipeline)


def test_latents_end_to_end(latent_pipeline):
    prior = load_prior(latent_pipeline)
    guidances = [DPS(0.3), CMI(0.01, interval=1, estimator=Lanczos(krylov=2))]
    module = PosteriorSampler(prior, BoxMask(4, margin=1), DDPM(), guidances, num_steps=3)
    batch = {"x": torch.rand(2, 3, 8, 8) * 2 - 1, "id": ["a", "b"]}
    both = module.predict_step(batch)
    assert both["restored"].shape == both["measurement"].shape == (2, 3, 8, 8)
    assert not both["failed"]
    alone = module.predict_step({"x": batch["x"][1:], "id": ["b"]})
    torch.testing.assert_close(both["restored"][1:], alone["restored"], rtol=1e-4, atol=1e-4)
    assert Schedule.linear(40, beta_end=0.2).times == prior.schedule.times
