"""What is chosen by measuring: the batch size and the precision."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from predicting import items, restore
from torch.utils.data import DataLoader

from cmi_lightning import InputError, PosteriorSampler
from cmi_lightning.callbacks import ImageWriter
from cmi_lightning.data import ImageFolderData
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import DPS
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask
from cmi_lightning.predict import auto
from cmi_lightning.predict.auto import FULL, HALF, Choice, Trial, batch_size, choose, faster
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM

CPU = torch.device("cpu")
IDS = [f"{i:05d}" for i in range(5)]


def trial(images: int, seconds: float, x0=None, denoiser=None) -> Trial:
    sampler = denoiser and Sampler(denoiser, DDIM(), num_steps=8)
    return Trial(images, seconds, x0, SampleNoise(0, ["a"]), sampler)


@pytest.mark.parametrize(
    ("seconds", "most", "wanted", "why"),
    [
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.1}, 64, 4, "8 gain less than 5%"),
        ({1: 1.0, 2: 1.0, 4: 1.0, 6: 1.0}, 6, 6, "there are no more"),
        ({1: 1.0, 2: 1.0}, 64, 2, "4 do not fit into memory"),
        ({1: 1.0}, 1, 1, "there are no more"),
    ],
    ids=["throughput", "few images", "memory", "one image"],
)
def test_a_batch_grows_while_it_is_worth_it(seconds, most, wanted, why):
    def tried(n: int) -> Trial:
        if n not in seconds:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")
        return trial(n, seconds[n])

    size, text = batch_size(tried, most, 1, CPU)
    assert size == wanted
    assert f"{wanted} at a time; {why}" in text


def test_a_batch_does_not_grow_beyond_what_the_machine_has_left(monkeypatch):
    monkeypatch.setattr(auto, "peak_memory", lambda device: next(peaks))
    monkeypatch.setattr(auto, "free_memory", lambda: 15)
    peaks = iter([100, 104, 104, 112])
    size, why = batch_size(lambda n: trial(n, 1.0), 64, 1, CPU)
    assert (size, "4 might not fit" in why) == (2, True)


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [("crash", RuntimeError, "crash"), ("CUDA out of memory.", InputError, "with 1 image")],
)
def test_errors_at_the_first_image_are_told(message, kind, words):
    def broken(n: int) -> Trial:
        raise RuntimeError(message)

    with pytest.raises(kind, match=words):
        batch_size(broken, 4, 1, CPU)


class Off(GaussianPrior):
    """x̂₀ whose distance to x̃ = 0 is ``factor`` times the exact one's."""

    factor = 1.0

    def forward(self, x, level):
        return super().forward(x, level).map(lambda x0: self.factor * x0)


@pytest.mark.parametrize(
    ("factor", "seconds", "wanted"),
    [(1.005, 0.5, HALF), (0.995, 0.5, HALF), (1.007, 0.5, FULL), (1.0, 2.0, FULL)],
)
def test_the_faster_precision_is_taken_if_it_is_near(factor, seconds, wanted):
    x, off = torch.zeros(1, 1, 4, 4), Off(torch.zeros(1, 4, 4))
    off.factor = factor
    full, half = trial(1, 1.0, x, GaussianPrior(x[0])), trial(1, seconds, x, off)
    found, why = faster(full, half)
    assert found == wanted
    assert f"{20 * abs(math.log10(factor)):.2g} dB" in why


def sampler(**options) -> PosteriorSampler:
    prior = GaussianPrior(torch.zeros(1, 32, 32))
    return PosteriorSampler(prior, BoxMask(14, 4), None, [DPS()], 3, **options)


def test_a_run_chooses_once_and_its_folder_keeps_it(tmp_path, monkeypatch, capsys):
    def run(**options):
        data = ImageFolderData("fashion-mnist-test", limit=5, batch_size="auto")
        return restore(tmp_path, sampler(precision="auto"), data, ImageWriter(), **options)

    monkeypatch.setattr(auto, "batch_size", lambda *_: (2, "2 at a time"))
    monkeypatch.setattr(auto, "faster", lambda *_: (HALF, HALF))
    first = run()
    told = "cmi-lightning: data.batch_size=auto: 2 at a time.\n"
    assert told + f"cmi-lightning: model.precision=auto: {HALF}.\n" in capsys.readouterr().err
    assert [r["id"] for r in first] == [IDS[:2], IDS[2:4], IDS[4:]]
    options = json.loads((tmp_path / "run.json").read_text())
    assert options["data.batch_size"] == "2"
    assert options["trainer.precision"] == HALF
    monkeypatch.undo()  # measuring again might choose otherwise
    (tmp_path / "records/00002.json").unlink()
    again = run()
    assert [r["id"] for r in again] == [IDS[:2], IDS[2:4], IDS[4:]]
    assert torch.equal(again[1]["restored"], first[1]["restored"])
    assert json.loads((tmp_path / "run.json").read_text()) == options
    half = sampler()
    with pytest.raises(InputError, match="precision was bf16-mixed and is 32-true"):
        restore(tmp_path, half, ImageFolderData("fashion-mnist-test", limit=5), ImageWriter())


@pytest.mark.parametrize("batch", ["auto", 2])
def test_measuring_leaves_the_results_as_they_are(tmp_path, batch):
    data = ImageFolderData("fashion-mnist-test", limit=5, batch_size=batch)
    module = sampler(precision="auto")
    results = restore(tmp_path, module, data)
    fixed = restore(tmp_path, sampler(), ImageFolderData("fashion-mnist-test", limit=5))
    assert [name for r in results for name in r["id"]] == IDS
    assert module.chosen.precision in (FULL, HALF)
    assert (module.chosen.batch_size is None) == (batch == 2)
    restored = torch.cat([r["restored"] for r in results])  # the exact prior has no layer to lower
    torch.testing.assert_close(restored, fixed[0]["restored"], rtol=0, atol=1e-5)


def test_a_loader_is_measured_too(tmp_path, shipped_images):
    module = sampler(precision="auto")
    (result,) = restore(tmp_path, module, items(shipped_images[:2]))
    assert result["id"] == ["set/0", "set/1"]
    assert module.chosen.precision in (FULL, HALF)
    with pytest.raises(InputError, match="read twice"):
        restore(tmp_path, module, iter(DataLoader(items(shipped_images[:2]))))
    with pytest.raises(InputError, match=r"leave out trainer\.precision=bf16-mixed"):
        restore(tmp_path, module, items(shipped_images[:2]), precision="bf16-mixed")


def test_the_first_process_chooses_for_all():
    data = SimpleNamespace(batch_size="auto", at_once=None)
    strategy = SimpleNamespace(broadcast=lambda own: (Choice(8, HALF), None))
    trainer = SimpleNamespace(datamodule=data, is_global_zero=False, strategy=strategy)
    module = SimpleNamespace(precision="auto", chosen=Choice(4, FULL))
    assert choose(module, trainer) == Choice(8, HALF)
    assert data.at_once == 8


def test_what_nothing_has_chosen_is_refused():
    data = ImageFolderData("fashion-mnist-test", limit=2, batch_size="auto")
    data.setup("predict")
    with pytest.raises(InputError, match="give a number"):
        data.predict_dataloader()
