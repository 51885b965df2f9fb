"""Training: the loss, and fit end to end with resuming."""

import gzip

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cmi_lightning.cli import main
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


CONFIG = """
model:
  network:
    class_path: cmi_lightning.denoisers.UNet
    init_args: {in_channels: 1, model_channels: 32, channel_mult: [1]}
  warmup_steps: 2
  schedule: rectified
  prediction: velocity
data:
  class_path: cmi_lightning.data.FashionMNISTData
  init_args: {batch_size: 16, root: DATA}
trainer:
  {default_root_dir: OUT, accelerator: cpu, precision: bf16-mixed, logger: false,
    limit_val_batches: 0, enable_progress_bar: false, enable_model_summary: false, callbacks: [
    {class_path: lightning.pytorch.callbacks.EMAWeightAveraging},
    {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
      init_args: {dirpath: OUT, save_last: true, every_n_train_steps: 2}}]}
"""


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 1024 + 48), ("t10k", 8)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        content = bytes(16) + pixels.tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


def test_fit_trains_averages_resumes_and_exports(tmp_path, dataset, capsys):
    out, path = tmp_path / "run", tmp_path / "fit.yaml"
    path.write_text(CONFIG.replace("OUT", str(out)).replace("DATA", str(dataset)))
    assert main(["fit", "-c", str(path), "--trainer.max_steps=3"]) == 0
    first = load_file(out / "network.safetensors")
    last = torch.load(out / "last.ckpt", weights_only=False)
    assert last["global_step"] == 2
    resumed = f"--ckpt_path={out / 'last.ckpt'}"
    assert main(["fit", "-c", str(path), "--trainer.max_steps=5", resumed]) == 0
    second = load_file(out / "network.safetensors")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert torch.load(out / "last.ckpt", weights_only=False)["global_step"] == 4
    assert "network.safetensors" in capsys.readouterr().out
