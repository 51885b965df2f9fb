"""The command line, end to end, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cmi_lightning.cli import main
from cmi_lightning.zoo.cards import shipped

FAST = [
    "--data.limit=2",
    "--data.batch_size=2",
    "--model.num_steps=3",
]


def run(tmp_path, *args: str) -> int:
    return main(["predict", *args, f"--trainer.default_root_dir={tmp_path / 'out'}"])


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


def test_demo_writes_everything(tmp_path, capsys):
    assert run(tmp_path, "-c", "demo/garments", *FAST) == 0
    out = tmp_path / "out"
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {
        "restored/00000.png",
        "restored/00001.png",
        "grid.png",
        "metrics.csv",
        "summary.json",
        "config.yaml",
        "trajectory.csv",
        "trajectory.png",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["00000", "00001"]
    printed = capsys.readouterr().out
    assert "σ = 0.05 on [−1, 1] = 0.025 on [0, 1]" in printed
    assert "PSNR" in printed
    assert "LPIPS" in printed  # either a number or what is missing
    json.loads((out / "summary.json").read_text())
    with Image.open(out / "restored/00000.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")


def test_saved_config_reproduces_the_run(tmp_path):
    assert run(tmp_path / "a", "-c", "demo/garments", *FAST) == 0
    saved = tmp_path / "a/out/config.yaml"
    assert run(tmp_path / "b", "-c", str(saved)) == 0
    a, b = (tmp_path / f"{x}/out/restored/00001.png" for x in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_add_cmi_is_one_line(tmp_path):
    task = ["-c", "task/super_resolution", "-c", "guidance/dps"]
    assert run(tmp_path / "a", *task, "-c", "add_cmi", *FAST) == 0
    saved = yaml.safe_load((tmp_path / "a/out/config.yaml").read_text())
    classes = [g["class_path"].rsplit(".")[-1] for g in saved["model"]["guidances"]]
    assert classes == ["DPS", "CMI"]
    assert saved["model"]["operator"]["class_path"].endswith("Downsample")


@pytest.mark.parametrize(
    "name",
    [
        *(f"task/{n}" for n in ("inpaint_random", "inpaint_box", "gaussian_blur", "motion_blur")),
        *(f"task/{n}" for n in ("super_resolution", "denoise", "hdr", "photons")),
        *(f"guidance/{n}" for n in ("none", "dps", "pigdm", "mcg", "dsg", "moment_matching")),
        *(f"solver/{n}" for n in ("ddpm", "ddim", "heun")),
        # one of each shape; tests/test_method_configs.py runs every section
        *("guidance/dps_discrepancy", "guidance/repaint", "solver/ddrm", "add_lamp"),
    ],
)
def test_every_config_runs(tmp_path, name):
    quiet = ["--trainer.callbacks=[]", "--trainer.logger=false"]
    assert run(tmp_path, "-c", "guidance/none", "-c", name, *FAST, *quiet) == 0


def test_lle_writes_an_overlay_that_predict_takes(tmp_path, capsys):
    method = ["-c", "demo/garments", "-c", "guidance/ddnm_noiseless", *FAST]
    overlay = tmp_path / "lle.yaml"
    own = ["--images=3", "--prior_steps=2", f"--output={overlay}"]
    assert main(["lle", *method, *own]) == 0
    before, after = re.search(r"error (\S+) → (\S+) on 3 images", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    assert run(tmp_path, *method, "-c", str(overlay)) == 0
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    added = saved["model"]["guidances"][-1]
    assert added["class_path"] == "cmi_lightning.guidance.LLE"
    assert [len(row) for row in added["init_args"]["seen"]] == [1, 2, 3]
    error = refusal(capsys, "predict", *method, "-c", str(overlay), "--model.num_steps=4")
    assert "LLE's coefficients are for 3 steps and the chain has 4" in error
    assert "--images" in refusal(capsys, "lle", *method, "--images=0")


def test_config_in_an_own_file_and_long_spelling(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("model: {num_steps: 2, guidances: []}\n")
    assert run(tmp_path, f"--config={own}", *FAST[:2]) == 0
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert saved["model"]["num_steps"] == 2


def test_bf16_and_ddim(tmp_path):
    options = ["--trainer.precision=bf16-mixed", "-c", "solver/ddim"]
    assert run(tmp_path, "-c", "demo/garments", *options, *FAST) == 0


def test_usage_names_commands_and_configs(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "predict" in printed
    assert "add_cmi" in printed
    assert main(["--version"]) == 0
    assert main([]) == 0


# ---------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing sampled


def test_unknown_command(capsys):
    assert "Unknown command 'restore'" in refusal(capsys, "restore")


def test_unknown_config(capsys):
    error = refusal(capsys, "predict", "-c", "no_such_task")
    assert "No configuration 'no_such_task'" in error
    assert "add_cmi" in error


def test_missing_folder(capsys, tmp_path):
    error = refusal(capsys, "predict", f"--data.folder={tmp_path / 'absent'}")
    assert str(tmp_path / "absent") in error


def test_unreadable_image(capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    error = refusal(capsys, "predict", f"--data.folder={tmp_path}")
    assert "broken.png" in error


def save_image(path, shape):
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def test_channels_of_another_network(capsys, tmp_path):
    save_image(tmp_path / "rgb.png", (32, 32, 3))
    error = refusal(capsys, "predict", "-c", "prior/fashion_mnist", f"--data.folder={tmp_path}")
    assert "3×32×32" in error
    assert "1×32×32" in error


def test_size_that_the_factor_does_not_divide(capsys, tmp_path):
    error = refusal(
        capsys, "predict", "-c", "task/super_resolution", "--model.operator.init_args.factor=5"
    )
    assert "5" in error
    assert "64" in error


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.operator=Blurr", ["model.operator", "Blurr"]),
        ("--model.num_step=5", ["num_step"]),
        ("--model.guidances=[{class_path: CMI, init_args: {scal: 1}}]", ["scal", "CMI"]),
        ("--model.num_steps=0", ["num_steps", "between 1 and 1000"]),
        ("--model.noise.sigma=-1", ["sigma"]),
        ("--data.batch_size=many", ["batch_size", "many"]),
        ("--model.noise.range=percent", ["range", "percent"]),
        ("--data.limit=0", ["data.limit"]),
        ("--trainer.devices=0", ["devices"]),
        ("--trainer.precision=bf16-true", ["bf16-mixed"]),
        ("--ckpt_path=x.ckpt", ["ckpt_path"]),
    ],
)
def test_wrong_options_are_named(capsys, option, words):
    error = refusal(capsys, "predict", option)
    assert all(word in error for word in words), error


def test_cmi_without_measurement_noise(capsys):
    error = refusal(capsys, "predict", "-c", "demo/garments", "--model.noise.sigma=0")
    assert "CMI needs measurement noise" in error


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--ckpt_path=absent.ckpt", ["absent.ckpt"]),
        ("--trainer.max_stepz=3", ["max_stepz"]),
        ("--model.schedule=quadratic", ["schedule", "quadratic"]),
    ],
)
def test_fit_names_what_is_wrong(capsys, option, words):
    error = refusal(capsys, "fit", "-c", "fit/fashion_mnist", option)
    assert all(word in error for word in words), error


def test_cosine_schedule_by_name(tmp_path):
    options = [*FAST, "--model.denoiser.init_args.schedule=cosine", "--trainer.callbacks=[]"]
    assert run(tmp_path, "-c", "demo/garments", "-c", "prior/fashion_mnist", *options) == 0


def test_solver_without_noise_for_dsg(capsys):
    error = refusal(capsys, "predict", "-c", "guidance/dsg", "-c", "solver/ddim")
    assert "DSG" in error


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_checkpoint_that_does_not_fit(capsys, tmp_path, change):
    state = load_file(shipped()["fashion-mnist"])
    if change == "missing":
        state.pop("out.2.bias")
    else:
        state["surplus.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "net.safetensors")
    option = f"--model.denoiser.init_args.weights={tmp_path / 'net.safetensors'}"
    error = refusal(capsys, "predict", "-c", "prior/fashion_mnist", option)
    assert f"1 {change}" in error
    assert "net.safetensors" in error


def test_the_default_prior_leaves_nothing_behind(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model:\n  denoiser:\n    class_path: cmi_lightning.denoisers.NetworkDenoiser\n"
        "    init_args: {network: torch.tanh, weights: null}\n"
    )
    with pytest.raises(SystemExit):
        main(["predict", "-c", str(tmp_path / "mine.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["denoiser"]["init_args"]
    assert printed["network"] == "torch.tanh"
    assert printed["image_shape"] is None
    assert printed["weights"] is None


# ---------------------------------------------------------------------------------------------
# The nearest name, and remedies that exist


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--model.num_step=5", "did you mean --model.num_steps?"),
        ("--modle.seed=5", "did you mean --model.seed?"),
        ("--overwrit", "did you mean --overwrite?"),
        ("--data.limitt=3", "did you mean limit?"),
        ("--model.guidances=[{class_path: CMI, init_args: {scal: 1}}]", "did you mean scale?"),
        ("--model.operator=GausianBlur", "did you mean GaussianBlur?"),
        ("--data.folder=a${b", r"write \${"),
        ("--trainer.strategy=foo", "strategy='foo'"),
        ("--trainer.accelerator=foo", "accelerator='foo'"),
        ("--trainer.precision=99", "99"),
        ("--trainer.limit_predict_batches=0", "leaves nothing to restore"),
    ],
)
def test_misspelt_options_are_told_with_the_nearest_name(capsys, option, nearest):
    error = refusal(capsys, "predict", "-c", "demo/garments", option)
    assert nearest in error
    assert len(error) < 500


@pytest.mark.parametrize("command", ["predict", "fit", "table", "tune"])
def test_a_folder_that_cannot_be_written_is_told(capsys, tmp_path, command):
    (tmp_path / "file").touch()
    config = {"predict": "demo/garments", "fit": "fit/fashion_mnist"}.get(command, "table/smoke")
    option = "--trainer.default_root_dir" if command in ("predict", "fit") else "--output"
    for place in (tmp_path / "file", tmp_path / "file/inner", "/proc/x"):
        assert main([command, "-c", config, f"{option}={place}"]) == 2
        assert "cannot write in" in capsys.readouterr().err


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
        with pytest.raises(SystemExit):
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


def test_a_rerun_elsewhere_leaves_the_first_run_alone(tmp_path):
    assert run(tmp_path / "a", "-c", "demo/garments", *FAST) == 0
    first = tmp_path / "a/out"
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    saved = str(first / "config.yaml")
    assert run(tmp_path / "b", "-c", saved, "--model.num_steps=2") == 0
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
    assert (tmp_path / "b/out/config.yaml").is_file()
    option = f"--trainer.logger.init_args.save_dir={first}"
    assert run(tmp_path / "c", "-c", saved, option) == 2  # as in files of an older version
