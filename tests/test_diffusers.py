"""Models of diffusers against diffusers' own pipelines, on the same noise."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_two_derivatives, randn
from safetensors.torch import load_file, save_file
from tiny import unet2d
from torch import Tensor

from cmi_lightning.denoisers import DiffusersDenoiser
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM, DDPM

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()


def save_pipeline(folder: Path, network, **options):
    scheduler = diffusers.DDPMScheduler(**{"num_train_timesteps": 20, "beta_end": 0.4, **options})
    pipeline = diffusers.DDPMPipeline(network, scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture
def same_noise(monkeypatch):
    """Our noise in place of diffusers', and our sampler on the same noise."""
    noise = SampleNoise(0, ["a", "b"])

    def run(denoiser, solver, num_steps, pipeline, **options) -> tuple[Tensor, Tensor]:
        like = torch.zeros(2, 3, 8, 8)
        problem = Problem(like, Identity(), 1.0)
        ours = Sampler(denoiser, solver, num_steps=num_steps).run(problem, noise, like)
        schedule = denoiser.schedule if num_steps is None else denoiser.schedule.respace(num_steps)
        draws = [noise.normal("solver", i, like) for i in range(len(schedule))]
        draws.append(noise.normal("start", 0, like))
        for module in (
            "pipelines.ddpm.pipeline_ddpm",
            "pipelines.ddim.pipeline_ddim",
            "schedulers.scheduling_ddpm",
            "schedulers.scheduling_ddim",
        ):
            monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *a, **k: draws.pop())
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(2, num_inference_steps=len(schedule), output_type="np", **options).images
        theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
        return (ours / 2 + 0.5).clamp(0, 1), theirs

    return run


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusers_ddpm(tmp_path, same_noise, prediction, attention):
    pipeline = save_pipeline(tmp_path, unet2d(attention), prediction_type=prediction)
    denoiser = DiffusersDenoiser(str(tmp_path))
    assert (len(denoiser.schedule), denoiser.image_shape) == (20, (3, 8, 8))
    assert (denoiser.size_multiple, denoiser.derivatives) == (2, 2)
    assert not denoiser.learns_variance
    ours, theirs = same_noise(denoiser, DDPM(), None, pipeline)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float(theirs.std()) > 0.1  # not all clamped alike


@pytest.mark.parametrize(
    ("variance_type", "variance", "outputs"),
    [("learned_range", "learned", 6), ("fixed_large", "large", 3)],
)
def test_diffusers_variances(tmp_path, same_noise, variance_type, variance, outputs):
    pipeline = save_pipeline(tmp_path, unet2d(outputs=outputs), variance_type=variance_type)
    denoiser = DiffusersDenoiser(str(tmp_path))
    assert denoiser.learns_variance == (outputs == 6)
    ours, theirs = same_noise(denoiser, DDPM(variance), None, pipeline)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_diffusers_ddim_with_fewer_steps(tmp_path, same_noise, eta, schedule):
    saved = save_pipeline(
        tmp_path, unet2d(), beta_schedule=schedule, prediction_type="v_prediction"
    )
    scheduler = diffusers.DDIMScheduler.from_config(saved.scheduler.config)
    pipeline = diffusers.DDIMPipeline(saved.unet, scheduler)
    denoiser = DiffusersDenoiser(str(tmp_path))
    ours, theirs = same_noise(
        denoiser, DDIM(eta), "ddim10", pipeline, eta=eta, use_clipped_model_output=True
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_diffusers_second_derivatives(tmp_path):
    save_pipeline(tmp_path, unet2d())
    denoiser = DiffusersDenoiser(str(tmp_path)).double()
    for module in denoiser.modules():
        if hasattr(module, "upcast_softmax"):
            module.upcast_softmax = False  # it means float32, too coarse for a difference
    level, (x, u, p) = denoiser.schedule[10], randn(3, 1, 3, 8, 8, seed=1)
    assert_two_derivatives(lambda z: denoiser(z, level).x0, x, u, p, 1e-4)
    fused = DiffusersDenoiser(str(tmp_path), second_derivatives=False).double()
    assert fused.derivatives == 1
    torch.testing.assert_close(fused(x, level).x0, denoiser(x, level).x0)
    z = x.clone().requires_grad_()
    product = torch.autograd.grad(fused(z, level).x0, z, u, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not implemented"):  # and so it is refused before
        torch.autograd.grad((product * p).sum(), z)
    save_pipeline(tmp_path / "plain", unet2d(attention=False))
    assert DiffusersDenoiser(str(tmp_path / "plain"), second_derivatives=False).derivatives == 2


def test_diffusers_layouts(tmp_path):
    network = unet2d(sample_size=(8, 16))
    save_pipeline(tmp_path / "pipeline", network)
    whole = DiffusersDenoiser(str(tmp_path / "pipeline"))
    assert whole.image_shape == (3, 8, 16)
    x, level = torch.randn(1, 3, 8, 16), whole.schedule[10]
    inner = DiffusersDenoiser(str(tmp_path / "pipeline/unet"))  # the scheduler lies beside it
    network.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"no scheduler/scheduler_config.json: give the schedule"):
        DiffusersDenoiser(str(tmp_path / "bare"))
    bare = DiffusersDenoiser(str(tmp_path / "bare"), schedule=whole.schedule, prediction="epsilon")
    config = tmp_path / "pipeline/scheduler/scheduler_config.json"
    (tmp_path / "bare/scheduler_config.json").write_text(config.read_text())
    flat = DiffusersDenoiser(str(tmp_path / "bare"), size=(None, None))
    for other in (inner, bare, flat):
        assert torch.equal(other(x, level).x0, whole(x, level).x0)
    flat(torch.randn(1, 3, 10, 6), level)


def test_averages_beside_the_network(tmp_path):
    save_pipeline(tmp_path, unet2d())
    average = unet2d()
    torch.nn.init.constant_(average.conv_in.bias, 0.5)
    average.save_pretrained(tmp_path / "unet_ema")
    with pytest.raises(InputError, match="'unet', 'unet_ema': choose one by weights_part"):
        DiffusersDenoiser(str(tmp_path))
    for part, same in (("unet", False), ("unet_ema", True)):
        for denoiser in (
            DiffusersDenoiser(str(tmp_path), weights_part=part),
            DiffusersDenoiser(str(tmp_path / part)),
        ):
            assert len(denoiser.schedule) == 20
            assert torch.equal(denoiser.network.conv_in.bias, average.conv_in.bias) == same


@pytest.mark.parametrize("autoencoder", ["vqvae", "vae", "movq"])
def test_pipelines_of_latents(tmp_path, autoencoder):
    save_pipeline(tmp_path, unet2d())
    (tmp_path / autoencoder).mkdir()
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(InputError, match=rf"has an autoencoder \({autoencoder}\), .*latents"):
            DiffusersDenoiser(str(folder))


def test_diffusers_half_precision_variant(tmp_path):
    unet2d().half().save_pretrained(tmp_path, variant="fp16")
    denoiser = DiffusersDenoiser(str(tmp_path), "linear", variant="fp16")
    assert all(p.dtype == torch.float32 for p in denoiser.parameters())
    with pytest.raises(InputError, match="name its files by variant"):
        DiffusersDenoiser(str(tmp_path), "linear")


def test_diffusers_tables_of_times(tmp_path):
    network = unet2d(time_embedding_type="learned", num_train_timesteps=20)
    save_pipeline(tmp_path, network)
    denoiser = DiffusersDenoiser(str(tmp_path))
    x, level = torch.randn(1, 3, 8, 8), denoiser.schedule[17]
    expected = (x - level.sigma * network.eval()(x, torch.tensor([17])).sample) / level.alpha
    torch.testing.assert_close(denoiser(x, level).x0, expected)


def test_zero_terminal_snr_loses_its_last_level(tmp_path):
    save_pipeline(tmp_path, unet2d(), rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = DiffusersDenoiser(str(tmp_path)).schedule
    assert schedule.times == tuple(range(19))
    abar = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler").alphas_cumprod
    assert float(abar[19]) == 0
    torch.testing.assert_close(torch.tensor(schedule.alphas) ** 2, abar[:19], rtol=1e-4, atol=1e-6)


def test_hub_ids(tmp_path, monkeypatch):
    save_pipeline(tmp_path / "copy", unet2d())
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        assert "text_encoder*" in ignore_patterns
        asked.append(name)
        if name != "someone/model":
            raise OSError("offline\nand more")
        return str(tmp_path / "copy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(DiffusersDenoiser("someone/model").schedule) == 20
    with pytest.raises(InputError, match=r"hub gave none \(OSError: offline\)"):
        DiffusersDenoiser("someone/else")
    with pytest.raises(InputError, match="There is no folder '/a/b'"):
        DiffusersDenoiser("/a/b")
    assert asked == ["someone/model", "someone/else"]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda s: s.pop("conv_in.weight"), r"1 missing \(conv_in.weight\)"),
        (lambda s: s.update(surplus=torch.zeros(1)), r"1 unexpected \(surplus\)"),
        (
            lambda s: s.update(
                {"conv_out.weight": torch.zeros(6, 16, 3, 3), "conv_out.bias": torch.zeros(6)}
            ),
            "2 misshapen .*predict a variance as well",
        ),
    ],
)
def test_diffusers_weights_are_strict(tmp_path, break_it, words):
    save_pipeline(tmp_path, unet2d())
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    break_it(state)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        DiffusersDenoiser(str(tmp_path))


def test_diffusers_refusals(tmp_path, monkeypatch):
    def refused(words: str, **options) -> None:
        with pytest.raises(InputError, match=words):
            DiffusersDenoiser(str(tmp_path), **options)

    refused("has no config.json")
    save_pipeline(tmp_path, unet2d())
    model, scheduler = tmp_path / "unet/config.json", tmp_path / "scheduler/scheduler_config.json"
    edit(model, _class_name="UNet1DModel")
    refused("holds a UNet1DModel: a prior is one of UNet2DModel, UNet2DConditionModel")
    edit(model, _class_name="UNet2DModel", num_class_embeds=10)
    refused(r"1 missing \(class_embedding.weight\)")
    edit(model, num_class_embeds=None)
    edit(scheduler, prediction_type="flow")
    refused("prediction_type 'flow'")
    DiffusersDenoiser(str(tmp_path), prediction="v")
    edit(scheduler, prediction_type="epsilon", _class_name="ScoreSdeVeScheduler")
    refused("ScoreSdeVeScheduler .* has no betas: give the schedule")
    edit(scheduler, _class_name="Nonsense")
    refused("Nonsense .* has no betas")
    DiffusersDenoiser(str(tmp_path), "edm", "score")
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    refused("is cut short")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("git lfs pull")
    weights.unlink()
    refused("has no weights")
    model.write_text("{")
    refused("is not JSON")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(r"pip install 'cmi-lightning\[diffusers\]'")


def test_learned_variance_that_is_no_range(tmp_path):
    save_pipeline(tmp_path, unet2d(outputs=6), variance_type="learned")
    with pytest.raises(InputError, match="only learned_range"):
        DiffusersDenoiser(str(tmp_path))
    save_pipeline(tmp_path / "odd", unet2d(outputs=4))
    with pytest.raises(InputError, match="maps 3 channels to 4"):
        DiffusersDenoiser(str(tmp_path / "odd"))
