"""Networks: layout, derivatives, precision, and the loading of weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmi_lightning.denoisers import Autocast, UNet, load_weights
from cmi_lightning.errors import InputError
from cmi_lightning.exact import GaussianMixture

SMALL = dict(in_channels=2, model_channels=32, channel_mult=(1, 2), attention_levels=(1,))


def randomised(**options) -> UNet:
    torch.manual_seed(0)
    network = UNet(**{**SMALL, **options})
    for p in network.parameters():  # the zero-initialised layers would hide most of the network
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    return network.double()


def second_order(network: UNet, x, u, p):
    """∇⟨u, J p⟩ by differentiating twice."""
    x = x.clone().requires_grad_()
    times = torch.full((len(x),), 300.0, dtype=x.dtype)
    (g,) = torch.autograd.grad(network(x, times), x, u, create_graph=True)
    return torch.autograd.grad((g * p).sum(), x)[0]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_derivatives_match_finite_differences(checkpoint, scale_shift, frozen):
    network = randomised(checkpoint=checkpoint, scale_shift=scale_shift).requires_grad_(not frozen)
    g = torch.Generator().manual_seed(1)
    x, u, p = (torch.randn(1, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    times = torch.full((1,), 300.0, dtype=torch.float64)
    h = 1e-5

    def vjp(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(network(z, times), z, u)[0]

    with torch.no_grad():
        difference = (network(x + h * p, times) - network(x - h * p, times)) / (2 * h)
    first = float((vjp(x) * p).sum())
    assert first == pytest.approx(float((difference * u).sum()), rel=1e-6)
    second = (vjp(x + h * p) - vjp(x - h * p)) / (2 * h)
    torch.testing.assert_close(second_order(network, x, u, p), second, rtol=1e-4, atol=1e-7)
    assert float(second.abs().max()) > 1e-4


def test_checkpointing_changes_nothing():
    plain, saving = randomised(), randomised(checkpoint=True)
    x, u, p = torch.randn(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    assert torch.equal(second_order(plain, x, u, p), second_order(saving, x, u, p))


def test_fused_attention_agrees_with_plain():
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    times = torch.tensor([3.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(randomised()(x, times), randomised(fused_attention=True)(x, times))


def test_attention_mixes_heads_as_the_published_layout():
    from cmi_lightning.denoisers.blocks import AttentionBlock

    torch.manual_seed(0)
    block = AttentionBlock(64, 2)
    nn.init.normal_(block.proj_out.weight, std=0.1)
    x = torch.randn(1, 64, 3, 3)
    flat = x.reshape(1, 64, 9)
    qkv = block.qkv(block.norm(flat)).reshape(2, 96, 9)  # heads first, then q, k, v within a head
    q, k, v = qkv.split(32, dim=1)
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / 32**0.5, dim=-1)
    h = torch.einsum("bts,bcs->bct", weights, v).reshape(1, 64, 9)
    expected = (flat + block.proj_out(h)).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_sides_must_suit_the_network():
    with pytest.raises(ValueError, match="multiples of 2"):
        randomised()(torch.zeros(1, 2, 5, 4).double(), torch.zeros(1).double())


def test_shipped_prior_survives_low_precision_where_noise_is_small(prior, shipped_images):
    # The last levels have noise of 0.01: bfloat16 at the input would drown it.
    x = shipped_images[:8]
    level = prior.schedule[0]
    noisy = level.alpha * x + level.sigma * torch.randn(x.shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        full = prior(noisy, level).x0
        low = Autocast(prior, torch.bfloat16)(noisy, level).x0
    assert float((full - low).square().mean().sqrt()) < 0.1 * level.sigma


def test_parameters_are_frozen(prior):
    assert not any(p.requires_grad for p in prior.parameters())
    assert not prior.training


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_load_strictly(tmp_path, suffix):
    network = UNet(**SMALL)
    path = tmp_path / f"net{suffix}"

    def save(state):
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    state = {k: torch.randn_like(v) for k, v in network.state_dict().items()}
    save(state)
    load_weights(network, path)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())

    save({k: v for k, v in state.items() if not k.startswith("out.")})
    with pytest.raises(InputError, match=r"4 missing \(out.0.weight"):
        load_weights(network, path)
    save({**state, "surplus": torch.zeros(1)})
    with pytest.raises(InputError, match=r"1 unexpected \(surplus\)"):
        load_weights(network, path)
    save({**state, "out.2.bias": torch.zeros(7)})
    with pytest.raises(InputError, match=r"1 misshapen \(out.2.bias \(7,\) instead of \(2,\)\)"):
        load_weights(network, path)


def test_weights_that_are_no_weights(tmp_path):
    network = UNet(**SMALL)
    with pytest.raises(InputError, match="No weights at"):
        load_weights(network, tmp_path / "absent.pt")
    path = tmp_path / "garbage.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="Cannot read the weights"):
        load_weights(network, path)
    torch.save(network, tmp_path / "pickled.pt")  # a whole module is code, not plain tensors
    with pytest.raises(InputError, match="weights_only"):
        load_weights(network, tmp_path / "pickled.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a state dict"):
        load_weights(network, tmp_path / "other.pt")


def test_mixture_denoises_as_bayes_would():
    prior = GaussianMixture(torch.tensor([[[[-1.0]]], [[[2.0]]]]).double(), 0.2)
    level = prior.schedule[200]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    grid = torch.linspace(-6, 7, 200_001, dtype=torch.float64)
    density = sum(torch.exp(-((grid - m) ** 2) / 0.4) for m in (-1, 2))
    for value, x0, log_p in zip(
        x.flatten(), prior(x, level).x0.flatten(), prior.log_prob(x, level), strict=True
    ):
        likelihood = torch.exp(-((value - level.alpha * grid) ** 2) / (2 * level.sigma**2))
        weight = density * likelihood
        assert float(x0) == pytest.approx(float((weight * grid).sum() / weight.sum()), rel=1e-6)
        constant = (0.2 * level.sigma**2) ** 0.5 * 2 * torch.pi * 2
        mass = weight.sum() * (grid[1] - grid[0]) / constant
        assert float(log_p) == pytest.approx(float(mass.log()), rel=1e-6)
