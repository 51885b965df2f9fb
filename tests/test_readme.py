"""The README's own code and commands, run as they stand (on fewer images and steps)."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from cmi_lightning.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    command.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("cmi-lightning predict")
]
MINE = "-c mine.yaml"
SHORT = ["--data.limit=2", "--data.batch_size=2", "--model.num_steps=3"]


def python(marker: str) -> str:
    """The only Python block that contains ``marker``."""
    (code,) = [block for language, block in BLOCKS if language == "python" and marker in block]
    return code


@pytest.fixture
def my_terms(tmp_path, monkeypatch):
    """The README's guidance in a file of the user's own."""
    (tmp_path / "my_terms.py").write_text(python("class Smoothness"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # where it lies; nothing else is done to find it
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield
    sys.modules.pop("my_terms", None)


def test_the_guidance_is_short():
    code = python("class Smoothness")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15


ELSEWHERE = ("broken/", MINE, "experiment/")  # the last in tests/test_experiments.py


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(e in c for e in ELSEWHERE)])
def test_commands(my_terms, command, tmp_path, capsys):
    arguments = shlex.split(command)[1:]
    short = [a for a in SHORT if a.split("=")[0] not in arguments]
    if "--print_config" in arguments:
        with pytest.raises(SystemExit):
            main([*arguments, *short])
        assert "bf16-mixed" in capsys.readouterr().out
        return
    assert main([*arguments, *short, f"--trainer.default_root_dir={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out/grid.png").is_file()


def test_commands_for_many_devices(capsys):
    bash = "".join(block for language, block in BLOCKS if language == "bash")
    commands = [c.split("#")[0] for c in bash.replace("\\\n", " ").splitlines() if MINE in c]
    assert [c.split()[0] for c in commands] == ["cmi-lightning"] * 2 + ["torchrun", "srun"]
    for command in commands:
        arguments = command.replace(MINE, "-c demo").split(" predict ")[1]
        with pytest.raises(SystemExit) as ended:
            main(["predict", *shlex.split(arguments), "--print_config"])
        assert ended.value.code in (0, None)
        assert ("strategy: ddp" in capsys.readouterr().out) == ("ddp" in command)


def test_measurements_of_ones_own(my_terms, tmp_path, shipped_images):
    import numpy as np
    from PIL import Image

    from cmi_lightning.callbacks.drawing import save_png, to_tile

    for i in range(2):
        save_png(to_tile(shipped_images[i]), tmp_path / f"broken/{i}.png")
        mask = np.full((32, 32), 255, np.uint8)
        mask[8:20, 8 : 20 + i] = 0
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    (command,) = [c for c in COMMANDS if "broken/" in c]
    out = f"--trainer.default_root_dir={tmp_path / 'out'}"
    assert main([*shlex.split(command)[1:], *SHORT, out]) == 0
    assert (tmp_path / "out/restored/1.png").is_file()
    header = (tmp_path / "out/metrics.csv").read_text().splitlines()[0]
    assert "psnr" not in header
    assert "residual" in header


def test_python(my_terms, tmp_path):
    code = python("trainer.predict(")
    code = code.replace("limit=16", "limit=2").replace("CMI()])", "CMI()], num_steps=3)")
    code = code.replace('default_root_dir="', 'accelerator="cpu", default_root_dir="')
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/python/metrics.csv").is_file()


def test_operator(shipped_images):
    import torch

    from cmi_lightning.noise import SampleNoise

    scope: dict = {}
    exec(compile(python("class Luminance"), "README.md", "exec"), scope)
    x = shipped_images[:2].repeat(1, 3, 1, 1)
    A = scope["Luminance"]().bind((3, 32, 32), SampleNoise(0, ["a", "b"]), x)
    y = A(x)
    torch.testing.assert_close(A(A.pinv(y)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.adjoint(y), y.repeat(1, 3, 1, 1) / 3)


def test_nothing_is_left_to_fill_in():
    root = Path(__file__).parent.parent
    card = (root / "cmi_lightning/assets/MODEL_CARD.md").read_text(encoding="utf-8")
    for text in (README, card):
        assert not re.search(r"@\w+@|<!--|TODO", text)
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (root / image).is_file()


def test_measured_numbers_are_those_of_the_results():
    """The README quotes docs/results.md, and that the table of all cells."""
    docs = Path(__file__).parent.parent / "docs"
    page = (docs / "results.md").read_text(encoding="utf-8")
    quoted = [line for line in README.splitlines() if "±" in line and line.startswith("| ")]
    assert len(quoted) == 6
    assert all(line in page for line in quoted)
    table = (docs / "results" / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [part.strip() for part in line.split("|")[1:4]] for line in table if line.startswith("| ")
    ]
    bases = [row for row in rows if row[1] in ("measurement A⁺y", "DPS", "ΠGDM", "MCG", "DSG")]
    assert len(bases) == 6 * 5
    for row in bases:
        assert any(row[2] in line for line in quoted), row
