"""The mixture benchmark: its problems, its metrics, and that DPS lands where others found it."""

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats

from cmi_lightning.guidance import CMI, DPS, MomentMatching
from cmi_lightning.information import Lanczos
from cmi_lightning.schedule import CLEAN
from cmi_lightning.solvers import DDPM

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/mixture.py with the names of its parts, which are in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("mixture", "mixture_problems", "mixture_samplers", "mixture_tables")
        whole, *parts = (importlib.import_module(name) for name in names)
        for part in parts:
            vars(whole).update({k: v for k, v in vars(part).items() if not hasattr(whole, k)})
        yield whole
    for name in names:
        del sys.modules[name]


def test_prior_is_the_grid_of_25(bench):
    expected = [[8 * i, 8 * j] * 4 for i, j in itertools.product((-2, -1, 0, 1, 2), repeat=2)]
    assert bench.means(8).tolist() == expected
    w = bench.weights(8)
    assert w.shape == (25,)
    assert float(w.sum()) == pytest.approx(1)
    assert torch.equal(w, bench.weights(8))


def test_measurement_has_the_drawn_singular_values(bench):
    for index in range(20):
        A, s, std = bench.measurement(bench.Cell(80, 4, 20), bench.generator("test", index))
        torch.testing.assert_close(torch.linalg.svdvals(A), s)
        assert bool((s[:-1] >= s[1:]).all())
        assert 0 < float(s[-1]) < float(s[0]) < 1
        assert 0 < std < float(s[0])


def test_posterior_is_bayes_rule(bench):
    """p(x₀ | y) ∝ p(x₀) N(y; A x₀, σ²), the right side by torch.distributions."""
    task = bench.instance(bench.Cell(8, 2, 20), "test", 0, 20)
    A, y, std = task.problem.operator.matrix, task.problem.y[0], task.problem.noise_std
    kinds = torch.distributions
    prior = kinds.MixtureSameFamily(
        kinds.Categorical(bench.weights(8)),
        kinds.Independent(kinds.Normal(bench.means(8), torch.ones((), dtype=torch.float64)), 1),
    )
    x = torch.cat([task.reference, task.second, task.truth[None]])
    joint = prior.log_prob(x) + kinds.Normal(x @ A.mT, std).log_prob(y).sum(1)
    evidence = joint - task.posterior.log_prob(x, CLEAN)
    torch.testing.assert_close(evidence, evidence[:1].expand_as(evidence))


def test_grid_steps_down_evenly_and_holds_the_special_level(bench):
    abar, g = bench.alpha_bars(), np.random.default_rng(0)
    assert len(abar) == 1000
    assert abar[1] == pytest.approx(0.98)  # the largest β comes first
    assert abar[-1] / abar[-2] == pytest.approx(1 - 1e-4)
    for _ in range(50):
        for steps in (20, 100):
            s = np.sort(g.random(int(g.choice([1, 2, 4]))))[::-1]
            std = g.random() * s[0]
            grid = bench.time_grid(steps, s, std)
            assert len(grid) == steps
            assert grid[0] == 0
            assert grid[-1] == 999
            assert all(a < b for a, b in itertools.pairwise(grid))
            # Where ᾱ std² = (1 − ᾱ) s², ᾱ is s²/(s² + std²); a level is nearest to one of these.
            nearest = {int(np.abs(abar - v**2 / (v**2 + std**2)).argmin()) for v in s}
            assert any(abs(i - j) <= 1 for i in grid for j in nearest)
            drops = -np.diff(np.sqrt(abar[grid]))
            assert drops.max() < 1.5 / (steps - 2) + 0.01
    schedule = bench.schedule(bench.time_grid(20, [0.5], 0.2))
    assert len(schedule) == 19
    assert schedule[18].alpha == pytest.approx(abar[999] ** 0.5)
    assert schedule[18].time == 999


def test_roles_indices_and_step_counts(bench):
    def y(steps: int, role: str, index: int) -> torch.Tensor:
        return bench.instance(bench.Cell(8, 2, steps), role, index, 3).problem.y

    assert torch.equal(y(20, "report", 0), y(100, "report", 0))
    assert not torch.equal(y(20, "report", 0), y(20, "tune", 0))
    assert not torch.equal(y(20, "report", 0), y(20, "report", 1))


def test_sliced_wasserstein_is_scipys(bench):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50, 6, generator=g, dtype=torch.float64) + k for k in (0, 1))
    directions = torch.randn(6, 7, generator=g, dtype=torch.float64)
    expected = np.mean(
        [stats.wasserstein_distance((a @ v).numpy(), (b @ v).numpy()) for v in directions.mT]
    )
    assert bench.sliced_wasserstein(a, b, directions) == pytest.approx(expected)


def test_exact_draws_cover_as_they_should(bench):
    """Of the truth itself, over many problems; errors of one problem's coordinates correlate."""
    inside, noise = [], []
    for index in range(150):
        task = bench.instance(bench.Cell(8, 2, 20), "test", index, 400)
        inside.append(bench.coverage(task.reference, task.truth[None]))
        problem = task.problem
        noise.append((problem.y[0] - problem.operator(task.truth[None])[0]) / problem.noise_std)
    assert float(torch.cat(noise).square().mean()) == pytest.approx(1, abs=4 * (2 / 300) ** 0.5)
    for share, level in zip(np.array(inside).T, bench.CENTRAL, strict=True):
        assert abs(share.mean() - level) < 4 * share.std() / len(share) ** 0.5
        assert share.std() / len(share) ** 0.5 < 0.025


def test_coverage_tells_narrow_from_wide(bench):
    g = torch.Generator().manual_seed(2)
    draws = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    truths = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    for width in (0.5, 1.0, 2.0):
        expected = [2 * stats.norm.cdf(width * stats.norm.ppf((1 + c) / 2)) - 1 for c in (0.5, 0.9)]
        assert bench.coverage(width * draws, truths) == pytest.approx(expected, abs=0.02)


def test_solver_is_ddpm_at_full_noise(bench):
    task = bench.instance(bench.Cell(8, 2, 20), "test", 0, 4)
    ours = bench.draw(task, [DPS(0.2)], 1.0)
    sampler = bench.Sampler(task.prior, DDPM(), [DPS(0.2)], clamp=False)
    noise = bench.BatchNoise(task.seed, ["batch"])
    torch.testing.assert_close(ours, sampler.run(task.problem, noise, task.reference))


def test_solver_without_noise_ignores_it(bench):
    task = bench.instance(bench.Cell(8, 2, 20), "test", 0, 4)
    step = bench.Step(
        5, task.reference, task.prior.schedule[5], task.prior.schedule[4], task.problem, task.prior,
        bench.BatchNoise(0, ["batch"]), False,
    )  # fmt: skip
    half, full = (bench.ScaledDDPM(e).transition(step, lambda s: s.x0) for e in (0.5, 1.0))
    torch.testing.assert_close(half.mean, full.mean)
    assert half.std == pytest.approx(0.5 * full.std)


def test_diverging_draws_are_kept_and_counted(bench):
    """A step of DPS a million times too long would leave NaN or infinity."""
    task = bench.instance(bench.Cell(8, 1, 20), "test", 0, 10)
    draws = bench.draw(task, [DPS(1e9)], 0.6)
    assert bool(draws.isfinite().all())
    scores = bench.score(draws, task)
    assert scores.diverged == 1
    assert 10 < scores.distance <= bench.FENCE * 8
    fence, step = bench.Fence(), None
    x = torch.tensor([[float("nan"), 1.0], [-float("inf"), 2.0]])
    expected = torch.tensor([[1e3, 1.0], [-1e3, 2.0]])
    assert torch.equal(fence.guide_sample(step, x), expected)
    assert fence.guide_sample(step, expected) is expected


def test_grids_are_of_one_size_and_hold_no_cmi(bench):
    for m in (1, 2, 4):
        assert {len(grid) for grid in bench.bases(m).values()} == {6}
        settings = bench.cmis(m)
        assert len(settings) == 6
        assert settings["off"] == []
        assert all(isinstance(g, CMI) for s in settings.values() for g in s)
        assert all(g.scale > 0 for s in settings.values() for g in s)  # descent is not tuned
        assert bench.unlimited(bench.FIXED["c=1"], m) == settings["c=1"]


def test_fixed_settings_are_ascent_and_descent(bench):
    """c = −1 moves the mean as far as c = 1, the other way; I rises with 1 and falls with −1."""
    task = bench.instance(bench.Cell(8, 2, 20), "test", 0, 4)
    levels = task.prior.schedule
    # At the reference's clean draws I is flat to rounding; between two components it is not.
    noise = torch.randn(4, 8, generator=bench.generator("between"), dtype=torch.float64)
    x = levels[9].alpha * bench.means(8)[12:14].mean(0) + levels[9].sigma * noise
    step = bench.Step(
        9, x, levels[9], levels[8], task.problem, task.prior, bench.BatchNoise(0, ["batch"])
    )
    start = bench.Transition(x, 0.1, torch.zeros_like(x))
    shifts = {}
    for label, c in bench.FIXED.items():
        (cmi,) = bench.unlimited(c, 2)
        shifts[label] = cmi.guide_transition(step, start).mean - start.mean
    assert float(shifts["c=1"].norm(dim=1).min()) > 0
    torch.testing.assert_close(shifts["c=-1"], -shifts["c=1"])
    value = cmi.estimate(step).value
    for label, sign in {"c=1": 1, "c=-1": -1}.items():
        small = 1e-3 * shifts[label] / shifts[label].norm(dim=1, keepdim=True)
        moved = cmi.estimate(replace(step, x=step.x + small)).value
        assert bool((sign * (moved - value) > 0).all())


def test_short_krylov_space_is_the_default_for_few_measurements(bench):
    """For m < 3 the benchmark shortens the default's space, which ends there anyway."""
    task = bench.instance(bench.Cell(8, 2, 20), "test", 0, 4)
    short = bench.cmis(2)["c=1"]
    long = [CMI(1.0, "beta", float("inf"), 0.0, 1.0, 1, Lanczos())]
    torch.testing.assert_close(
        bench.draw(task, [DPS(0.2), *short], 0.6), bench.draw(task, [DPS(0.2), *long], 0.6)
    )


def test_interval_and_correction(bench):
    values = [0.3, -0.1, 0.8, 0.4, 0.2]
    e = bench.estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (e.mean - e.half, e.mean + e.half) == pytest.approx((low, high))
    assert e.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert e.sign == 0
    assert bench.estimate([0.0, 0.0]).p == 1
    assert bench.holm([0.016, 0.01, 0.04, 0.3]) == [True, True, False, False]
    assert bench.holm([0.02, 0.01]) == [True, True]


def test_run_can_be_interrupted(bench, tmp_path, monkeypatch):
    """A run that stops after one problem and goes on gives the file of one that does not."""
    few = {"DPS": ("scale=0.2", "scale=2"), "DSG": ("rate=0.1",)}
    grids = bench.bases
    monkeypatch.setattr(
        bench, "bases", lambda m: {k: {s: grids(m)[k][s] for s in few[k]} for k in few}
    )
    cell = bench.Cell(8, 1, 20)
    full, parts = tmp_path / "full.json", tmp_path / "parts.json"
    size = bench.Size([cell], 1, 20, 2, {8: 20})
    bench.Bench(size, full).run()
    for problems in (1, 2):
        bench.Bench(replace(size, problems=problems), parts).run()
    assert full.read_text() == parts.read_text()
    scores = json.loads(full.read_text())["scores"][str(cell)]
    assert len(scores) == 12
    assert all(len(entries) == 2 for entries in scores.values())
    text = bench.Report(json.loads(full.read_text()), size).text()
    for label in bench.FIXED:
        pairs = list(zip(scores[f"CMI+DPS, {label}"], scores["DPS"], strict=True))
        assert f"| {np.mean([a[0] - b[0] for a, b in pairs]):+.3f} ± " in text.replace("**", "")
        points = np.mean([100 * (a[1][1] - b[1][1]) for a, b in pairs])
        rows = [line for line in text.splitlines() if line.startswith(f"| 90 % | CMI, {label}")]
        assert len(rows) == 1
        assert f"| {points:+.1f} ± " in rows[0]


def test_run_adds_only_what_is_missing(bench, tmp_path, monkeypatch):
    """Lists that are there stay, whatever they hold; deleted ones come back the same."""
    grids = bench.bases
    monkeypatch.setattr(bench, "bases", lambda m: {"DPS": {"scale=2": grids(m)["DPS"]["scale=2"]}})
    cell, path = bench.Cell(8, 1, 20), tmp_path / "results.json"
    size = bench.Size([cell], 1, 20, 2, {8: 20})
    bench.Bench(size, path).run()
    results = json.loads(path.read_text())
    lists = results["scores"][str(cell)]
    removed = {name: lists.pop(name) for name in list(lists) if name.endswith("c=-1")}
    assert len(removed) == 2
    lists["DPS"] = [[7.0, *entry[1:]] for entry in lists["DPS"]]
    path.write_text(json.dumps(results))
    bench.Bench(size, path).run()
    assert json.loads(path.read_text())["scores"][str(cell)] == lists | removed


def test_document_holds_the_tables(bench):
    """docs/mixture.md quotes `python benchmarks/mixture.py table` as it is."""
    report = bench.Report(json.loads(bench.RESULTS.read_text()), bench.Size())
    assert len(report.cells) == 18
    document = (ROOT / "docs" / "mixture.md").read_text()
    for line in report.text().splitlines():
        if line.startswith("|"):
            assert line in document


def test_dps_lands_where_it_was_found_before(bench):
    """MCGdiff's DPS at d = 8, m = 1, 20 steps: 4.9 to 5.2 in replications of ours."""
    cell, distances = bench.Cell(8, 1, 20), {"DPS": [], "MomentMatching": [], "exact": []}
    for index in range(20):
        task = bench.instance(cell, "anchor", index, 800)
        for name, draws in {
            "DPS": bench.draw(task, [DPS(0.2)], bench.ETA[20]),
            "MomentMatching": bench.draw(task, [MomentMatching(1)], bench.ETA[20]),
            "exact": task.second,
        }.items():
            distances[name].append(bench.sliced_wasserstein(draws, task.reference, task.directions))
    mean = {name: np.mean(values) for name, values in distances.items()}
    assert abs(mean["DPS"] - 4.9) < 1.5
    assert mean["MomentMatching"] < mean["DPS"]
    assert mean["exact"] < 0.3
