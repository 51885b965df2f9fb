"""A thousand malformed images, masks, kernels, tables and configurations.

Each is either refused by one clear sentence or read right; nothing raises another error or warns.
The examples are the same in every run.
"""

import contextlib
import copy
import io
import math
import random
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import icc
from PIL import Image

from cmi_lightning.cli import main
from cmi_lightning.data import ImageFolderData, MeasurementFolderData
from cmi_lightning.data.extras import read_kernel
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Convolution, PixelMask

SIDE = 8
SHARES = {"images": 400, "masks": 160, "kernels": 200, "tables": 170, "configs": 70}
COUNTS: Counter[str] = Counter()
CODES: Counter[int] = Counter()


def fuzz(what: str) -> Callable:
    """Settings of one share of the thousand."""
    return settings(
        max_examples=SHARES[what],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def example(what: str, side: int = SIDE) -> Iterator[Path]:
    """A folder with y/a.png and y/b.png for one example, which is counted."""
    COUNTS[what] += 1
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "y").mkdir()
        for name in "ab":
            Image.new("L", (side, side), 130).save(f"{folder}/y/{name}.png")
        yield Path(folder)


def ready(data: Any) -> Any:
    """Set data up; None where it is refused, in one line that says what to do."""
    try:
        data.setup("predict")
    except InputError as error:
        text = str(error)
        assert text.isprintable(), text
        assert 30 < len(text) < 3000, text
        assert text.endswith("."), text
        return None
    for reason in data.skipped.values():
        assert reason.isprintable(), reason
    return data


# Bytes ----------------------------------------------------------------------------------------


def encoded(mode: str, suffix: str, **options: Any) -> bytes:
    rng = np.random.default_rng(len(mode) + len(suffix))
    image = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16))
    elif mode in ("I", "F"):
        image = image.convert("L").convert(mode)
    elif mode == "LAB":
        image = Image.frombytes("LAB", (SIDE, SIDE), rng.bytes(3 * SIDE * SIDE))
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 40
    return exif


IMAGES: list[tuple[str, bytes]] = [
    *(("png", encoded(m, "PNG")) for m in ("L", "LA", "RGB", "RGBA", "P", "1", "I;16")),
    ("png", encoded("P", "PNG", transparency=bytes(range(0, 250, 5)))),
    ("png", encoded("RGB", "PNG", exif=_exif())),
    *(("jpg", encoded(m, "JPEG")) for m in ("L", "RGB", "CMYK")),
    ("jpeg", encoded("RGB", "JPEG", progressive=True, exif=_exif())),
    *(("bmp", encoded(m, "BMP")) for m in ("L", "RGB", "1", "P")),
    *(
        ("tif", encoded(m, "TIFF"))
        for m in ("L", "RGB", "RGBA", "I;16", "I", "F", "LAB", "CMYK", "YCbCr", "1", "P")
    ),
    *(
        ("tiff", encoded("RGB", "TIFF", compression=c))
        for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ),
    ("webp", encoded("RGB", "WEBP")),
    ("webp", encoded("RGBA", "WEBP", lossless=True)),
    ("png", encoded("L", "GIF")),
    ("tif", encoded("L", "PPM")),
    ("gif", encoded("P", "GIF", transparency=9)),
    ("jp2", encoded("RGB", "JPEG2000")),
    ("ppm", encoded("RGB", "PPM")),
    ("png", encoded("L", "PNG", icc_profile=icc(1.0, gray=True))),
    ("jpg", encoded("RGB", "JPEG", icc_profile=icc(1.0))),
]
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


def mangled(source: bytes, seed: int) -> bytes:
    """Change some bytes, numbers or pieces of a file; none for one seed in ten."""
    rng = random.Random(seed)
    data = bytearray(source)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3, 5, 10, 30])):
        at = rng.randrange(len(data) + 1)
        until = min(len(data), at + rng.choice([1, 2, 4, 8, 64]))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] = rng.choice([0, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
        elif kind == 1:
            order = rng.choice("<>")
            data[at : at + 4] = struct.pack(f"{order}I", rng.choice(EXTREMES))
        elif kind == 2:
            data[at:until] = rng.randbytes(until - at)
        elif kind == 3:
            data[at:at] = data[at:until]
        elif kind == 4:
            del data[at:until]
        elif kind == 5 and rng.random() < 0.3:
            del data[at:]
        elif kind == 6:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
    if data[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.8:
        _mend_checksums(data)  # so that the decoder behind them is reached
    return bytes(data)


def _mend_checksums(data: bytearray) -> None:
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4


seeds = st.integers(0, 2**32)


# Images ---------------------------------------------------------------------------------------


@given(
    st.sampled_from(IMAGES),
    seeds,
    st.sampled_from([None, None, 1, 3, 4]),
    st.sampled_from([None, 5, 8]),
    st.booleans(),
)
@fuzz("images")
def check_images(image, seed, channels, size, strict):
    suffix, source = image
    with example("images") as folder:
        (folder / "y/b.png").unlink()
        (folder / f"y/b.{suffix}").write_bytes(mangled(source, seed))
        Image.new("L", (SIDE, SIDE), seed % 256).save(folder / "y/a.png")
        data = ready(ImageFolderData(str(folder / "y"), size, channels, strict=strict))
        if data is None:
            return
        (batch,) = data.predict_dataloader()
        assert batch["id"] == (["a"] if data.skipped else ["a", "b"])
        assert batch["x"].shape == (len(batch["id"]), *data.image_shape)
        assert batch["x"].dtype == torch.float32
        assert batch["x"].abs().max() <= 1
        gray = torch.full((SIDE, SIDE), seed % 256 / 127.5 - 1)
        if size is None:
            assert torch.allclose(batch["x"][0, 0], gray, atol=1e-6)
        assert not strict or not data.skipped


# Masks ----------------------------------------------------------------------------------------

PNGS = [source for suffix, source in IMAGES if source.startswith(b"\x89PNG")]


@given(st.sampled_from(PNGS), seeds, st.booleans(), st.booleans(), st.integers(1, 9))
@fuzz("masks")
def check_masks(source, seed, each, strict, side):
    with example("masks") as folder:
        (folder / "m").mkdir()
        for name in "ab":
            size = side if side > SIDE else SIDE  # one size in nine does not fit
            Image.new("RGB", (SIDE, size), (9, 99, 199)).save(folder / f"y/{name}.png")
            Image.new("1", (SIDE, SIDE), 1).save(folder / f"m/{name}.png")
        (folder / "m/b.png").write_bytes(mangled(source, seed))
        masks = str(folder / ("m" if each else "m/b.png"))
        data = MeasurementFolderData(str(folder / "y"), "inpaint", masks=masks, strict=strict)
        if ready(data) is None:
            return
        (batch,) = data.predict_dataloader()
        assert batch["id"] == (["a"] if data.skipped else ["a", "b"])
        assert each or not data.skipped
        assert batch["mask"].shape == (len(batch["id"]), SIDE, SIDE)
        assert batch["mask"].dtype == torch.bool
        assert batch["mask"].flatten(1).any(1).all()
        y = PixelMask.from_mask(batch["mask"], batch["y_image"])(batch["y_image"])
        assert y.isfinite().all()


# Kernels --------------------------------------------------------------------------------------

DTYPES = ["f2", "f4", "f8", ">f8", "g", "i1", "u8", "?", "c8", "S3", "U2", "M8[s]", "m8[s]", "V4"]
NUMBERS = [0.0, 1.0, -1.0, 0.25, 1e-300, 1e308, -1e308, math.inf, math.nan, 6e4, 1e-45]


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """A ``.npy`` file of any type, shape and values, mangled or not."""
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
            st.sampled_from([(1, 2049), (70_000, 1), (1, 1), (8, 9)]),
        )
    )
    dtype = draw(st.sampled_from(["f8", "f8", "f4", *DTYPES]))
    usual = [1.0, 0.5, 2.0]
    values = draw(
        st.lists(st.sampled_from([*usual, *usual, *usual, *NUMBERS]), min_size=1, max_size=6)
    )
    array = np.resize(np.array(values), shape)
    with np.errstate(all="ignore"):
        try:
            array = array.astype(dtype)
        except (ValueError, TypeError):
            array = np.zeros(shape, dtype)
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array) if draw(st.booleans()) else array)
    seed = draw(seeds)
    return mangled(buffer.getvalue(), seed) if draw(st.booleans()) else buffer.getvalue()


@given(st.one_of(arrays(), arrays(), st.tuples(st.sampled_from(PNGS), seeds)))
@fuzz("kernels")
def check_kernels(content):
    with example("kernels") as folder:
        suffix = "npy" if isinstance(content, bytes) else "png"
        path = folder / f"k.{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else mangled(*content))
        data = MeasurementFolderData(str(folder / "y"), "blur", kernels=str(path), limit=1)
        if ready(data) is None:
            return
        (batch,) = data.predict_dataloader()
        kernel = batch["kernel"]
        assert kernel.dtype == torch.float32
        assert kernel.isfinite().all()
        assert float(kernel.double().sum()) == pytest.approx(1, abs=1e-3)
        assert torch.equal(kernel[0], read_kernel(path))
        noise = SampleNoise(0, ["a"])
        y = batch["y_image"]
        blurred = Convolution(kernel).bind(data.image_shape, noise, y)(y)
        assert torch.allclose(blurred, y, atol=0.1)  # y is constant


# Tables ---------------------------------------------------------------------------------------

CELLS = ["a", "b", "c", "id", "sigma", "", "0.1", "0.2", "1e-3", "-1", "0", "nan", "inf", "1e400"]
CELLS += ["x" * 300, '"', '"a"', "1,0", "½", "٣", "a.png", " 0.1 ", "0x1", "1_0", "\x1b[1m", "\0"]


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A CSV file that is nearly right, or lines of anything."""
    rows = [["id", "sigma"], ["a", "0.1"], ["b", "0.2"]]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 4]))):
        row = draw(st.integers(0, len(rows) - 1))
        kind = draw(st.sampled_from(["cell", "cell", "drop", "again", "add", "insert"]))
        if kind == "cell" and rows[row]:
            rows[row][draw(st.integers(0, len(rows[row]) - 1))] = draw(st.sampled_from(CELLS))
        elif kind == "drop" and len(rows) > 1:
            del rows[row]
        elif kind == "again":
            rows.append(rows[row])
        elif kind == "add":
            rows[row] = [*rows[row], draw(st.sampled_from(CELLS))]
        elif kind == "insert":
            rows.insert(row, [draw(st.sampled_from(CELLS)), draw(st.sampled_from(CELLS))])
    comma, end = draw(st.sampled_from([",", ",", ",", ";", "\t"])), draw(st.sampled_from("\n\n\r"))
    text = end.join(comma.join(row) for row in rows)
    code = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    data = text.encode(code, "replace")
    return mangled(data, draw(seeds)) if draw(st.sampled_from([False, False, True])) else data


@given(tables(), st.sampled_from(["signed", "unit"]))
@fuzz("tables")
def check_tables(content, unit):
    with example("tables") as folder:
        (folder / "s.csv").write_bytes(content)
        data = MeasurementFolderData(
            str(folder / "y"), sigmas=str(folder / "s.csv"), sigma_range=unit
        )
        if ready(data) is None:
            return
        (batch,) = data.predict_dataloader()
        assert batch["sigma"].shape == (2,)
        assert batch["sigma"].isfinite().all()
        assert (batch["sigma"] > 0).all()
        assert f"σ of each image, from {folder}" in str(data.given_noise)


# Configurations -------------------------------------------------------------------------------

JUNK = [None, True, False, 0, -1, 3, 10**30, -0.5, 0.1, 1e308, math.inf, math.nan, "", " ", "x"]
JUNK += [".", "no.such.Class", "cmi_lightning.solvers.DDIM", "DPS", "../../x", "~nobody/x"]
JUNK += ["x" * 5000, "\0", "\x1b[2J", "日本", "é\ud7ff", "${trainer.precision}", "${nowhere}"]
JUNK += ["null", "1e3", "0x1", [], [None], [1, 2], [[[]]], {}, {"x": 1}, {"class_path": "x"}]
JUNK += [{"init_args": {}}, {"class_path": "DPS", "init_args": {"scale": "x"}}]
JUNK += [{"class_path": "DDPM", "x": []}]
CONFIG = """
model:
  denoiser:
    class_path: cmi_lightning.exact.power_law_prior
    init_args: {image_shape: [1, 32, 32], exponent: 2.0, std: 0.3, mean: 0.0}
  operator: {class_path: cmi_lightning.operators.BoxMask, init_args: {size: 3, margin: 1}}
  solver: {class_path: cmi_lightning.solvers.DDIM, init_args: {eta: 0.5}}
  guidances:
  - {class_path: cmi_lightning.guidance.DPS, init_args: {scale: 1.0}}
  - {class_path: cmi_lightning.guidance.PiGDM}
  num_steps: 2
  noise: {sigma: 0.05, range: signed}
  seed: 0
  clamp: true
data:
  class_path: cmi_lightning.data.ImageFolderData
  init_args:
    {folder: y, size: 32, channels: 1, limit: 2, batch_size: 2, num_workers: 0, strict: false}
trainer:
  precision: 32-true
  limit_predict_batches: 1
  callbacks: [{class_path: cmi_lightning.callbacks.ImageWriter, init_args: {grid_rows: 2}}]
"""


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a nested configuration."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in [(*path, k), *_places(v, (*path, k))]]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in [(*path, i), *_places(v, (*path, i))]]
    return []


def twisted(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Replace, delete, add or move one to three entries of a configuration."""
    rng = random.Random(seed)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
        places = _places(config)
        *above, last = rng.choice(places)
        parent: Any = config
        for key in above:
            parent = parent[key]
        kind = rng.randrange(6)
        if kind <= 2:
            parent[last] = copy.deepcopy(rng.choice(JUNK))
        elif kind == 3:
            del parent[last]
        elif kind == 4 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "class_path", "sigma", last + "s"])] = rng.choice(JUNK)
        elif kind == 5:
            parent[last] = copy.deepcopy(_at(config, rng.choice(places)))
    return config


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def fuzz_configs(capfd: pytest.CaptureFixture) -> None:
    @given(seeds, st.sampled_from([False, False, False, True]))
    @fuzz("configs")
    def check(seed, as_text):
        with example("configs", 32) as folder:
            config = yaml.safe_load(CONFIG)
            config["data"]["init_args"]["folder"] = str(folder / "y")
            config = config if as_text else twisted(config, seed)
            text = yaml.safe_dump(config, allow_unicode=True).encode("utf-8", "replace")
            (folder / "c.yaml").write_bytes(mangled(text, seed) if as_text else text)
            out = folder / "out"
            capfd.readouterr()
            # Never more than this machine, and nothing written but here.
            fixed = [f"--trainer.default_root_dir={out}", "--trainer.devices=1"]
            fixed += ["--trainer.accelerator=cpu", "--trainer.logger=false"]
            with contextlib.chdir(folder):
                code = main(["predict", "-c", str(folder / "c.yaml"), *fixed])
            error = capfd.readouterr().err
            CODES[code] += 1
            if code == 2:
                lines = [x for x in error.splitlines() if x.startswith("cmi-lightning: error: ")]
                assert len(lines) == 1, error
                assert len(error.strip().splitlines()) == 1, error
                assert "Traceback" not in error
            else:
                assert code in (0, 3), (code, error)
                for path in out.glob("restored/*.png"):
                    with Image.open(path) as image:
                        assert image.size == (32, 32)

    check()


CHECKS = {"images": check_images, "masks": check_masks, "kernels": check_kernels}
CHECKS["tables"] = check_tables


@pytest.mark.parametrize("what", CHECKS)
def test_malformed_files(what, capfd):
    COUNTS.pop(what, None)
    CHECKS[what]()
    captured = capfd.readouterr()
    assert COUNTS[what] >= SHARES[what]
    # libtiff, in C, has its say past Pillow and Python.
    assert not re.search("Traceback|Warning|Exception", captured.err)


# Advice of Lightning and PyTorch on what was asked for.
@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes")
@pytest.mark.filterwarnings("ignore:The `Trainer` class does not expose the `callbacks` argument")
def test_malformed_configurations(capfd):
    COUNTS.pop("configs", None)
    fuzz_configs(capfd)
    assert COUNTS["configs"] >= SHARES["configs"]
    assert sum(SHARES.values()) == 1000
    assert CODES[2] > 30  # many are refused, and many are not
    assert CODES[0] > 10


# What the fuzzing found -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPS", "MCG", "PiGDM", "DSG", "CMI", "MomentMatching", "Mine"])
def test_options_of_every_guidance_are_checked(tmp_path, monkeypatch, capsys, name):
    """jsonargparse checks none where it cannot resolve a name in an annotation of a base class."""
    (tmp_path / "mine_for_fuzz.py").write_text(
        "from dataclasses import dataclass\n\nfrom cmi_lightning.guidance import Guidance\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Guidance):\n    scale: 'float' = 0.1\n"
    )
    monkeypatch.chdir(tmp_path)
    option = "rate" if name == "DSG" else "scale"
    path = "mine_for_fuzz.Mine" if name == "Mine" else name
    value = f"[{{class_path: {path}, init_args: {{{option}: much}}}}]"
    assert main(["predict", f"--model.guidances={value}"]) == 2
    assert "much" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "model: {noise: false}",
        "model: {num_steps: '${nowhere}'}",
        "model: {solver: {class_path: DDIM, init_args: {eta: 2}}}",
        "data: {init_args: {folder: '~nobody/x'}}",
        "trainer: [1, 2]",
    ],
)
def test_configurations_once_met_with_a_traceback(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    assert main(["predict", "-c", "c.yaml"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
