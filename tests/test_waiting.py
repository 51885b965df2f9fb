"""A step asks the device for no number: an accelerator runs ahead of Python."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cmi_lightning import PosteriorSampler
from cmi_lightning.callbacks import SamplingProgress, TrajectoryLogger
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, PiGDM
from cmi_lightning.information import TraceLimit
from cmi_lightning.operators import BoxMask

READS = (
    *("item", "tolist", "cpu", "numpy", "nonzero"),
    *("__bool__", "__float__", "__int__", "__index__", "__contains__"),
)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a value of a tensor is read: there, a GPU would have to be waited for."""
    count = [0]

    def counting(read):
        def counted(self, *args, **kwargs):
            count[0] += 1
            return read(self, *args, **kwargs)

        return counted

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    return count


@pytest.mark.parametrize(
    "guidances",
    [
        [DPS()],
        [CMI(interval=1), DPS()],
        [CMI(interval=1, estimator=TraceLimit()), DPS()],
        [PiGDM()],
        [MCG()],
        [DSG()],
    ],
    ids=["DPS", "CMI+DPS", "TraceLimit+DPS", "PiGDM", "MCG", "DSG"],
)
def test_more_steps_read_no_more_numbers(reads, tmp_path, guidances):
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    counts = []
    for steps in (6, 12):
        module = PosteriorSampler(GaussianPrior(x[0]), BoxMask(4, 1), None, guidances, steps)
        callbacks = [SamplingProgress(interval=3600), TrajectoryLogger(max_images=0)]
        trainer = L.Trainer(
            default_root_dir=tmp_path / str(steps), callbacks=callbacks, logger=False
        )
        before = reads[0]
        trainer.predict(module, DataLoader([{"x": x[i], "id": f"{i}"} for i in range(2)], 2))
        counts.append(reads[0] - before)
    assert counts[0] == counts[1] > 0
