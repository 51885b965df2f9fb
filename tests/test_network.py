"""Networks as denoisers: kept and made again, patches of pixels, images they do not take."""

import pytest
import torch
from conftest import assert_two_derivatives, randn
from tiny import filled
from torch import nn

from cmi_lightning.data import ImageFolderData
from cmi_lightning.denoisers import (
    AsGray,
    Autocast,
    EDMDenoiser,
    NetworkDenoiser,
    UNet,
    card_unet,
    shipped_prior,
)
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Schedule
from cmi_lightning.training import ScoreTraining

SMALL = dict(model_channels=32, channel_mult=(1, 2), attention_levels=())


# Kept and made again


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": Schedule.cosine(50), "prediction": "v", "time": "log_snr"},
        {"value_range": (0.0, 1.0), "schedule": "edm", "image_shape": (3, None, 16)},
        {"value_range": None, "image_shape": (3, 8, 8)},
    ],
)
def test_pretrained_networks_come_back(tmp_path, options):
    ours = NetworkDenoiser(filled(UNet(3, learn_variance=True, **SMALL), 0.05), None, **options)
    ours.save_pretrained(tmp_path / "kept")
    back = NetworkDenoiser.from_pretrained(tmp_path / "kept")
    assert back.spec == ours.spec
    x, level = torch.randn(1, 3, 8, 16), ours.schedule[20]
    for a, b in zip(ours(x, level), back(x, level), strict=True):
        assert torch.equal(a, b)


def test_pretrained_networks_in_half_precision(tmp_path):
    ours = NetworkDenoiser(filled(UNet(3, **SMALL)), None)
    ours.save_pretrained(tmp_path / "half", torch.float16)
    ours.save_pretrained(tmp_path / "full")
    half, full = (tmp_path / n / "model.safetensors" for n in ("half", "full"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    back = NetworkDenoiser.from_pretrained(tmp_path / "half")
    for a, b in zip(ours.parameters(), back.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float(), b)


class Timeless(nn.Module):
    """A network of the user's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, width, padding="same")

    def forward(self, x, times):
        return self.layer(x)


def test_pretrained_networks_of_other_classes(tmp_path):
    network = filled(Timeless(3))
    with pytest.raises(InputError, match="Timeless has no dictionary 'config'"):
        NetworkDenoiser(network, None).save_pretrained(tmp_path)
    network.config = {"width": 3}
    NetworkDenoiser(network, None).save_pretrained(tmp_path)
    back = NetworkDenoiser.from_pretrained(tmp_path, Timeless(3))
    assert torch.equal(back.network.layer.weight, network.layer.weight)
    with pytest.raises(InputError, match="for a UNet"):  # files choose no class
        NetworkDenoiser.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="There is no folder"):
        NetworkDenoiser.from_pretrained(tmp_path / "absent")
    with pytest.raises(InputError, match="misshapen"):
        NetworkDenoiser.from_pretrained(tmp_path, Timeless(5))


def test_shipped_priors_have_names():
    assert shipped_prior("fashion-mnist").image_shape == (1, 32, 32)
    with pytest.raises(InputError, match="no shipped prior 'faces': use fashion-mnist, photos-64"):
        shipped_prior("faces")


def test_shipped_priors_are_frozen(prior):
    assert not any(p.requires_grad for p in prior.parameters())
    assert not prior.training


def test_low_precision_keeps_details_where_noise_is_small(prior, shipped_images):
    # The last levels have noise of 0.01: bfloat16 at the input would drown it.
    x = shipped_images[:8]
    level = prior.schedule[0]
    noisy = level.alpha * x + level.sigma * torch.randn(x.shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        full = prior(noisy, level).x0
        low = Autocast(prior, torch.bfloat16)(noisy, level).x0
    assert float((full - low).square().mean().sqrt()) < 0.1 * level.sigma


def test_the_prior_of_photographs_denoises_colour_of_any_size():
    prior, data = shipped_prior("photos-64"), ImageFolderData("photos-validation", limit=2)
    data.setup("predict")
    x0 = torch.stack([data.images[i]["x"] for i in range(2)])
    noise = torch.randn(x0.shape, generator=torch.manual_seed(0))
    for height, width in ((64, 64), (72, 128)):
        y, z = x0[..., :height, :width], noise[..., :height, :width]
        for time, most in ((125, 0.1), (425, 0.03), (925, 0.002)):
            level = prior.schedule[time]
            with torch.no_grad():
                found = prior(level.alpha * y + level.sigma * z, level).x0
            error = (level.alpha / level.sigma * (found - y)).square().mean()  # that of ε
            assert float(error) < most
    with pytest.raises(InputError, match="multiples of 8"):
        prior(x0[..., :60, :60], prior.schedule[500])
    with pytest.raises(InputError, match="crop or enlarge them to 56×8, or set"):
        prior.check((3, 60, 5))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_averaged_weights_become_a_prior(tmp_path, patch_size):
    # What `fit` leaves with EMAWeightAveraging: the average, and the last weights beside it.
    def network():
        options = dict(attention_levels=(), patch_size=patch_size, middle_attention=False)
        return UNet(1, 32, (1, 2), **options)

    module = ScoreTraining(network())
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.manual_seed(0))
    indices = torch.arange(0, 1000, 250)
    loss = module.loss(x0, indices, noise)
    loss.backward()
    assert float(module.network.out[2].weight.grad.abs().max()) > 0
    average = {k: torch.randn_like(v) / 10 for k, v in module.state_dict().items()}
    raw = module.state_dict()
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": average, "current_model_state": raw, "averaging_state": {}}, path)
    shape = (1, None, None)
    prior = NetworkDenoiser(network(), str(path), image_shape=shape, weights_part="state_dict")
    prior.save_pretrained(tmp_path / "prior", torch.float16)
    back = NetworkDenoiser.from_pretrained(tmp_path / "prior")
    assert back.spec == prior.spec
    for name, value in back.network.state_dict().items():
        assert torch.equal(value, average[f"network.{name}"].half().float())


# Patches of pixels


PATCHED = dict(SMALL, patch_size=2, middle_attention=False)
TIMES = torch.full((1,), 300.0, dtype=torch.float64)


@pytest.mark.parametrize("learn_variance", [False, True])
def test_patches_are_channels_of_a_plain_network(learn_variance):
    # pixel-unshuffle by hand: channel c at (i, j) of a patch is channel 4c + 2i + j
    patched = filled(UNet(3, learn_variance=learn_variance, **PATCHED)).double()
    plain = UNet(12, learn_variance=learn_variance, **{**PATCHED, "patch_size": 1}).double()
    plain.load_state_dict(patched.state_dict())
    x = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    patches = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2)
    out = plain(patches.flatten(1, 2), TIMES).unflatten(1, (-1, 2, 2))
    expected = torch.empty(1, 6 if learn_variance else 3, 8, 12, dtype=torch.float64)
    for i in (0, 1):
        for j in (0, 1):
            expected[..., i::2, j::2] = out[:, :, i, j]
    torch.testing.assert_close(patched(x, TIMES), expected)


def test_learned_variance_of_patches_is_split_off():
    network = filled(UNet(3, learn_variance=True, **PATCHED))
    denoiser = NetworkDenoiser(network, None)
    level, x = denoiser.schedule[300], torch.randn(2, 3, 8, 8)
    epsilon, v = network(x, torch.full((2,), 300.0)).split(3, dim=1)
    prediction = denoiser(x, level)
    torch.testing.assert_close(prediction.x0, (x - level.sigma * epsilon) / level.alpha)
    torch.testing.assert_close(prediction.variance_fraction, (v + 1) / 2)


@pytest.mark.parametrize(("patch", "levels"), [(1, 2), (2, 2), (2, 3), (4, 2)])
def test_sizes_of_patches(patch, levels):
    network = filled(UNet(3, **dict(PATCHED, patch_size=patch, channel_mult=(1,) * levels)))
    multiple = network.size_multiple
    assert multiple == patch * 2 ** (levels - 1)
    assert not any("qkv" in name for name in network.state_dict())
    for height, width in ((multiple, 2 * multiple), (3 * multiple, 5 * multiple)):  # any size
        assert network(torch.zeros(1, 3, height, width), TIMES).shape == (1, 3, height, width)
    with pytest.raises(InputError, match=f"multiples of {multiple}; got"):
        network(torch.zeros(1, 3, multiple + 1, multiple), TIMES)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_derivatives_through_patches(checkpoint):
    network = filled(UNet(1, checkpoint=checkpoint, **PATCHED), 0.2).double()
    x, u, p = randn(3, 1, 1, 4, 8, seed=1)
    assert_two_derivatives(lambda z: network(z, TIMES), x, u, p)


# Images and networks that do not go together are found out before anything runs


class Halving(nn.Module):
    """Takes multiples of 4 alone, without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Upsample(scale_factor=2)
        self.deep, self.out = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x, times):
        a = self.down(x)
        return self.up(self.out(torch.cat([self.up(self.deep(a)), a], dim=1)))


class Positions(nn.Module):
    """Has one size, by a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 8, 8))

    def forward(self, x, times):
        return x + self.table


class AssertsClass(Halving):
    """guided-diffusion's way."""

    num_classes = 10

    def forward(self, x, times, y=None):
        assert (y is not None) == (self.num_classes is not None), "must specify y"
        return super().forward(x, times)


@pytest.mark.parametrize(
    ("network", "size", "words"),
    [
        (
            Halving(),
            50,
            r"Halving does not take images of 3×50×50 \(RuntimeError: Sizes.*data.size",
        ),
        (Positions(), 16, r"Positions does not take images of 3×16×16 .*set data.size"),
        (lambda x, t: x.reshape(-1, 3, 100), 16, r"<lambda> does not take .*shape .*is invalid"),
        (lambda x, t: x[..., 1:], 16, "image_shape and the network's channels must agree"),
    ],
)
def test_sizes_are_tried_before_anything_runs(network, size, words):
    denoiser = NetworkDenoiser(network, None, image_shape=(3, None, None))
    for wrapper in (denoiser, Autocast(denoiser, torch.bfloat16)):
        with pytest.raises(InputError, match=words):
            wrapper.rehearse((3, size, size))


@pytest.mark.parametrize("network", [Halving(), lambda x, t: x, UNet(3, **SMALL)])
def test_sizes_that_do(network):
    denoiser = NetworkDenoiser(network, None, image_shape=(3, None, None))
    denoiser.rehearse((3, 16, 24))
    AsGray(denoiser).rehearse((1, 16, 24))


def test_large_networks_are_tried_without_arithmetic():
    with torch.device("meta"):  # whose weights have no numbers to compute with
        denoiser = NetworkDenoiser(card_unet("ffhq-256"), None, image_shape=(3, None, None))
    denoiser.rehearse((3, 256, 256))


def class_needed(x, t, y): ...
def class_by_name(x, t, *, labels): ...


class Embedded(nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True): ...


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (class_needed, "needs y besides x_t and its time"),
        (class_by_name, "needs labels besides x_t and its time"),
        (Embedded(), "needs encoder_hidden_states besides x_t and its time"),
        (AssertsClass(), r"num_classes=10, so that it must be told y: give it by condition, \{y"),
        (UNet(3, num_classes=7, **SMALL), "num_classes=7, so that it must be told y"),
    ],
)
@pytest.mark.parametrize("kind", [NetworkDenoiser, EDMDenoiser])
def test_networks_that_need_a_class(network, name, kind):
    with pytest.raises(InputError, match=name):
        kind(network, None)


def test_networks_with_further_options():
    NetworkDenoiser(lambda x, t, y=None, *rest, **more: x, None)


def test_latents_are_no_pixels():
    denoiser = NetworkDenoiser(lambda x, t: x, None, image_shape=(4, 64, 64))
    with pytest.raises(InputError, match="4 channels are usually latents"):
        denoiser.rehearse((3, 64, 64))
