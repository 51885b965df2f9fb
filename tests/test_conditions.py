"""Networks that are told more than x_t and its time, and ten ways to use a prior wrongly."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmi_lightning.denoisers import EDMDenoiser, NetworkDenoiser, UNet
from cmi_lightning.errors import InputError
from cmi_lightning.zoo import load_prior

SMALL = dict(model_channels=32, channel_mult=(1,), attention_levels=(), middle_attention=False)


class Told(nn.Module):
    """ε = x + y-th number + mean of the text; counts its calls."""

    num_classes, calls = 4, 0

    def __init__(self, learn_variance: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        self.learn_variance = learn_variance

    def forward(self, x, times, y=None, text=None):
        type(self).calls += 1
        out = x + self.table[y][:, None, None, None]
        if text is not None:
            out = out + text.mean(dim=(1, 2))[:, None, None, None]
        return torch.cat([out, out], dim=1) if self.learn_variance else out


def test_classes_and_embeddings(tmp_path):
    save_file({"prompt": torch.full((5, 3), 0.5)}, tmp_path / "text.safetensors")
    x = torch.randn(2, 1, 4, 4, generator=torch.manual_seed(0))
    for text in (torch.full((5, 3), 0.5), [[0.5]], str(tmp_path / "text.safetensors")):
        denoiser = NetworkDenoiser(Told(), None, condition={"y": 2, "text": text})
        level = denoiser.schedule[300]
        epsilon = x + 2 + 0.5
        torch.testing.assert_close(denoiser(x, level).x0, (x - level.sigma * epsilon) / level.alpha)


@pytest.mark.parametrize("learn_variance", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_guidance_without_a_classifier_in_one_call(prediction, learn_variance):
    def prior(y, **options):
        return NetworkDenoiser(
            Told(learn_variance), None, prediction=prediction, condition={"y": y}, **options
        )

    x, scale = torch.randn(3, 1, 4, 4, generator=torch.manual_seed(0)), 2.5
    level = prior(1).schedule[300]
    with_, without = prior(3)(x, level), prior(1)(x, level)
    Told.calls = 0
    guided = prior(3, unconditional={"y": 1}, guidance_scale=scale)(x, level)
    assert Told.calls == 1
    expected = without.x0 + scale * (with_.x0 - without.x0)  # x̂₀ is affine in the output
    torch.testing.assert_close(guided.x0, expected, rtol=1e-4, atol=1e-5)
    if learn_variance:
        assert torch.equal(guided.variance_fraction, with_.variance_fraction)
    assert torch.equal(prior(3, guidance_scale=1.0)(x, level).x0, with_.x0)


def test_our_network_of_classes():
    torch.manual_seed(0)
    network = UNet(1, num_classes=5, **SMALL)
    nn.init.normal_(network.out[2].weight, std=0.1)
    nn.init.normal_(network.label_emb.weight)
    for block in network.middle_block:
        nn.init.normal_(block.out_layers[3].weight, std=0.1)
    x, times = torch.randn(2, 1, 8, 8), torch.full((2,), 300.0)
    denoiser = NetworkDenoiser(network, None, condition={"y": np.int64(3)})
    level = denoiser.schedule[300]
    epsilon = network(x, times, torch.tensor([3, 3]))
    torch.testing.assert_close(denoiser(x, level).x0, (x - level.sigma * epsilon) / level.alpha)
    assert not torch.equal(epsilon, network(x, times, torch.tensor([1, 1])))
    with pytest.raises(InputError, match="num_classes=5: give classes y"):
        network(x, times)


def test_edm_networks_are_told_a_class_as_a_vector():
    seen = []

    class Precond(nn.Module):
        label_dim = 3

        def forward(self, x, sigma, class_labels=None):
            seen.append(class_labels)
            return x

    denoiser = EDMDenoiser(Precond(), None, condition={"class_labels": 2})
    denoiser(torch.zeros(2, 1, 4, 4), denoiser.schedule[50])
    assert seen[0].tolist() == [[0.0, 0.0, 1.0]] * 2


def test_the_callers_network_stays_as_it_is():
    network = Told()
    NetworkDenoiser(network, None, condition={"y": 1}).double()
    assert network.training
    assert network.table.requires_grad
    assert network.table.dtype == torch.float32


def plain(x, times):
    return x


WRONG = {
    "no such class": (
        lambda: NetworkDenoiser(Told(), None, condition={"y": 4}),
        "condition says y=4, and the classes of the network Told are 0 to 3",
    ),
    "no such argument": (
        lambda: NetworkDenoiser(Told(), None, condition={"y": 1, "label": 1}),
        "condition has label, and the network Told takes y, text besides x_t",
    ),
    "guidance against nothing": (
        lambda: NetworkDenoiser(Told(), None, condition={"y": 1}, guidance_scale=3.0),
        "guidance_scale=3 compares .* give condition and unconditional",
    ),
    "a condition of words": (
        lambda: NetworkDenoiser(Told(), None, condition={"y": 1, "text": "a cat"}),
        "condition.text: there is no file 'a cat'",
    ),
    "a list of words": (
        lambda: NetworkDenoiser(Told(), None, condition={"y": ["cat"]}),
        r"condition.y must be a list of numbers, got \['cat'\]",
    ),
    "an unknown schedule": (
        lambda: NetworkDenoiser(plain, None, "flow"),
        "schedule must be one of linear, cosine, edm, vp, rectified, got 'flow'",
    ),
    "an unknown name": (
        lambda: load_prior("ffhq-512"),
        "There is no prior 'ffhq-512': use fashion-mnist, photos-64, ffhq-256",
    ),
    "a card's weights on the hub": (
        lambda: load_prior("ddpm-cat-256", weights="cat.pt"),
        "weights are a card's file: for 'ddpm-cat-256' give their folder",
    ),
    "a class of images that are none": (
        lambda: load_prior("imagenet-64", weights="/absent.pt", condition={"y": 0}),
        r"No weights at '/absent.pt': download 64x64_diffusion.pt .*from https://openaipublic",
    ),
    "no prediction of that name": (
        lambda: NetworkDenoiser(plain, None, prediction="eps"),
        "prediction must be one of epsilon, x0, v, score, velocity, got 'eps'",
    ),
    "no pipeline": (
        lambda: load_prior(torch.Generator()),
        "A Generator is no network of diffusers",
    ),
}


def test_wrong_uses_have_a_sentence_each():
    told = {}
    for name, (use, words) in WRONG.items():
        with pytest.raises(InputError, match=words) as caught:
            use()
        told[name] = str(caught.value)
        assert "\n" not in told[name]
        assert told[name].endswith(".")
    assert len(set(told.values())) == len(WRONG) >= 10
