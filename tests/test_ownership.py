"""Whose files are these? A run touches what it wrote, and nothing else."""

import sys
from pathlib import Path

import lightning as L
import predicting
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cmi_lightning import InputError, PosteriorSampler, files
from cmi_lightning.callbacks import ImageWriter
from cmi_lightning.data import ImageFolderData, MeasurementFolderData
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import DPS
from cmi_lightning.operators import BoxMask, Identity
from cmi_lightning.predict import folder as folders
from cmi_lightning.predict.fingerprint import differences, options
from cmi_lightning.predict.folder import RunFolder


def trainer(folder: Path) -> L.Trainer:
    return predicting.trainer(folder, ImageWriter(grid_rows=0))


def module(**kwargs) -> PosteriorSampler:
    prior = GaussianMixture(torch.zeros(1, 1, 8, 8), 0.2)
    return PosteriorSampler(prior, **{"guidances": [DPS()], "num_steps": 2, **kwargs})


def loader(count: int = 2) -> DataLoader:
    return DataLoader([{"x": torch.zeros(1, 8, 8), "id": str(i)} for i in range(count)], 2)


def run(folder: Path, count: int = 2, **kwargs) -> None:
    trainer(folder).predict(module(**kwargs), loader(count), return_predictions=False)


def photos(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("0", "1"):
        Image.new("L", (8, 8), 100).save(folder / f"{name}.png")
    return folder


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# Foreign files


@pytest.mark.parametrize("there", ["restored/0.png", "run.json", "records/1.json"])
def test_a_foreign_file_is_not_replaced(tmp_path, there):
    path = tmp_path / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        run(tmp_path)
    assert path.read_text() == "mine"


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    run(tmp_path, 3)
    (tmp_path / "restored/mine.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, 2, overwrite=True, num_steps=3)
    assert not (tmp_path / "restored/2.png").exists()  # the old options' own
    assert not (tmp_path / "records/2.json").exists()
    assert (tmp_path / "restored/mine.png").read_text() == "mine"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    owned = (tmp_path / "manifest.txt").read_text().splitlines()
    assert owned == sorted({*names(tmp_path)} - {"restored/mine.png", "notes.txt", ".lock"} - {
        "manifest.txt"})  # fmt: skip


def test_only_own_temporary_files_are_removed(tmp_path):
    run(tmp_path, 1)
    own = tmp_path / f"restored/.{files.mark(Path('0.png'))}.{'0' * 32}.tmp"
    foreign = [
        tmp_path / "deep/.draft.tmp",
        tmp_path / "restored/.draft.tmp",
        # Another run's, in a folder of its own within this one.
        tmp_path / f"inner/restored/.{files.mark(Path('0.png'))}.{'1' * 32}.tmp",
    ]
    for path in (own, *foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run(tmp_path, 2)
    assert not own.exists()
    assert all(path.read_text() == "half" for path in foreign)


# Inputs and outputs


@pytest.mark.parametrize("place", [".", "restored", "restored/deep", "truth", "link"])
def test_inputs_where_results_go_are_refused(tmp_path, place):
    given = photos(tmp_path / ("restored" if place == "link" else place))
    if place == "link":
        (tmp_path / "elsewhere").symlink_to(given)
        given = tmp_path / "elsewhere"
    before = {p: p.read_bytes() for p in given.rglob("*.png")}
    with pytest.raises(InputError, match=r"data\.measurements: .* puts results"):
        trainer(tmp_path).predict(module(), datamodule=MeasurementFolderData(str(given)))
    assert {p: p.read_bytes() for p in given.rglob("*.png")} == before


@pytest.mark.parametrize("place", ["out", "deep/out"])
def test_results_are_not_read_back_as_inputs(tmp_path, place):
    photos(tmp_path)
    for _ in range(2):
        data = ImageFolderData(str(tmp_path))
        trainer(tmp_path / place).predict(module(), datamodule=data)
        assert [name for name, _ in data.images.files] == ["0", "1"]


def test_results_of_another_run_can_be_inputs(tmp_path):
    run(tmp_path / "a")
    data = ImageFolderData(str(tmp_path / "a/restored"))
    trainer(tmp_path / "b").predict(module(), datamodule=data)
    assert (tmp_path / "b/restored/1.png").is_file()


# Records and their options


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "not UTF-8"])
def test_records_without_their_options_are_not_taken_for_others(tmp_path, damage):
    run(tmp_path)
    path = tmp_path / "run.json"
    text = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut short": text[:40], "empty": b""}.get(damage, b"\xff\xfe"))
    with pytest.raises(InputError, match="2 results of other options"):
        run(tmp_path, num_steps=3)
    run(tmp_path, 3)  # the same options go on
    assert path.read_bytes() == text


def test_a_smaller_limit_keeps_what_is_done(tmp_path):
    photos(tmp_path / "in", "1", "2", "10")
    for limit in (None, 1):
        sampler = module()
        data = ImageFolderData(str(tmp_path / "in"), limit=limit)
        t = trainer(tmp_path / "out")
        t.predict(sampler, datamodule=data, return_predictions=False)
        assert [r["id"] for r in sampler.run.collect(t)] == ["1", "2", "10"]


# Two at once


def test_a_second_run_in_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    first = RunFolder(tmp_path)
    first.lock()
    with pytest.raises(InputError, match="Another run is at work"):
        run(tmp_path)
    first.close()
    run(tmp_path)


def test_processes_of_one_run_share_the_folder(tmp_path):
    first, second = RunFolder(tmp_path, 0), RunFolder(tmp_path, 1)
    first.lock()
    first.claim(tmp_path / "a")
    second.claim(tmp_path / "b")
    for name in "ab":
        (tmp_path / name).touch()
    second.claim(tmp_path / "a")  # the other process's: of the same run
    first.tidy()
    first.close()
    assert (tmp_path / "manifest.txt").read_text() == "a\nb\n"
    assert names(tmp_path) - {".lock"} == {"a", "b", "manifest.txt"}


# Changed code

CODE = {
    "class": "class Scale(LinearOperator):\n    def forward(self, x): return x * {}\n",
    "base class": "class Base(LinearOperator):\n    def forward(self, x): return x * {}\n"
    "class Scale(Base):\n    pass\n",
    "helper": "def times(x): return x * {}\n"
    "class Scale(LinearOperator):\n    def forward(self, x): return times(x)\n",
    "constant": "BY = {}\nclass Scale(LinearOperator):\n    def forward(self, x): return x * BY\n",
}


def written(folder: Path, kind: str, value: float, name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    head = "from cmi_lightning.operators import LinearOperator\n"
    (folder / f"{name}.py").write_text(head + CODE[kind].format(value))
    sys.modules.pop(name, None)
    return __import__(name)


@pytest.mark.parametrize("kind", list(CODE))
def test_changed_code_is_another_run(tmp_path, kind, monkeypatch):
    found = []
    for i, value in enumerate((1.0, 1.0, 0.1)):
        here = tmp_path / str(i)
        here.mkdir()
        made = written(here, kind, value, "myop", monkeypatch)
        found.append(dict(options("model.operator", made.Scale())))
    assert differences(found[0], found[1]) is None
    assert differences(found[1], found[2]) == "source of myop.Scale differs"


def test_functions_closures_and_prompts_are_covered():
    def make(by: float):
        return lambda x: x * by

    def typed(by: float):
        scope: dict = {"__name__": "__main__"}
        exec(f"def scale(x): return x * {by}", scope)
        return scope["scale"]

    for kind in (make, typed):
        one, same, other = (dict(options("f", kind(by))) for by in (1.0, 1.0, 0.1))
        assert differences(one, same) is None
        assert "source of" in str(differences(one, other))
    assert not [name for name in dict(options("f", torch.tanh)) if name.startswith("source")]


# Loaders of the user's own


IMAGE = torch.zeros(1, 8, 8)


@pytest.mark.parametrize(
    ("items", "batch_size", "ids"),
    [
        ([{"x": IMAGE, "id": i} for i in range(3)], 2, ["0", "1", "2"]),
        ([{"x": IMAGE}] * 3, 2, ["00000", "00001", "00002"]),
        ([IMAGE] * 3, 2, ["00000", "00001", "00002"]),
        ([(IMAGE, 7)] * 3, 2, ["00000", "00001", "00002"]),
        ([{"x": IMAGE, "id": str(i), "label": 3} for i in range(3)], None, ["0", "1", "2"]),
        ([IMAGE.byte()] * 2, 2, ["00000", "00001"]),
        ([{"y_image": IMAGE, "factor": 1}] * 2, 1, ["00000", "00001"]),
    ],
    ids=["int ids", "no ids", "tensors", "labels", "single", "uint8", "measurements"],
)
def test_other_batches_work(tmp_path, items, batch_size, ids):
    results = trainer(tmp_path).predict(module(), DataLoader(items, batch_size))
    assert [name for result in results for name in result["id"]] == ids
    assert results[0]["restored"].shape[1:] == (1, 8, 8)
    if torch.is_tensor(items[0]) and items[0].dtype == torch.uint8:
        assert float(results[0]["truth"].max()) == -1.0


def test_several_loaders(tmp_path):
    results = trainer(tmp_path).predict(module(), [loader(1), DataLoader([IMAGE] * 2, 2)])
    assert [r["id"] for part in results for r in part] == [["0"], ["00001", "00002"]]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"image": IMAGE}, 'the loader gave {"image": a tensor (1, 1, 8, 8)}'),
        ("photo.png", "the loader gave [str]"),
        ({"x": IMAGE + 200, "id": "a"}, "values from 200 to 200"),
        ({"x": IMAGE * float("nan"), "id": "a"}, "no numbers"),
        ({"x": IMAGE.int(), "id": "a"}, "torch.int32"),
        ({"y_image": IMAGE + 255, "id": "a"}, "values from 255 to 255"),
    ],
)
def test_batches_of_no_known_form_are_told(tmp_path, item, words):
    with pytest.raises(InputError) as error:
        trainer(tmp_path).predict(module(), DataLoader([item]))
    assert words in str(error.value)


def test_an_operator_that_would_not_be_used_is_refused(tmp_path):
    given = DataLoader([{"y_image": IMAGE, "id": "a"}])
    with pytest.raises(InputError, match=r"model\.operator=BoxMask would not be used"):
        trainer(tmp_path).predict(module(operator=BoxMask(2, 2)), given)
    data = MeasurementFolderData(str(photos(tmp_path / "y")))
    with pytest.raises(InputError, match="given measurements, denoise"):
        trainer(tmp_path / "o").predict(module(operator=BoxMask(2, 2)), datamodule=data)


# A run that cannot be right


@pytest.mark.parametrize(
    ("scale", "given", "words"),
    [(0.0, False, "too few steps"), (0.0, True, "inverted mask"), (1.0, True, None)],
)
def test_a_residual_far_above_the_noise_is_told(tmp_path, capsys, scale, given, words):
    key = "y_image" if given else "x"
    items = [{key: IMAGE + 0.9, "id": str(i)} for i in range(3)]

    class Nothing(DPS):
        def guide_sample(self, step, x):
            return x if scale == 0 else step.problem.y

    sampler = module(guidances=[Nothing()], operator=Identity(), num_steps=10)
    trainer(tmp_path).predict(sampler, DataLoader(items, 3))
    told = [line for line in capsys.readouterr().err.splitlines() if "do not fit" in line]
    assert len(told) == (0 if words is None else 1)
    assert all(str(words) in line for line in told)
