"""Training: the loss, and fit: resuming, what it refuses, and how it stops."""

import gzip
import os
import signal
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from predicting import cli
from safetensors.torch import load_file
from torch import nn

from cmi_lightning import callbacks
from cmi_lightning.errors import InputError
from cmi_lightning.training import ScoreTraining


class Constant(nn.Module):
    """Predicts one number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.5))
        self.seen: list[torch.Tensor] = []

    def forward(self, x, times):
        self.seen.append(times)
        return self.value.expand_as(x)


def test_loss_is_the_error_of_the_noise():
    module = ScoreTraining(Constant())
    noise = torch.randn(64, 1, 8, 8, generator=torch.manual_seed(0))
    loss = module.loss(torch.zeros_like(noise), torch.zeros(64, dtype=torch.long), noise)
    assert float(loss.detach()) == pytest.approx(float((noise - 0.5).square().mean()))


class Clean(nn.Module):
    """Knows that x₀ = c everywhere: v = (α x_t − x₀)/σ; an error e may be added."""

    def __init__(self, schedule, c: float, e: float) -> None:
        super().__init__()
        self.schedule, self.c, self.e = schedule, c, e

    def forward(self, x, times):
        alpha, sigma, _ = self.schedule[int(times[0])]
        return (alpha * x - self.c) / sigma + self.e


def test_v_is_fitted_by_its_own_error_and_validated_by_that_of_the_noise():
    x0 = torch.full((4, 1, 8, 8), 0.3)
    noise = torch.randn(x0.shape, generator=torch.manual_seed(0))
    for index in (0, 500, 999):
        levels = torch.full((4,), index)
        module = ScoreTraining(nn.Identity(), prediction="v")
        alpha = module.schedule[index].alpha
        module.network = Clean(module.schedule, 0.3, 0.0)
        assert float(module.loss(x0, levels, noise)) < 1e-7
        module.network.e = 0.2
        assert float(module.loss(x0, levels, noise)) == pytest.approx(0.04, rel=1e-3)
        module.eval()
        assert float(module.loss(x0, levels, noise)) == pytest.approx(0.04 * alpha**2, rel=1e-3)
    with pytest.raises(InputError, match="must be one of epsilon, v, velocity, got 'x0'"):
        ScoreTraining(nn.Identity(), prediction="x0")


@pytest.mark.parametrize(("power", "share"), [(1.0, 0.1), (2.0, 0.1**0.5)])
def test_times_are_stratified(power, share, monkeypatch):
    module = ScoreTraining(Constant(), low_noise_power=power)
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    module.training_step({"x": torch.zeros(1000, 1, 2, 2)}, 0)
    (times,) = module.network.seen
    assert float((times < 100).float().mean()) == pytest.approx(share, abs=0.002)
    assert bool((times.diff() >= 0).all())


# Fit, end to end. IMAGES are the options of the data, OUT is a folder.

CONFIG = """
model:
  network:
    class_path: cmi_lightning.denoisers.UNet
    init_args: {in_channels: CHANNELS, model_channels: 32, channel_mult: [1], num_res_blocks: 1,
      attention_levels: []}
data: {class_path: cmi_lightning.data.DATA, init_args: {IMAGES}}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false,
  enable_checkpointing: false, log_every_n_steps: 1, max_steps: 4, default_root_dir: OUT}
"""
AVERAGED = """
model: {warmup_steps: 2, schedule: rectified, prediction: velocity}
trainer: {precision: bf16-mixed, limit_val_batches: 0, enable_checkpointing: true, callbacks: [
  {class_path: lightning.pytorch.callbacks.EMAWeightAveraging},
  {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
    init_args: {dirpath: OUT, save_last: true, every_n_train_steps: 2}}]}
"""


def written(path: Path, text: str, **words: object) -> Path:
    """A configuration's file."""
    for word, value in {"OUT": path.parent / "out", **words}.items():
        text = text.replace(word, str(value))
    path.write_text(text)
    return path


@pytest.fixture
def garments(tmp_path):
    """A training on noise in the files of Fashion-MNIST."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 1024 + 48), ("t10k", 8)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        content = bytes(16) + pixels.tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    images, path = f"batch_size: 16, root: {folder}", tmp_path / "fit.yaml"
    return written(path, CONFIG, CHANNELS=1, DATA="FashionMNISTData", IMAGES=images)


@pytest.fixture
def photographs(tmp_path):
    """A training on four photographs in colour."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    images = f"batch_size: 2, val_count: 2, folder: {folder}"
    return written(tmp_path / "fit.yaml", CONFIG, CHANNELS=3, DATA="ImageFolderData", IMAGES=images)


def test_fit_trains_averages_resumes_and_exports(tmp_path, garments, capsys):
    out, average = tmp_path / "out", written(tmp_path / "average.yaml", AVERAGED)
    fit = f"fit -c {garments} -c {average}"
    assert cli(fit, "--trainer.max_steps=3") == 0
    first = load_file(out / "network.safetensors")
    last = torch.load(out / "last.ckpt", weights_only=False)
    assert last["global_step"] == 2
    resumed = f"--ckpt_path={out / 'last.ckpt'}"
    assert cli(fit, "--trainer.max_steps=5", resumed) == 0
    second = load_file(out / "network.safetensors")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert torch.load(out / "last.ckpt", weights_only=False)["global_step"] == 4
    assert "network.safetensors" in capsys.readouterr().out


class Stop(L.Callback):
    """Sends this process a signal after two steps."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def on_train_batch_end(self, trainer, *rest) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_weights(photographs, tmp_path, signum, code, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "Stop", Stop, raising=False)
    stop = f"[{{class_path: cmi_lightning.callbacks.Stop, init_args: {{signum: {int(signum)}}}}}]"
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            cli(f"fit -c {photographs}", f"--trainer.callbacks={stop}")
    finally:
        signal.signal(signal.SIGINT, outer)
    assert ended.value.code == code
    assert "stopped at step" in capsys.readouterr().err
    assert load_file(tmp_path / "out/network.safetensors")
    again = f"fit -c {photographs} --ckpt_path={tmp_path}/out/stopped.ckpt"
    assert cli(again) == 0
    assert cli(again, "--model.network.init_args.model_channels=64") == 2
    assert "is of another network" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {"state_dict": {}}, [1, 2]])
def test_a_foreign_checkpoint_is_told(photographs, tmp_path, content, capsys):
    torch.save(content, tmp_path / "w.pt")
    assert cli(f"fit -c {photographs} --ckpt_path={tmp_path}/w.pt") == 2
    assert "is no checkpoint of a training" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 4])
def test_images_that_the_network_does_not_take_are_told(photographs, channels, capsys):
    assert cli(f"fit -c {photographs} --data.channels={channels}") == 2
    assert f"does not take images of {channels}×16×16" in capsys.readouterr().err
