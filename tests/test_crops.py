"""Crops of photographs: any number is drawn alone, so that a training resumes where it was."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cmi_lightning.data import ImageFolderData, PhotoCropsData
from cmi_lightning.data.crops import PHOTOGRAPHS, five_squares
from cmi_lightning.errors import InputError


@pytest.fixture
def photos(tmp_path):
    """Two training photographs and one for validation, of 96×48, whose red tells the column."""
    ramp = np.zeros((48, 96, 3), np.uint8)
    ramp[..., 0] = np.arange(96) * 2
    with open(tmp_path / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["photo", "split"])
        for i, split in enumerate(["train", "train", "validation"]):
            ramp[..., 2] = 60 * i
            Image.fromarray(ramp).save(tmp_path / f"{i}.png")
            rows.writerow([f"{i}.png", split])
    return tmp_path


def data(folder, **options):
    made = PhotoCropsData(
        str(folder),
        str(folder / "list.csv"),
        size=16,
        **{"smallest": 16, "largest": 48, "crops_per_epoch": 64, "batch_size": 8, **options},
    )
    made.setup("fit")
    return made


def test_a_crop_is_a_function_of_seed_and_number(photos):
    first, again, other = data(photos), data(photos), data(photos, seed=1)
    for n in (0, 70, 12345):
        assert torch.equal(first.train[n]["x"], again.train[n]["x"])
        assert not torch.equal(first.train[n]["x"], other.train[n]["x"])


def test_epochs_go_on_where_the_last_one_ended(photos):
    loader = data(photos).train_dataloader()
    assert list(loader.sampler) == list(range(64))
    loader.sampler.set_epoch(2)
    assert list(loader.sampler) == list(range(128, 192))
    batch = next(iter(loader))
    assert batch["x"].shape == (8, 3, 16, 16)
    assert torch.equal(batch["x"][0], data(photos).train[128]["x"])


def test_crops_have_every_scale_are_mirrored_and_come_from_the_training_photographs(photos):
    train = data(photos).train
    slopes, blues = [], set()
    for n in range(200):
        x = train[n]["x"]
        assert x.min() >= -1
        assert x.max() <= 1
        slopes.append(float((x[0, :, 12] - x[0, :, 3]).mean()) * 127.5 / 2 / 9)  # source px per px
        blues.add(round(float(x[2].mean() + 1) * 127.5))
    assert blues == {0, 60}
    scales = np.abs(slopes)
    assert scales.min() < 1.15
    assert scales.max() > 2.6  # the largest side, 48, is 3
    assert 60 < (np.array(slopes) < 0).sum() < 140
    # log-uniform in [1, 3]: half lie below √3
    assert 70 < (scales < 3**0.5).sum() < 130


def test_validation_is_five_squares_inside_each_photograph(photos):
    validation = data(photos).validation
    assert len(validation) == 5
    assert {round(float(validation[i]["x"][2].mean() + 1) * 127.5) for i in range(5)} == {120}
    for width, height in ((1440, 720), (96, 48), (101, 51)):
        squares = five_squares(width, height)
        assert len(set(squares)) == 5
        assert all(0 <= x <= width - s and 0 <= y <= height - s for x, y, s in squares)


def test_what_is_missing_is_named(photos):
    (photos / "1.png").unlink()
    with pytest.raises(InputError, match=r"data.folder: .* lacks 1 of 2 photographs .*1\.png"):
        data(photos)
    with pytest.raises(InputError, match=r"data.largest must be at least data.smallest"):
        data(photos, largest=8)


def test_shipped_photographs_are_those_of_the_list():
    with open(PHOTOGRAPHS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    split = {row["photo"].removesuffix(".jpg").removesuffix("@2x"): row["split"] for row in rows}
    assert {row["licence"] for row in rows} == {"public-domain"}
    # A file's name may end with its author's, who licenses it under CC-BY-SA.
    assert not any(re.search(r"-(sfiera|striker|harro)", row["photo"]) for row in rows)
    for name, count in (("test", 24), ("validation", 16)):
        whole, crops = (ImageFolderData(f"photos-{name}{end}") for end in ("", "-64"))
        whole.setup("predict")
        crops.setup("predict")
        assert whole.image_shape == (3, 192, 256)
        assert crops.image_shape == (3, 64, 64)
        assert len(whole.images) == count
        assert len(crops.images) == 5 * count
        assert all(split[whole.images[i]["id"]] == name for i in range(count))
        assert {crops.images[i]["id"].split("/")[1] for i in range(5 * count)} == {
            whole.images[i]["id"] for i in range(count)
        }
