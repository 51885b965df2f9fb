"""guided-diffusion's U-Net: layout, layers, derivatives, precision, memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import published_layouts
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_two_derivatives, graph_bytes, randn
from torch import Tensor, nn

from cmi_lightning.denoisers import Autocast, NetworkDenoiser, UNet, card_unet
from cmi_lightning.denoisers.blocks import (
    AttentionBlock,
    GroupNorm32,
    ResBlock,
    timestep_embedding,
)
from cmi_lightning.denoisers.recompute import Recomputed, run_leanly, run_plainly
from cmi_lightning.errors import InputError, warn_once
from cmi_lightning.guidance import CMI, DPS
from cmi_lightning.information import Lanczos
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM
from cmi_lightning.step import Step

LAYOUTS = {"ffhq": published_layouts.FFHQ, "imagenet": published_layouts.IMAGENET}
SMALL = dict(in_channels=2, model_channels=32, channel_mult=(1, 2), attention_levels=(1,))


def frozen(**options) -> UNet:
    """A small network in float64 as denoisers hold it, with every layer contributing."""
    torch.manual_seed(0)
    network = UNet(**{**SMALL, **options})
    for p in network.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
        else:
            nn.init.normal_(p, mean=0.5, std=0.2)
    return network.double().requires_grad_(False).eval()


# Layout


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("ffhq", 362, 93_563_910), ("imagenet", 566, 552_814_086)],
)
def test_presets_have_the_published_tensors(name, tensors, parameters):
    published = published_layouts.shapes(LAYOUTS[name])
    assert len(published) == tensors
    assert sum(math.prod(shape) for shape in published.values()) == parameters
    with torch.device("meta"):
        network = card_unet(f"{name}-256")
    assert {n: tuple(v.shape) for n, v in network.state_dict().items()} == published
    assert network.learn_variance
    assert network.size_multiple == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_channels": 48}, "model_channels must be a multiple of 32, got 48"),
        ({"channel_mult": ()}, "UNet.channel_mult must not be empty"),
        ({"channel_mult": (1, 0)}, "channel_mult must be a list of whole numbers, at least 1, got"),
        ({"patch_size": 0}, "patch_size must be a whole number, at least 1, got 0"),
        ({"num_head_channels": 0}, "num_head_channels must be a whole number, at least 1, got 0"),
        ({"num_heads": 5}, "5 heads do not divide 64 channels; set num_heads"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        UNet(**{**SMALL, **options})


def test_heads_have_64_channels():
    with torch.device("meta"):
        blocks = [m for m in card_unet("imagenet-256").modules() if isinstance(m, AttentionBlock)]
    assert {(b.qkv.in_channels, b.num_heads) for b in blocks} == {(512, 8), (1024, 16)}


# Layers, against re-derivations from elementary operations


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(2, keepdim=True)
    normal = centred / torch.sqrt((centred**2).mean(2, keepdim=True) + 1e-5)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return normal.reshape(x.shape) * weight.reshape(shape) + bias.reshape(shape)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """A 3x3 convolution with zero borders as a sum over its nine shifts, or a 1x1 one."""
    size = layer.weight.shape[-1]
    height, width = x.shape[2:]
    padded = x.new_zeros(*x.shape[:2], height + size - 1, width + size - 1)
    edge = size // 2
    padded[..., edge : edge + height, edge : edge + width] = x
    out = layer.bias[:, None, None]
    for i in range(size):
        for j in range(size):
            part = padded[..., i : i + height, j : j + width]
            out = out + torch.einsum("oc,bchw->bohw", layer.weight[:, :, i, j], part)
    return out


def test_timestep_embedding_has_cosines_first():
    times, dim = [0.0, 1.0, 37.0, 999.0], 128
    expected = [
        [f(t * 10_000 ** (-k / 64)) for f in (math.cos, math.sin) for k in range(64)] for t in times
    ]
    found = timestep_embedding(torch.tensor(times), dim)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)  # float32 of 999
    assert timestep_embedding(torch.tensor(times), 33).shape == (4, 33)


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("width", [32, 64])
def test_residual_block(resample, scale_shift, width):
    torch.manual_seed(0)
    block = ResBlock(32, 16, width, resample=resample, scale_shift=scale_shift)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    block = block.double()
    x, e = randn(2, 32, 6, 4), randn(2, 16, seed=2)

    def resized(x: Tensor) -> Tensor:
        if resample == "up":
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) if resample == "down" else x

    norm, _, first = block.in_layers
    h = convolution(first, resized(silu(group_norm(x, norm.weight, norm.bias))))
    linear = block.emb_layers[1]
    projected = (silu(e) @ linear.weight.T + linear.bias)[..., None, None]
    norm, last = block.out_layers[0], block.out_layers[3]
    if scale_shift:
        scale, shift = projected[:, :width], projected[:, width:]
        h = group_norm(h, norm.weight, norm.bias) * (1 + scale) + shift
    else:
        h = group_norm(h + projected, norm.weight, norm.bias)
    h = convolution(last, silu(h))
    around = resized(x)
    if width != 32:
        around = convolution(block.skip_connection, around)
    for run in (run_plainly, run_leanly):
        torch.testing.assert_close(block(e, x, run=run), around + h)


def test_attention_splits_heads_before_q_k_v():
    torch.manual_seed(0)
    block = AttentionBlock(64, 2).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = randn(2, 64, 2, 3)
    flat = x.reshape(2, 64, 6)
    normed = group_norm(flat, block.norm.weight, block.norm.bias)
    qkv = block.qkv.weight[..., 0] @ normed + block.qkv.bias[:, None]
    out = torch.zeros_like(flat)
    for b in range(2):
        for head in range(2):
            q, k, v = qkv[b, 96 * head : 96 * (head + 1)].reshape(3, 32, 6)
            for i in range(6):
                weight = torch.exp(torch.stack([q[:, i] @ k[:, j] for j in range(6)]) / 32**0.5)
                out[b, 32 * head : 32 * (head + 1), i] = v @ (weight / weight.sum())
    out = flat + block.proj_out.weight[..., 0] @ out + block.proj_out.bias[:, None]
    for run in (run_plainly, run_leanly):
        torch.testing.assert_close(block(x, run=run), out.reshape(x.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_takes_statistics_in_float32(dtype, monkeypatch):
    seen, norm = [], nn.functional.group_norm
    monkeypatch.setattr(
        nn.functional, "group_norm", lambda x, *args: seen.append(x.dtype) or norm(x, *args)
    )
    layer = GroupNorm32(32).to(dtype)
    x = (100 + randn(2, 32, 16, 16)).to(dtype)  # sums of these in 16 bits would be off by a digit
    expected = group_norm(x.double(), torch.ones(32).double(), torch.zeros(32).double())
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.01, atol=0.01)
    # PyTorch's CPU kernel for bfloat16 does so by itself
    assert set(seen) == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}


def test_softmax_is_taken_in_float32(monkeypatch):
    seen, softmax = [], torch.softmax

    def spy(*args, **kwargs):
        seen.append((out := softmax(*args, **kwargs)).dtype)
        return out

    monkeypatch.setattr(torch, "softmax", spy)
    block = AttentionBlock(32, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(torch.randn(1, 32, 2, 2))
    block.bfloat16()(torch.randn(1, 32, 2, 2).bfloat16())
    assert seen == [torch.float32, torch.float32]


# Learned variance


@pytest.mark.parametrize("t", [1, 37, 500, 999])
def test_learned_variance_drives_ddpm(t):
    torch.manual_seed(0)
    network = UNet(**SMALL, learn_variance=True)
    nn.init.normal_(network.out[2].weight, std=0.05)
    denoiser = NetworkDenoiser(network, None)
    noise = SampleNoise(0, ["a"])
    x = noise.normal("x", 0, torch.zeros(1, 2, 4, 4))
    sampler = Sampler(denoiser, DDPM("learned"))
    level, lower = denoiser.schedule[t], denoiser.schedule[t - 1]
    step = Step(t, x, level, lower, Problem(x, Identity(), 0.1), denoiser, noise, False)
    transition = sampler.solver.transition(step, sampler.guided_x0)

    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    small = betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
    with torch.no_grad():
        v = network(x, torch.tensor([float(t)]))[:, 2:].double().numpy()
    assert np.ptp(v) > 0.01
    f = (v + 1) / 2
    variance = np.exp(f * np.log(betas[t]) + (1 - f) * np.log(small))
    np.testing.assert_allclose(transition.std.numpy(), np.sqrt(variance), rtol=1e-5)


# Derivatives

TIMES = torch.full((1,), 300.0, dtype=torch.float64)


def product(network, x, u):
    """Jᵀ u."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(network(x, TIMES), x, u)[0]


def mixed(network, x, u, p):
    """∇⟨u, J p⟩ by differentiating twice."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(network(x, TIMES), x, u, create_graph=True)
    return torch.autograd.grad((g * p).sum(), x)[0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale_shift": False}, {"learn_variance": True}])
def test_derivatives_match_finite_differences(checkpoint, options, trained):
    network = frozen(checkpoint=checkpoint, **options).requires_grad_(trained)
    channels = 4 if "learn_variance" in options else 2
    x, p, u = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=2), randn(1, channels, 4, 4, seed=3)
    assert_two_derivatives(lambda z: network(z, TIMES), x, u, p)


def test_third_derivatives_survive_checkpointing():
    results = []
    for checkpoint in (False, True):
        network = frozen(checkpoint=checkpoint)
        x = randn(1, 2, 4, 4).requires_grad_()
        value = (network(x, TIMES) ** 2).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = (g * g.detach().cos()).sum()
        results.append(g.detach())
    assert float(results[0].abs().max()) > 1e-3
    torch.testing.assert_close(*results)


def test_checkpointing_in_training_changes_no_bit_of_a_second_derivative():
    plain, saving = (frozen(checkpoint=c).requires_grad_().train() for c in (False, True))
    x, u, p = randn(3, 1, 2, 4, 4)
    assert torch.equal(mixed(plain, x, u, p), mixed(saving, x, u, p))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_graph_gives_many_products(checkpoint):
    # What Krylov spaces and CMI ask for.
    network = frozen(checkpoint=checkpoint)
    x = randn(1, 2, 4, 4).requires_grad_()
    out = network(x, TIMES)
    u, p = randn(1, 2, 4, 4, seed=2), randn(1, 2, 4, 4, seed=3)

    def vjp(u, **kwargs):
        return torch.autograd.grad(out, x, u, retain_graph=True, **kwargs)[0]

    first = vjp(u)
    g = vjp(u, create_graph=True)
    (second,) = torch.autograd.grad((g * p).sum(), x, retain_graph=True)
    torch.testing.assert_close(vjp(p), product(network, x, p))
    torch.testing.assert_close(vjp(u), first)
    torch.testing.assert_close(second, mixed(network, x, u, p))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_trains_as_without(dropout):
    results = []
    for checkpoint in (False, True):
        network = frozen(checkpoint=checkpoint, dropout=dropout).requires_grad_().train()
        torch.manual_seed(0)
        network(randn(1, 2, 4, 4), TIMES).square().sum().backward()
        results.append({name: p.grad for name, p in network.named_parameters()})
    assert all(float(g.abs().max()) > 0 for g in results[0].values())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_the_weights_match_finite_differences(checkpoint):
    network = frozen(checkpoint=checkpoint).requires_grad_().train()
    x, h = randn(1, 2, 4, 4), 1e-6
    network(x, TIMES).square().sum().backward()
    weights = {p: (p.detach().clone(), randn(*p.shape, seed=i))
               for i, p in enumerate(network.parameters())}  # fmt: skip
    slope = sum(float((p.grad * along).sum()) for p, (_, along) in weights.items())
    losses = []
    with torch.no_grad():
        for step in (h, -h):
            for p, (at, along) in weights.items():
                p.copy_(at + step * along)
            losses.append(float(network(x, TIMES).square().sum()))
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_fused_attention_has_the_first_derivative(checkpoint):
    plain, fused = frozen(), frozen(fused_attention=True, checkpoint=checkpoint)
    x, u = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=2)
    torch.testing.assert_close(fused(x, TIMES), plain(x, TIMES))
    torch.testing.assert_close(product(fused, x, u), product(plain, x, u))
    assert (plain.derivatives, fused.derivatives) == (2, 1)


class Fused(nn.Module):
    """Attention by PyTorch's fused kernel, without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(2, 24), nn.Linear(8, 2)

    def forward(self, x, times):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.inside(tokens)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.outside(mixed).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("declared", [True, False])
def test_cmi_takes_differences_where_there_is_no_second_derivative(caplog, declared):
    warn_once.cache_clear()
    x, noise = randn(2, 2, 4, 4), SampleNoise(0, ["a", "b"])
    results, costs = [], []
    for derivative in ("autograd", "difference"):
        torch.manual_seed(0)
        network = frozen(fused_attention=True) if declared else Fused().double()
        denoiser = NetworkDenoiser(network, None)
        assert denoiser.derivatives == (1 if declared else 2)  # found out when it is tried
        cmi = CMI(interval=1, estimator=Lanczos(derivative=derivative, krylov=2))
        sampler = Sampler(denoiser, DDPM(), [DPS(), cmi], num_steps=4)
        *_, last = sampler.iterate(Problem(x, Identity(), 0.1), noise, x)
        results.append(last.x)
        costs.append((last.forwards, last.vjps, last.second_order))
    assert torch.equal(*results)
    assert costs[0] == costs[1]
    assert costs[0][1] > 4  # CMI has acted
    assert sum("no second derivative" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_bfloat16_derivatives_are_near_those_of_float32(checkpoint):
    network = frozen(checkpoint=checkpoint).float()
    full = NetworkDenoiser(network, None)
    low = Autocast(full, torch.bfloat16)
    level = full.schedule[300]
    x, u, p = (randn(1, 2, 8, 8, seed=s).float() for s in (1, 2, 3))

    def derivatives(denoiser):
        z = x.clone().requires_grad_()
        x0 = denoiser(z, level).x0
        (g,) = torch.autograd.grad(x0, z, u, create_graph=True)
        return x0.detach(), g.detach(), torch.autograd.grad((g * p).sum(), z)[0]

    for a, b in zip(derivatives(full), derivatives(low), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float((a - b).norm() / a.norm()) < 0.05


def test_checkpointing_computes_in_autocasts_precision():
    results = []
    for checkpoint in (False, True):
        network = frozen(checkpoint=checkpoint).float()
        x = randn(1, 2, 8, 8).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(x, TIMES)
        assert out.dtype == torch.bfloat16
        results.append((out, torch.autograd.grad(out, x, torch.ones_like(out))[0]))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_output_and_gradient_have_their_own_dtypes(dtype, checkpoint):
    network = frozen(checkpoint=checkpoint).to(dtype)
    x = randn(1, 2, 4, 4).float().requires_grad_()
    out = network(x, TIMES)
    assert out.dtype == dtype
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float32


# Memory


def kept(network: UNet, second_order: bool = False) -> int:
    """Bytes that the graph of x̂₀, or of Jᵀ u, keeps, without the parameters."""
    x = randn(1, 2, 32, 32).requires_grad_()

    def run() -> None:
        out = network(x, TIMES)
        if second_order:
            torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)

    return graph_bytes(network, run)


def test_checkpointing_keeps_less():
    plain, saving = frozen(), frozen(checkpoint=True)
    for second_order in (False, True):
        assert kept(saving, second_order) < 0.4 * kept(plain, second_order)
    training = [network.requires_grad_().train() for network in (plain, saving)]
    assert kept(training[1]) < 0.4 * kept(training[0])


@pytest.mark.slow
def test_memory_of_the_ffhq_network():
    script = Path(__file__).parent.parent / "benchmarks" / "memory.py"

    def memory(method: str, checkpoint: bool) -> float:
        case = {"method": method, "checkpoint": checkpoint, "batch": 1, "size": 256}
        command = [sys.executable, str(script), "--case", json.dumps({**case, "device": "cpu"})]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])["memory"]

    plain = memory("DPS", False)
    assert memory("DPS", True) < plain / 2
    assert memory("CMI+DPS, difference", True) < plain


def test_recomputed_has_derivatives_of_every_order():
    a, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.5, -0.7))
    value = Recomputed.apply(lambda x, y: x**2 * y, a, b)
    expected = [2 * a * b, 2 * b, torch.zeros_like(a), torch.zeros_like(a)]
    for order in expected:
        (value,) = torch.autograd.grad(value.sum(), a, create_graph=True)
        torch.testing.assert_close(value, order)
