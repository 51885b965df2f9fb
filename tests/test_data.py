"""Image folders and given measurements: values, order, and one clear sentence for bad input."""

import os
import pickle
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from predicting import ready, trainer

from cmi_lightning.data import (
    FashionMNIST,
    FashionMNISTData,
    ImageFolderData,
    MeasurementFolderData,
)
from cmi_lightning.data import files as data_files
from cmi_lightning.data.batches import FolderData
from cmi_lightning.data.extras import read_kernel
from cmi_lightning.data.fashion import DEBIAN_FOLDER
from cmi_lightning.data.folder import crop_to
from cmi_lightning.errors import InputError
from cmi_lightning.paths import SHIPPED

RNG = np.random.default_rng(0)


def save(path: Path, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    array = RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def items(data: FolderData) -> list[dict]:
    images = ready(data).images
    return [images[i] for i in range(len(images))]


def test_shipped_garments_are_the_first_of_the_test_set():
    data = ready(ImageFolderData("fashion-mnist-test", batch_size=64))
    batch = next(iter(data.predict_dataloader()))
    assert data.image_shape == (1, 32, 32)
    assert batch["id"] == [f"{i:05d}" for i in range(64)]
    assert batch["x"].shape == (64, 1, 32, 32)
    assert batch["x"].dtype == torch.float32
    if not DEBIAN_FOLDER.is_dir():  # else it would be downloaded
        pytest.skip("Fashion-MNIST is not on this machine")
    source = FashionMNIST(train=False)
    assert torch.equal(batch["x"], torch.stack([source[i]["x"] for i in range(64)]))


def test_values_ids_and_natural_order(tmp_path):
    arrays = {name: save(tmp_path / f"{name}.png", 5, 6, 3) for name in ("a10", "a9", "b/2")}
    save(tmp_path / ".hidden.png", 9, 9)
    (tmp_path / "notes.txt").write_text("no image")
    found = items(ImageFolderData(str(tmp_path)))
    assert [item["id"] for item in found] == ["a9", "a10", "b/2"]
    for item in found:
        expected = arrays[item["id"]].transpose(2, 0, 1) / 255 * 2 - 1
        assert np.allclose(item["x"], expected, atol=1e-6)
    assert [i["id"] for i in items(ImageFolderData(str(tmp_path), limit=2))] == ["a9", "a10"]


def test_limit_leaves_later_files_unread(tmp_path):
    save(tmp_path / "0.png", 4, 4)
    (tmp_path / "1.png").write_bytes(b"broken")
    assert len(items(ImageFolderData(str(tmp_path), limit=1))) == 1


def test_16_bit_gray_is_scaled_by_65535(tmp_path):
    array = save(tmp_path / "x.png", 4, 5, dtype=np.uint16)
    (gray,) = items(ImageFolderData(str(tmp_path)))
    (color,) = items(ImageFolderData(str(tmp_path), channels=4))
    assert np.allclose(gray["x"][0], array / 65535 * 2 - 1, atol=1e-6)
    assert torch.equal(color["x"][:3], gray["x"].expand(3, 4, 5))
    assert (color["x"][3] == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_converted_only_when_asked(tmp_path, channels):
    save(tmp_path / "a.png", 4, 4)
    save(tmp_path / "b.png", 4, 4, 3)
    save(tmp_path / "c.png", 4, 4, 4)
    Image.new("P", (4, 4)).save(tmp_path / "d.png")
    Image.new("1", (4, 4)).save(tmp_path / "e.png")
    found = items(ImageFolderData(str(tmp_path), channels=channels))
    assert {tuple(item["x"].shape) for item in found} == {(channels, 4, 4)}
    with pytest.raises(InputError, match=r"a\.png' has 1 channels and .*b\.png' 3; set data\.chan"):
        ready(ImageFolderData(str(tmp_path)))


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    save(tmp_path / "a.png", 12, 20)
    save(tmp_path / "b.png", 31, 9)
    data = ready(ImageFolderData(str(tmp_path), size=6))
    assert data.image_shape == (1, 6, 6)
    assert {tuple(item["x"].shape) for item in items(data)} == {(1, 6, 6)}
    x = torch.linspace(-1, 1, 4 * 8).reshape(1, 4, 8)
    assert torch.equal(crop_to(x, 4), x[:, :, 2:6])
    flat = torch.full((1, 10, 14), 0.3)
    assert torch.allclose(crop_to(flat, 5), torch.full((1, 5, 5), 0.3), atol=1e-6)
    mixed = ready(ImageFolderData(str(tmp_path)))
    assert mixed.image_shapes == [(1, 12, 20), (1, 31, 9)]
    with pytest.raises(InputError, match=r"12×20 and 31×9 .* data\.size"):
        mixed.train_dataloader()


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("L", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert ready(ImageFolderData(str(tmp_path))).image_shape == (1, 8, 4)


BAD = {
    "text": ("bad.jpg", b"not an image", r"Cannot read the image '.*bad\.jpg'"),
    "truncated": ("bad.png", (64, 64), r"Cannot read the image '.*bad\.png'"),
    "cmyk": ("bad.jpg", Image.new("CMYK", (8, 8)), r"bad\.jpg' .* kind CMYK; set data\.channels"),
    "twice": ("ok.bmp", (8, 8), r"ok\.bmp' and '.*ok\.png' would share the id 'ok'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_at_setup(tmp_path, kind):
    name, content, words = BAD[kind]
    save(tmp_path / "ok.png", 8, 8)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        save(path, *content)
    else:
        content.save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=words) as caught:
        ready(ImageFolderData(str(tmp_path), strict=True))
    assert "\n" not in str(caught.value)


def test_bad_folders_and_options(tmp_path):
    with pytest.raises(InputError, match=r"data\.folder: there is no folder '.*nowhere'"):
        ready(ImageFolderData(str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="holds no image"):
        ready(ImageFolderData(str(tmp_path)))
    for option in ("size", "limit", "batch_size"):
        with pytest.raises(
            InputError, match=rf"data\.{option} must be a whole number, at least 1.*, got 0"
        ):
            ready(ImageFolderData("fashion-mnist-test", **{option: 0}))


SOURCES = {
    "folder": lambda: ImageFolderData("fashion-mnist-test", limit=5, batch_size=2),
    "measurements": lambda: MeasurementFolderData(
        str(SHIPPED["fashion-mnist-test"]), limit=5, batch_size=2
    ),
    "fashion": lambda: FashionMNISTData(limit=5, batch_size=2),
}


@pytest.mark.parametrize("source", SOURCES)
def test_lightning_takes_the_loaders(tmp_path, source):
    class Count(L.LightningModule):
        def predict_step(self, batch: dict) -> int:
            return len(batch["id"])

    if source == "fashion" and not DEBIAN_FOLDER.is_dir():
        pytest.skip("Fashion-MNIST is not on this machine")
    data = SOURCES[source]()
    assert trainer(tmp_path).predict(Count(), datamodule=data) == [2, 2, 1]


class Reads:
    """How often files of a folder are opened as images, and folders are searched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.searches = Counter(), Counter()
        opened, walk = Image.open, os.walk

        def count(path, *args, **kwargs):
            self.images.update([Path(path).relative_to(folder).as_posix()])
            return opened(path, *args, **kwargs)

        def search(top, *args, **kwargs):
            self.searches.update([Path(top).relative_to(folder).as_posix()])
            return walk(top, *args, **kwargs)

        monkeypatch.setattr(Image, "open", count)
        monkeypatch.setattr(os, "walk", search)


@pytest.mark.parametrize("given", [False, True])
def test_a_run_searches_once_and_decodes_every_image_once(tmp_path, monkeypatch, given):
    for i in range(5):
        save(tmp_path / f"y/{i}.png", 32, 32)
        known = RNG.random((32, 32)) > 0.02
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray((known * 255).astype(np.uint8)).save(tmp_path / f"m/{i}.png")
    reads, folder = Reads(tmp_path, monkeypatch), str(tmp_path / "y")
    data: FolderData = ImageFolderData(folder, batch_size=2)
    if given:
        masks = str(tmp_path / "m")
        data = MeasurementFolderData(folder, "inpaint", masks=masks, sigmas="estimate")
    data.setup("predict")  # as the command line does, before the trainer
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "out")
    data.trainer = trainer
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert sum(len(batch["id"]) for batch in batches) == 5
    files = {f"{kind}/{i}.png" for kind in ("ym" if given else "y") for i in range(5)}
    assert reads.images == dict.fromkeys(files, 1)
    assert reads.searches == {kind: 1 for kind in ("ym" if given else "y")}
    data.setup("predict")  # of another run, which may find another folder
    assert set(reads.images.values()) == {2}


def test_options_that_change_before_the_trainer_comes_count(tmp_path):
    class Own(ImageFolderData):
        def __init__(self, count):  # which it does not keep by that name
            super().__init__("fashion-mnist-test", limit=count)

    data = ready(Own(4))
    data.limit = 2
    assert len(ready(data).images) == 2
    data.folder = str(tmp_path)
    for _ in range(2):  # what failed is not taken for done
        with pytest.raises(InputError, match="holds no image"):
            ready(data)


def test_what_is_kept_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_KEPT", 2 * 4 * 8 * 8)  # two images
    for i in range(3):
        save(tmp_path / f"{i}.png", 8, 8)
    data = ready(ImageFolderData(str(tmp_path)))
    reads = Reads(tmp_path, monkeypatch)
    first, second = (torch.stack([item["x"] for item in data.images]) for _ in range(2))
    assert torch.equal(first, second)
    assert reads.images == {"2.png": 2}
    copied = pickle.loads(pickle.dumps(data.images))  # as a worker process gets it
    assert torch.equal(copied[0]["x"], first[0])
    assert reads.images == {"2.png": 2, "0.png": 1}


def test_denoise_and_downsample_measurements(tmp_path):
    array = save(tmp_path / "s/x.png", 5, 6, 3)
    (item,) = items(MeasurementFolderData(str(tmp_path)))
    assert set(item) == {"y_image", "id"}
    assert item["id"] == "s/x"
    assert np.allclose(item["y_image"], array.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    data = ready(MeasurementFolderData(str(tmp_path), "downsample", factor=4))
    assert data.image_shape == (3, 20, 24)
    assert int(next(iter(data.predict_dataloader()))["factor"][0]) == 4


def test_masks_one_for_all_or_one_for_each(tmp_path):
    save(tmp_path / "y/a/0.png", 6, 5)
    save(tmp_path / "y/1.png", 6, 5)
    known = RNG.random((6, 5)) > 0.5
    (tmp_path / "m/a").mkdir(parents=True)
    Image.fromarray((known * 255).astype(np.uint8)).save(tmp_path / "m/a/0.png")
    Image.fromarray((~known * 255).astype(np.uint8)).save(tmp_path / "m/1.png")
    y, masks = str(tmp_path / "y"), tmp_path / "m"
    data = ready(MeasurementFolderData(y, "inpaint", masks=str(masks)))
    batch = next(iter(data.predict_dataloader()))
    assert batch["id"] == ["1", "a/0"]
    assert batch["mask"].dtype == torch.bool
    assert np.array_equal(batch["mask"], np.stack([~known, known]))
    same = items(MeasurementFolderData(y, "inpaint", masks=str(masks / "1.png")))
    assert all(np.array_equal(item["mask"], ~known) for item in same)


def test_kernels_sum_to_one(tmp_path):
    save(tmp_path / "y/0.png", 6, 5)
    kernel = RNG.random((3, 5))
    np.save(tmp_path / "k.npy", kernel)
    data = MeasurementFolderData(str(tmp_path / "y"), "blur", kernels=str(tmp_path / "k.npy"))
    (item,) = items(data)
    assert np.allclose(item["kernel"], kernel / kernel.sum(), atol=1e-6)
    array = save(tmp_path / "k.png", 5, 5)
    assert np.allclose(read_kernel(tmp_path / "k.png"), array / array.sum(), atol=1e-6)


def test_bad_measurements(tmp_path):
    y, m = tmp_path / "y", tmp_path / "m"
    save(y / "0.png", 6, 5)
    m.mkdir()

    def refused(words: str, kind: str, **options: object) -> None:
        with pytest.raises(InputError, match=words):
            ready(MeasurementFolderData(str(y), kind, **options))

    refused(r"data\.kind=inpaint needs data\.masks", "inpaint")
    refused(r"data\.masks is not used by data\.kind=blur", "blur", kernels="k", masks="m")
    refused(r"data\.kind must be one of", "haze")
    refused(r"data\.factor must be a whole number, at least 2, got 1", "downsample", factor=1)
    refused(r"there is no '.*none'", "inpaint", masks=str(tmp_path / "none"))
    refused(r"has nothing for the measurement '0'", "inpaint", masks=str(m))
    save(m / "0.png", 5, 6)
    refused(r"0\.png' is 5×6 .* the measurement 6×5", "inpaint", masks=str(m))
    Image.new("L", (5, 6)).save(m / "0.png")
    refused("no white", "inpaint", masks=str(m))


def test_what_can_be_stacked_makes_a_batch(tmp_path):
    y, k = tmp_path / "y", tmp_path / "k"
    k.mkdir()
    for name, height, side in (("0", 6, 3), ("1", 6, 5), ("2", 7, 5), ("3", 6, 3)):
        save(y / f"{name}.png", height, 5)
        np.save(k / f"{name}.npy", np.ones((side, side)))

    def batches(kind: str, **options: object) -> list[list[str]]:
        data = ready(MeasurementFolderData(str(y), kind, batch_size=2, **options))
        assert data.ids == ["0", "1", "2", "3"]
        return [batch["id"] for batch in data.predict_dataloader()]

    assert batches("blur", kernels=str(k)) == [["0", "3"], ["1"], ["2"]]
    assert batches("downsample", factor=2) == batches("own") == [["0", "1"], ["3"], ["2"]]
