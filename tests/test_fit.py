"""``fit``: what it refuses, and how it stops."""

import os
import signal

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cmi_lightning.callbacks as callbacks
from cmi_lightning.cli import main

CONFIG = """
model:
  network:
    class_path: cmi_lightning.denoisers.UNet
    init_args: {in_channels: 3, model_channels: 32, channel_mult: [1], num_res_blocks: 1,
      attention_levels: []}
data:
  class_path: cmi_lightning.data.ImageFolderData
  init_args: {folder: TMP/photos, batch_size: 2, val_count: 2}
trainer: {max_steps: 4, accelerator: cpu, logger: false, enable_progress_bar: false,
  enable_checkpointing: false, enable_model_summary: false, log_every_n_steps: 1,
  default_root_dir: TMP/out}
"""


class Stop(L.Callback):
    """Sends this process a signal after two steps."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def on_train_batch_end(self, trainer, *rest) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def config(tmp_path):
    """A tiny training on four photographs in colour."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i}.png")
    path = tmp_path / "fit.yaml"
    path.write_text(CONFIG.replace("TMP", str(tmp_path)))
    return str(path)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_weights(config, tmp_path, signum, code, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "Stop", Stop, raising=False)
    stop = f"[{{class_path: cmi_lightning.callbacks.Stop, init_args: {{signum: {int(signum)}}}}}]"
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["fit", "-c", config, f"--trainer.callbacks={stop}"])
    finally:
        signal.signal(signal.SIGINT, outer)
    assert ended.value.code == code
    assert "stopped at step" in capsys.readouterr().err
    assert load_file(tmp_path / "out/network.safetensors")
    assert main(["fit", "-c", config, f"--ckpt_path={tmp_path / 'out/stopped.ckpt'}"]) == 0
    other = "--model.network.init_args.model_channels=64"
    assert main(["fit", "-c", config, other, f"--ckpt_path={tmp_path / 'out/stopped.ckpt'}"]) == 2
    assert "is of another network" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {"state_dict": {}}, [1, 2]])
def test_a_foreign_checkpoint_is_told(config, tmp_path, content, capsys):
    torch.save(content, tmp_path / "w.pt")
    assert main(["fit", "-c", config, f"--ckpt_path={tmp_path / 'w.pt'}"]) == 2
    assert "is no checkpoint of a training" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 4])
def test_images_that_the_network_does_not_take_are_told(config, channels, capsys):
    assert main(["fit", "-c", config, f"--data.channels={channels}"]) == 2
    assert f"does not take images of {channels}×16×16" in capsys.readouterr().err
