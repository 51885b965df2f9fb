"""Small commands: info, new, completion, -q; and the files that build and test the package."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rich
import yaml
from predicting import cli
from rich.console import Console

from cmi_lightning.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent


def record(folder: Path, name: str, **fields: object) -> None:
    (folder / "records").mkdir(parents=True, exist_ok=True)
    entry = {"id": name, "input": "0", "failed": None, **fields}
    (folder / f"records/{name}.json").write_text(json.dumps(entry))


def test_info_tells_what_a_folder_holds(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"model.solver": "DDPM", "model.seed": "3"}))
    record(tmp_path, "a", psnr=20.0)
    record(tmp_path, "b", psnr=30.0)
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 images done, 0 given up" in printed
    assert re.search(r"psnr +25 \(mean of 2 images\)", printed)
    assert re.search(r"solver +DDPM", printed)
    assert "records (2)" in printed
    record(tmp_path, "c", failed="not a number at step 3 of 100", psnr=None)
    assert main(["info", str(tmp_path)]) == 1
    assert "c: not a number at step 3 of 100" in capsys.readouterr().out


def test_info_of_another_folder_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        assert main(["info", str(folder)]) == 2
        assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["guidance", "operator", "metric"])
def test_new_writes_a_class_whose_test_passes(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["new", kind, f"Mine{kind.title()}"]) == 0
    module = f"mine_{kind}"
    assert f"{module}.Mine{kind.title()}" in capsys.readouterr().out
    scope: dict = {}
    exec((tmp_path / f"test_{module}.py").read_text(), scope)
    tests = [function for name, function in scope.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
    sys.modules.pop(module)
    assert main(["new", kind, f"Mine{kind.title()}"]) == 2  # never written over
    assert "is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["guidance", "a/b"], ["solver", "X"], ["guidance"], ["metric", "if"]]
)
def test_new_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    assert main(["new", *args]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "guidance/dps" in script
    if shell == "bash":
        typed = "COMP_WORDS=(cmi-lightning predict -c guidance/dp); COMP_CWORD=3; _cmi_lightning;"
        found = subprocess.run(
            ["bash", "-c", f"{script}\n{typed} printf '%s\\n' \"${{COMPREPLY[@]}}\""],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "guidance/dps" in found.stdout.split()
        assert "guidance/pigdm" not in found.stdout
    elif (path := shutil.which(shell)) is not None:
        subprocess.run([path, "-n"], input=script, text=True, check=True)
    assert main(["completion", "tcsh"]) == 2


TINY = "predict -c guidance/none -c prior/fashion_mnist --data.folder=fashion-mnist-test"
TINY += " --data.limit=1 --model.num_steps=2 --trainer.accelerator=cpu --trainer.logger=false"


def test_quiet_prints_nothing(tmp_path, capsys):
    assert cli(f"-q {TINY}", f"--trainer.default_root_dir={tmp_path}") == 0
    assert capsys.readouterr().out == ""
    assert not rich.get_console().quiet  # of that command alone
    rich.get_console().print("after")
    assert capsys.readouterr().out == "after\n"


def test_no_color_leaves_colours_out(tmp_path, monkeypatch):
    """Of a whole prediction in a terminal: table, progress bars, summary."""
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
    printed = []
    monkeypatch.delenv("NO_COLOR", raising=False)  # empty, it counts for older releases of rich
    for value in ("", "1"):
        if value:
            monkeypatch.setenv("NO_COLOR", value)
        terminal = Console(file=io.StringIO(), force_terminal=True, color_system="256")
        monkeypatch.setattr(rich, "_console", terminal)
        assert cli(TINY, f"--trainer.default_root_dir={tmp_path / value}/run") == 0
        printed.append(terminal.file.getvalue())
    assert coloured.search(printed[0])
    assert "steps" in printed[1]
    assert not coloured.search(printed[1])


def test_workflows_and_dockerfile():
    """They run what `.ci/run` and the README run; no engine runs here, so their form is checked."""
    jobs = {}
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        jobs |= yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert {"lint", "test", "lowest", "docs", "wheel"} <= set(jobs)
    for job in jobs.values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "run" in step:
                subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)
                for script in re.findall(r"(?:^|\s)(\.ci/\w+)", step["run"]):
                    assert (ROOT / script).is_file()
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert words[:2] == ["ARG", "FROM"]
    known = "ARG FROM RUN COPY WORKDIR USER ENV ENTRYPOINT CMD"
    assert set(words) <= {*known.split()}
    for line in lines:
        if line.startswith("RUN "):
            subprocess.run(["sh", "-n"], input=line[4:], text=True, check=True)
        if line.startswith("COPY "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1] if name[0] != "-")
