"""The table: its cells, its statistics, its results, its command."""

import csv
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from cmi_lightning import configs
from cmi_lightning.callbacks.distances import embedding_path, frechet
from cmi_lightning.cli import main
from cmi_lightning.errors import InputError
from cmi_lightning.report.album import Album
from cmi_lightning.report.results import VARIANTS, Search, Trial, read_results
from cmi_lightning.report.tables import csv as to_csv
from cmi_lightning.report.tables import latex, markdown
from cmi_lightning.statistics import Estimate, mean_and_error
from cmi_lightning.table.aggregate import aggregate
from cmi_lightning.table.cells import SET_RESAMPLES, StartedCell, started_cells
from cmi_lightning.table.command import check, parse, rounds
from cmi_lightning.table.records import passes, records
from cmi_lightning.table.resampling import (
    bootstrap_interval,
    holm,
    interval_and_p,
    resamples_of,
    sign_flip_p,
)
from cmi_lightning.table.run import FinishedCell, ProgressPrinter, run, run_job
from cmi_lightning.table.spec import Method, Posterior, Table, Task
from cmi_lightning.table.tune import best, count_trials, trial
from cmi_lightning.table.tune import check as check_tuning

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def small(**options) -> Table:
    parts = {
        "title": "t",
        "common": ["table/garments"],
        "tasks": {"box": Task("box", ["task/inpaint_box"])},
        "methods": {
            "none": Method(["guidance/none"]),
            "DPS": Method(["guidance/dps"], "dps", [0.5, 1.0]),
        },
        "cmi": Method(["table/cmi"], "cmi", [0.0, 0.1]),
        "step_sizes": {"box": {"DPS": 2.0, "CMI+DPS": 0.1}},
    }
    return Table(**{**parts, **options})


# Statistics ---------------------------------------------------------------------------------------


def test_mean_and_error_are_the_textbook_ones():
    values = np.random.default_rng(0).normal(size=50)
    found = mean_and_error(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.se == pytest.approx(scipy.stats.sem(values))
    assert mean_and_error([1.0]) == Estimate(1.0)
    assert mean_and_error([]) == Estimate(None)


def test_bootstrap_interval_is_scipys_up_to_its_own_draws():
    data = np.random.default_rng(1).gamma(2.0, size=200)
    low, high = bootstrap_interval(data)
    ours = scipy.stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        random_state=np.random.default_rng(2),  # "rng" since scipy 1.15
    ).confidence_interval
    width = ours.high - ours.low
    assert low == pytest.approx(ours.low, abs=0.05 * width)
    assert high == pytest.approx(ours.high, abs=0.05 * width)
    assert bootstrap_interval(data) == (low, high)  # the same draws every time


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(3)
    inside = 0
    for k in range(300):
        low, high = bootstrap_interval(rng.normal(0.3, 1.0, size=60), resamples=500, seed=k)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_sign_flips_agree_with_all_of_them():
    data = np.random.default_rng(4).normal(0.4, 1.0, size=10)
    sums = np.array([np.dot(signs, data) for signs in itertools.product([-1, 1], repeat=10)])
    exact = (np.abs(sums) >= abs(data.sum()) - 1e-12).mean()
    assert sign_flip_p(data, resamples=40_000) == pytest.approx(exact, abs=0.01)


def test_sign_flips_of_nothing_are_no_evidence():
    assert sign_flip_p([0.0] * 20) == 1.0


def test_resamples_draw_every_image_as_often():
    counts = resamples_of(7, 4000)
    assert (counts.sum(1) == 7).all()
    assert counts.mean(0) == pytest.approx(np.ones(7), abs=0.06)


def test_interval_and_p_mirror_the_draws():
    low, high, p = interval_and_p(0.5, np.linspace(-1, 3, 4001))  # mirrored: −2 to 2
    assert (low, high) == pytest.approx((-1.9, 1.9), abs=1e-3)
    assert p == pytest.approx(1.0, abs=1e-2)
    assert interval_and_p(1.0, np.linspace(0.9, 1.3, 999))[2] == pytest.approx(2 / 1000)


def test_intervals_of_a_biased_statistic_cover_it():
    """The variance with 1/n: a resample's is too small on average, as the sample's own is."""
    rng = np.random.default_rng(5)
    inside = 0
    for k in range(300):
        data = rng.normal(size=80)
        counts = resamples_of(80, 500, seed=k) / 80
        draws = counts @ data**2 - (counts @ data) ** 2
        low, high, _ = interval_and_p(data.var(), draws)
        inside += low <= 1.0 <= high
    assert 0.87 <= inside / 300 <= 0.98


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_step_down_of_its_definition(seed):
    p = np.random.default_rng(seed).beta(0.2, 3, size=12)
    ordered = np.sort(p)
    k = next((i for i in range(12) if ordered[i] > 0.05 / (12 - i)), 12)
    assert holm(list(p)) == [bool(v <= ordered[k - 1]) if k else False for v in p]
    assert holm([]) == []


CLUSTERED = [f"photo{k // 5}/crop{k % 5}" for k in range(40)]


def clustered_values() -> np.ndarray:
    """Five crops of each of eight photographs, most of whose differences are the photograph's."""
    rng = np.random.default_rng(6)
    return np.repeat(rng.normal(0.4, 1.0, 8), 5) + 0.2 * rng.normal(size=40)


def test_errors_and_intervals_of_clusters_are_those_of_resampled_photographs():
    values, clusters = clustered_values(), [name.partition("/")[0] for name in CLUSTERED]
    means = values.reshape(8, 5).mean(1)  # clusters of one size: the mean of the clusters' means
    found = mean_and_error(values, clusters)
    assert found.mean == pytest.approx(values.mean())
    assert found.se == pytest.approx(scipy.stats.sem(means))
    assert found.se > 1.5 * mean_and_error(values).se
    assert mean_and_error(values, CLUSTERED) == mean_and_error(values)
    assert mean_and_error(values, ["one"] * 40).se is None
    assert bootstrap_interval(values, clusters) == pytest.approx(bootstrap_interval(means))
    assert bootstrap_interval(values, CLUSTERED) == pytest.approx(bootstrap_interval(values))
    sums = [np.dot(signs, means) for signs in itertools.product([-1, 1], repeat=8)]
    exact = (np.abs(sums) >= abs(means.sum()) - 1e-12).mean()
    assert sign_flip_p(values, clusters, resamples=40_000) == pytest.approx(exact, abs=0.01)


def test_clusters_of_different_sizes_are_drawn_whole():
    values, clusters = [1.0, 2.0, 3.0, 10.0], ["a", "a", "a", "b"]
    draws = [np.array(v) for v in ([1, 2, 3] * 2, [1, 2, 3, 10], [10, 10])]
    low, high = bootstrap_interval(values, clusters)
    assert (low, high) == (min(d.mean() for d in draws), max(d.mean() for d in draws))


@pytest.mark.parametrize(
    ("cluster", "name", "expected"),
    [
        (None, "a/b/3", None),
        ("/", "a/b/3", "a/b"),
        ("/", "3", "3"),
        ("-", "lake-2-7", "lake-2"),
        (r"^(\w+?)_", "lake_2_7", "lake"),
    ],
)
def test_a_cluster_is_named_by_a_separator_or_a_group(cluster, name, expected):
    assert small(cluster=cluster).cluster_of(name) == expected


def test_an_id_that_has_no_cluster_is_refused():
    with pytest.raises(InputError, match="does not match the image 'lake'"):
        small(cluster=r"(\d+)").cluster_of("lake")


# Cells --------------------------------------------------------------------------------------------


def test_rounds_go_over_all_cells_before_any_does_more():
    table = small(images=5, round=2)
    work = rounds(table)
    assert [[job[0].images for job in part] for part in work] == [[2, 2], [4, 4], [5, 5]]
    assert all(len({cell.images for cell in job}) == 1 for part in work for job in part)
    names = [[c.label for c in job] for job in work[0]]
    assert names == [["none", "CMI"], ["DPS", "CMI+DPS", "DPS, 100 steps"]]


def test_rows_of_equal_cost_may_have_fewer_images():
    table = small(images=5, round=2, equal_images=3, only_methods=["DPS"])
    work = [part[0] for part in rounds(table)]
    assert [{c.variant: c.images for c in job} for job in work] == [
        {"base": 2, "cmi": 2, "equal": 2},
        {"base": 4, "cmi": 4, "equal": 3},
        {"base": 5, "cmi": 5},
    ]
    with pytest.raises(InputError, match="equal_cost to false"):
        small(equal_images=0)


def test_a_method_may_have_steps_of_its_own_and_no_cmi():
    methods = {"DPS": Method(["guidance/dps"], "dps", [0.5, 1.0], steps=30)}
    methods["DAPS"] = Method(["solver/daps"], steps=40, cmi=False)
    table = small(methods=methods, posterior=Posterior(), descent=Method(["table/cmi"], "cmi"))
    (work,) = rounds(table)[:1]
    assert [[(c.variant, c.steps) for c in job] for job in work] == [
        [("base", 30), ("cmi", 30), ("descent", 30), ("equal", 30)],
        [("base", 40)],
    ]
    assert [c.label for c in table.posterior_cells()] == ["DPS", "CMI+DPS", "DAPS"]
    assert rounds(table)[-1] == [(cell,) for cell in table.posterior_cells()]
    assert "--model.num_steps=40" in table.arguments(table.cell("box", "DAPS"))
    assert trial(table, "box", "DAPS", None).steps == 40
    assert count_trials(table) == 2 + 2  # DPS's, and CMI's on DPS
    with pytest.raises(InputError, match=r"methods\.DPS\.steps must be a whole number, at least 1"):
        small(methods={"DPS": Method(["guidance/dps"], steps=0)})


def test_cells_carry_their_step_sizes_and_no_others():
    table = small()
    assert table.cell("box", "DPS").step_sizes == {"dps": 2.0}
    assert table.cell("box", "DPS", "cmi").step_sizes == {"dps": 2.0, "cmi": 0.1}
    assert table.cell("box", "DPS", "equal").step_sizes == {"dps": 2.0}
    folders = [table.cell("box", m, v).folder for m in table.methods for v in ("base", "cmi")]
    assert len(set(folders)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": 0}, "images must be a whole number, at least 1, got 0"),
        ({"only_tasks": ["bx"]}, "only_tasks: there is no 'bx'"),
        ({"only_methods": ["dps"]}, "only_methods: there is no 'dps'; use none, DPS"),
        ({"step_sizes": {"box": {"CMI": 1.0}}}, "step_sizes.box: there is no 'CMI'"),
        ({"step_sizes": {"blur": {}}}, "step_sizes: there is no 'blur'"),
        (
            {"posterior": Posterior(draws=1)},
            "posterior.draws must be a whole number, at least 2",
        ),
        ({"posterior": Posterior(methods=["MCG"])}, "posterior.methods: there is no 'MCG'"),
        ({"tasks": {"../box": Task("b", [])}}, "names a folder"),
        ({"cluster": ""}, "cluster: give a separator"),
        ({"cluster": "(a"}, "is no pattern"),
        ({"cluster": "(a)(b)"}, "needs one group, and has 2"),
    ],
)
def test_bad_tables_are_refused_in_a_sentence(options, words):
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        small(**options)


@pytest.mark.parametrize(
    "name",
    [
        "fashion",
        "fashion descent",
        "fashion thousand",
        "ffhq",
        "imagenet",
        "photos",
        "photos methods",
        "smoke",
    ],
)
def test_packaged_tables_make_cells_that_predict_understands(name):
    overlays = [part for overlay in name.split() for part in ("-c", f"table/{overlay}")]
    table, text = parse(overlays, "table")
    assert yaml.safe_load(text)["title"] == table.title
    if table.validation:
        check_tuning(table)
    for task, method in table.rows():
        for variant in table.variants(method):
            arguments = table.arguments(table.cell(task, method, variant))
            for flag, value in itertools.pairwise(arguments):
                if flag == "-c":
                    assert configs.find(value)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--imags=3", "--images"),
        ("--cmi.optin=a", "--cmi.option"),
        ("--step_size.box.DPS=1", "--step_sizes"),
        ("--posterior.drws=3", "draws"),
        ("--im=3", "--images"),  # no abbreviations
        ("--image=3", "--images"),
    ],
)
@pytest.mark.parametrize("command", ["table", "tune"])
def test_misspelt_options_are_told_with_the_nearest(command, option, nearest, capsys):
    assert main([command, "-c", "table/smoke", option]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") <= 2
    assert "no option" in error
    assert nearest in error


def test_unknown_configurations_are_refused(capsys):
    assert main(["table", "-c", "no_such"]) == 2
    assert "No configuration 'no_such'" in capsys.readouterr().err


def test_tune_keeps_the_best_value_that_broke_no_image():
    table = small()
    means = {0.5: 20.0, 1.0: 21.0, 2.0: None, 4.0: 21.0}
    assert best(table, means) == 1.0
    assert best(replace(table, objective="lpips"), means) == 0.5
    assert best(table, {1.0: None}) is None
    assert best(table, {-1.0: 20.0, 0.0: 20.0, -0.1: 19.0}) == 0


def test_trials_are_of_the_validation_images_and_apart():
    table = small(validation=["table/validation"])
    cells = [trial(table, "box", "DPS", v) for v in (0.5, 1.0)]
    cells += [trial(table, "box", "DPS", 1.0, cmi) for cmi in (None, 0.1)]
    cells += [trial(table, "box", "none", None, cmi) for cmi in (None, 0.1)]
    assert cells[2] == cells[1]
    assert len({cell.folder for cell in cells}) == 5
    assert cells[3].step_sizes == {"dps": 1.0, "cmi": 0.1}
    assert cells[5].step_sizes == {"cmi": 0.1}
    assert "table/validation" in table.arguments(cells[0])
    assert "table/validation" not in table.arguments(table.cell("box", "DPS"))


# Results of records -------------------------------------------------------------------------------


def write_records(cell, psnr, failed=(), steps=100):
    """Write the records of a run, as `predict` leaves them, with ids 1, 2, …, 12."""
    for i, value in enumerate(psnr, start=1):
        path = cell.folder / "records" / f"{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "id": str(i),
            "input": str(i),
            "failed": "diverged" if i in failed else None,
            "steps": steps,
            "forwards": 150 if cell.variant == "cmi" else 100,
            "vjps": 150 if cell.variant == "cmi" else 100,
            "metrics": {"psnr": value, "psnr_measurement": 5.0},
            "curves": {"residual": {"1": float(i), "2": 2.0 * i}},
        }
        path.write_text(json.dumps(record))


def write_features(cell, seed, count, dimension):
    """Write the features of a run's first images, truths first; return all twelve images'."""
    features = np.random.default_rng(seed).normal(size=(12, 3, dimension))
    for i in range(count):
        path = embedding_path(cell.folder, str(i + 1))
        path.parent.mkdir(exist_ok=True)
        np.save(path, features[i])
    return torch.from_numpy(features).double()


def compared(results):
    """The differences by metric, by variant and what it is compared with."""
    return {(c.variant, against): d for c in results.cells for against, d in c.differences.items()}


def test_images_are_taken_in_the_order_of_the_loader(tmp_path):
    cell = small(output=str(tmp_path)).cell("box", "DPS")
    write_records(cell, range(12))
    assert [r["id"] for r in records(cell.folder)] == [str(i) for i in range(1, 13)]
    assert [r["id"] for r in records(cell.folder, 3)] == ["1", "2", "3"]


def test_the_steps_told_are_those_of_the_run(tmp_path):
    table = small(output=str(tmp_path), steps=100, only_methods=["DPS"])
    write_records(table.cell("box", "DPS"), [20.0] * 12, steps=50)
    results = aggregate(table)
    assert [cell.steps for cell in results.cells] == [50]
    assert "These methods have other than 100 steps: DPS 50." in results.notes


def test_an_image_that_failed_is_in_no_mean_and_not_improved(tmp_path):
    table = small(output=str(tmp_path), images=12, only_methods=["DPS"])
    write_records(table.cell("box", "DPS"), [20.0] * 12)
    write_records(table.cell("box", "DPS", "cmi"), [21.0] * 10 + [19.0, 99.0], failed=[12])
    results = aggregate(table)
    cells = {c.variant: c for c in results.cells}
    assert cells["cmi"].failed == 1
    assert cells["cmi"].metrics["psnr"].mean == pytest.approx((210 + 19) / 11)
    (differences,) = compared(results).values()
    entry = differences["psnr"]
    assert entry.difference == pytest.approx(9 / 11)
    assert len(entry.values) == 11
    assert entry.improved == pytest.approx(10 / 12)
    assert any("1 image failed" in note for note in results.notes)
    assert cells["base"].curves["residual"] == {1: 6.5, 2: 13.0}


def test_bold_is_what_a_paired_interval_does_not_tell_from_the_best(tmp_path):
    spec = importlib.util.spec_from_file_location("methods_page", BENCHMARKS / "methods.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    names = {"DPS": 0.0, "near": 0.1, "far": -1.0}
    methods = {n: Method(["guidance/dps"], "dps" if n == "DPS" else None, cmi=False) for n in names}
    table = small(output=str(tmp_path), methods=methods, step_sizes={}, images=12)
    for k, (name, shift) in enumerate(names.items()):  # far: alike in every image; near: not
        noise = [(-1) ** i * (k == 1) for i in range(12)]
        write_records(table.cell("box", name), [20.0 + i + shift + noise[i] for i in range(12)])
    cells = {"box": {c.cell.label: c for c in started_cells(table).values()}}
    psnr = page.SHOWN[0]
    assert page.means(cells, psnr) == {
        "DPS": ["**25.50**"],
        "near": ["**25.60**"],
        "far": ["24.50"],
    }
    mean, low, high = page.difference(cells["box"]["far"], cells["box"]["DPS"], "psnr")
    assert (mean, low, high) == pytest.approx((-1.0, -1.0, -1.0))
    assert list(page.unsearched(table, cells)) == ["near", "far"]
    assert page.unsearched(table, cells)["far"] == ["−1.00 [−1.00, −1.00]"]


def test_cells_of_an_unfinished_row_are_compared_over_the_same_images(tmp_path):
    table = small(output=str(tmp_path), images=12, only_methods=["none", "DPS"])
    write_records(table.cell("box", "DPS"), [20.0] * 4 + [30.0] * 4)
    write_records(table.cell("box", "DPS", "cmi"), [21.0] * 4)
    write_records(table.cell("box", "none"), [10.0] * 8)  # another row: nothing to be paired with
    results = aggregate(table)
    cells = {(c.method, c.variant): c for c in results.cells}
    assert cells["DPS", "base"].images == cells["DPS", "cmi"].images == 4
    assert cells["DPS", "base"].metrics["psnr"].mean == 20.0
    assert cells["none", "base"].images == 8
    assert any(
        "3 of 3 rows have fewer images than wanted, the shortest 4" in note
        for note in results.notes
    )


def test_cells_that_lack_different_images_are_compared_over_those_they_share(tmp_path):
    table = small(output=str(tmp_path), images=6, only_methods=["DPS"])
    for variant in ("base", "cmi"):
        write_records(table.cell("box", "DPS", variant), [20.0, 21.0, 22.0, 23.0, 24.0, 25.0])
    (table.cell("box", "DPS", "cmi").folder / "records" / "3.json").write_text("{")  # cut short
    results = aggregate(table)
    assert [c.images for c in results.cells] == [5, 5]
    assert {c.metrics["psnr"].mean for c in results.cells} == {22.6}
    assert len(compared(results)["cmi", "base"]["psnr"].values) == 5


def test_differences_of_fewer_images_say_so(tmp_path):
    """Distances of sets grow as sets shrink: never a difference of 12 images' from 5 images'."""
    table = small(output=str(tmp_path), images=12, equal_images=5, only_methods=["DPS"])
    features = {}
    for variant, count in (("base", 12), ("cmi", 12), ("equal", 5)):
        cell = table.cell("box", "DPS", variant)
        write_records(cell, np.linspace(20, 21, count) + 0.1 * len(variant))
        features[variant] = write_features(cell, len(variant), count, 8)[:5]
    results = aggregate(table)
    against = compared(results)["cmi", "equal"]
    pairs = {metric: entry.pairs for metric, entry in against.items()}
    assert pairs == {"psnr": 5, "frechet": 5, "kernel": 5}
    cmi, equal = features["cmi"], features["equal"]
    apart = frechet(cmi[:, 0], cmi[:, 1]) - frechet(equal[:, 0], equal[:, 1])
    assert against["frechet"].difference == pytest.approx(apart)
    assert "| DPS, 100 steps, 5 images |" in markdown(results)
    assert "DPS, 100 steps, 5 images &" in latex(results)
    rows = {(r["variant"], r["metric"]): r for r in csv.DictReader(io.StringIO(to_csv(results)))}
    assert rows["cmi", "frechet"]["pairs_equal"] == "5"
    assert rows["cmi", "frechet"]["pairs_base"] == "12"
    assert {c.variant: c.images for c in results.cells} == {"base": 12, "cmi": 12, "equal": 5}
    assert any("first 5 images" in note for note in results.notes)
    assert not any("not finished" in note for note in results.notes)
    # Without these rows: those that there are from before are shown, and not counted as missing.
    without = aggregate(replace(table, equal_cost=False))
    assert any(c.variant == "equal" for c in without.cells)
    assert not any("Not started" in note for note in without.notes)


def test_a_table_takes_clusters_as_the_independent_units(tmp_path):
    table = small(output=str(tmp_path), images=12, only_methods=["DPS"], cluster=r"^(\d)")
    base, cmi = np.linspace(20, 21, 12), np.linspace(20.5, 21, 12) ** 1.01
    clusters = [str(i)[0] for i in range(1, 13)]  # 1, 10, 11 and 12 are one
    for variant, psnr in (("base", base), ("cmi", cmi)):
        write_records(table.cell("box", "DPS", variant), psnr.tolist())
    results = aggregate(table)
    assert results.cells[0].metrics["psnr"] == mean_and_error(base.tolist(), clusters)
    found, differences = compared(results)["cmi", "base"]["psnr"], (cmi - base).tolist()
    assert (found.low, found.high) == bootstrap_interval(differences, clusters)
    assert found.p == sign_flip_p(differences, clusters)
    assert any("The images are of 9 clusters" in note for note in results.notes)
    alone = aggregate(replace(table, cluster=None))
    assert alone.cells[0].metrics["psnr"] == mean_and_error(base.tolist())


def test_distances_of_sets_are_resampled_by_clusters(tmp_path):
    table = small(output=str(tmp_path), cluster=r"^(\d)")
    cell, ids = table.cell("box", "DPS"), [str(i) for i in range(1, 13)]
    write_records(cell, [20.0] * 12)
    features = write_features(cell, 1, 12, 4)
    started = StartedCell(table, cell, records(cell.folder))
    whole, first, *_ = started.distances("frechet", tuple(ids)).tolist()
    drawn = resamples_of(9, SET_RESAMPLES)[0]
    chosen = np.repeat(np.arange(12), [drawn[int(name[0]) - 1] for name in ids])
    real, fake = features[:, 0], features[:, 1]
    assert whole == pytest.approx(frechet(real, fake), rel=1e-3)
    assert first == pytest.approx(frechet(real[chosen], fake[chosen]), rel=1e-3)


def test_time_left_is_of_the_images_that_are_left(tmp_path, capsys, monkeypatch):
    """Two base cells are finished, CMI takes three times as long, the second round is larger."""
    clock = [0.0]
    monkeypatch.setattr("cmi_lightning.table.run.time.monotonic", lambda: clock[0])
    table = small(output=str(tmp_path), images=12, round=2, equal_cost=False)
    cells = [table.cell("box", m, v) for m in ("none", "DPS") for v in ("base", "cmi")]
    write_records(cells[0], [20.0] * 12)
    jobs = [(replace(cell, images=images),) for images in (2, 12) for cell in cells]
    printer = ProgressPrinter(len(jobs))
    printer.expect(jobs)
    seconds = {"base": 60.0, "cmi": 180.0}
    for (cell,) in jobs:
        new = 0 if cell.folder == cells[0].folder else cell.images - 2 * (cell.images == 12)
        spent = new * seconds[cell.variant] or 6.0  # of a finished cell, to see that it is
        clock[0] += spent
        printer(FinishedCell(cell, spent))
    left = [int(m) for m in re.findall(r"(\d+) min left", capsys.readouterr().out)]
    # After one image of each variant is known, it is right: 10 images each, of 3, 1 and 3 minutes.
    assert left[-5:] == [70, 70, 40, 30, 0]


def test_descent_has_rows_of_its_own_beside_those_of_cmi(tmp_path):
    sizes = {"box": {"DPS": 2.0, "CMI+DPS": 0.1, "descent+DPS": -0.3}}
    descent = Method(["table/cmi"], "cmi", [0.0, -0.3])
    table = small(output=str(tmp_path), images=8, descent=descent, step_sizes=sizes)
    assert table.variants("DPS") == VARIANTS
    assert table.variants("none") == VARIANTS[:3]
    assert "descent" not in small().variants("DPS")
    cells = {variant: table.cell("box", "DPS", variant) for variant in VARIANTS}
    assert len({cell.folder for cell in cells.values()}) == 4
    assert cells["descent"].label == "descent+DPS"
    assert cells["descent"].step_sizes == {"dps": 2.0, "cmi": -0.3}
    assert cells["equal"].step_sizes == {"dps": 2.0}
    arguments = table.arguments(cells["descent"])
    assert arguments[arguments.index("--step_sizes.cmi") + 1] == "-0.3"
    assert ("-c", "table/cmi") in itertools.pairwise(arguments)
    psnr = {"base": 20.0, "cmi": 19.5, "descent": 20.25, "equal": 21.0}
    for variant, cell in cells.items():
        write_records(cell, [psnr[variant]] * (6 if variant == "descent" else 8))
    results = aggregate(table)
    assert [(c.variant, c.images) for c in results.cells] == [(v, 6) for v in VARIANTS]
    gains = {kind: metrics["psnr"].difference for kind, metrics in compared(results).items()}
    assert gains == {
        ("cmi", "base"): -0.5, ("descent", "base"): 0.25, ("equal", "base"): 1.0,
        ("cmi", "equal"): -1.5, ("descent", "equal"): -0.75,
    }  # fmt: skip
    tried = trial(table, "box", "DPS", 2.0, -0.3, "descent")
    assert tried.folder.name == "descent@-0.3+DPS@2"
    assert tried.step_sizes == cells["descent"].step_sizes
    with pytest.raises(InputError, match=r"descent\.space: give 0"):
        check_tuning(replace(table, validation=["v"], descent=replace(descent, space=[-0.1, -1.0])))
    with pytest.raises(InputError, match=r"descent\.space: give 0 and values below"):
        check_tuning(replace(table, validation=["v"], descent=replace(descent, space=[0.0, 0.1])))
    check(table, [cells["descent"]])
    for size in ({}, {"descent+DPS": 0.1}):  # a row of descent ascends by no default
        other = replace(table, step_sizes={"box": size})
        with pytest.raises(InputError, match=r"step_sizes\.box: give 'descent\+DPS' a value below"):
            check(other, [other.cell("box", "DPS", "descent")])
    with pytest.raises(InputError, match="there is no 'descent+MCG'".replace("+", r"\+")):
        small(step_sizes={"box": {"descent+MCG": -1.0}})


def test_fid_is_that_of_the_images_shown(tmp_path):
    table = small(output=str(tmp_path), images=6, only_methods=["DPS"])
    cell = table.cell("box", "DPS")
    write_records(cell, [20.0] * 6)
    summary = {"metrics": {"fid": {"mean": 7.0, "count": 6}}}
    (cell.folder / "summary.json").write_text(json.dumps(summary))
    assert aggregate(table).cells[0].metrics["fid"].mean == 7.0
    assert "fid" not in aggregate(replace(table, images=4)).cells[0].metrics
    summary["metrics"]["fid"]["count"] = 4  # of a later, shorter run
    (cell.folder / "summary.json").write_text(json.dumps(summary))
    assert "fid" not in aggregate(table).cells[0].metrics


def test_steps_of_equal_cost_follow_from_the_passes(tmp_path):
    table = small(output=str(tmp_path))
    write_records(table.cell("box", "DPS"), [20.0])
    write_records(table.cell("box", "DPS", "cmi"), [20.0])
    cell = table.cell("box", "DPS", "equal")
    assert table.at_equal_cost(cell).steps == 150
    write_records(cell, [20.0])  # it keeps the steps it has been run with
    assert replace(table, steps=50).at_equal_cost(cell).steps == 100


def test_many_cells_can_be_told_apart_by_distances_of_sets():
    p = interval_and_p(5.0, np.random.default_rng(0).normal(5.0, 0.1, SET_RESAMPLES))[2]
    assert all(holm([p] * 30))


def test_the_study_is_told_where_the_table_uses_it(tmp_path):
    table = small(output=str(tmp_path))
    write_records(table.cell("box", "DPS"), [20.0] * 2)
    entry = Search({"0": Trial(21.0, None, 2)}, winner=0.0, chosen=0.1, at_edge=True)
    other = Search({}, winner=1.0, chosen=1.0, at_edge=False)  # the table has 2.0
    searches = {"CMI+DPS": entry, "DPS": other}
    path = tmp_path / "tune" / "study.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"study": {"box": {k: asdict(v) for k, v in searches.items()}}}))
    results = aggregate(table)
    assert results.study == {"box": {"CMI+DPS": entry}}
    assert any("In 1 of 1 cells" in note and "preferred no CMI" in note for note in results.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "validation: name a configuration"),
        ({"validation": ["v"], "cmi": Method([], None, [0.0, 1.0])}, "cmi.option"),
        ({"validation": ["v"], "cmi": Method([], "cmi", [0.0, 1.0, 2.0])}, "the same number"),
        ({"validation": ["v"], "cmi": Method([], "cmi", [0.1, 1.0])}, "cmi.space: give 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_work(options, words):
    with pytest.raises(InputError, match=words):
        check_tuning(small(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cmi.configs=[nope]"], "No configuration 'nope'"),
        (["--cmi.option=cmy", "--step_sizes={}"], None),
        (["--cmi.option=cmy"], "box inpainting|'cmy'"),
    ],
)
def test_bad_cells_are_found_before_work(tmp_path, options, words, monkeypatch, capsys):
    monkeypatch.setattr("cmi_lightning.table.command.run", lambda *_: None)
    code = main(["table", "-c", "table/smoke", f"--output={tmp_path}", *options])
    assert code == (2 if words else 0)
    assert words is None or re.search(words, capsys.readouterr().err)
    assert bool(words) != (tmp_path / "report.html").is_file()


def test_two_commands_do_not_share_a_folder(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["table", "-c", "table/smoke", f"--output={tmp_path}"]) == 2
    assert "Another command is at work" in capsys.readouterr().err


def test_one_bad_cell_keeps_no_other_from_running(monkeypatch):
    table, ran, done = small(), [], []
    rows = (("none",), ("DPS",), ("DPS", "cmi"), ("none", "cmi"))
    cells = tuple(table.cell("box", *row) for row in rows)

    def restore(arguments, cell):
        ran.append(cell)
        if cell == cells[1]:
            raise InputError("box, DPS: no")

    monkeypatch.setattr("cmi_lightning.table.run.restore", restore)
    with pytest.raises(InputError, match="box, DPS: no"):
        run(table, [cells[:1], cells[1:3], cells[3:]], lambda finished: done.append(finished.cell))
    assert ran == [cells[0], cells[1], cells[3]]
    assert done == [cells[0], cells[3]]


def test_a_job_restores_no_more_images_of_equal_cost_than_wanted(monkeypatch):
    table, limits = small(equal_images=3), []
    monkeypatch.setattr(
        "cmi_lightning.table.run.restore",
        lambda arguments, cell: limits.extend(a for a in arguments if "data.limit" in a),
    )
    cells = tuple(table.cell("box", "DPS", v, 5) for v in ("base", "cmi", "equal"))
    done = list(run_job(table, cells))
    assert limits == ["--data.limit=5", "--data.limit=5", "--data.limit=3"]
    assert [d.cell.images for d in done] == [5, 5, 3]


# A whole table ------------------------------------------------------------------------------------

PART = ["--only_tasks=[super_resolution]", "--only_methods=[DPS]"]


def results_of(folder):
    return read_results(folder / "results.json")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The packaged smoke table as it is: its folder, and its results."""
    folder = tmp_path_factory.mktemp("smoke")
    assert main(["table", "-c", "table/smoke", f"--output={folder}"]) == 0
    return folder, results_of(folder)


@pytest.fixture(scope="module")
def grown(smoke, tmp_path_factory):
    """A copy of which a part lost a record and goes on, by a second round and by draws."""
    folder = tmp_path_factory.mktemp("grown") / "smoke"
    shutil.copytree(smoke[0], folder)
    cut = folder / "cells/super_resolution/DPS-cmi"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("records/*.json")}
    (cut / "records" / f"{records(cut)[2]['id']}.json").unlink()
    arguments = ["-c", "table/smoke", f"--output={folder}", *PART]
    more = ["--images=6", "--posterior={images: 2, draws: 2, methods: [DPS]}"]
    assert main(["table", *arguments, *more]) == 0
    again = {p.parents[1] for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert again == {cut}  # its batch: all of its first four images
    return folder, arguments


def test_the_smoke_table_runs_as_it_is_packaged(smoke):
    folder, results = smoke
    assert len(results.cells) == 2 * 2 * 3
    assert results.images == 4
    for cell in results.cells:
        assert cell.images == 4
        assert cell.failed == 0
        measured = results.measured[cell.task]["psnr"].mean
        assert cell.metrics["psnr"].mean > measured - 3  # 12 steps are few
    wanted = {"psnr", "ssim", "perceptual", "frechet", "kernel"}
    assert {m.key for m in results.metrics} == wanted
    for name in ("report.html", "table.md", "table.csv", "table.tex"):
        assert (folder / name).stat().st_size > 200
    assert results.command.startswith("cmi-lightning table -c table/smoke ")
    name = results.examples["super_resolution"][0]
    example = Album(results, folder).example("super_resolution", name, ["DPS"])
    assert example.truth is not None
    assert ("DPS", "cmi") in example.restored


def test_results_are_the_means_of_the_records(smoke):
    folder, results = smoke
    seen = {}
    for cell in results.cells:
        found = records(folder / cell.folder)
        assert cell.metrics["psnr"].mean == pytest.approx(
            np.mean([r["metrics"]["psnr"] for r in found])
        )
        assert cell.passes == pytest.approx(passes(found))
        assert cell.curves["residual"][1] == pytest.approx(
            np.mean([r["curves"]["residual"]["1"] for r in found])
        )
        shared = [(r["id"], r["input"], r["metrics"]["psnr_measurement"]) for r in found]
        assert seen.setdefault(cell.task, shared) == shared  # measurements and truths


def test_differences_are_paired(smoke):
    folder, results = smoke
    pairs = [(cell, against) for cell in results.cells for against in cell.differences]
    assert len(pairs) == 2 * 2 * 3
    for cell, against in pairs:
        one, other = (
            {r["id"]: r["metrics"]["psnr"] for r in records(folder / side.folder)}
            for side in (cell, results.cell(cell.task, cell.method, against))
        )
        entry = cell.differences[against]["psnr"]
        values = list(entry.values.values())
        assert entry.values == pytest.approx({n: one[n] - other[n] for n in one}, abs=1e-4)
        assert entry.difference == pytest.approx(np.mean(values), abs=1e-4)
        assert entry.low <= entry.difference <= entry.high
        assert entry.improved == pytest.approx(np.mean([v > 0 for v in values]))


def test_equal_cost_is_equal(smoke):
    for task, method in itertools.product(("inpaint_box", "super_resolution"), ("DPS", "ΠGDM")):
        base, cmi, equal = (smoke[1].cell(task, method, v) for v in ("base", "cmi", "equal"))
        assert cmi.passes > base.passes
        assert abs(equal.passes - cmi.passes) <= base.passes / base.steps


def test_draws_are_judged_without_and_with_cmi(grown):
    folder, _ = grown
    rows = {c.label: c.draws for c in results_of(folder).cells if c.draws}
    shown = [(label, r.images, r.draws) for label, r in rows.items()]
    assert shown == [("DPS", 2, 2), ("CMI+DPS", 2, 2)]
    for row in rows.values():
        assert 0 <= row.coverage["50"].mean <= row.coverage["90"].mean <= 1
        assert row.residual.mean > 0
        assert (folder / row.folder / "std").is_dir()


def test_a_table_goes_on_where_it_was_stopped(smoke, grown):
    folder, arguments = grown
    assert [cell.images for cell in results_of(folder).cells] == [6, 6, 6]
    _, before = smoke
    after = aggregate(parse(arguments, "table")[0])  # of the first four images
    for cell in after.cells:
        other = before.cell(cell.task, cell.method, cell.variant)
        assert other.differences == cell.differences
        assert replace(cell, seconds=0, draws=None) == replace(other, seconds=0)


def test_a_cell_of_other_options_is_refused(grown, capsys):
    assert main(["table", *grown[1], "--steps=5"]) == 2
    error = capsys.readouterr().err
    assert "super_resolution, DPS" in error
    assert "num_steps" in error


# Tuning -------------------------------------------------------------------------------------------


def test_tune_saves_its_study_and_an_overlay_that_the_table_takes(tmp_path):
    arguments = ["-c", "table/smoke", "--steps=4", "--tune_images=2", *PART]
    arguments += [f"--output={tmp_path}"]
    assert main(["tune", *arguments]) == 0
    found = json.loads((tmp_path / "tune" / "study.json").read_text())
    rows = found["study"]["super_resolution"]
    assert set(rows) == {"DPS", "CMI+DPS"}
    trials = {float(v): t["mean"] for v, t in rows["DPS"]["trials"].items()}
    assert set(trials) == {1.0, 4.0}
    assert rows["DPS"]["chosen"] == max(trials, key=lambda v: trials[v])
    chosen = rows["DPS"]["chosen"]
    folder = tmp_path / "tune" / "super_resolution" / f"DPS@{chosen:g}"
    psnr = [r["metrics"]["psnr"] for r in records(folder)]
    assert len(psnr) == 2
    assert trials[chosen] == pytest.approx(np.mean(psnr))
    assert all(r["id"].startswith("58") for r in records(folder))  # held-back training images
    assert rows["CMI+DPS"]["trials"]["0"]["mean"] == trials[chosen]  # no CMI is the base
    assert rows["CMI+DPS"]["chosen"] == 0.03

    overlay = tmp_path / "step_sizes.yaml"
    table, _ = parse([*arguments, "-c", str(overlay)], "table")
    assert table.step_sizes == {"super_resolution": {"DPS": chosen, "CMI+DPS": 0.03}}


@pytest.mark.slow
def test_a_killed_table_loses_one_batch_at_most(tmp_path):
    """Two processes, killed with all they started; then the rest, and nothing a second time."""
    options = [*PART[:1], "--steps=4", "--round=1", "--images=4", "--processes=2"]

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "cmi_lightning", "table", "-c", "table/smoke", *options]
        return subprocess.Popen([*command, f"--output={tmp_path / name}"], start_new_session=True)

    def done(name: str) -> dict[Path, int]:
        found = (tmp_path / name).rglob("records/*.json")
        return {p.relative_to(tmp_path / name): p.stat().st_mtime_ns for p in found}

    assert start("whole").wait() == 0
    for count in (2, 9):
        killed = start("cut")
        while len(done("cut")) < count and killed.poll() is None:
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        before = done("cut")
        time.sleep(3)  # workers end with the process that started them
        assert done("cut") == before
    assert start("cut").wait() == 0
    after = done("cut")
    assert set(after) == set(done("whole"))
    assert {p: t for p, t in after.items() if p in before} == before
    whole, cut = results_of(tmp_path / "whole"), results_of(tmp_path / "cut")
    for one, other in zip(whole.cells, cut.cells, strict=True):
        assert one.metrics == other.metrics
        assert one.differences == other.differences
