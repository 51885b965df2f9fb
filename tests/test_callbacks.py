"""Callbacks in real prediction runs, their numbers against skimage and numpy."""

import csv
import io
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.response import addinfourl

import lightning as L
import numpy as np
import pytest
import rich
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from predicting import Watch, items, restore, strict_json, trainer
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cmi_lightning import GaussianNoise, InputError, PosteriorSampler, fetch
from cmi_lightning.callbacks import (
    VGG,
    Alex,
    FeatureMetrics,
    ImageWriter,
    RecordingCallback,
    RestorationMetrics,
    SampleGrid,
    SamplingProgress,
    TrajectoryLogger,
)
from cmi_lightning.callbacks.distances import read_embeddings
from cmi_lightning.callbacks.drawing import tile, to_tile
from cmi_lightning.callbacks.feature_metrics import STABLE_FID
from cmi_lightning.callbacks.summary import statistics
from cmi_lightning.callbacks.trajectory import plot_curves
from cmi_lightning.data import MeasurementFolderData
from cmi_lightning.data.images import read_image
from cmi_lightning.data.pictures import levels, to_uint8
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.fetch import ALEX, INCEPTION
from cmi_lightning.guidance import DPS
from cmi_lightning.operators import BoxMask, PixelMask
from cmi_lightning.predict.folder import MANIFEST
from cmi_lightning.problem import Problem
from cmi_lightning.training import ScoreTraining

STEPS = 5


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make any use of the network an error, and torch.hub's cache an empty folder."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a callback tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(fetch, "download_sdist", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def garments(count: int, channels: int = 1, size: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(count, channels, size // 4, size // 4, generator=g) * 1.6 - 0.7
    return torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear")


def predict(
    folder: Path,
    *callbacks: L.Callback,
    x: Tensor | None = None,
    batch_size: int = 3,
    logger: Any = False,
    given: bool = False,
    ids: list[str] | None = None,
    sigma: float = 0.05,
    module: PosteriorSampler | None = None,
) -> Watch:
    """Restore images with a Gaussian prior through Lightning; return what happened."""
    x = garments(5) if x is None else x
    shape = tuple(x.shape[1:])
    if module is None:
        prior = GaussianMixture(torch.zeros(1, *shape), 0.3)
        operator = BoxMask(shape[1] // 2, 1)
        module = PosteriorSampler(
            prior, operator, guidances=[DPS(0.5)], num_steps=STEPS, noise=GaussianNoise(sigma)
        )
    keep = next((c for c in callbacks if isinstance(c, Watch)), Watch())
    others = [c for c in callbacks if c is not keep]
    options = {"batch_size": batch_size, "logger": logger, "inference_mode": False}
    restore(folder, module, items(x, given, ids), *others, keep, **options)
    return keep


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def png(path: Path, mode: str | None = None) -> np.ndarray:
    """Read a PNG, which must be of the given mode or is one of the pictures in RGB."""
    with Image.open(path) as image:
        assert image.mode == (mode or "RGB")
        return np.asarray(image)


def unit(x: Tensor) -> np.ndarray:
    """Pixels (H, W, C) in [0, 1] on the 8-bit grid, computed in numpy."""
    array = np.clip((x.double().numpy() + 1) / 2, 0, 1)
    return np.round(array * 255).transpose(1, 2, 0) / 255


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """skimage's SSIM (Wang et al.'s: 11×11 window, σ = 1.5), on reflected borders as torchmetrics'.

    It is the mean over channels, with population covariance and K = (0.01, 0.03).
    """
    a, b = (np.pad(v, ((5, 5), (5, 5), (0, 0)), mode="reflect") for v in (a, b))
    return structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
        channel_axis=2,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 20, 44)])
def test_metrics_equal_skimage_on_the_saved_pixels(tmp_path, shape, capsys):
    channels, height, width = shape
    x = garments(5, channels, width)[:, :, :height]
    keep = predict(tmp_path, RestorationMetrics(), ImageWriter(), x=x)
    rows = rows_of(tmp_path / "metrics.csv")
    assert [row["id"] for row in rows] == [f"set/{i}" for i in range(5)]
    restored, measured = keep.joined("restored"), keep.joined("measurement")
    for i, row in enumerate(rows):
        path = tmp_path / "restored" / f"{row['id']}.png"
        saved = png(path, "L" if channels == 1 else "RGB").reshape(height, width, -1) / 255
        assert np.array_equal(saved, unit(restored[i]))
        for suffix, image in {"": saved, "_measurement": unit(measured[i])}.items():
            psnr = peak_signal_noise_ratio(unit(x[i]), image, data_range=1.0)
            assert float(row[f"psnr{suffix}"]) == pytest.approx(psnr, abs=1e-4)
            ssim = reference_ssim(unit(x[i]), image)
            assert float(row[f"ssim{suffix}"]) == pytest.approx(ssim, abs=1e-5)
        y = keep.outputs[i // 3]["details"].problem.y[i % 3]
        operator = keep.outputs[i // 3]["details"].problem.operator
        residual = y - operator(keep.outputs[i // 3]["restored"])[i % 3]
        assert float(row["residual"]) == pytest.approx(float(residual.norm()), rel=1e-4)
        expected = 0.05 * (channels * (height * width - (height // 2) ** 2)) ** 0.5
        assert float(row["expected_residual"]) == pytest.approx(expected, rel=1e-5)
        assert (row["forwards"], row["vjps"]) == (str(STEPS), str(STEPS))
    summary = strict_json(tmp_path / "summary.json")
    psnrs = np.array([float(row["psnr"]) for row in rows])
    assert summary["images"] == 5
    assert summary["metrics"]["psnr"]["mean"] == pytest.approx(psnrs.mean())
    error = psnrs.std(ddof=1) / 5**0.5
    assert summary["metrics"]["psnr"]["standard_error"] == pytest.approx(error)
    assert summary["protocol"]["data_range"] == 1.0
    assert summary["run"]["steps"] == str(STEPS)
    shown = capsys.readouterr().out
    assert f"{psnrs.mean():.2f} ± {error:.2f}" in shown


def test_missing_networks_are_named_and_leave_no_number(tmp_path, capsys):
    predict(tmp_path, RestorationMetrics())
    shown, summary = capsys.readouterr().out, strict_json(tmp_path / "summary.json")
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    for weights in (ALEX, INCEPTION):
        (line,) = [note for note in summary["notes"] if note.startswith(weights.metric)]
        for part in (weights.file, weights.url, str(cache / weights.file), weights.option):
            assert part in line
        assert line in shown
    assert not {"lpips", "fid"} & set(summary["metrics"])
    assert "lpips" not in rows_of(tmp_path / "metrics.csv")[0]
    assert not cache.exists()


def test_networks_that_are_not_wanted_are_not_mentioned(tmp_path):
    predict(tmp_path, RestorationMetrics(lpips=None, fid=False))
    assert strict_json(tmp_path / "summary.json")["notes"] == []


def test_a_failed_download_is_a_note(tmp_path, monkeypatch):
    def fail(url: str, timeout: float) -> None:
        assert timeout <= 10
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    predict(tmp_path, RestorationMetrics(fid=False, fetch=True), x=garments(1))
    (note, _) = strict_json(tmp_path / "summary.json")["notes"]
    assert "download failed: OSError: no route" in note
    other = addinfourl(io.BytesIO(b"other"), {}, ALEX.url, 200)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: other)
    found = ALEX.locate(None, fetch=True)
    assert isinstance(found, str)
    assert "SHA-256 differs" in found
    assert list(ALEX.cached.parent.iterdir()) == []


@pytest.fixture
def alexnet(tmp_path: Path) -> Path:
    """A file shaped like torchvision's AlexNet, with random weights."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    state = {}
    for i, (outputs, inputs, kernel) in shapes.items():
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=g)
        state[f"features.{i}.weight"] = weight * (inputs * kernel**2) ** -0.5
        state[f"features.{i}.bias"] = torch.randn(outputs, generator=g) * 0.1
    torch.save(state, tmp_path / "alex.pth")
    return tmp_path / "alex.pth"


def test_lpips_with_given_weights(tmp_path, alexnet, capsys):
    x = garments(3)
    keep = predict(tmp_path, RestorationMetrics(lpips_weights=str(alexnet), fid=False), x=x)
    metric, state = Alex().read(alexnet), torch.load(alexnet)
    own = metric.net.state_dict()
    assert torch.equal(own["slice2.3.weight"], state["features.3.weight"])

    def features(image: Tensor) -> Tensor:
        return torch.from_numpy(unit(image)).float().permute(2, 0, 1).expand(1, 3, -1, -1) * 2 - 1

    rows = rows_of(tmp_path / "metrics.csv")
    for suffix, key in {"": "restored", "_measurement": "measurement"}.items():
        for row, image, truth in zip(rows, keep.joined(key), x, strict=True):
            distance = float(metric(features(image), features(truth)))
            assert float(row[f"lpips{suffix}"]) == pytest.approx(distance, rel=1e-3)
            assert distance > 0
    notes = strict_json(tmp_path / "summary.json")["notes"]
    assert any("is not the published alexnet-owt-7be5be79.pth" in note for note in notes)
    assert any("channel repeated" in note for note in notes)
    assert "LPIPS" in capsys.readouterr().out


def test_distances_of_sets_on_alexnet_have_names_of_their_own(tmp_path, alexnet):
    network = Alex(str(alexnet))
    both = [FeatureMetrics(network, sets=True), FeatureMetrics(), FeatureMetrics(VGG())]
    keep = predict(tmp_path, *both, x=garments(4))
    result = strict_json(tmp_path / "features.json")
    assert result["labels"] == {
        "lpips": "LPIPS (AlexNet)",
        "frechet": "Fréchet distance (AlexNet features)",
        "kernel": "kernel distance (AlexNet features)",
    }
    kinds = ("lpips", "frechet", "kernel")
    assert set(result["metrics"]) == {*kinds, *(f"{k}_measurement" for k in kinds)}
    said = [*result["metrics"], *result["labels"].values(), *result["notes"]]
    assert not any(word in text.lower() for text in said for word in ("fid", "kid"))
    shown = (garments(4), keep.joined("restored"), keep.joined("measurement"))
    stored = read_embeddings(tmp_path, [f"set/{i}" for i in range(4)])
    for i, x in enumerate(shown):
        features = network.embed(levels(x) / 255)
        np.testing.assert_allclose(stored[:, i], features, rtol=1e-3, atol=1e-4)
    assert network.features(garments(1))[-1].shape[1] == stored.shape[2] == 256
    assert result["protocol"]["lpips"].startswith("lpips 0.1")
    # The others have files of their own; the one without weights says so.
    garment = strict_json(tmp_path / "features-garment classifier.json")
    assert garment["network"]["file"] == "fashion_mnist_classifier.safetensors"
    missing = strict_json(tmp_path / "features-VGG16.json")
    assert missing["metrics"] == {}
    assert any("Run `cmi-lightning fetch lpips`" in note for note in missing["notes"])
    again = [FeatureMetrics(Alex(str(alexnet))), FeatureMetrics(), FeatureMetrics(VGG())]
    assert len(predict(tmp_path, *again, x=garments(4)).records) == 0
    with pytest.raises(InputError, match="Two FeatureMetrics are called 'AlexNet'"):
        predict(tmp_path / "b", FeatureMetrics(network), FeatureMetrics(network), x=garments(1))


def test_wrong_weights_stop_the_run_before_sampling(tmp_path):
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, words in {
        "none.pth": "lpips_weights: there is no file",
        "bad.pth": "does not hold the backbone of LPIPS",
        "text.pth": "LPIPS: Cannot read the weights",
    }.items():
        keep = Watch()
        with pytest.raises(InputError, match=words):
            predict(tmp_path, keep, RestorationMetrics(lpips_weights=str(tmp_path / name)))
        assert keep.records == []


@pytest.mark.slow
def test_fid_equals_the_formula(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as source

    with monkeypatch.context() as patch:  # a random network, saved as a weights file
        patch.setattr(source, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        network = source.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    x, metrics = (
        garments(6, 3),
        RestorationMetrics(lpips=None, fid_weights=str(tmp_path / "inception.pth")),
    )
    keep = predict(tmp_path, metrics, x=x)
    features = [network(to_uint8(v))[0].double() for v in (x, keep.joined("restored"))]
    means = [f.mean(0) for f in features]
    a, b = (f - m for f, m in zip(features, means, strict=True))
    # Tr (S₁S₂)^½ is the nuclear norm of the centred features' product
    cross = torch.linalg.matrix_norm(a @ b.T, "nuc") / 5
    fid = (
        (means[0] - means[1]).square().sum() + (a.square().sum() + b.square().sum()) / 5 - 2 * cross
    )
    summary = strict_json(tmp_path / "summary.json")
    assert summary["metrics"]["fid"]["mean"] == pytest.approx(float(fid), rel=1e-2)
    assert any(f"use {STABLE_FID} or more" in note for note in summary["notes"])


def test_without_ground_truth(tmp_path, capsys):
    module = PosteriorSampler(GaussianMixture(torch.zeros(1, 1, 32, 32)), num_steps=STEPS)
    predict(tmp_path, RestorationMetrics(), ImageWriter(), given=True, module=module)
    summary = strict_json(tmp_path / "summary.json")
    assert set(summary["metrics"]) == {
        "residual",
        "expected_residual",
        "forwards",
        "vjps",
        "second_order",
    }
    assert any(note.startswith("There is no ground truth") for note in summary["notes"])
    assert "psnr" not in rows_of(tmp_path / "metrics.csv")[0]
    assert png(tmp_path / "grid.png").shape[1] == 6 + 2 * 134
    assert "no ground truth" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["file", "estimate"])
def test_noise_levels_of_their_own_have_a_column(tmp_path, how):
    folder, levels = tmp_path / "given", {"0": 0.1, "b/1": 0.04, "2": 0.2}
    g = torch.Generator().manual_seed(0)
    for (name, level), x in zip(levels.items(), garments(3), strict=True):
        y = 0.5 * x + level * torch.randn(x.shape, generator=g)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        to_tile(y).save(folder / f"{name}.png")
    file = tmp_path / "levels.csv"  # on [0, 1], where levels are half as high
    file.write_text("id,sigma\n" + "".join(f"{n},{v / 2}\n" for n, v in levels.items()))
    sigmas = str(file) if how == "file" else "estimate"
    data = MeasurementFolderData(
        str(folder), "denoise", sigmas=sigmas, sigma_range="unit", batch_size=2
    )
    prior = GaussianMixture(torch.zeros(1, 1, 32, 32), 0.2)
    restore(tmp_path, PosteriorSampler(prior, num_steps=2), data, RestorationMetrics())
    rows = {row["id"]: row for row in rows_of(tmp_path / "metrics.csv")}
    assert set(rows) == set(levels)
    for name, level in levels.items():
        sigma = float(rows[name]["sigma"])
        assert sigma == pytest.approx(level, rel=1e-5 if how == "file" else 0.3)
        assert sigma == pytest.approx(data.images.sigmas[name], rel=1e-5)
        assert float(rows[name]["expected_residual"]) == pytest.approx(32 * sigma, rel=1e-5)
    predict(tmp_path / "same", RestorationMetrics())  # one level for all is in the summary
    assert "sigma" not in rows_of(tmp_path / "same/metrics.csv")[0]


def test_tiny_images_and_other_channels_give_notes(tmp_path, alexnet):
    metrics = RestorationMetrics(lpips_weights=str(alexnet), fid=False)
    predict(tmp_path / "a", metrics, x=garments(2, 3, 8))
    notes = strict_json(tmp_path / "a/summary.json")["notes"]
    assert any("SSIM is left out: it needs 11" in note for note in notes)
    assert any("LPIPS (alex) is left out: it needs 31" in note for note in notes)
    predict(tmp_path / "b", metrics, x=garments(2, 2, 32))
    notes = strict_json(tmp_path / "b/summary.json")["notes"]
    assert any("1 or 3 channels are needed, not 2" in note for note in notes)


def test_statistics_of_odd_columns():
    rows = [{"id": "a", "psnr": "inf", "ssim": "nan", "residual": "2"}]
    result, notes = statistics(rows)
    assert result["psnr"] == {"mean": None, "standard_error": None, "count": 1}
    assert result["residual"] == {"mean": 2.0, "standard_error": None, "count": 1}
    assert any("infinite" in note for note in notes)
    assert any("diverged" in note for note in notes)
    assert statistics([]) == ({}, [])


def test_perfect_and_diverged_images_still_give_json(tmp_path):
    class Spoil(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, *rest):
            outputs["restored"] = torch.full_like(outputs["restored"], float("nan"))
            outputs["measurement"] = outputs["truth"].clone()

    predict(tmp_path, Spoil(), RestorationMetrics(), ImageWriter())
    summary = strict_json(tmp_path / "summary.json")
    assert summary["metrics"]["psnr"]["mean"] is None
    assert summary["metrics"]["psnr_measurement"]["mean"] is None
    assert rows_of(tmp_path / "metrics.csv")[0]["psnr"] == "nan"


def test_a_crash_keeps_what_was_finished(tmp_path):
    (tmp_path / "summary.json").write_text("{}")  # of an earlier run
    (tmp_path / MANIFEST).write_text("summary.json\n")
    callbacks = (RestorationMetrics(), ImageWriter(), TrajectoryLogger(), Watch((1, 2)))
    with pytest.raises(RuntimeError, match="crash"):
        predict(tmp_path, *callbacks, batch_size=2)
    assert [row["id"] for row in rows_of(tmp_path / "metrics.csv")] == ["set/0", "set/1"]
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")}
    assert {name for name in written if not name.startswith("records/")} == {
        "grid.png", "film.png", "trajectory.png", "restored/set/0.png", "restored/set/1.png",
    }  # fmt: skip
    assert {row["count"] for row in rows_of(tmp_path / "trajectory.csv")} == {"2"}
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_pixels_are_clamped_and_rounded_never_stretched():
    x = torch.tensor([[[-2.0, -1.0, -0.2, 0.0], [0.2, 0.3, 1.0, 2.0]]])
    expected = np.round(np.clip((x[0].double().numpy() + 1) / 2, 0, 1) * 255)
    image = to_tile(x)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), expected)
    assert torch.isnan(levels(torch.tensor(float("nan"))))
    every = torch.arange(256.0)
    assert torch.equal(to_uint8(every / 127.5 - 1), every.to(torch.uint8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (2, None)])
def test_png_modes_and_ids_with_slashes(tmp_path, channels, mode):
    x = garments(2, channels, 16)
    keep = predict(tmp_path, ImageWriter(), x=x, ids=["a/b/0", "1"])
    folder = tmp_path / "restored"
    if mode is None:
        names = {"a/b/0_c0.png", "a/b/0_c1.png", "1_c0.png", "1_c1.png"}
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.png")} == names
        array = np.stack([png(folder / f"1_c{c}.png", "L") for c in range(2)], -1)
    else:
        assert (folder / "a" / "b" / "0.png").is_file()
        array = png(folder / "1.png", mode).reshape(16, 16, channels)
    assert np.array_equal(array / 255, unit(keep.joined("restored")[1]))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits(tmp_path, channels):
    x = garments(1, channels, 16)
    keep = predict(tmp_path, ImageWriter(bits=16), x=x, ids=["a"])
    expected = np.clip((keep.joined("restored")[0].double().numpy() + 1) / 2, 0, 1) * 65535
    names = [f"a_c{c}.png" for c in range(2)] if channels == 2 else ["a.png"]
    if channels < 4:  # a transparent image is read on white
        found = torch.cat([read_image(tmp_path / "restored" / name) for name in names])
        assert np.abs((found.double().numpy() + 1) / 2 * 65535 - expected).max() < 0.51
    header = (tmp_path / "restored" / names[0]).read_bytes()
    assert (header[24], header[25]) == (16, {3: 2, 4: 6}.get(channels, 0))
    assert len(predict(tmp_path, ImageWriter(bits=16), x=x, ids=["a"]).records) == 0
    assert len(predict(tmp_path, ImageWriter(), x=x, ids=["a"]).records) == STEPS  # other files


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ImageWriter(bits=12), "ImageWriter.bits must be one of 8, 16, got 12"),
        (lambda: ImageWriter(grid_rows=-1), "grid_rows must be a whole number, at least 0"),
        (lambda: TrajectoryLogger(save_every=0), "save_every must be a whole number, at least 1"),
        (lambda: TrajectoryLogger(max_images=-1), "max_images must be a whole number, at least 0"),
        (lambda: SamplingProgress(interval=-1.0), "interval must be a number, at least 0"),
        (lambda: SampleGrid(every_n_validations=0), "every_n_validations must be a whole number"),
        (lambda: RestorationMetrics(lpips="squeeze"), "lpips must be one of alex, vgg"),
        (lambda: ScoreTraining(TinyNetwork(), num_eval_levels=0), "num_eval_levels must be"),
    ],
)
def test_options_out_of_range(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("given", [False, True])
def test_inputs_are_written_where_they_are_wanted(tmp_path, given):
    x, folder = garments(2, 1, 16), tmp_path / "run"
    module = PosteriorSampler(GaussianMixture(torch.zeros(1, 1, 16, 16)), num_steps=STEPS)

    def write(*writers: L.Callback) -> Watch:
        options = dict(x=x, ids=["a/b/0", "../../up"], given=given, module=module)
        return predict(folder, *writers, **options)

    kinds = ["measurement", "restored"] + ["truth"] * (not given)
    write(ImageWriter())
    assert not (folder / "measurement").exists()
    assert len(write(ImageWriter()).records) == 0
    keep = write(ImageWriter(inputs=True))  # what is missing is seen, in the same folder
    assert len(keep.records) == STEPS
    names = [p.relative_to(folder).as_posix() for p in (folder / "records").rglob("*.json")]
    for record in map(strict_json, (folder / name for name in names)):
        i = 0 if record["id"] == "a/b/0" else 1
        assert sorted(name.split("/")[0] for name in record["images"]) == kinds
        for name in record["images"]:
            kind = name.split("/")[0]
            assert name.endswith("/a/b/0.png") if i == 0 else name.startswith(f"{kind}/up~")
            pixels = png(folder / name, "L")[..., None] / 255
            assert np.array_equal(pixels, unit(keep.joined(kind)[i]))
    assert len(names) == 2
    assert all(p.is_relative_to(folder) for p in tmp_path.rglob("*.*"))
    (folder / "measurement/a/b/0.png").unlink()
    assert len(write(ImageWriter(inputs=True)).records) == STEPS
    assert (folder / "measurement/a/b/0.png").is_file()
    assert len(write(ImageWriter(inputs=True)).records) == 0


def test_grid_shows_the_images_enlarged(tmp_path):
    logger = TensorBoardLogger(tmp_path / "tb", name="", version="")
    keep = predict(tmp_path, ImageWriter(grid_rows=4), logger=logger)
    grid = png(tmp_path / "grid.png")[..., 0]
    assert grid.shape == (22 + 4 * (128 + 6), 6 + 3 * (128 + 6))
    for column, key in enumerate(("truth", "measurement", "restored")):
        left, top = 6 + column * 134, 22 + 134
        block = grid[top : top + 128, left : left + 128]
        small = unit(keep.outputs[0][key][1])[..., 0] * 255
        assert np.array_equal(block, np.kron(small, np.ones((4, 4))))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert events.Tags()["images"] == ["grid"]


def test_grids_lay_transparency_on_white():
    clear = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    assert np.asarray(tile([[clear]])).min() == 255


def test_progress_prints_lines_where_there_is_no_terminal(tmp_path, capsys):
    predict(tmp_path, SamplingProgress(interval=0))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "σ = 0.05 on [−1, 1] = 0.025 on [0, 1]" in shown
    lines = shown.splitlines()
    assert any(f"images 0/5, step 1/{STEPS}, residual" in line for line in lines)
    assert any(f"images 3/5, step {STEPS}/{STEPS}, residual" in line for line in lines)
    assert any(line.startswith("sampled 5 images in 0:0") for line in lines)
    quiet = SamplingProgress(interval=3600)
    predict(tmp_path, quiet)
    assert "step 1/" not in capsys.readouterr().out
    quiet.disable()
    predict(tmp_path, quiet)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("crash", [False, True])
def test_progress_bars_come_and_go_on_a_terminal(tmp_path, monkeypatch, crash):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    callbacks = (SamplingProgress(), RestorationMetrics(), Watch((1, 0) if crash else None))
    if crash:
        with pytest.raises(RuntimeError, match="crash"):
            predict(tmp_path, *callbacks)
    else:
        predict(tmp_path, *callbacks)
    shown = screen.getvalue()
    assert "images" in shown
    assert "noise alone" in shown
    assert shown.count("\x1b[?25h") >= shown.count("\x1b[?25l") > 0  # the cursor is back
    console.print("alone")  # a bar that is still there would be drawn again
    assert screen.getvalue().removeprefix(shown) == "alone\n"
    if not crash:
        assert "5/5" in shown
        assert shown.rindex("PSNR") > shown.rindex("\x1b[?25h")


def test_trajectory_averages_over_all_samples(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    keep = predict(tmp_path, TrajectoryLogger(per_sample=True), logger=logger)
    rows = rows_of(tmp_path / "trajectory.csv")
    names = {"residual", *(n for n in keep.records[0].log if n != "residual")}
    assert len(names) > 1
    assert {row["name"] for row in rows} == names
    assert len(rows) == STEPS * len(names)
    record = keep.records[0]
    first = next(row for row in rows if row["name"] == "residual")
    assert (first["step"], int(first["index"]), first["count"]) == ("1", record.index, "5")
    assert float(first["alpha"]) == pytest.approx(record.t.alpha, rel=1e-5)
    assert float(first["set/1"]) == pytest.approx(float(record.log["residual"][1]), rel=1e-5)
    logged = {int(row["step"]): row for row in rows_of(tmp_path / "metrics.csv")}
    assert sorted(logged) == list(range(1, STEPS + 1))
    for step, row in logged.items():
        same = [r for r in keep.records if r.num_steps - r.index == step]
        for name in names:
            mean = float(torch.cat([r.log[name] for r in same]).mean())
            assert float(row[f"trajectory/{name}"]) == pytest.approx(mean, rel=1e-5)


def test_film_strip_and_plot(tmp_path):
    keep = predict(tmp_path, TrajectoryLogger(max_images=4, save_every=2))
    film = png(tmp_path / "film.png")[..., 0]
    # 4 samples of two batches; steps 2, 4 and the last, then the truth
    assert film.shape == (22 + 4 * 134, 6 + 4 * 134)
    x0 = unit(keep.records[1].x0[0])[..., 0] * 255
    assert np.array_equal(film[22 : 22 + 128, 6 : 6 + 128], np.kron(x0, np.ones((4, 4))))
    plot = png(tmp_path / "trajectory.png")
    assert plot.shape[0] > 100
    assert plot.std() > 5
    predict(tmp_path / "none", TrajectoryLogger(max_images=0))
    assert not (tmp_path / "none" / "film.png").exists()


def test_plot_survives_a_diverged_run():
    plot = plot_curves({"residual": {1: float("nan"), 2: 1.0}, "x": {1: float("inf")}}, 0.5)
    assert plot is not None
    assert plot.width


def test_noise_norm_counts_no_padding():
    mask = torch.zeros(2, 4, 4)
    mask[0, :2], mask[1, 0] = 1, 1
    operator = PixelMask.from_mask(mask, torch.zeros(2, 3, 4, 4))
    problem = Problem(operator(torch.zeros(2, 3, 4, 4)), operator, 0.1)
    assert torch.allclose(problem.noise_norm, 0.1 * torch.tensor([24.0, 12.0]).sqrt())


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return self.dropout(self.conv(x))


def test_sample_grid_leaves_training_alone(tmp_path):
    class Data(L.LightningDataModule):
        def loader(self) -> DataLoader:
            items = [{"x": x, "id": str(i)} for i, x in enumerate(garments(8, size=16))]
            return DataLoader(items, batch_size=4)

        train_dataloader = val_dataloader = loader

    def fit(folder: Path, *callbacks: L.Callback) -> ScoreTraining:
        L.seed_everything(0, verbose=False)
        module = ScoreTraining(TinyNetwork())
        trainer(folder, *callbacks, max_epochs=4).fit(module, datamodule=Data())
        return module

    grid = SampleGrid(every_n_validations=2, num_samples=5, num_steps=3)
    watched, alone = fit(tmp_path, grid), fit(tmp_path / "alone")
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["0000004.png", "0000008.png"]
    assert png(tmp_path / "samples" / names[0]).shape[:2] == (6 + 2 * 118, 6 + 3 * 118)
    assert all(p.requires_grad for p in watched.network.parameters())
    for a, b in zip(watched.network.parameters(), alone.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("entries", [[{}], [{"id": "a"}, {"id": "b"}]])
def test_records_that_do_not_belong_to_the_samples_are_refused(entries):
    class Odd(RecordingCallback):
        key = "odd"

        def measure(self, outputs):
            return entries

    outputs = {"id": ["a", "b"], "records": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(InputError, match=r"Odd\.measure must return a dictionary for each of 2 s"):
        Odd().on_predict_batch_end(None, None, outputs, None, 0)
