"""Measurements of the user's own operator: batches and files, through Lightning."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predicting import ready, trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from cmi_lightning import InputError, PoissonNoise, PosteriorSampler, Problem, Sampler
from cmi_lightning.data import MeasurementFolderData
from cmi_lightning.data.base import LoaderData
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import DPS
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import HDR, AveragePool, GaussianBlur, Identity, Operator
from cmi_lightning.predict.checks import check
from cmi_lightning.solvers import DDPM

SHAPE = (1, 4, 4)
IDS = ["a", "b", "c"]


class Rows(Operator):
    """Means of rows and columns (B, 2, n): a measurement that is no image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2)), x.mean((1, 3))], 1).tanh()


def prior() -> GaussianPrior:
    return GaussianPrior(torch.zeros(SHAPE))


def images() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def predict(module: PosteriorSampler, data: object) -> dict:
    (result,) = trainer(None).predict(module, data)
    return result


def direct(y: Tensor, operator: Operator, std: float | Tensor) -> Tensor:
    like = torch.zeros(len(y), *SHAPE)
    sampler = Sampler(prior(), DDPM(), [DPS()], 5)
    return sampler.run(Problem(y, operator, std), SampleNoise(0, IDS[: len(y)]), like)


def test_a_loaders_measurements_meet_the_modules_operator():
    y, x = Rows()(images()), images()
    rows = [{"y": y[i], "x": x[i], "id": IDS[i]} for i in range(3)]
    module = PosteriorSampler(prior(), Rows(), guidances=[DPS()], num_steps=5)
    result = predict(module, DataLoader(rows, batch_size=3))
    assert torch.equal(result["restored"], direct(y, Rows(), 0.05))
    assert torch.equal(result["truth"], x)
    assert result["measurement"].shape == x.shape
    for row in rows:  # without the truth, nothing else changes
        del row["x"]
        row["image_shape"] = torch.tensor(SHAPE)
    again = predict(module, DataLoader(rows, batch_size=3, collate_fn=collated))
    assert torch.equal(again["restored"], result["restored"])
    assert again["truth"] is None


def collated(rows: list[dict]) -> dict:
    return {
        "y": torch.stack([row["y"] for row in rows]),
        "id": [row["id"] for row in rows],
        "image_shape": SHAPE,
    }


def save(folder: Path, name: str, y: Tensor, kind: str) -> None:
    folder.mkdir(exist_ok=True)
    if kind == ".npy":
        np.save(folder / f"{name}.npy", y.numpy())
    elif kind == ".pt":
        torch.save({"y": y, "other": y}, folder / f"{name}.pt")
    else:
        save_file({"anything": y}, folder / f"{name}.safetensors")


def test_files_of_any_kind(tmp_path):
    y = Rows()(images())
    for name, kind, row in zip(IDS, (".npy", ".pt", ".safetensors"), y, strict=True):
        save(tmp_path / "y", name, row.contiguous(), kind)
    module = PosteriorSampler(prior(), Rows(), guidances=[DPS()], num_steps=5)
    data = MeasurementFolderData(str(tmp_path / "y"), "own", shape=SHAPE)
    result = predict(module, data)
    assert torch.equal(result["restored"], direct(y, Rows(), 0.05))
    assert result["id"] == IDS
    module._trainer = None
    assert "Rows" in module.describe()["operator"]


def test_images_and_maps_of_the_noise(tmp_path):
    pixels = (torch.rand(2, 4, 4) * 255).byte()
    std = torch.rand(2, *SHAPE) + 0.1
    (tmp_path / "y").mkdir()
    for name, image, level in zip(IDS, pixels, std, strict=False):
        Image.fromarray(image.numpy()).save(tmp_path / "y" / f"{name}.png")
        save(tmp_path / "std", name, level, ".npy")
    y = pixels[:, None].float() / 127.5 - 1
    module = PosteriorSampler(prior(), HDR(), guidances=[DPS()], num_steps=5)
    folder, levels = str(tmp_path / "y"), str(tmp_path / "std")
    result = predict(module, MeasurementFolderData(folder, "own", sigmas=levels))
    assert torch.equal(result["restored"], direct(y, HDR(), std))
    unit = ready(MeasurementFolderData(folder, "own", sigmas=levels, sigma_range="unit"))
    assert torch.equal(unit.images[1]["sigma"], 2 * std[1])
    table = tmp_path / "s.csv"
    table.write_text("id,sigma\na,0.1\nb,0.4\n")
    result = predict(module, MeasurementFolderData(folder, "own", sigmas=str(table)))
    assert torch.equal(result["restored"], direct(y, HDR(), torch.tensor([0.1, 0.4])))


def test_noise_models_serve_given_measurements():
    noise, batch = SampleNoise(0, IDS), {"y": torch.zeros(3, *SHAPE), "id": IDS}
    problem, _ = LoaderData().problem(batch, Identity(), PoissonNoise(50), noise)
    assert torch.allclose(problem.std, torch.full((3, *SHAPE), 0.2))
    mask = {"y_image": torch.zeros(3, *SHAPE), "mask": torch.eye(4).expand(3, 4, 4), "id": IDS}
    levels = torch.arange(16.0).reshape(1, 4, 4).expand(3, 1, 4, 4) + 1
    problem, _ = LoaderData().problem({**mask, "sigma": levels}, Identity(), 0.1, noise)
    assert problem.std[0, 0].tolist() == [1, 6, 11, 16]


@pytest.mark.parametrize(
    ("batch", "operator", "words"),
    [
        ({"y": torch.zeros(1, 1, 4, 4), "mask": torch.ones(1, 4, 4)}, HDR(), '"mask", which says'),
        ({"y": torch.zeros(1, 2, 4)}, Rows(), "not known: give its shape as data.shape"),
        ({"y": torch.zeros(1, 1, 2, 2)}, AveragePool(2), r"shape \(1, 2, 2\) .* makes \(1, 1, 1\)"),
        ({"y": torch.zeros(1, 2)}, Identity(), "are not known"),
    ],
)
def test_contradictions(batch, operator, words):
    with pytest.raises(InputError, match=words):
        LoaderData().problem(batch, operator, 0.1, SampleNoise(0, ["a"]))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.long), "real numbers"),
        (torch.full((2, 3), torch.nan), "no numbers"),
        ("text", "must be a tensor"),
    ],
)
def test_batches_that_hold_no_measurement(y, words):
    module = PosteriorSampler(prior(), GaussianBlur(3, 1.0), num_steps=2)
    with pytest.raises(InputError, match=words):
        module.predict_step({"y": y, "id": ["a", "b"]})


def test_folders_that_cannot_be_read(tmp_path):
    def refused(words: str, **options: object) -> None:
        with pytest.raises(InputError, match=words):
            ready(MeasurementFolderData(str(tmp_path), "own", **options))

    refused("holds no measurement")
    np.save(tmp_path / "a.npy", np.zeros((2, 2)) + 1j)
    refused("two channels, its real and imaginary part")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused("Cannot read the array")
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    np.save(tmp_path / "b.npy", np.zeros((2, 3)))
    refused(r"'a' is of shape \(2, 2\) and 'b' \(2, 3\)", shape=SHAPE)
    save(tmp_path, "a", torch.zeros(2, 2), ".pt")
    refused("would share the id 'a'")
    refused("data.sigmas=estimate is for images", sigmas="estimate")
    with pytest.raises(InputError, match=r"data\.shape is not used"):
        MeasurementFolderData(str(tmp_path), "denoise", shape=SHAPE)
    data = MeasurementFolderData(str(tmp_path), "denoise")
    with pytest.raises(InputError, match="would not be used"):
        check(PosteriorSampler(prior(), HDR()), trainer(None), data)
