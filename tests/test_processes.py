"""Long runs in processes of their own: killed, several at once, and how exact they are."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from predicting import files
from torch import Tensor

from cmi_lightning.denoisers import Autocast
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Downsample
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM

pytestmark = pytest.mark.slow

CALLBACKS = '''
import time
import numpy as np
import lightning as L


class FailOn(L.Callback):
    """Fails in a step of one process's first batch."""

    def __init__(self, rank: int):
        self.rank = rank

    def on_sampling_start(self, trainer, pl_module, ids, problem):
        pass

    def on_sampling_step(self, trainer, pl_module, record):
        if trainer.global_rank == self.rank and record.index == 1:
            raise RuntimeError(f"rank {self.rank} fails on purpose")


class Slow(L.Callback):
    """Makes every step of one process take longer."""

    def __init__(self, seconds: float, rank: int = -1):
        self.seconds, self.rank = seconds, rank

    def on_sampling_start(self, trainer, pl_module, ids, problem):
        pass

    def on_sampling_step(self, trainer, pl_module, record):
        if self.rank in (-1, trainer.global_rank):
            time.sleep(self.seconds)


class Save(L.Callback):
    """Writes restored images as they are, unrounded."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, *rest):
        for name, x in zip(outputs["id"], outputs["restored"], strict=True):
            np.save(f"{trainer.default_root_dir}/{name}.npy", x.numpy())
'''


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "my_callbacks.py").write_text(CALLBACKS, encoding="utf-8")
    return tmp_path


def command(folder: str, *options: str, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", *launcher, "cmi_lightning", "predict", "-c", "demo/garments"]
    fixed = [f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
    return [*start, *options, *fixed]


def processes(count: int) -> list[str]:
    return [f"--trainer.devices={count}", "--trainer.strategy=ddp"]


def start(here: Path, arguments: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    return subprocess.Popen(
        arguments,
        cwd=here,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(here: Path, arguments: list[str], code: int = 0, timeout: float = 600) -> str:
    process = start(here, arguments)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def assert_same(a: dict[str, bytes], b: dict[str, bytes]) -> None:
    assert set(a) == set(b)
    assert [name for name in a if a[name] != b[name]] == []


def assert_whole(folder: Path) -> set[str]:
    """Every visible file can be read, and every record's images are there; return the records."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    records = set()
    for path in (folder / "records").rglob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert all((folder / name).is_file() for name in record["images"])
        records.add(record["id"])
    return records


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def count_records(folder: Path) -> int:
    return len(list(folder.rglob("*.json")))


def ended_or_changed(process: subprocess.Popen, news: Callable[[], int], before: int) -> bool:
    return process.poll() is not None or news() != before


def test_ten_kills_lose_nothing(here):
    chance = random.Random(0)
    fast = ["--data.limit=40", "--data.batch_size=2", "--model.num_steps=6"]
    slow = [*fast, "--trainer.callbacks+=my_callbacks.Slow", "--trainer.callbacks.seconds=0.05"]
    run(here, command("whole", *slow))
    kept: set[str] = set()
    opened, records = here / "cut/run.json", here / "cut/records"
    for i in range(10):
        # At any moment from the look-up of what is done, or from the first new record.
        news = partial(stamp, opened) if i % 2 else partial(count_records, records)
        before, process = news(), start(here, command("cut", *slow))
        wait_for(partial(ended_or_changed, process, news, before))
        time.sleep(chance.uniform(0, 1.5))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        now = assert_whole(here / "cut")
        assert kept <= now
        kept = now
        print(f"kill {i + 1}: {len(kept)} of 40 images are done")
    run(here, command("cut", *slow))
    assert_same(files(here / "whole"), files(here / "cut"))
    output = run(here, command("cut", *slow))
    assert "nothing to sample: 40 images done before" in output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_to_the_first_process_ends_all(here, signum, count):
    slow = ["--data.limit=8", "--data.batch_size=2", "--model.num_steps=4", *processes(count)]
    slow += ["--trainer.callbacks+=my_callbacks.Slow", "--trainer.callbacks.seconds=0.3"]
    process = start(here, command("out", *slow))
    wait_for(lambda: list((here / "out/records").rglob("*.json")))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == count - 1
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, output
    assert "run the same command again to go on" in output.lower()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
    assert_whole(here / "out")
    run(here, command("out", *slow))
    assert json.loads((here / "out/summary.json").read_text())["images"] == 8


@pytest.mark.parametrize(("count", "limit", "batch"), [(2, 9, 2), (3, 9, 2), (3, 2, 1), (3, 6, 6)])
def test_processes_give_what_one_gives(here, count, limit, batch):
    fast = [f"--data.limit={limit}", f"--data.batch_size={batch}", "--model.num_steps=3"]
    run(here, command("one", *fast))
    output = run(here, command("many", *fast, *processes(count)))
    one, many = files(here / "one"), files(here / "many")
    assert set(one) == set(many)
    assert f"sampled {limit} images" in output
    if (count, limit, batch) != (3, 6, 6):  # there a single batch is split, which rounds otherwise
        assert_same(one, many)


def test_two_processes_share_sizes_and_choose_alike(here):
    chance = np.random.default_rng(0)
    (here / "images").mkdir()
    for i, size in enumerate([(32, 32), (40, 32), (32, 32), (32, 48), (40, 32), (32, 32)]):
        pixels = chance.integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(here / f"images/{i}.png")
    options = ["--data.folder=images", "--model.num_steps=4", "-c", "guidance/dps"]
    auto = [*options, "--data.batch_size=auto", "--model.precision=auto", *processes(2)]
    assert "data.batch_size=auto: " in run(here, command("two", *auto))
    chosen = json.loads((here / "two/run.json").read_text())
    assert int(chosen["data.batch_size"]) in (1, 2)  # of three images alike, for two processes
    same = [f"--data.batch_size={chosen['data.batch_size']}"]
    same.append(f"--trainer.precision={chosen['trainer.precision']}")
    run(here, command("one", *options, *same))
    one, two = files(here / "one"), files(here / "two")
    assert {name for name in one if one[name] != two[name]} <= {"run.json"}
    assert set(one) == set(two)


def test_draws_of_two_processes_are_judged_together(here):
    fast = ["--data.limit=5", "--data.batch_size=2", "--model.num_steps=3"]
    fast += ["--model.samples_per_image=3", "--trainer.callbacks+=PosteriorQuality"]
    run(here, command("one", *fast))
    output = run(here, command("many", *fast, *processes(2)))
    assert output.count("5 images, 3 draws of each") == 1
    one, many = files(here / "one"), files(here / "many")
    assert_same(one, many)
    found = json.loads(many["posterior.json"])
    assert (found["images"], sum(found["ranks"])) == (5, 5 * 32 * 32)


def test_processes_killed_and_resumed_on_another_number(here):
    fast = ["--data.limit=14", "--data.batch_size=2", "--model.num_steps=4"]
    slow = [*fast, "--trainer.callbacks+=my_callbacks.Slow", "--trainer.callbacks.seconds=0.2"]
    run(here, command("whole", *slow))
    for count, victim in ((2, "first"), (3, "last"), (2, "first")):
        process = start(here, command("cut", *slow, *processes(count)))
        news = partial(count_records, here / "cut/records")
        wait_for(partial(ended_or_changed, process, news, news()))
        everyone = [psutil.Process(process.pid)]
        everyone += everyone[0].children(recursive=True)
        assert len(everyone) == count
        everyone[0 if victim == "first" else -1].kill()
        process.communicate(timeout=60)
        _, alive = psutil.wait_procs(everyone[1:], timeout=60)
        assert not alive
        assert_whole(here / "cut")
    # Four images are left at most: fewer batches than processes.
    run(here, command("cut", *slow, *processes(3)))
    assert_same(files(here / "whole"), files(here / "cut"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_others(here, rank):
    fail = ["--trainer.callbacks+=my_callbacks.FailOn", f"--trainer.callbacks.rank={rank}"]
    fast = ["--data.limit=8", "--data.batch_size=2", "--model.num_steps=4", *processes(2)]
    process = start(here, command("out", *fast, *fail))
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, 3)
    assert f"rank {rank} fails on purpose" in output
    run(here, command("out", *fast))
    assert json.loads((here / "out/summary.json").read_text())["images"] == 8


def test_torchrun(here):
    fast = ["--data.limit=5", "--data.batch_size=2", "--model.num_steps=3"]
    run(here, command("one", *fast))
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    run(here, command("many", *fast, *processes(2), launcher=torchrun))
    assert_same(files(here / "one"), files(here / "many"))


def test_a_slow_process_is_waited_for(here):
    fast = ["--data.limit=4", "--data.batch_size=2", "--model.num_steps=4"]
    slow = ["--trainer.callbacks+=my_callbacks.Slow", "--trainer.callbacks.seconds=6"]
    slow += ["--trainer.callbacks.rank=1"]
    devices = ["--trainer.devices=2", "--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"]
    devices += ["--trainer.strategy.timeout=0:00:20"]
    run(here, command("out", *fast, *slow, *devices))
    assert json.loads((here / "out/summary.json").read_text())["images"] == 4


def test_batches_and_processes_change_nothing_beyond_rounding(here):
    save = ["--trainer.callbacks+=my_callbacks.Save", "--data.limit=16"]
    for name, options in {
        "one": ["--data.batch_size=1"],
        "sixteen": ["--data.batch_size=16"],
        "processes": ["--data.batch_size=16", *processes(2)],
    }.items():
        run(here, command(name, *save, *options), timeout=3000)
    x = {
        name: np.stack([np.load(here / name / f"{i:05d}.npy") for i in range(16)])
        for name in ("one", "sixteen", "processes")
    }
    for a, b in (("one", "sixteen"), ("one", "processes"), ("sixteen", "processes")):
        difference = float(np.abs(x[a] - x[b]).max())
        print(f"{a}, {b}: largest difference {difference:.2g}")
        assert difference <= 1e-3


BASES = [DPS(), PiGDM(), MCG(), DSG(), MomentMatching(krylov=2)]
IMAGES, STEPS = 100, 30


@pytest.mark.parametrize("cmi", [False, True])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_bf16_is_as_good(prior, shipped_images, base, cmi):
    x = torch.cat([shipped_images, shipped_images.flip(-1)])[:IMAGES]
    guidances = [base, *([CMI()] if cmi else [])]
    psnr = {}
    for dtype in (None, torch.bfloat16):
        denoiser = prior if dtype is None else Autocast(prior, dtype)
        chain = Sampler(denoiser, DDPM(), guidances, STEPS)
        restored = []
        for i, part in enumerate(x.split(20)):
            noise = SampleNoise(0, [f"{i}/{j}" for j in range(len(part))])
            problem = Problem.simulate(part, Downsample(4), 0.05, noise)
            result = chain.run(problem, noise, part)
            assert result.dtype == torch.float32
            restored.append(result)
        psnr[dtype] = mean_psnr(torch.cat(restored), x)
    loss = psnr[None] - psnr[torch.bfloat16]
    print(f"{base}{'+CMI' * cmi}: {psnr[None]:.2f} dB, bf16 {-loss:+.3f} dB")
    assert abs(loss) <= 0.1


def mean_psnr(restored: Tensor, truth: Tensor) -> float:
    error = (restored.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())
