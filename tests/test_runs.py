"""Long runs: what is kept, resumed, refused, shared between processes, and given up."""

import copy
import ctypes
import datetime
import enum
import errno
import itertools
import json
import logging
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from predicting import Watch, cli, files, items, restore
from torch import Tensor

from cmi_lightning import GaussianNoise, InputError, PosteriorSampler
from cmi_lightning import files as disk
from cmi_lightning.callbacks import ImageWriter, RestorationMetrics, SamplingProgress
from cmi_lightning.callbacks import TrajectoryLogger as Trajectory
from cmi_lightning.data import ImageFolderData
from cmi_lightning.denoisers import Denoiser, Prediction
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.files import mark, write
from cmi_lightning.guidance import CMI, DPS, Guidance
from cmi_lightning.information import Lanczos
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Identity, RandomMask
from cmi_lightning.predict import processes
from cmi_lightning.predict.fingerprint import differences, options
from cmi_lightning.predict.records import Run
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers import DDPM

STEPS = 3
DEMO = "predict -c demo/garments --trainer.logger=false --trainer.callbacks=[ImageWriter]"


def sampler(prior: Denoiser, *guidances: Guidance, **kwargs: Any) -> PosteriorSampler:
    kwargs = {"num_steps": STEPS, "operator": RandomMask(0.5), **kwargs}
    return PosteriorSampler(copy.deepcopy(prior), guidances=list(guidances), **kwargs)


def predict(
    module: PosteriorSampler,
    folder: Path,
    images: Tensor,
    *callbacks: L.Callback,
    batch_size: int = 3,
    order: list[int] | None = None,
    **kwargs: Any,
) -> list[Any]:
    data = items(images)
    data = [data[i] for i in order] if order is not None else data
    writers = [RestorationMetrics(lpips=None, fid=False), ImageWriter(), Trajectory()]
    return restore(folder, module, data, *writers, *callbacks, batch_size=batch_size, **kwargs)


@pytest.fixture
def images(shipped_images) -> Tensor:
    """The centres of the garments: most of what is tested here asks nothing of a network."""
    return shipped_images[:, :, 8:24, 8:24]


@pytest.fixture
def exact(images) -> GaussianMixture:
    """A prior of these images."""
    return GaussianMixture(images[:5], 0.1)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, prior, shipped_images):
    x, module = shipped_images[:8], sampler(prior, DPS())
    predict(module, tmp_path / "whole", x)
    with pytest.raises(RuntimeError, match="crash"):
        predict(module, tmp_path / "cut", x, Watch((1, 0)))
    cut = files(tmp_path / "cut")
    assert {n for n in cut if n.endswith(".json") and n.startswith("records")} == {
        f"records/set/{i}.json" for i in range(3)
    }
    assert "summary.json" not in cut
    # Of a process that was killed while writing.
    left = tmp_path / f"cut/restored/set/.{mark(Path('0.png'))}.{'0' * 32}.tmp"
    left.write_bytes(b"half")
    again = Watch()
    results = predict(sampler(prior, DPS()), tmp_path / "cut", x, again)
    assert again.batches == [["set/3", "set/4", "set/5"], ["set/6", "set/7"]]
    # What was done before is read back.
    assert [r["id"] for r in results] == [["set/0", "set/1", "set/2"], *again.batches]
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert set(whole) == set(cut)
    assert [name for name in whole if whole[name] != cut[name]] == []


class Smooth(Denoiser):
    """Blurs x_t; images of any size, wide ones in windows."""

    schedule, image_shape, trained_side = Schedule.linear(), (1, None, None), 8

    def forward(self, x, level):
        return Prediction(F.avg_pool2d(level.alpha * x, 3, 1, 1))


def test_images_of_three_sizes_are_restored_as_each_is_alone(tmp_path):
    sizes = {"0": (8, 8), "1": (16, 24), "2": (8, 8), "10": (8, 12), "3": (16, 24), "4": (8, 8)}
    images = tmp_path / "images"
    images.mkdir()
    for i, (name, size) in enumerate(sizes.items()):
        x = torch.rand(size, generator=torch.Generator().manual_seed(i)) * 255
        Image.fromarray(x.byte().numpy()).save(images / f"{name}.png")

    def run(folder: str, batch_size: int, *callbacks: L.Callback) -> dict[str, Tensor]:
        module = PosteriorSampler(Smooth(), BoxMask(4, 1), None, [DPS()], STEPS)
        data = ImageFolderData(str(images), batch_size=batch_size)
        writers = [RestorationMetrics(lpips=None, fid=False), ImageWriter(), *callbacks]
        results = restore(tmp_path / folder, module, data, *writers)
        return {name: x for r in results for name, x in zip(r["id"], r["restored"], strict=True)}

    alone, count = run("alone", 1), Watch()
    with pytest.raises(RuntimeError, match="crash"):
        run("cut", 4, Watch((1, 0)))
    together = run("cut", 4, count)
    assert count.batches == [["1", "3"], ["10"]]
    assert list(together) == ["0", "2", "4", "1", "3", "10"]
    for name, x in together.items():
        assert x.shape == (1, *sizes[name])
        torch.testing.assert_close(x, alone[name], rtol=0, atol=1.01 / 127.5)  # read back: 8 bits
    run("whole", 4)
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert whole == cut
    rows = whole["metrics.csv"].decode().splitlines()[1:]
    assert [row.partition(",")[0] for row in rows] == ["0", "1", "2", "3", "4", "10"]
    left = np.asarray(Image.open(tmp_path / "alone/restored/1.png")).astype(int)
    right = np.asarray(Image.open(tmp_path / "whole/restored/1.png")).astype(int)
    assert abs(left - right).max() <= 1


@pytest.mark.parametrize("lost", ["records/set/4.json", "restored/set/4.png"])
def test_what_is_missing_is_restored_in_its_batch(tmp_path, exact, images, lost):
    x, module, again = images[:8], sampler(exact, DPS()), Watch()
    predict(module, tmp_path, x)
    before = files(tmp_path)
    (tmp_path / lost).unlink()
    predict(module, tmp_path, x, again)
    assert again.batches == [["set/3", "set/4", "set/5"]]
    assert files(tmp_path) == before


def test_when_everything_is_done_nothing_is_sampled(tmp_path, exact, images, capsys):
    x, module = images[:4], sampler(exact, DPS())
    predict(module, tmp_path, x)
    before, again = files(tmp_path), Watch()
    predict(module, tmp_path, x, again, SamplingProgress())
    assert again.batches == []
    assert files(tmp_path) == before
    assert "nothing to sample: 4 images done before" in capsys.readouterr().out


def test_more_images_are_added_and_another_batch_size_goes_on(tmp_path, exact, images):
    module, again = sampler(exact, DPS()), Watch()
    predict(module, tmp_path, images[:4], batch_size=2)
    predict(module, tmp_path, images[:8], again, batch_size=4)
    assert again.batches == [[f"set/{i}" for i in range(4, 8)]]
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 8


def test_a_callback_that_comes_later_gets_its_files(tmp_path, exact, images):
    module, again = sampler(exact, DPS()), Watch()
    predict(module, tmp_path, images[:2])
    for record in (tmp_path / "records").rglob("*.json"):  # as of a run without the metrics
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items()
                                      if k != "metrics"}))  # fmt: skip
    predict(module, tmp_path, images[:2], again)
    assert again.batches == [["set/0", "set/1"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 4}, ["model.num_steps was 3 and is 4"]),
        ({"seed": 1}, ["model.seed was 0 and is 1"]),
        ({"guidances": [DPS(0.5)]}, ["model.guidances.0.scale was 1.0 and is 0.5"]),
        ({"guidances": [DPS(), CMI()]}, ["model.guidances.1 was absent and is", "CMI"]),
        ({"operator": Identity()}, ["model.operator was", "RandomMask", "Identity"]),
        ({"noise": GaussianNoise(0.1)}, ["model.noise was 0.05 and is 0.1"]),
        ({"samples_per_image": 2}, ["model.samples_per_image"]),
        ({"weights": 1e-3}, ["model.denoiser.checksum"]),
        ({"precision": "bf16-mixed"}, ["trainer.precision was 32-true and is bf16-mixed"]),
    ],
)
def test_a_folder_of_other_options_is_refused(tmp_path, prior, shipped_images, change, words):
    predict(sampler(prior, DPS()), tmp_path, shipped_images[:1])
    before, count = files(tmp_path), Watch()
    kwargs = {"operator": RandomMask(0.5), "num_steps": STEPS, "guidances": [DPS()], **change}
    precision, weights = kwargs.pop("precision", "32-true"), kwargs.pop("weights", 0)
    other = PosteriorSampler(copy.deepcopy(prior), **kwargs)
    with torch.no_grad():
        next(other.denoiser.parameters()).view(-1)[0] += weights
    with pytest.raises(InputError) as error:
        predict(other, tmp_path, shipped_images[:1], count, precision=precision)
    assert all(word in str(error.value) for word in words), error.value
    assert "overwrite=True" in str(error.value)
    assert count.batches == []
    assert files(tmp_path) == before


def test_another_image_of_the_same_name_is_refused(tmp_path, exact, images):
    module = sampler(exact, DPS())
    predict(module, tmp_path, images[:2])
    with pytest.raises(InputError, match="'set/1' is not the image that was restored"):
        predict(module, tmp_path, images[[0, 5]])


def test_two_samples_of_one_id_are_refused(tmp_path, exact, images):
    with pytest.raises(InputError, match="Two samples have the id 'set/0'"):
        predict(sampler(exact), tmp_path, images[:2], order=[0, 0])


def test_overwrite_starts_afresh(tmp_path, capsys):
    fast = f"{DEMO} --data.limit=2 --model.num_steps=2 --trainer.default_root_dir={tmp_path}"
    assert cli(fast) == 0
    assert cli(fast, "--model.seed=1") == 2
    assert "model.seed was 0 and is 1" in capsys.readouterr().err
    before = files(tmp_path)["restored/00000.png"]
    assert cli(fast, "--model.seed=1", "--overwrite") == 0
    assert files(tmp_path)["restored/00000.png"] != before


def test_options_of_custom_parts_are_found():
    class Custom:
        def __init__(self, scale: float, kernel: Any, unknown: int = 3) -> None:
            self.scale, self.kernel = scale, kernel

    a, b = (dict(options("x", Custom(1.0, np.ones(3) * v))) for v in (1, 2))
    assert a["x.scale"] == "1.0"
    name = f"source of {Custom.__module__}.{Custom.__qualname__}"
    assert set(a) == {"x", "x.scale", "x.kernel", name}
    assert "x.kernel was" in str(differences(a, b))
    assert differences(a, dict(a)) is None
    many = {f"x.{i}": "1" for i in range(9)}
    assert "4 more" in str(differences({}, many))
    assert "x.scale" not in str(differences(a, {"x": "another class"}))

    class Handed(Custom):
        def __init__(self, more: int, **rest: Any) -> None:
            super().__init__(**rest)
            self.more = more

    handed = dict(options("x", Handed(2, scale=1.0, kernel=None)))
    assert (handed["x.more"], handed["x.scale"]) == ("2", "1.0")


class Speed(enum.Enum):
    SLOW, FAST = "slow", "fast"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.int64(3), np.int64(4)),
        (np.float32(1), np.float32(2)),
        (np.bool_(True), np.bool_(False)),
        (Fraction(1, 2), Fraction(1, 3)),
        (Speed.SLOW, Speed.FAST),
        ({"a", "b"}, frozenset("ac")),
        (torch.float32, torch.float64),
        (torch.device("cpu"), torch.device("meta")),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
    ],
)
def test_values_that_are_no_plain_numbers_are_compared_too(one, other):
    assert differences(dict(options("x", one)), dict(options("x", other)))
    assert differences(dict(options("x", one)), dict(options("x", copy.deepcopy(one)))) is None


def test_numbers_of_numpy_are_those_of_python():
    assert list(options("x", np.int64(3))) == list(options("x", 3))
    assert list(options("x", np.float32(0.5))) == list(options("x", 0.5))


# Files


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a/b.json"
    write(path, b"one")

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "broken")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="broken"):
                write(path, b"two")
        assert [p.name for p in path.parent.iterdir()] == ["b.json"]
        assert path.read_bytes() == b"one"


@pytest.mark.parametrize("whole", [True, False], ids=["syncfs", "without"])
def test_a_batch_asks_the_disk_twice(tmp_path, exact, images, monkeypatch, whole):
    if whole and not hasattr(ctypes.CDLL(None), "syncfs"):
        pytest.skip("Linux has syncfs")
    asked, fsync, syncfs = Counter(), os.fsync, disk._syncfs()
    monkeypatch.setattr(os, "fsync", lambda handle: asked.update(["file"]) or fsync(handle))
    monkeypatch.setattr(
        disk,
        "_syncfs",
        lambda: lambda handle: whole and not asked.update(["whole"]) and syncfs(handle),
    )
    runs = {}
    for count, batch in ((2, 2), (6, 6), (6, 2)):
        asked.clear()
        folder = tmp_path / f"{count}-{batch}"
        predict(sampler(exact), folder, images[:count], batch_size=batch)
        runs[count, batch] = Counter(asked)
        written = len((folder / "manifest.txt").read_text().splitlines())
        runs[count, batch]["written"] = written
    few, many, batches = runs.values()
    assert many["written"] - few["written"] >= 4 * 4  # image, its row, record, timing
    if whole:
        assert many["file"] == few["file"] == batches["file"]
        assert (few["whole"], many["whole"], batches["whole"]) == (2, 2, 6)
    else:  # every file once, and once a batch the manifest and the folders
        assert many["file"] - few["file"] == many["written"] - few["written"]
        folders = {"restored/set", "records/set", "timings/set", ""}
        assert batches["file"] - many["file"] == 2 * (1 + len(folders))


def test_a_batch_appears_in_order_once_all_is_on_the_disk(tmp_path, monkeypatch):
    names, events, end = ["image", "other", "record"], [], itertools.count()
    sync, replace = disk.sync, os.replace

    def synced(paths: Collection[Path]) -> None:
        events.append(f"sync {len(paths)}")
        sync(paths)

    def replaced(source: Path, to: Path) -> None:
        if next(end) == broken:
            raise KeyboardInterrupt
        events.append(to.name)
        replace(source, to)

    monkeypatch.setattr(disk, "sync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for broken in (0, 1, 2, None):
        folder, end = tmp_path / f"{broken}", itertools.count()
        events.clear()
        disk.hold()
        for name in names:
            write(folder / name, b"whole")
        assert not any((folder / name).exists() for name in names)
        with pytest.raises(KeyboardInterrupt) if broken is not None else nullcontext():
            disk.publish()
        assert sorted(p.name for p in folder.iterdir()) == names[:broken]
        assert events == ["sync 3", *names[:broken], *(["sync 1"] if broken is None else [])]
    disk.hold()
    write(tmp_path / "dropped", b"")
    disk.drop()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "None"]


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, exact, images, monkeypatch):
    x, module, real = images[:6], sampler(exact, DPS()), disk.sync
    predict(module, tmp_path / "whole", x)
    batches = itertools.count()

    def full(paths: Collection[Path]) -> None:
        if len(paths) > 9 and next(batches):  # the second batch's
            raise OSError(errno.ENOSPC, "No space left on device")
        real(paths)

    monkeypatch.setattr(disk, "sync", full)
    with pytest.raises(InputError, match=r"disk of .* is full; what was finished is kept"):
        predict(module, tmp_path / "cut", x)
    monkeypatch.undo()
    assert len(list((tmp_path / "cut/records").rglob("*.json"))) == 3
    for path in (tmp_path / "cut").rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    predict(module, tmp_path / "cut", x)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_line(tmp_path, signum, code, capsys, monkeypatch):
    import cmi_lightning.callbacks as callbacks

    class Stop(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *rest):
            if batch_idx == 1:  # before the batch's records are written
                os.kill(os.getpid(), signum)
                threading.Event().wait(0.01)

    monkeypatch.setattr(callbacks, "Stop", Stop, raising=False)
    fast = f"{DEMO} --data.limit=6 --data.batch_size=2 --model.num_steps=2"
    fast += f" --trainer.default_root_dir={tmp_path}"
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli(fast, "--trainer.callbacks+=cmi_lightning.callbacks.Stop")
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    finally:
        signal.signal(signal.SIGINT, outer)
    assert stop.value.code == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"cmi-lightning: stopped; 2 images done in '{tmp_path}'")
    assert "same command again" in last
    assert cli(fast) == 0
    assert len(list((tmp_path / "restored").glob("*.png"))) == 6


def test_a_further_rank_ends_with_the_process_that_started_it(monkeypatch):
    processes.leave_if_orphaned()
    monkeypatch.setattr(processes, "_parent", -1)
    processes.leave_if_orphaned()  # rank 0 has no such parent
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match=r"^1$"):
        processes.leave_if_orphaned()


# Sharing


def shares(sizes: list[int], world: int, done: set[str]) -> list[list[list[str]]]:
    """What each process gets of each batch."""
    names = iter(range(sum(sizes)))
    batches = [[str(next(names)) for _ in range(size)] for size in sizes]
    result = []
    for rank in range(world):
        run = Run()
        run.done = dict.fromkeys(done, "")
        result.append([[b[i] for i in run.share(b, world, rank, len(batches))] for b in batches])
    return result


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[4, 4, 4, 2], [16], [1], [5, 3], [1] * 20])
def test_processes_share_no_work_and_leave_none(world, sizes):
    g = torch.Generator().manual_seed(world)
    every = [str(i) for i in range(sum(sizes))]
    fresh = {tuple(p) for rank in shares(sizes, world, set()) for p in rank if p}
    assert sorted(n for p in fresh for n in p) == sorted(every)
    for _ in range(20):
        done = {n for n in every if torch.rand((), generator=g) < 0.6}
        shared = shares(sizes, world, done)
        pieces = [tuple(p) for rank in shared for p in rank if p]
        assert len(set(pieces)) == len(pieces)
        assert set(pieces) <= fresh  # a resumed run has the pieces of an uninterrupted one
        assert set(every) - done <= {n for p in pieces for n in p}
        assert all(set(p) - done for p in pieces)
        loads = [sum(map(bool, rank)) for rank in shared]
        assert max(loads) - min(loads) <= 1


def test_a_single_batch_is_split_between_processes():
    assert shares([16], 4, set()) == [[[str(4 * r + i) for i in range(4)]] for r in range(4)]


# Determinism


def test_the_noise_is_the_samples_own(tmp_path, monkeypatch, shipped_images):
    prior = GaussianMixture(torch.zeros(1, 1, 32, 32), 0.2)
    drawn: dict[tuple, Tensor] = {}
    real = SampleNoise.normal

    def spy(self, stream, step, like):
        value = real(self, stream, step, like)
        for name, row in zip(self.ids, value, strict=True):
            seen = drawn.setdefault((name, stream, step), row.clone())
            assert torch.equal(seen, row)
        return value

    monkeypatch.setattr(SampleNoise, "normal", spy)
    module = sampler(prior, DPS(), CMI(interval=1, estimator=Lanczos(krylov=2)))
    x = shipped_images[:6]
    for i, (size, order) in enumerate([(6, None), (1, None), (4, [5, 2, 0, 3, 1, 4]), (2, [3, 1])]):
        predict(module, tmp_path / str(i), x, batch_size=size, order=order)
    streams = {key[1:] for key in drawn}
    assert ("start", 0) in streams
    assert len(drawn) == 6 * len(streams)


def test_draws_of_one_image(tmp_path, exact, images):
    x = images[:3]
    (one,) = predict(sampler(exact, DPS()), tmp_path / "one", x)
    (four,) = predict(sampler(exact, DPS(), samples_per_image=4), tmp_path / "four", x)
    draws = four["draws"]
    assert draws.shape == (3, 4, 1, 16, 16)
    assert torch.equal(draws[:, 0], one["restored"])
    assert torch.equal(four["details"].problem.y, one["details"].problem.y)
    assert torch.equal(four["measurement"], one["measurement"])
    assert torch.equal(four["restored"], draws.mean(1))
    pairs = list(itertools.combinations(range(4), 2))
    assert min(float((draws[:, a] - draws[:, b]).abs().mean()) for a, b in pairs) > 0.01
    written = files(tmp_path / "four")
    for i, k in itertools.product(range(3), range(4)):
        assert f"draws/set/{i}/{k}.png" in written
    with Image.open(tmp_path / "four/std/set/1.png") as image:
        shown = np.asarray(image)
    std = draws[1].double().numpy().std(0, ddof=1)[0]
    assert np.abs(shown - np.clip(std / 0.5, 0, 1) * 255).max() <= 0.51
    record = json.loads(written["records/set/1.json"])
    assert (record["forwards"], record["vjps"], record["steps"]) == (4 * STEPS,) * 3
    truth = (x[1].double().numpy() + 1) * 127.5

    def psnr(image: Tensor) -> float:
        levels = np.round(np.clip((image.double().numpy() + 1) * 127.5, 0, 255))
        return 10 * math.log10(255**2 / ((levels - np.round(truth)) ** 2).mean())

    assert record["metrics"]["psnr"] == pytest.approx(psnr(four["restored"][1]), rel=1e-5)
    each = [psnr(draw) for draw in draws[1]]
    assert record["metrics"]["psnr_draws"] == pytest.approx(sum(each) / 4, rel=1e-5)
    for option, wrong in (("samples_per_image", 0), ("precision", "half"), ("noise", 0.05)):
        with pytest.raises(InputError, match=option):
            sampler(exact, **{option: wrong})


# Samples that fail, and memory


class Spoil(Guidance):
    """Multiplies x_s of the images whose ids end in 1 from a step on."""

    def __init__(self, factor: float, index: int = 1) -> None:
        self.factor, self.index = factor, index

    def guide_sample(self, step, x):
        if step.index > self.index:
            return x
        factors = [self.factor if name.endswith("1") else 1.0 for name in step.noise.ids]
        return x * torch.tensor(factors).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("factor", "why"),
    [(math.nan, "not a number at step 2 of 4"), (1e6, "diverged at step 3 of 4")],
)
def test_a_sample_fails_alone(tmp_path, exact, images, factor, why, capsys):
    x = images[:4]
    guidances = [DPS(), CMI(interval=1, estimator=Lanczos(krylov=2))]
    options = {"num_steps": 4, "operator": BoxMask(6, 2)}
    (well,) = predict(sampler(exact, *guidances, **options), tmp_path / "a", x, batch_size=4)
    spoilt = sampler(exact, *guidances, Spoil(factor, 2), **options)
    (result,) = predict(spoilt, tmp_path / "b", x, batch_size=4)
    row, name = 1, "set/1"
    assert result["failed"] == {name: why}
    assert spoilt.run.failures == {name: why}
    others = [0, 2, 3]
    assert torch.equal(result["restored"][others], well["restored"][others])
    assert bool(torch.isfinite(result["restored"]).all())
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    assert summary["failed"] == {name: why}
    assert summary["metrics"]["psnr"]["count"] == 3
    assert any("1 of 4 images failed" in n and why in n for n in summary["notes"])
    assert why in capsys.readouterr().out
    records = [json.loads((tmp_path / f"b/records/set/{i}.json").read_text()) for i in range(4)]
    psnr = [records[i]["metrics"]["psnr"] for i in others]
    assert summary["metrics"]["psnr"]["mean"] == pytest.approx(sum(psnr) / 3)
    assert len(records[row]["curves"]["residual"]) == int(why.split()[-3]) - 1
    again = Watch()  # a failure is final: the same would happen again
    predict(spoilt, tmp_path / "b", x, again, batch_size=4)
    assert again.batches == []
    assert spoilt.run.failures == {name: why}


def test_the_last_finite_state_is_kept(exact, images):
    x, noise, row = images[:2], SampleNoise(0, ["0", "1"]), 1
    problem = Problem.simulate(x, Identity(), 0.05, noise)
    chain = Sampler(exact, DDPM(), [DPS(), Spoil(math.nan, 1)], 4)
    records = list(chain.iterate(problem, noise, x))
    assert [int(r.stopped[row]) for r in records] == [0, 0, 3, 3]
    assert [int(r.stopped[1 - row]) for r in records] == [0] * 4
    assert torch.equal(records[-1].x[row], records[1].x[row])
    assert not bool(records[-1].log["residual"].isnan()[1 - row])
    assert bool(records[-1].log["residual"].isnan()[row])


def test_long_first_steps_are_no_divergence(prior, shipped_images):
    """DPS throws x̂₀ far off where σ/α is 100, and brings it back: no reason to give up."""
    x, noise = shipped_images[:1], SampleNoise(0, ["0"])
    problem = Problem.simulate(x, RandomMask(0.9), 0.05, noise)
    chain = Sampler(prior, DDPM(), [DPS(4.0)], 100)
    records = list(itertools.islice(chain.iterate(problem, noise, x), 40))
    residuals = torch.stack([r.log["residual"] for r in records])
    assert not bool(records[-1].stopped.any())
    assert bool((residuals.max(0).values > 1e3 * residuals[0].maximum(norm(problem.y))).any())
    assert bool((residuals[-1] < norm(problem.y)).all())


def test_exit_code_3_tells_of_failures_and_of_unreadable_files(tmp_path, monkeypatch, capsys):
    import cmi_lightning.guidance as guidance

    def run(name: str, words: str, *options: str) -> int:
        fast = f"--model.num_steps=4 --trainer.default_root_dir={tmp_path}/{name}"
        return cli(f"predict {words} {fast} --trainer.logger=false", *options)

    monkeypatch.setattr(guidance, "Spoil", Spoil, raising=False)
    spoil = "{class_path: cmi_lightning.guidance.Spoil, init_args: {factor: .nan}}"
    spoilt = f"--model.guidances=[{{class_path: DPS}}, {spoil}]"
    for _ in range(2):  # and again, from the records
        assert run("a", "-c demo/garments --data.limit=2", spoilt) == 3
    assert "1 of 2 images failed" in capsys.readouterr().out
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        Image.new("L", (32, 32), 100 + i).save(photos / f"{i}.png")
    folder = f"-c prior/fashion_mnist -c guidance/none --data.folder={photos}"
    assert run("b", folder) == 0
    (photos / "2.png").write_bytes(b"no image")
    assert run("b", folder) == 3
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    assert list(summary["skipped"]) == [str(photos / "2.png")]
    assert summary["images"] == 2


class Small(Denoiser):
    """A prior that takes a few images at a time, as a small GPU would."""

    def __init__(self, prior: Denoiser, rows: int) -> None:
        super().__init__()
        self.prior, self.rows, self.calls = prior, rows, 0
        self.schedule, self.image_shape = prior.schedule, prior.image_shape
        self.value_range = prior.value_range

    def forward(self, x, level):
        self.calls += 1
        if len(x) > self.rows:
            if self.calls > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return self.prior(x, level)  # it runs out later than at the first step
        return self.prior(x, level)


@pytest.mark.parametrize("draws", [1, 2])
def test_out_of_memory_halves_the_batches_once(tmp_path, caplog, shipped_images, draws):
    prior = GaussianMixture(torch.zeros(1, 1, 32, 32), 0.2)
    x, kwargs = shipped_images[:7], {"samples_per_image": draws, "operator": RandomMask(0.5)}
    wanted = predict(sampler(prior, DPS(), **kwargs), tmp_path / "a", x, batch_size=4)
    count = Watch()
    with caplog.at_level(logging.WARNING, "cmi_lightning"):
        got = predict(
            sampler(Small(prior, 2), DPS(), **kwargs), tmp_path / "b", x, count, batch_size=4
        )
    for a, b in zip(wanted, got, strict=True):
        assert a["id"] == b["id"]
        assert torch.equal(a["restored"], b["restored"])
        assert torch.equal(a["residual"], b["residual"])
    assert [len(b) for b in count.batches] == [4] + [2] * 2 * draws + [2] * draws + [1] * draws
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("cmi_lightning")]
    assert "Out of memory with 4 images at a time: going on with 2" in message
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    # The prior's name, and with it the options' checksum in every record.
    others = {n for n in a if a[n] != b.get(n)} - {"run.json", "summary.json"}
    assert others == {f"records/set/{i}.json" for i in range(7)}
    for name in others:
        first, second = (json.loads(x[name]) for x in (a, b))
        assert first.pop("options") != second.pop("options")
        assert first == second


def test_out_of_memory_twice_is_told(tmp_path, shipped_images):
    prior = Small(GaussianMixture(torch.zeros(1, 1, 32, 32), 0.2), 1)
    with pytest.raises(InputError, match=r"Out of memory with 2 image.* data.batch_size"):
        predict(sampler(prior, DPS()), tmp_path, shipped_images[:4], batch_size=4)


def test_other_errors_are_not_taken_for_memory(tmp_path, exact, images):
    with pytest.raises(RuntimeError, match="crash"):
        predict(sampler(exact), tmp_path, images[:2], Watch((0, 1)))


# Costs


def test_costs_are_counted(tmp_path, exact, images, monkeypatch):
    passes = {"first": 0, "with graph": 0}
    real = torch.autograd.grad

    def spy(*args, **kwargs):
        passes["with graph" if kwargs.get("create_graph") else "first"] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    cmi = CMI(interval=1, estimator=Lanczos(krylov=2), min_signal=0.0, max_signal=1.0)
    module = sampler(exact, DPS(), cmi, operator=BoxMask(6, 2))
    predict(module, tmp_path, images[:2], batch_size=1)
    costs = json.loads((tmp_path / "summary.json").read_text())["costs"]
    assert costs["forwards"] == {"per_image": STEPS, "per_step": 1}
    second = passes["with graph"] / 2
    assert costs["second_order"] == {"per_image": second, "per_step": pytest.approx(second / STEPS)}
    assert second == STEPS - 1  # the last step adds no noise, and CMI steps by its share
    assert costs["vjps"]["per_image"] == sum(passes.values()) / 2
    timing = json.loads((tmp_path / "timing.json").read_text())
    seconds = timing["seconds"]
    assert seconds["per_image"] == pytest.approx(STEPS * seconds["per_step"])
    assert seconds["per_image"] > 0
    assert timing["peak_memory"]["most"] > 2**20


def test_progress_tells_images_per_hour(tmp_path, exact, images, capsys):
    predict(sampler(exact), tmp_path, images[:4], SamplingProgress(interval=0))
    lines = capsys.readouterr().out.splitlines()
    assert any("images/h, 0:0" in line and line.endswith("left") for line in lines)


@pytest.mark.parametrize("draws", [1, 2])
def test_a_second_predict_returns_the_finished_images(tmp_path, capsys, draws):
    """As a notebook's cell that is run twice does."""
    module = PosteriorSampler(
        GaussianMixture(torch.zeros(1, 1, 8, 8), 0.2),
        guidances=[DPS()],
        num_steps=2,
        samples_per_image=draws,
    )
    data = [{"x": torch.full((1, 8, 8), i / 4), "id": str(i)} for i in range(3)]

    def predict(*callbacks: L.Callback) -> list:
        return restore(tmp_path, module, data, *callbacks, batch_size=2)

    first = predict(ImageWriter(bits=16))
    assert "finished before" not in capsys.readouterr().err
    again = predict(ImageWriter(bits=16))
    (said,) = [x for x in capsys.readouterr().err.splitlines() if "finished before" in x]
    assert "comes from the files; overwrite=True restores it again" in said
    for a, b in zip(first, again, strict=True):
        assert a["id"] == b["id"]
        for key in ("restored", "measurement", "truth", "draws", "residual", "residual_draws"):
            if a[key] is None:
                assert b[key] is None
            else:
                clamped = a[key].clamp(-1, 1) if key in ("restored", "draws") else a[key]
                torch.testing.assert_close(b[key], clamped, rtol=0.02, atol=2e-4)
