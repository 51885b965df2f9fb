"""The package as it is built and installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set(find_packages(str(ROOT), include=["cmi_lightning*"]))
    assert listed == found | {"cmi_lightning.callbacks", "cmi_lightning.configs"}


@pytest.mark.slow
def test_wheel_and_sdist_work_from_elsewhere(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "-o", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.stat().st_size < 20e6
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "cmi_lightning/callbacks/__init__.py",
        "cmi_lightning/configs/demo.yaml",
        "cmi_lightning/configs/guidance/dps.yaml",
        "cmi_lightning/assets/fashion_mnist_prior.safetensors",
        "cmi_lightning/assets/fashion_mnist_test/00063.png",
        "cmi_lightning/assets/fashion_mnist_table/00319.png",
        "cmi_lightning/assets/fashion_mnist_validation/58976.png",
        "cmi_lightning/assets/fashion_mnist_classifier.safetensors",
        "cmi_lightning/table/templates/report.html.j2",
        "cmi_lightning/py.typed",
    } <= set(names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import cmi_lightning, cmi_lightning.callbacks as c, cmi_lightning.cli as cli; "
        "print(cmi_lightning.__file__, c.__file__, 'demo' in cli.shipped_configs())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.count(str(tmp_path / "site")) == 2
    assert printed.strip().endswith("True")
