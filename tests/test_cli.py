"""The command line, end to end, and what it says to bad input."""

import contextlib
import csv
import io
import json
import re
import shlex
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cmi_lightning.cli import main
from cmi_lightning.zoo.cards import shipped

FAST = ["--data.limit=2", "--data.batch_size=2", "--model.num_steps=3"]
QUIET = ["--trainer.callbacks=[]", "--trainer.logger=false"]


def run(tmp_path, *args: str) -> int:
    return main(["predict", *args, f"--trainer.default_root_dir={tmp_path / 'out'}"])


def saved(tmp_path) -> dict:
    return yaml.safe_load((tmp_path / "out/config.yaml").read_text())


def refusal(capsys, *args: str) -> str:
    """The one line that bad input earns, with exit code 2 and not a file written."""
    with tempfile.TemporaryDirectory() as folder:
        root = f"--trainer.default_root_dir={folder}/out"
        assert main([*args, *([root] if args[0] in ("predict", "fit") else [])]) == 2
        assert not list(Path(folder).rglob("*.*"))
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("cmi-lightning: error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run of the demo: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(folder, "-c", "demo/garments", *FAST) == 0
    return folder / "out", printed.getvalue()


def test_demo_writes_everything(demo):
    out, printed = demo
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"restored/00000.png", "restored/00001.png", "grid.png", "metrics.csv"} <= names
    assert {"summary.json", "config.yaml", "trajectory.csv", "trajectory.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["00000", "00001"]
    assert "σ = 0.05 on [−1, 1] = 0.025 on [0, 1]" in printed
    assert "PSNR" in printed
    assert "LPIPS" in printed  # either a number or what is missing
    json.loads((out / "summary.json").read_text())
    with Image.open(out / "restored/00000.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")


def test_a_saved_config_reproduces_the_run_and_leaves_it_alone(demo, tmp_path):
    first, _ = demo
    config, before = str(first / "config.yaml"), {p: p.read_bytes() for p in first.rglob("*.*")}
    assert run(tmp_path / "b", "-c", config) == 0
    again = tmp_path / "b/out/restored/00001.png"
    assert again.read_bytes() == before[first / "restored/00001.png"]
    assert run(tmp_path / "c", "-c", config, "--model.num_steps=2") == 0
    assert (tmp_path / "c/out/config.yaml").is_file()
    option = f"--trainer.logger.init_args.save_dir={first}"
    assert run(tmp_path / "d", "-c", config, option) == 2  # as in files of an older version
    assert {p: p.read_bytes() for p in first.rglob("*.*")} == before


def test_add_cmi_is_one_line(tmp_path):
    task = ["-c", "task/super_resolution", "-c", "guidance/dps"]
    assert run(tmp_path, *task, "-c", "add_cmi", *FAST, *QUIET) == 0
    model = saved(tmp_path)["model"]
    classes = [g["class_path"].rsplit(".")[-1] for g in model["guidances"]]
    assert classes == ["DPS", "CMI"]
    assert model["operator"]["class_path"].endswith("Downsample")


@pytest.mark.parametrize(
    "name",
    [
        *(f"task/{n}" for n in ("inpaint_random", "inpaint_box", "gaussian_blur", "motion_blur")),
        *(f"task/{n}" for n in ("super_resolution", "denoise", "hdr", "photons")),
        # one of each shape; tests/test_method_configs.py runs every section
        *("guidance/dps", "guidance/dps_discrepancy", "guidance/repaint"),
        *("solver/ddim", "solver/heun", "solver/ddrm", "add_lamp"),
    ],
)
def test_every_config_runs(tmp_path, name):
    assert run(tmp_path, "-c", "guidance/none", "-c", name, *FAST, *QUIET) == 0


def test_lle_writes_an_overlay_that_predict_takes(tmp_path, capsys):
    method = ["-c", "demo/garments", "-c", "guidance/ddnm_noiseless", *FAST]
    overlay = tmp_path / "lle.yaml"
    own = ["--images=3", "--prior_steps=2", f"--output={overlay}"]
    assert main(["lle", *method, *own]) == 0
    before, after = re.search(r"error (\S+) → (\S+) on 3 images", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    assert run(tmp_path, *method, "-c", str(overlay), *QUIET) == 0
    added = saved(tmp_path)["model"]["guidances"][-1]
    assert added["class_path"] == "cmi_lightning.guidance.LLE"
    assert [len(row) for row in added["init_args"]["seen"]] == [1, 2, 3]
    error = refusal(capsys, "predict", *method, "-c", str(overlay), "--model.num_steps=4")
    assert "LLE's coefficients are for 3 steps and the chain has 4" in error
    assert "--images" in refusal(capsys, "lle", *method, "--images=0")


def test_options_from_an_own_file_and_by_name(tmp_path):
    """A file in the long spelling, another precision, and a schedule's name."""
    (tmp_path / "own.yaml").write_text("model: {num_steps: 2, guidances: []}\n")
    options = [f"--config={tmp_path / 'own.yaml'}", "-c", "prior/fashion_mnist"]
    options += ["--data.folder=fashion-mnist-test", "--trainer.precision=bf16-mixed"]
    options += ["--model.denoiser.init_args.schedule=cosine"]
    assert run(tmp_path, *options, *FAST[:2], *QUIET) == 0
    assert saved(tmp_path)["model"]["num_steps"] == 2


def test_usage_names_commands_and_configs(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "predict" in printed
    assert "add_cmi" in printed
    assert main(["--version"]) == 0
    assert main([]) == 0


# Bad input: one sentence, exit code 2, nothing sampled


DEMO = "predict -c demo/garments"
PARALLEL = "lightning.pytorch.strategies.ModelParallelStrategy"
TWO, DDP = "--trainer.accelerator=cpu --trainer.devices=2", ("use trainer.strategy=ddp.",)
REFUSED = [  # a command, where TMP is a folder, and what is said
    ("restore", "Unknown command 'restore'"),
    ("predict -c no_such_task", "No configuration 'no_such_task'", "`cmi-lightning configs` lists"),
    ("predict -c add_cmy", "No configuration 'add_cmy'", "did you mean add_cmi?"),
    ("predict -c dsp", "did you mean guidance/dps?"),
    ("predict -c prior/fashion-mnist", "did you mean prior/fashion_mnist?"),
    ("predict --data.folder=TMP/absent", "TMP/absent"),
    ("predict --data.folder=TMP/broken", "broken.png"),
    ("predict -c prior/fashion_mnist --data.folder=TMP/rgb", "3×32×32", "1×32×32"),
    ("predict -c task/super_resolution --model.operator.init_args.factor=5", "5", "64"),
    ("predict -c guidance/dsg -c solver/ddim", "DSG"),
    ("predict --model.operator=Blurr", "model.operator", "Blurr"),
    ("predict --model.num_steps=0", "num_steps", "between 1 and 1000"),
    ("predict --model.noise.sigma=-1", "sigma"),
    ("predict --data.batch_size=many", "batch_size must be a whole number or auto, got 'many'"),
    ("predict --model.noise.range=percent", "range must be one of signed, unit, got 'percent'"),
    ("predict -c guidance/dps --model.guidances.init_args.scale=nan", "scale must be a number"),
    (
        "predict -c guidance/dps --model.guidances.init_args.scale=.inf",
        "configuration: DPS.scale must",
    ),
    (
        "predict --data=MeasurementFolderData --data.measurements=x --data.kind=inpaint",
        "configuration: data.kind=inpaint needs data.masks.",
    ),
    ("predict -c task/super_resolution --data.folder=TMP/sizes", "'b': Downsample with factor 4"),
    ("predict --model.noise=0.05", "no class '0.05'; did you mean --model.noise.sigma?"),
    ("predict --model.denoiser=prior", "model.denoiser: there is no class 'prior'; --help lists"),
    (
        "predict -c TMP/typo.yaml",
        "There is no option model.num_step; did you mean model.num_steps?",
    ),
    (
        "predict -c prior/fashion_mnist --model.denoiser.init_args.weights=TMP/net.safetensors",
        *("net.safetensors", "1 missing (out.2.bias)", "1 unexpected (surplus.weight)"),
    ),
    ("predict --data.limit=0", "data.limit"),
    ("predict -c TMP/empty.yaml", "empty.yaml' holds no options"),
    ("predict -c TMP/list.yaml", "list.yaml' holds no options"),
    ("predict -c TMP/open.yaml", "open.yaml' is no YAML file"),
    (
        f"{DEMO} --model.operator=Inpaint",
        "Inpaint needs mask: give --model.operator.init_a",
    ),
    (f"{DEMO} --model.guidances=DPS", "it is a list: --model.guidances+=DPS adds to it"),
    (f"{DEMO} --data.range=[1]", "data.range must be 2 values or null, got '[1]'"),
    (f"{DEMO} --step_sizes.dps=big", "step_sizes must be a number, got 'big'"),
    (f"{DEMO} --step_sizes.dsp=1", "No method reads a step size 'dsp'; did you mean dps?"),
    (f"{DEMO} --trainer.max_epochs=3", "--trainer.max_epochs is of training"),
    ("fit", "There is no ", ": give a configuration that has it, by -c."),
    ("table", "There is no ", ": give a configuration that has it, by -c."),
    ("configs all", "configs takes no options, got 'all'"),
    ("studio --prot=1", "There is no option --prot=1; did you mean --port?"),
    ("studio --port=70000", "--port must be a whole number, between 0 and 65535, got 70000"),
    ("predict --trainer.devices=0", "devices"),
    ("predict --trainer.precision=bf16-true", "bf16-mixed"),
    ("predict --trainer.precision=auto", "set model.precision to auto"),
    (f"{DEMO} --model.compile=true", "compile=true has first derivatives alone"),
    (
        f"{DEMO} --trainer.precision=bf16-mixed --model.precision=auto",
        "leave out trainer.precision",
    ),
    ("predict --ckpt_path=x.ckpt", "ckpt_path"),
    (f"{DEMO} --model.noise.sigma=0", "CMI needs measurement noise"),
    # the nearest name
    (f"{DEMO} --model.num_step=5", "num_step", "did you mean --model.num_steps?"),
    (f"{DEMO} --modle.seed=5", "did you mean --model.seed?"),
    (f"{DEMO} --overwrit", "did you mean --overwrite?"),
    (f"{DEMO} --data.limitt=3", "did you mean limit?"),
    (
        f"{DEMO} '--model.guidances=[{{class_path: CMI, init_args: {{scal: 1}}}}]'",
        *("scal", "CMI", "did you mean scale?"),
    ),
    (f"{DEMO} --model.operator=GausianBlur", "did you mean GaussianBlur?"),
    (f"{DEMO} --model.guidances+=DSP", "guidances: there is no class 'DSP'; did you mean DPS?"),
    (f"{DEMO} --model.guidances+=cmi_lightning.guidance.DPSS", "cmi_lightning.guidance; did you"),
    (f"{DEMO} '--model.guidances=[{{class_path: cmi_lightning.guidnce.DPS}}]'", "mean guidance?"),
    (f"{DEMO} --model.guidances+=cmi_lightning.operators.BoxMask", "is no Guidance; --help"),
    (f"{DEMO} --trainer.callbacks+=ImageWritr", "no class 'ImageWritr'; did you mean ImageWriter"),
    (f"{DEMO} --data=cmi_lightning.data.ImageFoldrData", "did you mean ImageFolderData?"),
    (f"{DEMO} '--data.folder=a${{b'", r"write \${"),
    (f"{DEMO} --trainer.strategy=foo", "strategy='foo'"),
    *(
        (f"{DEMO} {TWO} --trainer.strategy=ddp_{how}", *DDP)
        for how in ("spawn", "fork", "notebook")
    ),
    (f"fit -c fit/fashion_mnist {TWO} --trainer.strategy=ddp_spawn", *DDP),
    (f"fit -c fit/fashion_mnist {TWO} --trainer.strategy.class_path={PARALLEL}", "a part of", *DDP),
    (f"{DEMO} --trainer.accelerator=foo", "accelerator='foo'"),
    (f"{DEMO} --trainer.precision=99", "99"),
    (f"{DEMO} --trainer.limit_predict_batches=0", "leaves nothing to restore"),
    ("fit -c fit/fashion_mnist --ckpt_path=absent.ckpt", "absent.ckpt"),
    ("fit -c fit/fashion_mnist --trainer.max_stepz=3", "max_stepz"),
    ("fit -c fit/fashion_mnist --trainer.max_steps=0", "max_steps=0 leaves nothing to train"),
    ("fit -c fit/fashion_mnist --model.schedule=quadratic", "schedule", "quadratic"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    """Folders with a file that is no image, or images in colour; weights that do not fit."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("broken", "rgb", "sizes"):
        (folder / name).mkdir()
    (folder / "broken/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    Image.new("RGB", (32, 32)).save(folder / "rgb/rgb.png")
    for name, height in (("a", 32), ("b", 33)):
        Image.new("RGB", (32, height)).save(folder / f"sizes/{name}.png")
    (folder / "typo.yaml").write_text("model: {num_step: 5}")
    for name, text in (("empty", ""), ("list", "- 1"), ("open", "model: [1")):
        (folder / f"{name}.yaml").write_text(text)
    state = load_file(shipped()["fashion-mnist"]) | {"surplus.weight": torch.zeros(2)}
    del state["out.2.bias"]
    save_file(state, folder / "net.safetensors")
    return str(folder)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_wrong_commands_are_told_in_a_sentence(capsys, files, case):
    command, *words = (text.replace("TMP", files) for text in case)
    error = refusal(capsys, *shlex.split(command))
    assert all(word in error for word in words), error
    assert len(error) < 500


def test_the_default_prior_leaves_nothing_behind(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model:\n  denoiser:\n    class_path: cmi_lightning.denoisers.NetworkDenoiser\n"
        "    init_args: {network: torch.tanh, weights: null}\n"
    )
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["predict", "-c", str(tmp_path / "mine.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["denoiser"]["init_args"]
    assert printed["network"] == "torch.tanh"
    assert printed["image_shape"] is None
    assert printed["weights"] is None


@pytest.mark.parametrize("command", ["predict", "fit", "table", "tune"])
def test_a_folder_that_cannot_be_written_is_told(capsys, tmp_path, command):
    (tmp_path / "file").touch()
    config = {"predict": "demo/garments", "fit": "fit/fashion_mnist"}.get(command, "table/smoke")
    option = "--trainer.default_root_dir" if command in ("predict", "fit") else "--output"
    for place in (tmp_path / "file", tmp_path / "file/inner", "/proc/x"):
        assert main([command, "-c", config, f"{option}={place}"]) == 2
        assert f"{option.lstrip('-')}: cannot write in" in capsys.readouterr().err


def test_what_is_appended_comes_last():
    from cmi_lightning.predict.options import resolved

    wanted = resolved(
        ["-c", "demo/garments", "-c", "guidance/dps", "-c", "add_cmi", "--model.seed=1"]
    )
    for args in (
        ["-c", "add_cmi", "-c", "demo/garments", "-c", "guidance/dps", "--model.seed=1"],
        ["-c", "demo/garments", "--config=add_cmi", "-c", "guidance/dps", "--model.seed=1"],
        ["-c", "demo/garments", "-c", "guidance/dps", "-c", "add_cmi", "--model.seed=1"],
    ):
        assert resolved(args) == wanted
    assert resolved(["-c", "add_cmi", "-c", "solver/ddim"])[1].endswith("add_cmi.yaml")


def test_help_shows_our_options_first(capsys):
    for option, shown, hidden in (
        ("--help", "--model.denoiser", "--trainer.devices"),
        ("--help.trainer", "--trainer.devices", "--model.denoiser"),
    ):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["predict", option])
        printed = capsys.readouterr().out
        assert printed.startswith("usage: cmi-lightning predict")
        assert shown in printed
        assert hidden not in printed
        assert option == "--help.trainer" or "--overwrite" in printed


def test_what_nobody_foresaw_is_one_line_and_a_file(capsys, monkeypatch):
    from cmi_lightning.predict import command

    monkeypatch.setattr(command, "prediction_cli", lambda args: 1 / 0)
    assert main(["predict"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ZeroDivisionError: division by zero" in line
    file = Path(line.partition("traceback: ")[2].rstrip(")"))
    assert "prediction_cli" in file.read_text()
    file.unlink()


def test_a_workers_error_is_one_sentence():
    from cmi_lightning.errors import one_sentence

    told = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1\ncmi_lightning.errors.InputError: The file is gone.\n'
    )
    assert one_sentence(told) == "The file is gone."
