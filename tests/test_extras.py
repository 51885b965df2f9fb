"""Masks and kernels as people save them: understood, or refused in one sentence."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predicting import cli, ready
from scipy import ndimage

from cmi_lightning.data import MeasurementFolderData
from cmi_lightning.data.extras import read_kernel, read_mask
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity

SIDE = 32
HOLE = np.zeros((SIDE, SIDE), bool)
HOLE[8:24, 8:24] = True
PHOTO = np.random.default_rng(0).integers(30, 226, (SIDE, SIDE, 3), dtype=np.uint8)


def paint(outside: object, hole: object, channels: int = 1) -> np.ndarray:
    """Pixels of one value, with another in the hole."""
    array = np.empty((SIDE, SIDE, channels), np.uint8)
    array[:], array[HOLE] = outside, hole
    return array.squeeze()


def photo_with(hole: object) -> np.ndarray:
    array = np.dstack([PHOTO, np.full((SIDE, SIDE), 255, np.uint8)])
    array[HOLE] = hole
    return array


def blurred() -> np.ndarray:
    return (ndimage.gaussian_filter((~HOLE).astype(float), 1) * 255).astype(np.uint8)


UNDERSTOOD = {
    "black on white": paint(255, 0),
    "hole in the alpha of white": paint((255, 255, 255, 255), (255, 255, 255, 0), 4),
    "the same, black hidden": paint((255, 255, 255, 255), (0, 0, 0, 0), 4),
    "hole in gray and alpha": paint((255, 255), (255, 0), 2),
    "hole in a photograph": photo_with((255, 255, 255, 0)),
    "black strokes on a clear white layer": paint((255, 255, 255, 0), (0, 0, 0, 255), 4),
    "0 and 1": paint(1, 0),
    "0 and 1 in 16 bits": paint(1, 0).astype(np.uint16),
    "0 and 255 in 16 bits": paint(255, 0).astype(np.uint16),
    "yellow brush": paint(255, (255, 255, 0), 3),
    "red brush": paint(255, (255, 0, 0), 3),
    "light gray brush": paint(255, 230),
    "dark gray and black": paint(100, 0),
    "one bit": Image.fromarray(~HOLE),
    "palette": Image.fromarray(paint(255, (255, 0, 255), 3)).quantize(2),
    "jpeg-like": np.clip(
        paint(250, 4) + np.random.default_rng(1).integers(0, 6, (SIDE, SIDE)), 0, 255
    ).astype(np.uint8),
}
REFUSED = {
    "black": (paint(0, 0), "no white .* inverted"),
    "clear": (paint((255, 255, 255, 0), (0, 0, 0, 0), 4), "transparent"),
    "bright strokes on a clear layer": (paint((0, 0, 0, 0), (255, 255, 0, 255), 4), "transparent"),
    "red strokes on a clear layer": (paint((255, 255, 255, 0), (255, 0, 0, 255), 4), "transparent"),
    "black with a hole": (paint((0, 0, 0, 255), (0, 0, 0, 0), 4), "no white"),
    "photograph": (PHOTO, "picture or a gradient"),
    "gradient": (np.tile(np.arange(0, 256, 8, dtype=np.uint8), (SIDE, 1)), "picture or a gradient"),
    "soft bright brush": (
        (255 - 40 * ndimage.gaussian_filter(HOLE.astype(float), 1)).astype(np.uint8),
        "no black .missing. pixel, but others than white",
    ),
}


def saved(picture: np.ndarray | Image.Image, path: Path) -> Path:
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path)
    return path


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_masks_that_are_understood(tmp_path, name):
    mask = read_mask(saved(UNDERSTOOD[name], tmp_path / "m.png"))
    assert np.array_equal(~mask, HOLE)


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_are_refused(tmp_path, name):
    picture, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as caught:
        read_mask(saved(picture, tmp_path / "m.png"))
    assert "\n" not in str(caught.value)
    assert re.search(f"^The mask '{tmp_path}/m.png' has|is a picture", str(caught.value))


def test_soft_masks_are_cut_at_one_half(tmp_path):
    soft = blurred()
    assert np.array_equal(read_mask(saved(soft, tmp_path / "m.png")), soft > 127.5)


@pytest.mark.parametrize("values", [~HOLE, 1.0 * ~HOLE, 255 * ~HOLE, ~HOLE * np.float32(0.8)])
def test_masks_as_arrays(tmp_path, values):
    np.save(tmp_path / "m.npy", values)
    assert np.array_equal(~read_mask(tmp_path / "m.npy"), HOLE)


@pytest.mark.parametrize("values", [np.ones(3), np.full((2, 2), np.nan), -np.ones((2, 2))])
def test_arrays_that_are_no_masks(tmp_path, values):
    np.save(tmp_path / "m.npy", values)
    with pytest.raises(InputError, match=r"mask '.*m\.npy'"):
        read_mask(tmp_path / "m.npy")


def measurements(folder: Path, names: tuple[str, ...] = ("0", "1"), suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(PHOTO).save(folder / f"{name}.{suffix}")
    return folder


def set_up(folder: Path, **options: object) -> MeasurementFolderData:
    return ready(MeasurementFolderData(str(folder), **options))


def test_the_share_that_is_missing_is_said(tmp_path, capsys):
    y = measurements(tmp_path / "y")
    (tmp_path / "m").mkdir()
    saved(paint(255, 0), tmp_path / "m/0.png")
    saved(paint(255, 255), tmp_path / "m/1.png")
    assert set_up(y, kind="inpaint", masks=str(tmp_path / "m")).given.endswith(
        "(0 % to 25 % missing)"
    )
    one = str(tmp_path / "m/0.png")
    assert set_up(y, kind="inpaint", masks=one).given.endswith("0.png (25 % missing)")
    command = "predict -c prior/fashion_mnist -c guidance/none --model.num_steps=1"
    command += f" --data=MeasurementFolderData --data.kind=inpaint --data.masks={one}"
    command += f" --data.channels=1 --data.measurements={y} --trainer.callbacks=[SamplingProgress]"
    assert cli(command, f"--trainer.default_root_dir={tmp_path}/o") == 0
    assert "(25 % missing)" in capsys.readouterr().out


def test_inverted_masks_are_suspected(tmp_path, capsys):
    y = tmp_path / "y"
    y.mkdir()
    for name in "01":
        picture = PHOTO.copy()
        picture[HOLE] = 0
        Image.fromarray(picture).save(y / f"{name}.png")
    set_up(y, kind="inpaint", masks=str(saved(paint(255, 0), tmp_path / "m.png")))
    assert not capsys.readouterr().err
    set_up(y, kind="inpaint", masks=str(saved(paint(0, 255), tmp_path / "i.png")))
    assert "2 of 2 images have known pixels of one value" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["mask.png", "masks", "deep/er/mask.png"])
@pytest.mark.parametrize("kind", ["inpaint", "blur"])
def test_what_goes_with_measurements_is_none_itself(tmp_path, where, kind):
    y = measurements(tmp_path)
    path = tmp_path / where
    for each in [path] if path.suffix else [path / "0.png", path / "1.png"]:
        each.parent.mkdir(parents=True, exist_ok=True)
        saved(paint(255, 0), each)
    option = {"inpaint": "masks", "blur": "kernels"}[kind]
    (tmp_path / "alias").symlink_to(path)  # named by another way
    for given in (path, tmp_path / "alias"):
        data = set_up(y, kind=kind, **{option: str(given)})
        assert [name for name, _ in data.images.files] == ["0", "1"]


@pytest.mark.parametrize("suffix", ["PNG", "jpg", "TIFF", "bmp", "npy"])
@pytest.mark.parametrize("kind", ["inpaint", "blur"])
def test_other_suffixes_match(tmp_path, suffix, kind):
    y = measurements(tmp_path / "y")
    (tmp_path / "m").mkdir()
    for name in "01":
        if suffix == "npy":
            np.save(tmp_path / f"m/{name}.npy", ~HOLE)
        else:
            saved(paint(255, 0), tmp_path / f"m/{name}.{suffix}")
    option, key = {"inpaint": ("masks", "mask"), "blur": ("kernels", "kernel")}[kind]
    item = set_up(y, kind=kind, **{option: str(tmp_path / "m")}).images[1]
    assert np.array_equal(item[key] > 1e-4, ~HOLE)


def test_two_files_for_one_measurement_are_refused(tmp_path):
    y = measurements(tmp_path / "y", ("0",))
    (tmp_path / "m").mkdir()
    for suffix in ("png", "bmp"):
        saved(paint(255, 0), tmp_path / f"m/0.{suffix}")
    with pytest.raises(InputError, match="has more than one file for the measurement '0'"):
        set_up(y, kind="inpaint", masks=str(tmp_path / "m"))


def test_kernels_beside_their_measurements_are_arrays(tmp_path):
    y = measurements(tmp_path)
    np.save(tmp_path / "0.npy", np.ones((3, 3)))
    np.save(tmp_path / "1.npy", np.eye(3))
    data = set_up(y, kind="blur", kernels=str(y))
    assert np.allclose(data.images[1]["kernel"], np.eye(3) / 3)
    with pytest.raises(InputError, match=r"has nothing for the measurement '0'; .* one '0\.npy'"):
        set_up(measurements(tmp_path / "y"), kind="inpaint", masks=str(tmp_path / "y"))


@pytest.mark.parametrize("shape", [(5, 5), (4, 4), (3, 6), (1, 2)])
@pytest.mark.parametrize("convention", ["correlation", "convolution"])
def test_both_conventions_of_kernels(tmp_path, convention, shape):
    kernel = np.random.default_rng(0).random(shape)
    np.save(tmp_path / "k.npy", kernel)
    y = measurements(tmp_path / "y", ("0",))
    data = set_up(
        y, kind="blur", kernels=str(tmp_path / "k.npy"), kernel_convention=convention, channels=1
    )
    (batch,) = data.predict_dataloader()
    problem, like = data.problem(batch, Identity(), 0.0, SampleNoise(0, ["0"]))
    x = torch.rand(like.shape)
    scipy = {"correlation": ndimage.correlate, "convolution": ndimage.convolve}[convention]
    expected = scipy(x[0, 0].numpy(), kernel / kernel.sum(), mode="mirror")
    assert np.allclose(problem.operator(x)[0, 0], expected, atol=1e-5)
    assert convention in data.given
    if convention == "correlation":
        assert torch.equal(read_kernel(tmp_path / "k.npy"), batch["kernel"][0])


def test_a_convention_that_there_is_not(tmp_path):
    with pytest.raises(InputError, match=r"data\.kernel_convention must be one of"):
        MeasurementFolderData(str(tmp_path), "blur", kernels="k", kernel_convention="fourier")
    with pytest.raises(InputError, match=r"kernel_convention is not used by data\.kind=denoise"):
        MeasurementFolderData(str(tmp_path), kernel_convention="convolution")
