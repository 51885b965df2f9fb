"""Every source of a prior with DPS, ΠGDM and CMI, on tiny networks; flow sampling as diffusers'."""

import pytest
import torch
from tiny import autoencoder, filled, unet2d
from torch import nn

from cmi_lightning import Problem, Sampler
from cmi_lightning.denoisers import (
    Denoiser,
    DiffusersDenoiser,
    EDMDenoiser,
    LatentPrior,
    NetworkDenoiser,
    UNet,
)
from cmi_lightning.errors import InputError
from cmi_lightning.guidance import CMI, DPS, PiGDM
from cmi_lightning.information import Lanczos
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers import DDIM, DDPM

TEXT = {
    "encoder_hidden_states": torch.randn(3, 16, generator=torch.manual_seed(1)),
    "pooled_projections": torch.randn(8, generator=torch.manual_seed(2)),
}


def unet(**options) -> nn.Module:
    return filled(UNet(3, 32, (1,), attention_levels=(), middle_attention=False, **options))


def of_diffusers(kind: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"block_out_channels": (8, 8), "attention_head_dim": 4}
    if kind == "UNet2DModel":
        return filled(unet2d(num_class_embeds=5, **blocks))
    heads = {"num_attention_heads": 2, "num_layers": 1}
    text = {"joint_attention_dim": 16, "pooled_projection_dim": 8, **heads}
    options = {
        "UNet2DConditionModel": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            **blocks,
        },
        "DiTTransformer2DModel": {
            "in_channels": 3,
            "out_channels": 6,
            "attention_head_dim": 4,
            "num_embeds_ada_norm": 10,
            **heads,
        },
        "SD3Transformer2DModel": {
            "in_channels": 3,
            "out_channels": 3,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 8,
            **text,
        },
        "FluxTransformer2DModel": {
            "in_channels": 12,
            "attention_head_dim": 16,
            "num_single_layers": 1,
            "axes_dims_rope": (4, 6, 6),
            **text,
        },
    }[kind]
    if kind != "FluxTransformer2DModel":
        options["sample_size"] = 8
    return filled(getattr(diffusers, kind)(**options))


def diffusers_prior(kind: str) -> Denoiser:
    diffusers = pytest.importorskip("diffusers")
    flow = kind in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    if flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        condition = TEXT
    else:
        variance = "learned_range" if kind == "DiTTransformer2DModel" else "fixed_small"
        scheduler = diffusers.DDPMScheduler(variance_type=variance)
        condition = {"class_labels": 3}
        if kind == "UNet2DConditionModel":
            condition = {"encoder_hidden_states": TEXT["encoder_hidden_states"]}
    nothing = {
        k: torch.zeros_like(v) if not isinstance(v, int) else 1 for k, v in condition.items()
    }
    return DiffusersDenoiser(
        of_diffusers(kind),
        scheduler=scheduler,
        condition=condition,
        unconditional=nothing,
        guidance_scale=1.5,
    )


def latent() -> Denoiser:
    network = UNet(4, 32, (1,), attention_levels=(), middle_attention=False)
    inner = NetworkDenoiser(filled(network), None, image_shape=(4, 4, 4))
    return LatentPrior(inner, autoencoder("AutoencoderKL"))


SOURCES = {
    "ours": lambda: NetworkDenoiser(unet(), None),
    "by class": lambda: NetworkDenoiser(
        unet(num_classes=4),
        None,
        condition={"y": 1},
        unconditional={"y": 3},
        guidance_scale=2.0,
    ),
    "flow": lambda: NetworkDenoiser(unet(), None, "rectified", "velocity"),
    "edm": lambda: EDMDenoiser(unet(), None, preconditioned=False),
    "latent": latent,
    "UNet2DModel": diffusers_prior,
    "UNet2DConditionModel": diffusers_prior,
    "DiTTransformer2DModel": diffusers_prior,
    "SD3Transformer2DModel": diffusers_prior,
    "FluxTransformer2DModel": diffusers_prior,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_with_every_kind_of_guidance(source):
    make = SOURCES[source]
    prior = make(source) if make is diffusers_prior else make()
    x = torch.rand(2, 3, 8, 8, generator=torch.manual_seed(3)) * 2 - 1
    prior.rehearse((3, 8, 8))
    for guidances in (
        [DPS(0.1)],
        [PiGDM()],
        [DPS(0.1), CMI(0.01, interval=1, estimator=Lanczos(krylov=2))],
    ):
        found = []
        batches = [(slice(0, 2), ["a", "b"]), (slice(1, 2), ["b"])]
        for rows, ids in batches if len(guidances) > 1 else batches[:1]:
            noise = SampleNoise(0, ids)
            problem = Problem.simulate(x[rows], BoxMask(4, margin=1), 0.1, noise)
            sampler = Sampler(prior, DDPM(), guidances, num_steps=3)
            *_, last = sampler.iterate(problem, noise, x[rows])
            assert bool((last.stopped == 0).all())
            assert last.x.shape == x[rows].shape
            found.append(last.x[-1])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)  # whatever the batch
    assert prior.derivatives == 2  # by autograd, which attention allows


@pytest.mark.parametrize("kind", ["UNet2DModel", "SD3Transformer2DModel"])
def test_the_network_of_a_caller_stays_as_it_is(kind):
    network = of_diffusers(kind).train()
    before = {name: (p.data_ptr(), p.dtype) for name, p in network.named_parameters()}
    processors = [type(m.processor) for m in network.modules() if hasattr(m, "processor")]
    if kind == "UNet2DModel":
        options = {"schedule": "linear", "condition": {"class_labels": 1}}
    else:
        options = {"schedule": "rectified", "prediction": "velocity", "condition": TEXT}
    DiffusersDenoiser(network, **options).double()
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert {n: (p.data_ptr(), p.dtype) for n, p in network.named_parameters()} == before
    assert [type(m.processor) for m in network.modules() if hasattr(m, "processor")] == processors
    shared = DiffusersDenoiser(network, **options).network
    assert {n: (p.data_ptr(), p.dtype) for n, p in shared.named_parameters()} == before


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_flow_sampling_is_that_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = of_diffusers(kind).eval()
    denoiser = DiffusersDenoiser(network, scheduler=scheduler, condition=TEXT)
    assert denoiser.prediction == "velocity"
    assert denoiser.schedule == Schedule.rectified(999, 3.0)
    like, noise = torch.zeros(2, 3, 8, 8), SampleNoise(0, ["a", "b"])
    sampler = Sampler(denoiser, DDIM(0.0), num_steps=8, clamp=False)
    problem = Problem.simulate(like, BoxMask(4, margin=1), 1.0, noise)
    ours = sampler.run(problem, noise, like)
    # The scheduler shifts what it is given.
    sigmas = [s / (3 - 2 * s) for s in reversed(sampler.schedule.sigmas)]
    scheduler.set_timesteps(sigmas=sigmas)
    x = sampler.solver.start(sampler.schedule[7], problem, noise, like)
    told = {k: v.expand(2, *v.shape) for k, v in TEXT.items()}
    with torch.no_grad():
        for t in scheduler.timesteps:
            if kind.startswith("SD3"):
                velocity = network(x, timestep=t.expand(2), **told, return_dict=False)[0]
            else:
                velocity = flux(network, x, t.expand(2) / 1000, told)
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert float(x.std()) > 0.1


def flux(network, x, times, told):
    """Flux's tokens by indices alone: token (i, j) holds channels of pixels (2i + a, 2j + b)."""
    channels, height, width = x.shape[1:]
    tokens, places = [], []
    for i in range(height // 2):
        for j in range(width // 2):
            tokens.append(x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1))
            places.append([0.0, i, j])
    out = network(
        torch.stack(tokens, 1),
        timestep=times,
        img_ids=torch.tensor(places),
        txt_ids=torch.zeros(3, 3),
        **told,
        return_dict=False,
    )[0]
    image = torch.empty_like(x)
    for k, (_, i, j) in enumerate(places):
        i, j = int(i), int(j)
        part = out[:, k].unflatten(1, (channels, 2, 2))
        image[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = part
    return image


def test_dynamic_shift_is_that_of_the_number_of_tokens():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    network = of_diffusers("FluxTransformer2DModel")
    denoiser = DiffusersDenoiser(network, scheduler=scheduler, size=(64, 64), condition=TEXT)
    mu = 0.5 + (1.15 - 0.5) * (32 * 32 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[0.5], mu=mu)
    theirs = float(scheduler.sigmas[0])
    level = denoiser.schedule[499]  # t = 1/2 before the shift
    assert level.sigma == pytest.approx(theirs, rel=1e-5)


def test_transformers_are_told_their_text():
    network = of_diffusers("SD3Transformer2DModel")
    with pytest.raises(InputError, match="joint_attention_dim=16, so that it must be told enc"):
        DiffusersDenoiser(network, "rectified", "velocity")
    some = {"encoder_hidden_states": TEXT["encoder_hidden_states"]}
    with pytest.raises(InputError, match="must be told pooled_projections"):
        DiffusersDenoiser(network, "rectified", "velocity", condition=some)
    with pytest.raises(InputError, match="num_class_embeds=5, so that it must be told class_lab"):
        DiffusersDenoiser(of_diffusers("UNet2DModel"), "linear")
    with pytest.raises(InputError, match="UNet2DConditionModel needs encoder_hidden_states"):
        DiffusersDenoiser(of_diffusers("UNet2DConditionModel"), "linear")
