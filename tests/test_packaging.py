"""The package as it is built and installed."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LICENSED = ("fashion_mnist_test", "photos")  # folders of images with a licence of their own


def shipped() -> set[str]:
    """Every module, configuration and template of the package, links followed."""
    return {
        (Path(folder) / file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "cmi_lightning", followlinks=True)
        for file in files
        if file.endswith((".py", ".yaml", ".j2", ".css", ".js", ".typed", ".safetensors", ".png"))
    }


def test_callbacks_and_configs_are_linked_into_the_package():
    for name in ("callbacks", "configs"):
        assert (ROOT / "cmi_lightning" / name).samefile(ROOT / name)
        assert f"cmi_lightning/{name}/__init__.py" in shipped()


@pytest.mark.slow
def test_wheel_and_sdist_work_from_elsewhere(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "-o", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.stat().st_size < 20e6
    assert wheel.stat().st_size < 40e6
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() for member in archive)  # whole on every system
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped() <= names
    for licence in ("LICENSE", *(f"cmi_lightning/assets/{p}/LICENSE" for p in LICENSED)):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names), licence
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import cmi_lightning, cmi_lightning.callbacks as c, cmi_lightning.configs as g; "
        "print(cmi_lightning.__file__, c.__file__, g.__file__); "
        "from cmi_lightning.cli import main; main(['configs'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(str(tmp_path / "site")) == 3
    assert "guidance/dps" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_find_the_installed_package(checker, tmp_path):
    pytest.importorskip(checker)
    (tmp_path / "mine.py").write_text(
        "import cmi_lightning.configs\n"
        "from cmi_lightning import PosteriorSampler\n"
        "from cmi_lightning.callbacks import ImageWriter\n"
        "reveal_type(PosteriorSampler)\n"
        "reveal_type(ImageWriter)\n"
    )
    options = {"mypy": ["--follow-imports=silent"], "pyright": ["--pythonpath", sys.executable]}
    found = subprocess.run(
        [sys.executable, "-m", checker, *options[checker], "mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Any" not in found.stdout
    assert "Unknown" not in found.stdout
    assert "ImageWriter" in found.stdout
