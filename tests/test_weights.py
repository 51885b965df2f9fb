"""Loading of weights: where from, how strictly, and what is said when they do not fit."""

import hashlib
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from cmi_lightning.denoisers import NetworkDenoiser, UNet, load_weights, presets
from cmi_lightning.errors import InputError
from cmi_lightning.zoo.cards import published

SMALL = dict(in_channels=2, model_channels=32, channel_mult=(1, 2), attention_levels=(1,))
SMALL |= {"num_head_channels": 32}


def unet(**options) -> UNet:
    return UNet(**{**SMALL, **options})


def random_state(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=g) for k, v in network.state_dict().items()}


def holds(network: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def named(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in state.items()}


@pytest.fixture
def network() -> UNet:
    return unet()


@pytest.fixture
def state(network) -> dict[str, torch.Tensor]:
    return random_state(network)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of tmp_path/www, and a torch.hub cache of the test's own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "www").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        requests = 0

        def log_message(self, *args):
            type(self).requests += 1

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "www"))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", tmp_path / "www", Quiet
    httpd.shutdown()
    thread.join()
    httpd.server_close()


# Where weights come from


@pytest.mark.parametrize(
    "name",
    [
        "net.pt",
        "net.pth",
        "net.safetensors",
        "misnamed.safetensors.pt",
        "address of a folder/net.pt",
    ],
)
def test_files(tmp_path, network, state, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_file(state, path) if "safetensors" in name else torch.save(state, path)
    load_weights(network, path.as_uri() if "folder" in name else path)
    assert holds(network, state)


def test_folders(tmp_path, network, state):
    with pytest.raises(InputError, match=r"must hold one weights file, found no \.safetensors"):
        load_weights(network, tmp_path)
    with pytest.raises(InputError, match="No weights at"):
        load_weights(network, tmp_path / "absent.pt")
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    load_weights(network, tmp_path)
    assert holds(network, state)
    save_file(random_state(network, 1), tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"found a.safetensors, b.safetensors"):
        load_weights(network, tmp_path)
    pipeline = tmp_path / "unet"  # as diffusers writes them
    pipeline.mkdir()
    other = random_state(network, 2)
    save_file(other, pipeline / "diffusion_pytorch_model.safetensors")
    save_file(state, pipeline / "diffusion_pytorch_model.fp16.safetensors")
    load_weights(network, tmp_path)
    assert holds(network, other)


def test_downloads_are_kept_and_not_mixed_up(server, network, state):
    url, www, handler = server
    for name, seed in (("a", 0), ("b", 1)):
        (www / name).mkdir()
        save_file(random_state(network, seed), www / name / "model.safetensors")
    for _ in range(2):
        load_weights(network, f"{url}/a/model.safetensors?download=true")
        assert holds(network, state)
        load_weights(network, f"{url}/b/model.safetensors")
        assert holds(network, random_state(network, 1))
    assert handler.requests == 2


def test_bad_downloads_are_refused_and_not_kept(server, network, state):
    url, www, _ = server
    with pytest.raises(InputError, match=r"Cannot download .*/absent.pt' \(HTTP Error 404"):
        load_weights(network, f"{url}/absent.pt")
    with pytest.raises(InputError, match="Cannot download"):  # no server at all
        load_weights(network, "http://127.0.0.1:9/net.pt")
    (www / "net.pt").write_bytes(b"<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    with pytest.raises(InputError, match="is a web page"):
        load_weights(network, f"{url}/net.pt")
    torch.save(state, www / "net.pt")
    load_weights(network, f"{url}/net.pt")
    assert holds(network, state)


def test_checksums(tmp_path, network, state):
    path = tmp_path / "net.pt"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load_weights(network, path, sha256=digest.upper())
    assert holds(network, state)
    with pytest.raises(InputError, match=f"has SHA-256 {digest}, not {'0' * 64}: delete it"):
        load_weights(network, path, sha256="0" * 64)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        load_weights(network, path, sha256="abc")


# What is no checkpoint


@pytest.mark.parametrize(
    ("name", "file", "address"),
    [
        ("ffhq_10m.pt", "ffhq_10m.pt (374,417,833 bytes", "DPS2022/diffusion-posterior-sampling"),
        ("imagenet256.pt", "256x256_diffusion_uncond.pt (2,211,383,297 bytes", "openaipublic"),
        ("256x256_diffusion_uncond.pt", "256x256_diffusion_uncond.pt (2,2", "openaipublic"),
    ],
)
def test_absent_public_checkpoints_say_where_they_are(network, name, file, address):
    with pytest.raises(InputError) as caught:
        load_weights(network, f"models/{name}")
    for words in (f"models/{name}", file, address, "--model.denoiser.init_args.weights"):
        assert words in str(caught.value)


def test_public_checkpoints_have_the_size_of_their_networks():
    # torch.save adds names and alignment to four bytes per parameter.
    for name, parameters in (("ffhq_10m.pt", 93_563_910), ("imagenet256.pt", 552_814_086)):
        assert 0 < published(name).size - 4 * parameters < 600_000
        assert len(bytes.fromhex(published(name).sha256)) == 32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (b"\n <!doctype HTML><title>Sign in</title>", "is a web page"),
        (b"<html><body>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file, not weights of PyTorch"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"\x1f\x8b\x08\0", "is a gzip archive"),
        (b"not a checkpoint", "Cannot read the weights"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, network, content, words):
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_weights(network, path)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "ffhq_10m.pt"])
@pytest.mark.parametrize("part", [0.9, 0.02])
def test_cut_short(tmp_path, network, state, name, part):
    path = tmp_path / name
    save_file(state, path) if "safe" in name else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError) as caught:
        load_weights(network, path)
    assert f"is cut short (it has {int(part * len(whole)):,} bytes" in str(caught.value)
    said = 374_417_833 if "ffhq" in name else len(whole)  # known of a public file
    assert (f"of {said:,})" in str(caught.value)) == (name != "net.pt")


# Containers, prefixes, precision


def lit_ema(raw, ema):
    """What latent-diffusion's Lightning module writes, its names without dots."""
    return {
        "state_dict": {
            **named("model.diffusion_model.", raw),
            **{f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in ema.items()},
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(7),
            "betas": torch.ones(1000),
        }
    }


CONTAINERS = {
    "module.": lambda s: named("module.", s),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "hyper_parameters": {"width": 32}},
    "Lightning": lambda s: {
        "state_dict": {
            **named("network.", s),
            "feature.weight": torch.ones(3, 3),
        },
        "pytorch-lightning_version": "2.6.6",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
    },
    "model": lambda s: {"model": named("module.", s), "step": 7},
    "compiled": lambda s: named("_orig_mod.", s),
    "average": lambda s: {
        "n_averaged": torch.tensor(9),
        **named("module.", s),
    },
    "twice the same": lambda s: {"model": s, "ema": dict(s)},
    "partly compiled": lambda s: {
        k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()
    },
    "FSDP": lambda s: {
        f"_fsdp_wrapped_module.{k.replace('.0.', '.0._checkpoint_wrapped_module.')}": v
        for k, v in s.items()
    },
    "only LitEma": lambda s: lit_ema({}, s),
    "only ema": lambda s: {"model": {}, "ema": s},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_and_prefixes(tmp_path, network, state, kind):
    torch.save(CONTAINERS[kind](state), tmp_path / "net.pt")
    load_weights(network, tmp_path / "net.pt")
    assert holds(network, state)


def test_two_networks_in_one_file(tmp_path, network, state):
    path = tmp_path / "net.pt"
    ema = random_state(network, 1)
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "ema": ema}, path)
    with pytest.raises(
        InputError, match=r"2 times, as 'model\.module', 'ema': choose one by weights"
    ):
        load_weights(network, path)
    load_weights(network, path, part="ema")
    assert holds(network, ema)
    load_weights(network, path, part="model.module")
    assert holds(network, state)
    with pytest.raises(InputError, match=r"has no part 'emma'.*it has 'model\.module', 'ema'"):
        load_weights(network, path, part="emma")
    denoiser = NetworkDenoiser(network, str(path), weights_part="ema")
    assert holds(denoiser.network, ema)


def lucidrains(raw, ema):
    """What denoising-diffusion-pytorch's trainer writes."""
    return {
        "step": 7,
        "model": {**named("model.", raw), "betas": torch.ones(1000)},
        "ema": {
            "initted": torch.tensor(True),
            **named("online_model.model.", raw),
            **named("ema_model.model.", ema),
        },
    }


def lightning(raw, ema):
    """What Lightning's WeightAveraging writes."""
    return {
        "state_dict": named("network.", ema),
        "current_model_state": named("network.", raw),
        "averaging_state": {"n_averaged": torch.tensor(9)},
    }


AVERAGES = {  # parts that choose the average, and the raw weights
    lit_ema: ("model_ema", "diffusion_model"),
    lucidrains: ("ema_model", "model.model"),
    lightning: ("state_dict", "current_model_state"),
    lambda raw, ema: {"params": raw, "params_ema": ema}: ("params_ema", "params"),
    lambda raw, ema: {**raw, **named("shadow.", ema)}: ("shadow", ""),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_are_named_and_chosen(tmp_path, network, state, kind):
    path, ema = tmp_path / "net.ckpt", random_state(network, 1)
    torch.save(kind(state, ema), path)
    average, raw = AVERAGES[kind]
    with pytest.raises(InputError) as caught:
        load_weights(network, path)
    assert re.search(f"holds the network 2 times, .*an average, '[^']*{average}", str(caught.value))
    load_weights(network, path, part=average)
    assert holds(network, ema)
    load_weights(network, path, part=raw)
    assert holds(network, state)


def test_averages_of_pipelines_are_named_and_chosen(tmp_path, network, state):
    for name, seed in (("unet", 0), ("unet_ema", 1)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "diffusion_pytorch_model.safetensors"
        save_file(random_state(network, seed), file)
    with pytest.raises(InputError, match=r"'unet', 'unet_ema': choose .*an average, 'unet_ema'"):
        load_weights(network, tmp_path)
    load_weights(network, tmp_path, part="unet_ema")
    assert holds(network, random_state(network, 1))
    load_weights(network, tmp_path, part="unet")
    assert holds(network, state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, network, state, suffix):
    files = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    names = list(state)
    halves = [{k: state[k] for k in part} for part in (names[::2], names[1::2])]
    for file, half in zip(files, halves, strict=True):
        save_file(half, tmp_path / file) if suffix != "bin" else torch.save(half, tmp_path / file)
    index = tmp_path / f"model.{suffix}.index.json"
    with pytest.raises(InputError, match="is one of 2 shards: give their folder"):
        load_weights(network, tmp_path / files[0])
    weight_map = {k: file for file, half in zip(files, halves, strict=True) for k in half}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for source in (tmp_path, index):
        nn.init.zeros_(network.out[2].weight)
        load_weights(network, source)
        assert holds(network, state)
    (tmp_path / files[1]).unlink()
    with pytest.raises(InputError, match=rf"names 2 shards, and {files[1]} is not there"):
        load_weights(network, tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(InputError, match="is no index of shards"):
            load_weights(network, tmp_path)


def test_a_compiled_network_is_filled(tmp_path, network, state):
    torch.save(state, tmp_path / "net.pt")
    network.out = nn.Sequential()
    network.out.add_module("_orig_mod", unet().out)  # as torch.compile names it
    load_weights(network, tmp_path / "net.pt")
    names = {k.replace("_orig_mod.", ""): v for k, v in network.state_dict().items()}
    assert all(torch.equal(v, state[k]) for k, v in names.items())


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\x9b2J", "a\u202eb", "a\rb"])
def test_no_terminal_escapes(tmp_path, network, state, name):
    torch.save({**state, f"{name}.weight": torch.ones(1)}, tmp_path / "net.pt")
    torch.save({"model": state, name: random_state(network, 1)}, tmp_path / "two.pt")
    for source in (tmp_path / name, tmp_path / "net.pt", tmp_path / "two.pt"):
        with pytest.raises(InputError) as caught:
            load_weights(network, source)
        assert str(caught.value).isprintable()
        assert name.encode("unicode_escape").decode() in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_into_float32(tmp_path, network, state, dtype):
    save_file({k: v.to(dtype) for k, v in state.items()}, tmp_path / "net.safetensors")
    load_weights(network, tmp_path / "net.safetensors")
    assert all(v.dtype == torch.float32 for v in network.parameters())
    assert holds(network, {k: v.to(dtype).float() for k, v in state.items()})


# What does not fit


@pytest.mark.parametrize(
    ("theirs", "ours", "cause"),
    [
        ({"learn_variance": True}, {}, "predict a variance as well .*learn_variance: true"),
        ({}, {"learn_variance": True}, "predict no variance .*learn_variance: false"),
        ({"model_channels": 64}, {}, "another width: input_blocks.0.0.weight has 64 .* 32 here"),
        ({"in_channels": 1}, {}, "for images of 1 channels and the network for 2"),
        ({"attention_levels": (0, 1)}, {}, "attention sits at other levels"),
        ({"num_res_blocks": 3}, {}, "another number of levels or of blocks"),
        ({"scale_shift": False}, {}, "scale_shift"),
    ],
)
def test_the_cause_of_a_misfit(tmp_path, theirs, ours, cause):
    torch.save({"model": random_state(unet(**theirs))}, tmp_path / "net.pt")
    network = unet(**ours)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(InputError, match=cause) as caught:
        load_weights(network, tmp_path / "net.pt")
    assert "(its part 'model') do not fit" in str(caught.value)
    assert holds(network, before)


def beside(**others):
    """A checkpoint of the network and something beside it."""
    return lambda s: {"state_dict": named("model.diffusion_model.", s) | others}


FOREIGN = [  # what a file holds, from the network's own tensors, and what is said of it
    (lambda s: {"state_dict": unet()}, "weights_only"),
    (lambda s: unet(), "weights_only"),  # a whole module is code, not plain tensors
    (lambda s: {"epoch": 3}, "not a state dict"),
    (lambda s: {k: v for k, v in s.items() if k[:4] != "out."}, r"4 missing \(out.0.weight"),
    (
        lambda s: {**s, "out.2.bias": torch.zeros(7)},
        r"1 misshapen \(out.2.bias \(7,\) instead of \(2,\)\)",
    ),
    # latent diffusion's checkpoints hold their configurations
    (
        lambda s: {"state_dict": s, "hyper_parameters": OmegaConf.create({"base_rate": 1e-4})},
        r"objects of omegaconf\.\S+\); .* load it yourself once",
    ),
    *(
        (beside(**{f"{name}.conv.weight": torch.ones(1)}), "an autoencoder .*latents and not on p")
        for name in ("first_stage_model", "vae", "model.autoencoder")
    ),
    (
        lambda s: {**s, "label_emb.weight": torch.ones(10, 128)},
        r"1 unexpected \(label_emb.weight\); .*class-conditional",
    ),
    (
        lambda s: {f"layer{i}.w": torch.ones(2) for i in range(9)},
        r"layer4.w, …\); no name agrees",
    ),
    (
        lambda s: {f"module.{k}": v for k, v in s.items() if k != "out.2.bias"},
        r"\(its part 'module'\) do not fit.* 1 missing \(out.2.b",
    ),
    (
        lambda s: {**s, "input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight": torch.ones(2)},
        "a network that is told a text",
    ),
    *(
        (lambda s, name=name: {"state": {name: torch.ones(2)}}, f"no name agrees: .*{cause}")
        for name, cause in {
            "down_blocks.0.resnets.0.conv1.weight": "diffusers' layout, for DiffusersDenoiser",
            "model.enc.map_noise.freqs": "NVlabs' EDM, for EDMDenoiser",
            "module.all_modules.3.weight": "score_sde's",
            "model.downs.0.0.mlp.1.weight": "of denoising-diffusion-pytorch",
            "unet.to_q.lora_A.weight": r"low-rank adapters \(LoRA\)",
        }.items()
    ),
]


@pytest.mark.parametrize(("content", "words"), FOREIGN, ids=[words for _, words in FOREIGN])
def test_foreign_checkpoints_have_their_cause(tmp_path, network, state, content, words):
    torch.save(content(state), tmp_path / "net.ckpt")
    with pytest.raises(InputError, match=words):
        load_weights(network, tmp_path / "net.ckpt")


def test_a_function_takes_no_weights(tmp_path):
    with pytest.raises(InputError, match=r"no torch.nn.Module.* set weights to null"):
        NetworkDenoiser(torch.sin, "net.pt")
    with pytest.raises(InputError, match="sha256 and weights_part describe a file"):
        NetworkDenoiser(unet(), None, sha256="0" * 64)


def test_a_preset_says_what_it_expects_before_it_is_built(monkeypatch):
    monkeypatch.setattr(presets, "card_unet", lambda *_: pytest.fail("built before the file"))
    with pytest.raises(InputError, match=r"faces\.pt.*ffhq_10m\.pt.*bytes"):
        presets.ffhq("faces.pt")
