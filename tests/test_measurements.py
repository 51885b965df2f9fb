"""Given measurements: a noise level for each, from a table or estimated, and what is left out."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predicting import cli
from predicting import ready as set_up
from skimage.restoration import estimate_sigma as skimage_estimate
from torch import Tensor

from cmi_lightning import example
from cmi_lightning.data import ImageFolderData, MeasurementFolderData
from cmi_lightning.data.noise_levels import estimate_sigma
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity


def save(x: Tensor, path: Path) -> None:
    """Write x (1, H, W) in [−1, 1] as a PNG of 8 bits."""
    pixels = ((x[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def white(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def folder(path: Path, count: int = 3, size: int = 16) -> Path:
    for i in range(count):
        save(0.3 * white((1, size, size), i), path / f"{i}.png")
    return path


def ready(path: Path, **options: object) -> MeasurementFolderData:
    return set_up(MeasurementFolderData(str(path), **options))


def batch_of(data: MeasurementFolderData) -> dict:
    return next(iter(data.predict_dataloader()))


def table(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# The estimator --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 40), (4, 17, 64)])
def test_estimator_is_scikit_images(shape):
    y = 0.2 * white(shape) + torch.linspace(-0.5, 0.5, shape[-1])
    expected = skimage_estimate(y.double().numpy(), channel_axis=0, average_sigmas=True)
    assert estimate_sigma(y) == pytest.approx(expected, rel=1e-12)
    everything = torch.ones(shape[1:], dtype=torch.bool)
    assert estimate_sigma(y, everything) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("sigma", "bias"), [(0.1, 1.107), (0.2, 1.033), (0.3, 0.998)])
def test_estimates_on_the_shipped_garments(shipped_images, sigma, bias):
    y = shipped_images + sigma * white(tuple(shipped_images.shape))
    ratios = torch.tensor([estimate_sigma(image) / sigma for image in y])
    assert float(ratios.mean()) == pytest.approx(bias, abs=0.03)  # as its docstring says
    assert abs(float(ratios.mean()) - 1) < 0.15
    assert float(ratios.std()) < 0.15


def test_missing_pixels_have_no_part_in_the_estimate():
    y = 0.1 * white((1, 64, 64))
    known = torch.ones(64, 64, dtype=torch.bool)
    known[10:40, 20:50] = False
    damaged = y.clone()
    damaged[:, ~known] = 5 * white((1, 900), 1)
    assert estimate_sigma(damaged, known) == estimate_sigma(y, known)
    assert estimate_sigma(damaged, known) == pytest.approx(0.1, rel=0.1)
    assert estimate_sigma(damaged) > 0.125  # the mask does matter
    few = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    with pytest.raises(ValueError, match="wavelet coefficients"):
        estimate_sigma(y, few)


def test_estimates_through_files_are_printed(tmp_path, capsys, shipped_images):
    true = [0.1, 0.15, 0.2, 0.1, 0.15, 0.2]
    for i, sigma in enumerate(true):  # of lower contrast, so that nothing is clipped
        save(0.4 * shipped_images[i] + sigma * white((1, 32, 32), i), tmp_path / f"{i}.png")
    data = ready(tmp_path, sigmas="estimate")
    found = batch_of(data)["sigma"]
    assert found.shape == (6,)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(true), rtol=0.25)
    assert float((found / torch.tensor(true)).mean()) == pytest.approx(1, abs=0.12)
    printed = capsys.readouterr().out
    assert f"0 {found[0]:.4g}, 1 {found[1]:.4g}" in printed
    assert "6 images" in printed
    assert "black or white" not in printed
    assert "rarely the whole error" not in printed
    data.setup("predict")
    assert not capsys.readouterr().out  # once, though the trainer sets up again


def test_clipped_noise_is_said_to_be_underestimated(tmp_path, capsys, shipped_images):
    for i in range(16):
        save(shipped_images[i] + 0.2 * white((1, 32, 32), i), tmp_path / f"{i}.png")
    found = batch_of(ready(tmp_path, sigmas="estimate"))["sigma"]
    assert "16 images more than 5% of the values are black or white" in capsys.readouterr().out
    assert 0.55 < float(found.mean()) / 0.2 < 0.75  # 0.66, as the docstring says


def test_an_estimate_that_jpeg_hides_is_doubted(tmp_path, capsys):
    Image.open(example("valley2")).save(tmp_path / "x.jpg", quality=20)
    sigma = float(batch_of(ready(tmp_path, channels=3, sigmas="estimate"))["sigma"])
    assert sigma < 0.01  # the error itself is 0.07
    assert "set model.noise.sigma, say 0.05" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["flat", "small"])
def test_what_cannot_be_estimated_is_refused(tmp_path, kind):
    x = torch.zeros(1, 32, 32) if kind == "flat" else 0.1 * white((1, 12, 12))
    save(x, tmp_path / "x.png")
    with pytest.raises(
        InputError, match=r"the noise of 'x' cannot be estimated .*; give it in a CSV"
    ):
        ready(tmp_path, sigmas="estimate")


# The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "factor"), [("signed", 1), ("unit", 2)])
def test_sigmas_of_a_table(tmp_path, unit, factor):
    folder(tmp_path / "y")
    text = "\ufeffID, Sigma\n2,0.3\n0,0.1\n\n1,2e-1\n"
    csv_file = table(tmp_path / "s.csv", text)
    batch = batch_of(ready(tmp_path / "y", sigmas=csv_file, sigma_range=unit))
    assert batch["id"] == ["0", "1", "2"]
    assert torch.allclose(batch["sigma"], factor * torch.tensor([0.1, 0.2, 0.3]))
    assert "sigma" not in batch_of(ready(tmp_path / "y"))


def test_a_table_may_hold_images_beyond_the_limit(tmp_path):
    folder(tmp_path / "y")
    csv_file = table(tmp_path / "s.csv", "id,sigma\n2,0.3\n0,0.1\n")
    assert len(ready(tmp_path / "y", sigmas=csv_file, limit=1).images) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(
            (x, "must start with the line id,sigma")
            for x in ("", "id;sigma\n0;1\n", "0,0.1\n1,0.1\n")
        ),
        ("id,sigma\n0,0.1\n", r"no sigma for 2 of 3 measurements, such as '1'"),
        ("id,sigma\n0,0.1\n1,much\n2,1\n", r"line 3: sigma of '1' must be a number .* 'much'"),
        ("id,sigma\n0,-0.1\n", "line 2: sigma of '0' must be a number above 0, got '-0.1'"),
        *((f"id,sigma\n0,{x}\n", "a number above 0") for x in ("0", "nan", "inf", "1_0", "")),
        ("id,sigma\n0,0.1\n0,0.2\n", r"line 3: '0' occurs a second time"),
        ("id,sigma\n0.png,0.1\n", r"line 2: there is no measurement '0\.png'; ids are paths"),
        ("id,sigma\n0,0.1,5\n", "line 2: 3 cells, not 2"),
    ],
)
def test_bad_tables(tmp_path, text, words):
    folder(tmp_path / "y")
    with pytest.raises(InputError, match=words) as caught:
        ready(tmp_path / "y", sigmas=table(tmp_path / "s.csv", text))
    assert "\n" not in str(caught.value)


def test_tables_that_are_none(tmp_path):
    folder(tmp_path / "y")
    (tmp_path / "latin").write_bytes(b"id,sigma\n\xe9,1\n")
    for name, words in {"absent": "there is no file", "y": "no file", "latin": "UTF-8"}.items():
        with pytest.raises(InputError, match=words):
            ready(tmp_path / "y", sigmas=str(tmp_path / name))


# What the sampler makes of it -----------------------------------------------------------------


def test_the_problem_takes_each_images_sigma(tmp_path):
    folder(tmp_path / "y", 2, 32)
    csv_file = table(tmp_path / "s.csv", "id,sigma\n0,0.1\n1,0.4\n")
    noise = SampleNoise(0, ["0", "1"])
    data = ready(tmp_path / "y", sigmas=csv_file)
    problem, _ = data.problem(batch_of(data), Identity(), 7.0, noise)
    assert torch.allclose(problem.std.flatten(), torch.tensor([0.1, 0.4]))
    plain, _ = data.problem(batch_of(ready(tmp_path / "y")), Identity(), 7.0, noise)
    assert plain.noise_std == 7.0


def test_each_image_is_restored_as_if_alone(tmp_path):
    """ΠGDM uses σ: with a table, each image is what a run with that σ for all makes of it."""
    folder(tmp_path / "y", 2, 32)
    csv_file = table(tmp_path / "s.csv", "id,sigma\n0,0.1\n1,0.4\n")

    def run(name: str, *options: str) -> Path:
        out = tmp_path / name
        common = "predict -c prior/fashion_mnist -c guidance/pigdm --data=MeasurementFolderData"
        common += f" --data.measurements={tmp_path}/y --model.num_steps=4 --trainer.logger=false"
        common += f" --trainer.callbacks=[ImageWriter] --trainer.default_root_dir={out}"
        assert cli(common, *options) == 0
        return out

    both = run("both", f"--data.sigmas={csv_file}")
    for i, sigma in enumerate((0.1, 0.4)):
        alone = run(f"alone{i}", f"--model.noise.sigma={sigma}")
        a, b = (np.asarray(Image.open(out / f"restored/{i}.png"), int) for out in (both, alone))
        assert np.abs(a - b).max() <= 1
    other = np.asarray(Image.open(tmp_path / "alone1/restored/0.png"), int)
    assert np.abs(other - np.asarray(Image.open(both / "restored/0.png"), int)).max() > 3


@pytest.mark.parametrize("kind", ["inpaint", "blur", "downsample"])
def test_every_kind_runs_without_ground_truth(tmp_path, capsys, kind):
    folder(tmp_path / "y", 2, 16 if kind == "downsample" else 32)
    known = torch.ones(1, 32, 32)
    known[:, 8:14, 8:14] = -1
    save(known, tmp_path / "m.png")
    np.save(tmp_path / "k.npy", np.ones((3, 3)))
    extra = {
        "inpaint": f"masks={tmp_path / 'm.png'}",
        "blur": f"kernels={tmp_path / 'k.npy'}",
        "downsample": "factor=2",
    }
    command = "predict -c prior/fashion_mnist -c guidance/dps --data=MeasurementFolderData"
    command += f" --data.kind={kind} --data.measurements={tmp_path}/y --data.{extra[kind]}"
    command += " --data.sigmas=estimate --model.num_steps=2"
    assert cli(command, f"--trainer.default_root_dir={tmp_path}/out") == 0
    printed = capsys.readouterr().out
    assert "There is no ground truth: PSNR, SSIM, LPIPS and FID are left out" in printed
    assert printed.count("FID") == 1  # nothing on fetching a network that would be of no use
    assert "σ of each image, estimated by wavelets" in " ".join(printed.split())
    with open(tmp_path / "out/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert not {"psnr", "ssim", "lpips"} & set(rows[0])
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert not {"psnr", "ssim", "fid"} & set(summary["metrics"])
    with Image.open(tmp_path / "out/restored/1.png") as image:
        assert image.size == (32, 32)


# Unreadable files -----------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_reported(tmp_path, capsys):
    folder(tmp_path, 20)
    for i in range(7):
        (tmp_path / f"bad{i}.png").write_bytes(b"nonsense")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    for data in (ImageFolderData(str(tmp_path)), MeasurementFolderData(str(tmp_path))):
        assert len(set_up(data).images) == 20
        assert batch_of(data)["id"][0] == "0"
        assert set(data.skipped) == {
            *(str(tmp_path / f"bad{i}.png") for i in range(7)),
            str(tmp_path / "gone.png"),
        }
        assert all(reason.startswith("Cannot read the image") for reason in data.skipped.values())
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 6
        assert lines[-1].startswith("skipped 8 of 28 images")
        data.setup("predict")
        assert not capsys.readouterr().err
        data.strict = True
        with pytest.raises(InputError, match=r"Cannot read the image '.*bad0\.png'"):
            data.setup("predict")


def test_a_folder_of_nothing_readable_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    for data in (ImageFolderData(str(tmp_path)), MeasurementFolderData(str(tmp_path))):
        with pytest.raises(InputError, match=r"none of 2 images can be read.*a\.png"):
            set_up(data)


def test_an_unreadable_mask_leaves_out_its_image_alone(tmp_path):
    folder(tmp_path / "y")
    for i in range(3):
        save(torch.ones(1, 16, 16), tmp_path / f"m/{i}.png")
    (tmp_path / "m/1.png").write_bytes(b"nonsense")
    data = ready(tmp_path / "y", kind="inpaint", masks=str(tmp_path / "m"))
    assert batch_of(data)["id"] == ["0", "2"]
    (reason,) = data.skipped.values()
    assert str(tmp_path / "m/1.png") in reason
    for strict, masks in ((True, "m"), (False, "m/1.png")):  # one mask of all is no single file
        with pytest.raises(InputError, match=r"Cannot read the image '.*m/1\.png'"):
            ready(tmp_path / "y", kind="inpaint", masks=str(tmp_path / masks), strict=strict)


def test_sigmas_of_skipped_images_are_not_missed(tmp_path):
    folder(tmp_path / "y")
    (tmp_path / "y/1.png").write_bytes(b"nonsense")
    for text in ("id,sigma\n0,1\n2,1\n", "id,sigma\n0,1\n1,1\n2,1\n"):
        data = ready(tmp_path / "y", sigmas=table(tmp_path / "s.csv", text))
        assert len(data.images) == 2


def test_sizes_that_would_not_fit_into_memory_are_refused(tmp_path):
    folder(tmp_path, 1)
    with pytest.raises(InputError, match=r"data\.factor would make images of 1600000×1600000"):
        ready(tmp_path, kind="downsample", factor=100_000)
    with pytest.raises(InputError, match=r"data\.size would make images of 100000×100000"):
        set_up(ImageFolderData(str(tmp_path), size=100_000))
    Image.new("L", (20000, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line\.png' would make .* crop that image"):
        set_up(ImageFolderData(str(tmp_path), size=1000))
    with pytest.raises(
        InputError, match=r"data\.num_workers must be a whole number, at least 0, got -1"
    ):
        set_up(ImageFolderData(str(tmp_path), num_workers=-1))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(3), "shape"),
        (np.ones((2, 3, 4)), "shape"),
        (np.ones((0, 3)), "positive sum"),
        (np.ones((1, 2049)), "shape"),
        (np.ones((2, 2), complex), "complex"),
        (np.array([["1"]]), "type"),
        (np.zeros((2, 2)), "positive sum"),
        (np.array([[1.0, -2.0]]), "positive sum"),
        (np.array([[np.inf, 1.0]]), "finite"),
        (np.full((2, 2), 1e308), "finite"),
        (np.array([[1e300, -1e300, 1e-10]]), "cancel"),
        (np.array([[1e8, -1e8, 1.0]]), "cancel"),
    ],
)
def test_kernels_that_are_none(tmp_path, array, words):
    folder(tmp_path / "y")
    np.save(tmp_path / "k.npy", array)
    with pytest.raises(InputError, match=words):
        ready(tmp_path / "y", kind="blur", kernels=str(tmp_path / "k.npy"))
