"""Distances in a classifier's features: against closed forms, sums by hand, and in real runs."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from predicting import Watch, items, restore
from torch import Tensor, nn

from cmi_lightning import GaussianNoise, PosteriorSampler
from cmi_lightning.callbacks import FeatureMetrics, Inception
from cmi_lightning.callbacks.classifier import WEIGHTS, GarmentClassifier
from cmi_lightning.callbacks.distances import (
    embedding_path,
    frechet,
    kernel,
    perceptual,
    read_embeddings,
)
from cmi_lightning.data.fashion import DEBIAN_FOLDER, FashionMNIST
from cmi_lightning.data.pictures import levels
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import DPS
from cmi_lightning.operators import BoxMask
from cmi_lightning.table.resampling import frechet_many, kernel_many

# Fashion-MNIST's labels of its first 64 test images.
LABELS = "9211614657457341248025791460938833807579613767212244582284807785"
KINDS = ("perceptual", "perceptual_measurement")


class Tiny(nn.Module):
    """Two layers of features of images of any size and channels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 5, 3, 2)

    def features(self, x: Tensor) -> list[Tensor]:
        return [a := self.first(x).tanh(), self.second(a)]

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x)[-1].mean((2, 3))


def run(
    folder: Path,
    x: Tensor,
    metrics: FeatureMetrics | None = None,
    batch_size: int = 3,
    at: tuple[int, int] | None = None,
    given: bool = False,
    draws: int = 1,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Restore images through Lightning; return what was restored and ``features.json``."""
    shape = tuple(x.shape[1:])
    module = PosteriorSampler(
        GaussianMixture(torch.zeros(1, *shape), 0.3),
        None if given else BoxMask(shape[1] // 2, 1),
        guidances=[DPS(0.5)],
        num_steps=4,
        noise=GaussianNoise(0.05),
        samples_per_image=draws,
    )
    watch = Watch(at)
    callbacks, options = [metrics or FeatureMetrics(), watch], {"inference_mode": False}
    restore(folder, module, items(x, given), *callbacks, batch_size=batch_size, **options)
    path, shown = folder / "features.json", {}
    for outputs in watch.outputs:
        for i, name in enumerate(outputs["id"]):
            wanted = ("truth", "restored", "measurement", "draws")
            shown[name] = {k: v[i] for k in wanted if (v := outputs[k]) is not None}
    return shown, json.loads(path.read_text("utf-8")) if path.is_file() else None


def record(folder: Path, i: int) -> dict[str, Any]:
    return json.loads((folder / "records" / "set" / f"{i}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def classifier() -> GarmentClassifier:
    return GarmentClassifier()


@pytest.fixture(scope="module")
def garments(shipped_images: Tensor) -> Tensor:
    return shipped_images[:7]


def clouds(count: int, dimension: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return correlated features of two sets."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, count, dimension, generator=g, dtype=torch.float64)
    mix = torch.randn(dimension, dimension, generator=g, dtype=torch.float64)
    return x @ mix, y @ mix.mT * 0.7 + 0.3


# The network -------------------------------------------------------------------------------------


def test_shipped_classifier_is_small_and_right(classifier, shipped_images):
    assert WEIGHTS.stat().st_size < 2_000_000
    logits = classifier(levels(shipped_images) / 255)
    right = (logits.argmax(1) == torch.tensor([int(label) for label in LABELS])).float().mean()
    assert right >= 0.9  # of 64 images, of which 3.5 % is one standard error
    # And it is sure of what it sees, which chance is not.
    assert logits.softmax(1).amax(1).mean() > 0.7


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Fashion-MNIST's labels")
def test_accuracy_on_test_images_it_has_not_seen(classifier):
    images = FashionMNIST(train=False).pixels[:2000]
    with gzip.open(DEBIAN_FOLDER / "t10k-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=8)[:2000]
    assert "".join(map(str, labels[:64].tolist())) == LABELS
    right = torch.cat([classifier(x.float() / 255).argmax(1) for x in images.split(500)]) == labels
    assert right.float().mean() >= 0.91


def test_classifier_features_are_what_it_classifies(classifier, garments):
    x = levels(garments) / 255
    maps = classifier.features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 32, 32),
        (48, 16, 16),
        (96, 8, 8),
        (64, 4, 4),
    ]
    assert classifier.embed(x).shape == (7, 64)
    torch.testing.assert_close(classifier.head(maps[-1].mean((2, 3))), classifier(x))
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_an_image_does_not_depend_on_its_batch(classifier, garments):
    x = levels(garments) / 255
    together, alone = classifier.embed(x), torch.cat([classifier.embed(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# Distances ---------------------------------------------------------------------------------------


def test_perceptual_against_a_sum_by_hand():
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 4), (2, 5, 2, 3)]
    f, h = ([torch.randn(s, generator=g) for s in shapes] for _ in range(2))
    expected = np.zeros(2)
    for a, b in zip(f, h, strict=True):
        for image in range(2):
            cells = [
                sum((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2)
                for u, v in zip(
                    a[image].flatten(1).T.double().numpy(),
                    b[image].flatten(1).T.double().numpy(),
                    strict=True,
                )
            ]
            expected[image] += np.mean(cells) / len(shapes)
    np.testing.assert_allclose(perceptual(f, h).numpy(), expected, rtol=1e-12)
    assert perceptual(f, f).tolist() == [0, 0]
    opposite = perceptual(f, [-3 * m for m in f])  # the scale of features does not count
    np.testing.assert_allclose(opposite, 4, rtol=1e-12)


def test_perceptual_distance_grows_with_damage(classifier, shipped_images):
    x = shipped_images
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    truth = classifier.features(levels(x) / 255)
    means = [
        float(perceptual(truth, classifier.features(levels(x + s * noise) / 255)).mean())
        for s in (0, 0.02, 0.1, 0.5)
    ]
    assert means[0] == 0
    assert means == sorted(means)
    assert means[1] < 0.5 * means[3]


@pytest.mark.parametrize("dimension", [3, 20])
def test_frechet_against_the_closed_form(dimension):
    x, y = (c.numpy() for c in clouds(60, dimension))
    sx, sy = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(sx @ sy)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sx + sy - 2 * root.real)
    found = frechet(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-8)


def test_frechet_of_shifted_features_is_the_shift_squared():
    x, _ = clouds(100, 6)
    assert frechet(x, x + 2) == pytest.approx(6 * 4, rel=1e-8)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_kernel_against_a_sum_over_pairs():
    x, y = (c.numpy() for c in clouds(12, 5))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 144
    found = kernel(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-10)


def test_kernel_of_unequal_sets_is_the_same_twice_and_leaves_the_generator():
    x, y = clouds(40, 5)
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = kernel(x[:15], y)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert kernel(x[:15], y) == first
    torch.set_rng_state(before)
    # The estimate on all pairs, which the subsets scatter about.
    gram = [(a @ b.mT / 5 + 1) ** 3 for a, b in ((x[:15], x[:15]), (y, y), (x[:15], y))]
    within = sum((g.sum() - g.trace()) / (len(g) * (len(g) - 1)) for g in gram[:2])
    expected = float(within - 2 * gram[2].mean())
    assert first == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("features", [8, 40])  # more images than features, and fewer
def test_resampled_distances_are_torchmetrics_of_repeated_rows(features):
    x, y = clouds(30, features)
    g = torch.Generator().manual_seed(3)
    rows = torch.randint(30, (70, 30), generator=g)  # more than one chunk of them
    counts = torch.stack([torch.bincount(r, minlength=30) for r in rows])
    many, kernels = frechet_many(x, y, counts), kernel_many(x, y, counts)
    assert torch.equal(frechet_many(x, y, counts), many)
    for i in (0, 1, 63, 64, 69):
        assert float(many[i]) == pytest.approx(frechet(x[rows[i]], y[rows[i]]), rel=1e-5)
        assert float(kernels[i]) == pytest.approx(kernel(x[rows[i]], y[rows[i]]), rel=1e-6)


def test_resampled_frechet_with_fewer_images_than_features():
    x, y = clouds(10, 16)
    once = torch.ones(1, 10)
    assert float(frechet_many(x, y, once)) == pytest.approx(frechet(x, y), abs=1e-5, rel=1e-6)


# Runs --------------------------------------------------------------------------------------------


def test_numbers_of_a_run(tmp_path, classifier, garments):
    outputs, result = run(tmp_path, garments)
    pixels = {
        key: torch.stack([levels(outputs[f"set/{i}"][key]) / 255 for i in range(7)])
        for key in ("truth", "restored", "measurement")
    }
    assert set(torch.unique(pixels["restored"] * 255).round().tolist()) <= set(range(256))
    maps = {key: classifier.features(x) for key, x in pixels.items()}
    for kind, key in zip(KINDS, ("restored", "measurement"), strict=True):
        expected = perceptual(maps[key], maps["truth"])
        found = [record(tmp_path, i)["perceptual"][kind] for i in range(7)]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert expected.min() > 0
        entry = result["metrics"][kind]
        assert entry["mean"] == pytest.approx(np.mean(found))
        assert entry["standard_error"] == pytest.approx(np.std(found, ddof=1) / 7**0.5)
        assert entry["count"] == 7
    z = {key: classifier.embed(x) for key, x in pixels.items()}
    stored = read_embeddings(tmp_path, [f"set/{i}" for i in range(7)])
    assert stored.shape == (7, 3, 64)
    for i, key in enumerate(("truth", "restored", "measurement")):
        np.testing.assert_allclose(stored[:, i], z[key], rtol=1e-3, atol=1e-4)
    for kind, key in (("", "restored"), ("_measurement", "measurement")):
        for name, distance in (("frechet", frechet), ("kernel", kernel)):
            entry = result["metrics"][f"{name}{kind}"]
            # Unlike the means over images, these lose digits: 7 images span 6 of 64 dimensions.
            assert entry["mean"] == pytest.approx(distance(z["truth"], z[key]), rel=1e-3)
            assert entry["standard_error"] is None


def test_names_say_what_the_metrics_are(tmp_path, garments):
    _, result = run(tmp_path, garments)
    assert set(result["labels"].values()) == {
        "perceptual distance (garment classifier)",
        "Fréchet distance (garment classifier features)",
        "kernel distance (garment classifier features)",
    }
    names = [*result["metrics"], *result["labels"].values(), *result["network"], *result["notes"]]
    assert not any(other in n.lower() for n in names for other in ("fid", "lpips", "kid"))
    assert result["network"]["sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert result["network"]["file"] == "fashion_mnist_classifier.safetensors"
    assert result["network"]["features"] == 64
    assert any("7 images in 64 features" in note for note in result["notes"])


def test_what_rounds_to_the_same_pixels_has_the_same_numbers(garments):
    """0.4 levels more are the same image, 0.6 are not, and 300 are clamped to 255."""
    metrics = FeatureMetrics(Tiny(1))
    x = levels(garments[:2]) / 127.5 - 1
    corner = torch.zeros_like(x)
    corner[1, :, 0, 0] = 1 / 127.5  # the restoration's first pixel, which is black

    def numbers(extra: float) -> tuple[dict[str, float], Tensor]:
        truth, restored = x + extra * corner
        return metrics.numbers(truth, restored, x[0], None)

    as_is, below, above, clamped, white = (numbers(extra) for extra in (0, 0.4, 0.6, 300, 255))
    assert as_is[0] == below[0] != above[0]
    assert torch.equal(as_is[1], below[1])
    assert clamped[0] == white[0] != above[0]


def test_batches_do_not_matter(tmp_path, garments):
    _, alone = run(tmp_path / "1", garments[:4], batch_size=1)
    _, together = run(tmp_path / "4", garments[:4], batch_size=4)
    for i in range(4):
        a, b = (record(tmp_path / size, i)["perceptual"] for size in ("1", "4"))
        assert a == pytest.approx(b, rel=1e-4)
    assert alone["metrics"]["frechet"]["mean"] == pytest.approx(
        together["metrics"]["frechet"]["mean"], rel=1e-3
    )


def test_resumed_run_has_all_samples(tmp_path, garments):
    _, whole = run(tmp_path / "whole", garments)
    folder = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="crash"):
        run(folder, garments, at=(2, 0))
    assert not (folder / "features.json").exists()
    outputs, resumed = run(folder, garments)
    assert list(outputs) == ["set/6"]
    assert resumed["metrics"] == whole["metrics"]
    # A lost file, or another network, is made good.
    embedding_path(folder, "set/1").unlink()
    outputs, again = run(folder, garments)
    assert list(outputs) == ["set/0", "set/1", "set/2"]
    assert again == resumed
    # A run that breaks off leaves no means of other samples behind.
    embedding_path(folder, "set/6").unlink()
    with pytest.raises(RuntimeError, match="crash"):
        run(folder, garments, at=(0, 0))
    assert not (folder / "features.json").exists()
    outputs, other = run(folder, garments, FeatureMetrics(Tiny(1)))
    assert len(outputs) == 7
    assert other["network"]["sha256"] != again["network"]["sha256"]
    assert other["metrics"]["perceptual"]["mean"] != again["metrics"]["perceptual"]["mean"]


def test_draws(tmp_path, garments):
    network = Tiny(1)
    outputs, result = run(tmp_path, garments, FeatureMetrics(network, name="tiny"), draws=3)
    stored = read_embeddings(tmp_path, [f"set/{i}" for i in range(7)])
    assert stored.shape == (7, 6, 5)
    for i in range(7):
        kept = outputs[f"set/{i}"]
        truth = network.features(levels(kept["truth"])[None] / 255)
        each = [network.features(levels(x)[None] / 255) for x in kept["draws"]]
        expected = np.mean([float(perceptual(m, truth).detach()) for m in each])
        found = record(tmp_path, i)["perceptual"]
        assert found["perceptual_draws"] == pytest.approx(expected, rel=1e-4)
        assert found["perceptual"] != found["perceptual_draws"]
    expected = frechet(stored[:, 0], stored[:, 3:].flatten(0, 1))
    assert result["metrics"]["frechet_draws"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert "kernel_draws" in result["metrics"]
    assert result["labels"]["frechet"] == "Fréchet distance (tiny features)"


def test_no_truth(tmp_path, garments, monkeypatch):
    _, result = run(tmp_path, garments[:2], given=True)
    assert result["metrics"] == {}
    assert any("no ground truth" in note for note in result["notes"])
    assert not (tmp_path / "embeddings").exists()
    outputs, _ = run(tmp_path, garments[:2], given=True)
    assert outputs == {}  # nothing is left to do
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nowhere"))
    for given in (True, False):  # nobody is told to fetch a network that would be of no use
        where = tmp_path / f"bare-{given}"
        _, result = run(where, garments[:2], FeatureMetrics(Inception()), given=given)
        told = [note for note in result["notes"] if "fetch fid" in note]
        assert len(told) == 1 - given


def test_images_of_another_kind(tmp_path):
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    _, result = run(tmp_path / "shipped", x)
    assert result["metrics"] == {}
    assert any("images of 1×32×32 and these are 3×16×16" in note for note in result["notes"])
    _, result = run(tmp_path / "own", x, FeatureMetrics(Tiny(3)))
    assert {*KINDS, "frechet", "kernel"} <= set(result["metrics"])
    # One that cannot tell before it is tried.
    _, result = run(tmp_path / "misfit", x, FeatureMetrics(Tiny(1)))
    assert result["metrics"] == {}
    assert any("left out: Given groups=1" in note for note in result["notes"])


def test_given_up_samples_are_left_out(tmp_path, garments):
    x = garments.clone()
    run(tmp_path, x)
    one = record(tmp_path, 3)
    one["failed"], one["perceptual"] = "not a number at step 2 of 4", dict.fromkeys(KINDS, "nan")
    (tmp_path / "records" / "set" / "3.json").write_text(json.dumps(one), "utf-8")
    _, result = run(tmp_path, x)
    assert result["failed"] == {"set/3": "not a number at step 2 of 4"}
    assert result["metrics"]["perceptual"]["count"] == 6
    assert result["metrics"]["frechet"]["count"] == 6


def test_one_image_has_no_distance_of_sets(tmp_path, garments):
    _, result = run(tmp_path, garments[:1])
    assert set(result["metrics"]) == set(KINDS)
    assert result["metrics"]["perceptual"]["standard_error"] is None
