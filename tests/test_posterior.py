"""Quality of posterior draws, against priors whose posterior is known exactly."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from predicting import cli, items, restore, strict_json
from torch import Tensor

from cmi_lightning import GaussianNoise, InputError, PosteriorSampler
from cmi_lightning.callbacks import ImageWriter, PosteriorQuality
from cmi_lightning.callbacks.posterior import INTERVALS, coverage, least_coverage, ranks, summary
from cmi_lightning.exact import GaussianMixture, as_matrix, exact_posterior
from cmi_lightning.guidance import DPS, Guidance
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Downsample, Identity, LinearOperator

SIDE, SIGMA = 8, 0.1


@pytest.fixture(autouse=True)
def any_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws from a Gaussian leave [−1, 1], where a user's images are refused."""
    monkeypatch.setattr("cmi_lightning.predict.batch._check_range", lambda *args: None)


class Exact(L.Callback):
    """Puts draws of the exact posterior in the place of the sampler's, ``width`` times as wide.

    With ``black``, half of every image is black in truth and draws.
    """

    def __init__(self, width: float = 1.0, black: bool = False) -> None:
        self.width, self.black, self.ids = width, black, []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.ids += outputs["id"]
        if not outputs["id"]:
            return
        problem, draws = outputs["details"].problem, []
        noise = SampleNoise(pl_module.seed, outputs["id"])
        for i in range(len(outputs["id"])):
            exact = exact_posterior(pl_module.denoiser, problem, i)
            x = exact.sample(pl_module.samples_per_image, noise.generator(i, "exact"))
            draws.append(exact.means + self.width * (x - exact.means))
        x = outputs["draws"] = torch.stack(draws)
        outputs["residual_draws"] = torch.stack(
            [norm(problem.y - problem.operator(one)) for one in x.unbind(1)], 1
        )
        if self.black:
            outputs["draws"] = x.clone()
            outputs["draws"][..., : SIDE // 2] = -1.7 + 0.1 * x[..., : SIDE // 2]
            outputs["truth"] = outputs["truth"].clone()
            outputs["truth"][..., : SIDE // 2] = -1.0


def sampler(
    variance: float = 0.3,
    draws: int = 8,
    operator: LinearOperator | None = None,
    guidances: list[Guidance] | None = None,
    sigma: float = SIGMA,
) -> PosteriorSampler:
    return PosteriorSampler(
        GaussianMixture(torch.zeros(1, 1, SIDE, SIDE), variance),
        operator or Downsample(2),
        guidances=guidances or [],
        num_steps=2,
        noise=GaussianNoise(sigma),
        samples_per_image=draws,
    )


def predict(
    folder: Path,
    *callbacks: Any,
    module: PosteriorSampler | None = None,
    count: int = 100,
    batch_size: int = 50,
    given: bool = False,
    logger: Any = False,
) -> dict[str, Any]:
    """Restore draws from the module's own prior; return what was written of them."""
    module = module or sampler()
    x = module.denoiser.sample(count, torch.Generator().manual_seed(7))
    restore(folder, module, items(x, given), *callbacks, batch_size=batch_size, logger=logger)
    return strict_json(folder / "posterior.json")


def close(estimate: dict[str, float], expected: float) -> bool:
    """Whether an estimate is its expectation, within three standard errors."""
    return abs(estimate["value"] - expected) <= 3 * estimate["standard_error"]


# Ranks and coverage


def test_equal_counts_give_the_probability_itself():
    for size in range(3, 60):
        for p in (*INTERVALS, 0.1, 0.68, 0.99):
            assert coverage([5] * size, p) == pytest.approx(p, rel=1e-12)
            assert least_coverage(size - 1, p) == pytest.approx(max(0, 1 - size * (1 - p) / 2))


def test_coverage_is_that_of_a_number_drawn_within_its_rank():
    counts = [5, 1, 0, 7, 2, 2, 9]
    rank = np.repeat(np.arange(7), counts)
    v = (rank + np.random.default_rng(0).random((20_000, len(rank)))) / 7
    for p in INTERVALS:
        inside = (np.abs(v - 0.5) < p / 2).mean()
        assert coverage(counts, p) == pytest.approx(inside, abs=0.002)


@pytest.mark.parametrize("draws", [2, 5, 16, 19, 40])
@pytest.mark.parametrize("values", [2, 7, None])  # None: continuous
def test_calibrated_draws_cover_as_they_should(draws, values):
    g = torch.Generator().manual_seed(draws)
    x = torch.randn(draws + 1, 40_000, generator=g)
    if values is not None:
        x = (x.abs() * values / 2).floor().clamp(max=values - 1)
    u = torch.rand(40_000, dtype=torch.float64, generator=g)
    rank = ranks(x[1:], x[0], u)
    counts = rank.bincount(minlength=draws + 1).double()
    assert len(counts) == draws + 1
    expected = 40_000 / (draws + 1)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < draws + 4 * math.sqrt(2 * draws) + 4
    for p in INTERVALS:
        error = math.sqrt(p * (1 - p) / 40_000)  # no less than it is: ranks count in part
        assert coverage(counts.tolist(), p) == pytest.approx(p, abs=3.5 * error)


def test_ranks_of_ties_take_every_place_between():
    draws = torch.tensor([0.0, 1.0, 1.0, 2.0])[:, None].expand(4, 5)
    u = torch.tensor([0.0, 0.34, 0.67, 0.99, 1.0], dtype=torch.float64)
    assert ranks(draws, torch.ones(5), u).tolist() == [1, 2, 3, 3, 3]
    assert ranks(draws, torch.full((5,), 1.5), u).tolist() == [3] * 5
    assert ranks(draws, torch.full((5,), -1.0), u).tolist() == [0] * 5
    assert ranks(draws, torch.full((5,), 3.0), u).tolist() == [4] * 5


def test_standard_errors_are_the_jackknife_s():
    g = np.random.default_rng(0)
    images = [
        {"ranks": [a, 9 - a, 3], "spread": s, "skill": e, "residual": q}
        for a, s, e, q in zip(
            g.integers(1, 8, 150), *g.gamma(3.0, 0.1, (2, 150)), g.gamma(9, 0.1, 150), strict=True
        )
    ]
    whole = summary(images)
    parts = [summary(images[:i] + images[i + 1 :]) for i in range(150)]
    for name in ("spread_skill", "residual"):
        values = np.array([part[name]["value"] for part in parts])
        error = math.sqrt(149 / 150 * ((values - values.mean()) ** 2).sum())
        assert whole[name]["standard_error"] == pytest.approx(error, rel=0.02)
    values = np.array([coverage(image["ranks"], 0.5) for image in images])
    assert whole["coverage"]["50"]["value"] == pytest.approx(values.mean())
    error = values.std(ddof=1) / math.sqrt(150)
    assert whole["coverage"]["50"]["standard_error"] == pytest.approx(error)
    spread, skill = (math.fsum(image[k] for image in images) for k in ("spread", "skill"))
    assert whole["spread_skill"]["value"] == pytest.approx(math.sqrt(spread / skill))


# Exact posteriors


@pytest.mark.parametrize("variance", [0.05, 0.6])  # the wide one is often clamped
@pytest.mark.parametrize("black", [False, True])
def test_exact_draws_are_found_calibrated(tmp_path, variance, black, capsys):
    found = predict(
        tmp_path, Exact(black=black), PosteriorQuality(), module=sampler(variance), count=120
    )
    assert (found["images"], found["draws"]) == (120, 8)
    for name, p in (("50", 0.5), ("90", 0.9)):
        value = found["coverage"][name]
        assert value["expected"] == p
        assert close(value, p)
        assert value["standard_error"] < 0.01
    assert close(found["spread_skill"], 1.0)
    assert found["spread_skill"]["standard_error"] < 0.02
    assert close(found["residual"], 1.0)
    assert found["residual"]["standard_error"] < 0.02
    assert sum(found["ranks"]) == 120 * SIDE**2
    shown = capsys.readouterr().out
    value = found["coverage"]["90"]
    assert f"{value['value']:.3f} ± {value['standard_error']:.3f}" in shown
    assert "posterior.json" in shown


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_too_narrow_and_too_wide_draws_are_told_apart(tmp_path, width):
    variance, count = 0.05, 8
    module = sampler(variance)
    found = predict(tmp_path, Exact(width), PosteriorQuality(), module=module, count=120)
    sign = 1 if width > 1 else -1
    for value in found["coverage"].values():
        assert sign * (value["value"] - value["expected"]) > 10 * value["standard_error"]
    spread, skill = width**2 * (count + 1) / count, 1 + width**2 / count
    assert close(found["spread_skill"], math.sqrt(spread / skill))
    like = torch.zeros(1, 1, SIDE, SIDE)
    operator = module.operator.bind((1, SIDE, SIDE), SampleNoise(0, ["0"]), like)
    matrix = as_matrix(operator, operator(like))
    measured = variance * torch.linalg.eigvalsh(matrix @ matrix.T)
    explained = float((measured / (measured + SIGMA**2)).mean())
    assert close(found["residual"], math.sqrt(1 + (width**2 - 1) * explained))


def test_numbers_are_of_the_saved_pixels(tmp_path):
    writer, path = ImageWriter(inputs=True), tmp_path / "records/set/1.json"
    predict(tmp_path, writer, PosteriorQuality(), module=sampler(0.6, draws=3), count=2)

    def png(name: str) -> np.ndarray:
        with Image.open(tmp_path / name) as image:
            return np.asarray(image) / 127.5 - 1

    truth, draws = png("truth/set/1.png"), np.stack([png(f"draws/set/1/{k}.png") for k in range(3)])
    found = json.loads(path.read_text())["posterior"]
    assert found["spread"] == pytest.approx(draws.var(0, ddof=1).mean() * 4 / 3, rel=1e-5)
    assert found["skill"] == pytest.approx(((draws.mean(0) - truth) ** 2).mean(), rel=1e-5)
    below, most = (draws < truth).sum(0), (draws <= truth).sum(0)
    counts = np.cumsum(found["ranks"])
    for r in range(4):  # a tie may fall either way
        assert (most <= r).sum() <= counts[r] <= (below <= r).sum()
    assert counts[-1] == SIDE**2


# Runs


class FailAt(L.Callback):
    """Fails in a batch, after the others."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch:
            raise RuntimeError("crash")


def test_a_resumed_run_and_other_batches_equal_an_uninterrupted_one(tmp_path):
    whole = predict(tmp_path / "whole", Exact(), PosteriorQuality(), count=9, batch_size=4)
    with pytest.raises(RuntimeError, match="crash"):
        predict(tmp_path / "cut", Exact(), PosteriorQuality(), FailAt(1), count=9, batch_size=4)
    assert not (tmp_path / "cut/posterior.json").exists()
    exact = Exact()
    cut = predict(tmp_path / "cut", exact, PosteriorQuality(), count=9, batch_size=4)
    assert exact.ids == [f"set/{i}" for i in range(4, 9)]
    assert cut == whole
    exact = Exact()
    assert predict(tmp_path / "cut", exact, PosteriorQuality(), count=9, batch_size=4) == whole
    assert exact.ids == []
    (tmp_path / "cut/records/set/5.json").unlink()
    with pytest.raises(RuntimeError, match="crash"):
        predict(tmp_path / "cut", Exact(), PosteriorQuality(), FailAt(1), count=9, batch_size=4)
    assert not (tmp_path / "cut/posterior.json").exists()  # it was of other rows
    assert predict(tmp_path / "ones", Exact(), PosteriorQuality(), count=9, batch_size=1) == whole


def test_a_run_without_it_is_made_up_for(tmp_path):
    with pytest.raises(FileNotFoundError):  # it wrote none to read back
        predict(tmp_path, ImageWriter(), count=3)
    (tmp_path / "posterior.json").write_text("{}")  # a user's file: no run wrote it
    with pytest.raises(InputError, match=r"posterior\.json' is in the way"):
        predict(tmp_path, Exact(), ImageWriter(), PosteriorQuality(), count=3)
    assert (tmp_path / "posterior.json").read_text() == "{}"
    (tmp_path / "posterior.json").unlink()
    exact = Exact()
    assert predict(tmp_path, exact, ImageWriter(), PosteriorQuality(), count=3)["images"] == 3
    assert exact.ids == [f"set/{i}" for i in range(3)]


def test_values_are_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    found = predict(tmp_path, Exact(), PosteriorQuality(), count=3, logger=logger)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["posterior/coverage_90"]) == found["coverage"]["90"]["value"]
    assert float(row["posterior/spread_skill"]) == found["spread_skill"]["value"]
    assert float(row["posterior/residual"]) == found["residual"]["value"]


@pytest.mark.parametrize(("draws", "bound"), [(2, "0.85"), (16, "0.15"), (19, None)])
def test_few_draws_are_told_to_bound_the_coverage(tmp_path, draws, bound):
    module = sampler(draws=draws)
    found = predict(tmp_path, Exact(0.0), PosteriorQuality(), module=module, count=2)
    notes = [note for note in found["notes"] if note.startswith("The coverage of 90 %")]
    if bound is None:
        assert notes == []
        assert found["coverage"]["90"]["value"] < 0.05
    else:
        (note,) = notes
        assert f"by {draws} draws is {bound} at least" in note
        assert "; 19 draws have" in note
        assert found["coverage"]["90"]["value"] == pytest.approx(float(bound), abs=0.1)


def test_one_draw_is_refused_before_sampling(tmp_path, capsys):
    exact = Exact()
    with pytest.raises(InputError, match=r"set --model\.samples_per_image to 2"):
        predict(tmp_path, exact, PosteriorQuality(), module=sampler(draws=1))
    assert exact.ids == []
    assert list(tmp_path.iterdir()) == []
    command = "predict -c demo/garments --trainer.callbacks+=PosteriorQuality"
    command += " --trainer.accelerator=cpu"
    assert cli(command, f"--trainer.default_root_dir={tmp_path}") == 2
    assert "--model.samples_per_image" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_without_truth_there_is_one_note(tmp_path, capsys):
    module = sampler(draws=3, operator=Identity(), guidances=[DPS()])
    found = predict(tmp_path, PosteriorQuality(), module=module, count=3, given=True)
    assert len(found["notes"]) == 1
    assert found["notes"][0].startswith("There is no ground truth")
    assert found["coverage"]["50"]["value"] is found["spread_skill"]["value"] is None
    assert found["residual"]["value"] is None
    assert found["ranks"] == []
    shown = capsys.readouterr().out
    assert shown.count("no ground truth") == 1
    assert "coverage of" not in shown


def test_without_noise_the_residual_is_left_out(tmp_path):
    module = sampler(draws=3, sigma=0.0)
    found = predict(tmp_path, PosteriorQuality(), module=module, count=3)
    assert found["residual"] == {"value": None, "standard_error": None, "expected": 1.0}
    assert any("no noise" in note for note in found["notes"])
    assert found["spread_skill"]["value"] > 0


class Spoil(Guidance):
    """Makes the images whose ids end in 1 no numbers."""

    def guide_sample(self, step, x):
        bad = [name.partition("#")[0].endswith("1") for name in step.noise.ids]
        return torch.where(torch.tensor(bad)[:, None, None, None], math.nan, x)


class SpoilDraw(L.Callback):
    """Makes one draw of the first image no number, unseen by the sampler."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        outputs["draws"][0, 1] = math.nan


@pytest.mark.parametrize("seen", [True, False])
def test_spoilt_images_are_left_out_and_told(tmp_path, seen):
    callbacks = [PosteriorQuality()] if seen else [SpoilDraw(), PosteriorQuality()]
    module = sampler(draws=3, guidances=[Spoil()] if seen else None)
    found = predict(tmp_path, *callbacks, module=module, count=3, batch_size=3)
    assert found["images"] == 3
    assert sum(found["ranks"]) == 2 * SIDE**2
    words = "1 of 3 images failed" if seen else "draws that are not numbers"
    assert any(words in note for note in found["notes"])
    assert list(found["failed"]) == ["set/1"] * seen


def test_the_module_measures_the_residual_of_every_draw(tmp_path):
    seen: list[Tensor] = []

    class Look(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, *rest):
            problem = outputs["details"].problem
            for k, x in enumerate(outputs["draws"].unbind(1)):
                residual = (problem.y - problem.operator(x)).flatten(1).norm(dim=1)
                torch.testing.assert_close(outputs["residual_draws"][:, k], residual)
            seen.append(outputs["residual_draws"])

    found = predict(tmp_path, Look(), PosteriorQuality(), module=sampler(draws=3), count=4)
    (residual,) = seen
    assert residual.shape == (4, 3)
    expected = (residual.double().square().mean() / (SIGMA**2 * (SIDE // 2) ** 2)).sqrt()
    assert found["residual"]["value"] == pytest.approx(float(expected), rel=1e-5)
