"""Image files as tensors: hidden colours, profiles, depths, formats that are and are not read."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_files import icc, png16
from PIL import Image, ImageCms
from predicting import ready

from cmi_lightning.data import ImageFolderData, MeasurementFolderData
from cmi_lightning.data.images import Decoding, read_image
from cmi_lightning.errors import InputError

RNG = np.random.default_rng(0)


def signed(array: np.ndarray, white: float = 255) -> torch.Tensor:
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array.astype(np.float64) / white * 2 - 1).float()


def set_up(folder: Path, **options: object) -> ImageFolderData:
    return ready(ImageFolderData(str(folder), **options))


# Transparency ---------------------------------------------------------------------------------


HIDDEN = {  # mode: what is hidden about a white square, white, and how it is saved
    "RGBA": ((255, 0, 0, 0), (255, 255, 255, 255), {}),
    "LA": ((0, 0), (255, 255), {}),
    "P": (0, 1, {"transparency": 0}),
    "RGB": ((255, 0, 0), (255, 255, 255), {"transparency": (255, 0, 0)}),
    "L": (7, 255, {"transparency": 7}),
    "RGB of 16 bits": (3, 65535, {}),
    "L of 16 bits": (1, 65535, {}),
}


def hidden(mode: str, path: Path) -> None:
    colour, white, options = HIDDEN[mode]
    if "16" in mode:
        array = np.full((4, 4, colour), 700, np.uint16)
        array[1:3, 1:3] = white
        path.write_bytes(png16(array, key=700))
        return
    image = Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([255, 0, 0, 255, 255, 255])
    image.paste(white, (1, 1, 3, 3))
    image.save(path, **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", HIDDEN)
def test_transparent_pixels_are_seen_on_the_background(tmp_path, capsys, mode, channels):
    hidden(mode, tmp_path / "x.png")
    for background, value in (("white", 1), ("black", -1), ("rgb(128,128,128)", 128 / 127.5 - 1)):
        x = read_image(tmp_path / "x.png", Decoding(channels, background))
        assert x.shape == (channels, 4, 4)
        assert torch.allclose(x[:, 0], torch.full((channels, 4), float(value)), atol=1e-6)
        assert torch.allclose(x[:, 1, 1], torch.ones(channels), atol=1e-6)
    data = set_up(tmp_path, channels=channels)
    said = capsys.readouterr().err
    assert "1 of 1 images have transparent pixels, seen on white (data.background)" in said
    data.setup("predict")
    assert not capsys.readouterr().err  # said once


@pytest.mark.parametrize("mode", HIDDEN)
def test_alpha_is_kept_where_it_is_asked_for(tmp_path, capsys, mode):
    hidden(mode, tmp_path / "x.png")
    x = set_up(tmp_path, channels=4).images[0]["x"]
    assert (x[3, 0] == -1).all()
    assert x[3, 1, 1] == 1
    assert not capsys.readouterr().err


def test_half_transparent_pixels_are_mixed_and_opaque_ones_kept(tmp_path):
    a = RNG.integers(0, 256, (6, 6, 4), dtype=np.uint8)
    a[:3, :, 3] = 255
    Image.fromarray(a).save(tmp_path / "x.png")
    x = read_image(tmp_path / "x.png", Decoding(3))
    alpha = a[..., 3:] / 255
    assert torch.allclose(x, signed(a[..., :3] * alpha + 255 * (1 - alpha)), atol=1e-5)
    assert torch.equal(x[:, :3], torch.from_numpy(a[:3, :, :3]).permute(2, 0, 1) / 127.5 - 1)
    assert read_image(tmp_path / "x.png").shape[0] == 4  # its own channels


def test_opaque_alpha_says_nothing(tmp_path, capsys):
    a = RNG.integers(0, 256, (6, 6, 4), dtype=np.uint8)
    a[..., 3] = 255
    Image.fromarray(a).save(tmp_path / "x.png")
    for channels, mode in ((1, "L"), (3, "RGB")):
        x = set_up(tmp_path, channels=channels).images[0]["x"]
        converted = torch.from_numpy(np.array(Image.fromarray(a).convert(mode)))
        assert torch.equal(x.movedim(0, -1).squeeze(), converted / 127.5 - 1)
    assert not capsys.readouterr().err


# Colour profiles ------------------------------------------------------------------------------


def srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_profiles_are_converted_to_srgb(tmp_path, capsys, suffix):
    a = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(a).save(tmp_path / f"x.{suffix}", icc_profile=icc(1.0), **options)
    x = set_up(tmp_path).images[0]["x"]
    assert torch.allclose(x, signed(srgb(a / 255), 1), atol=0.03)
    assert "1 of 1 images have a colour profile, which is converted" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA"])
def test_profiles_of_other_kinds_of_pixels(tmp_path, mode):
    gray = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    of = icc(1.0, gray=mode in ("L", "LA"))
    Image.fromarray(gray).convert(mode).save(tmp_path / "x.png", icc_profile=of)
    x = read_image(tmp_path / "x.png", Decoding(1))
    assert torch.allclose(x, signed(srgb(gray / 255), 1), atol=0.03)


def test_swapped_primaries_are_put_right(tmp_path):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.save(tmp_path / "x.png", icc_profile=icc(2.2, swap=True))
    pixel = read_image(tmp_path / "x.png")[:, 0, 0]
    assert pixel.tolist() == pytest.approx([-1, 1, -1], abs=0.05)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("which", ["srgb", "nonsense", "other space"])
def test_pixels_stay_without_a_profile_to_convert(tmp_path, capsys, mode, which):
    profiles = {
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "nonsense": b"nonsense" * 40,
        "other space": icc(1.0, gray=mode != "L"),
    }
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "x.png", icc_profile=profiles[which])
    image.save(tmp_path / "plain.png")
    assert torch.equal(read_image(tmp_path / "x.png"), read_image(tmp_path / "plain.png"))
    set_up(tmp_path)
    assert not capsys.readouterr().err


# Depths ---------------------------------------------------------------------------------------


def save_16_bits(array: np.ndarray, path: Path, **options: object) -> None:
    if path.suffix == ".png":
        path.write_bytes(png16(array))
    else:
        tifffile.imwrite(path, array, photometric="rgb", **options)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.png", {}),
        ("x.tif", {}),
        ("x.tif", {"byteorder": ">"}),
        ("x.tif", {"compression": "zlib", "predictor": True}),
        ("x.tiff", {"compression": "zlib", "byteorder": ">"}),
    ],
)
def test_16_bit_colour_keeps_its_bits(tmp_path, name, options, channels):
    array = RNG.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    save_16_bits(array, tmp_path / name, **options)
    assert torch.allclose(read_image(tmp_path / name), signed(array, 65535), atol=1e-6)
    gray = read_image(tmp_path / name, Decoding(1))
    colour = array[..., :3] / 65535
    if channels == 4:
        alpha = array[..., 3:] / 65535
        colour = colour * alpha + 1 - alpha
    assert torch.allclose(gray, signed(colour @ [0.299, 0.587, 0.114], 1), atol=1e-5)


def test_16_bit_colour_that_pillow_misreads_is_refused(tmp_path):
    array = RNG.integers(0, 65536, (3, 5, 7), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="rgb", planarconfig="separate")
    with pytest.raises(InputError, match=r"Cannot read the image .*one colour after the other"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("white", [1023, 4095])
@pytest.mark.parametrize("kind", ["gray", "colour", "32 bits"])
def test_white_level_of_fewer_bits(tmp_path, capsys, white, kind):
    array = RNG.integers(0, white + 1, (6, 6, 3), dtype=np.uint16)
    array[0, 0] = white
    if kind == "colour":
        save_16_bits(array, tmp_path / "x.png")
    else:
        array = array[..., 0]
        Image.fromarray(array.astype(np.int32 if kind == "32 bits" else np.uint16)).save(
            tmp_path / "x.tif"
        )
    if kind != "32 bits":  # whose range is unknown without
        set_up(tmp_path)
        assert "1 of 1 images use less than 10 % of 16 bits" in capsys.readouterr().err
    x = set_up(tmp_path, white_level=white).images[0]["x"]
    assert torch.allclose(x, signed(array, white), atol=1e-6)
    assert not capsys.readouterr().err
    with pytest.raises(
        InputError, match=rf"from \d+ to {white}, outside of 0 to 500; set data\.white"
    ):
        set_up(tmp_path, white_level=500)


def test_floating_point_needs_a_range(tmp_path):
    array = RNG.random((6, 6), dtype=np.float32) * 4 - 1
    Image.fromarray(array).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"32-bit pixels \(kind F\), .*set data\.range"):
        set_up(tmp_path)
    x = set_up(tmp_path, range=(-1.0, 3.0), channels=3).images[0]["x"]
    assert torch.allclose(x, signed((array + 1) / 4, 1).expand(3, 6, 6), atol=1e-6)
    with pytest.raises(InputError, match=r"outside of 0 to 1; set data\.range"):
        set_up(tmp_path, range=(0.0, 1.0))
    array[0, 0] = np.nan
    Image.fromarray(array).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="from nan to nan"):
        set_up(tmp_path, range=(-1.0, 3.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"background": "whitish"}, r"data\.background: 'whitish' is no colour"),
        ({"background": ""}, r"data\.background"),
        ({"background": None}, r"data\.background.* or rgb\(255, 0, 0\)"),  # '#f00' in YAML
        ({"white_level": 0}, r"data\.white_level must be a whole number, at least 1, got 0"),
        ({"range": (1.0, 1.0)}, r"data\.range must be black < white, got \(1.0, 1.0\)"),
        (
            {"range": (0.0, float("inf"))},
            r"data\.range must be 2 numbers, finite, got \(0.0, inf\)",
        ),
        ({"channels": 2}, r"data\.channels must be one of 1, 3, 4, got 2"),
    ],
)
def test_senseless_options(tmp_path, options, words):
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    for kind in (ImageFolderData, MeasurementFolderData):
        with pytest.raises(InputError, match=words):
            ready(kind(str(tmp_path), **options))


# Formats --------------------------------------------------------------------------------------


FORMATS = ["jpg", "JPEG", "bmp", "tif", "webp", "gif", "GIF", "jfif", "avif", "jp2", "ppm", "pgm"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_that_are_read(tmp_path, suffix):
    Image.init()
    if suffix == "avif" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    red, value = Image.new("RGB", (6, 5), (255, 0, 0)), 1
    if suffix == "pgm":
        red, value = red.convert("L"), 76 / 127.5 - 1
    red.save(tmp_path / f"x.{suffix}", format="JPEG" if suffix == "jfif" else None)
    x = set_up(tmp_path, channels=3).images[0]["x"]
    assert x.shape == (3, 5, 6)
    assert torch.allclose(x[0], torch.full((5, 6), float(value)), atol=0.05)


@pytest.mark.parametrize("suffix", ["heic", "JXL", "psd"])
def test_formats_that_are_not_read_are_named(tmp_path, capsys, suffix):
    (tmp_path / f"b.{suffix}").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"holds no image .*1 image of kinds .*\.{suffix}"):
        set_up(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    data = set_up(tmp_path)
    assert not data.skipped
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"kinds that are not read here (.{suffix.lower()}), such as '{tmp_path}/b.{suffix}'" in line
    )
    with pytest.raises(InputError, match="convert them to PNG"):
        set_up(tmp_path, strict=True)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_the_first_of_several_pictures_is_read(tmp_path, capsys, suffix):
    first, *others = (Image.new("L", (8, 8), value) for value in (10, 240, 120))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=others, **options)
    x = set_up(tmp_path, channels=1).images[0]["x"]
    assert torch.allclose(x, torch.full((1, 8, 8), 10 / 127.5 - 1), atol=0.02)
    assert "hold several pictures, of which the first is read" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ImageFolderData, MeasurementFolderData])
def test_an_empty_path_is_refused(kind):
    with pytest.raises(InputError, match=r"is no path here \(it is empty\)"):
        ready(kind(""))
