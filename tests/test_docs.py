"""The README and the site: their code and commands are run (on fewer images and steps), and built.

A block that cannot run here follows a comment <!-- not run: the reason -->.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import autoencoder, unet2d

import cmi_lightning.methods
from cmi_lightning import configs
from cmi_lightning.cli import main
from cmi_lightning.denoisers import UNet
from cmi_lightning.noise import SampleNoise

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (ROOT, DOCS, DOCS / "guides", DOCS / "results")
PAGES = {str(p.relative_to(ROOT)): p.read_text("utf-8") for f in FOLDERS for p in f.glob("*.md")}
SHORT = ["--data.limit=2", "--data.batch_size=2", "--model.num_steps=3", "--trainer.logger=false"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``reason`` says why it is not run, or is empty."""

    page: str
    reason: str
    language: str
    code: str


BLOCKS = [
    Block(page, *match)
    for page, text in PAGES.items()
    for match in re.findall(r"(?:<!-- not run: (.*?) -->\n)?```(\w+)\n(.*?)```", text, re.DOTALL)
]


def of(language: str) -> list[Block]:
    """The blocks of a language that are run."""
    return [block for block in BLOCKS if block.language == language and not block.reason]


def commands(blocks: list[Block]) -> list[list[str]]:
    """The blocks' command lines as arguments, every one once."""
    lines = [
        line for block in blocks for line in block.code.replace("\\\n", " ").splitlines() if line
    ]
    return [
        list(c) for c in dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in lines)
    ]


def arguments(command: list[str]) -> list[str]:
    """The arguments of cmi-lightning in a command, which may start with torchrun or srun."""
    start = [i for i, word in enumerate(command) if word in ("cmi-lightning", "cmi_lightning")]
    return command[start[0] + 1 :] if start else []


OURS = [a for a in map(arguments, commands(of("bash"))) if a]
MANY = [c for c in commands(of("bash")) if "mine.yaml" in c and "predict" in c]
RUN = [
    a for a in OURS if a[0] == "predict" and not {"mine.yaml", "--print_config", "--help"} & {*a}
]
EXAMPLES = {
    match[1]: block.code
    for block in of("yaml")
    if (match := re.match(r"# (\w+)\.yaml", block.code))
}
FILES = {
    match[1]: block.code
    for block in of("python")
    if (match := re.match(r"# (\w+\.py)\n", block.code))
}

# pages with code that is not a file of the user's
GUIDES = ("python", "mri", "operator", "coming", "trouble")
PYTHON = ["README.md", "docs/index.md", *(f"docs/guides/{name}.md" for name in GUIDES)]

MY_NETWORKS = '''
import torch
from torch import nn


def score(x, sigma):
    """The score of N(1/2, 1/16), images in [0, 1]."""
    return (0.5 - x) / (1 / 16 + sigma[:, None, None, None] ** 2)


def velocity(x, t):
    """E[ε − x₀ | x_t] of x₀ ~ N(0, 1/4)."""
    t = t[:, None, None, None]
    return (t - (1 - t) / 4) * x / ((1 - t) ** 2 / 4 + t**2)


def of_class(x, times, y):
    """ε of images of one grey each: the class."""
    assert set(y.tolist()) <= {3, 10}
    return x - (y[:, None, None, None] / 10 - 0.5)


class EDMPrecond(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x, sigma):
        sigma = sigma[:, None, None, None]
        return x / (1 + sigma**2) + self.net(x / (1 + sigma**2).sqrt())


class ScoreNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        assert 0 < float(t[0]) <= 1
        return -x + self.net(x)
'''


def images(folder: Path, size: tuple[int, ...]) -> None:
    """Write two images of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """The user's folder: what the pages take for granted."""
    home = tmp_path_factory.mktemp("home")
    for name, code in {"my_networks.py": MY_NETWORKS, **FILES}.items():
        (home / name).write_text(code, encoding="utf-8")
    for name, code in EXAMPLES.items():
        (home / f"{name}.yaml").write_text(code, encoding="utf-8")
    (home / "colour.yaml").write_text(EXAMPLES["callable"], encoding="utf-8")
    (home / "runs/table/thousand").mkdir(parents=True)
    (home / "runs/table/thousand/step_sizes.yaml").write_text("step_sizes: {}\n", encoding="utf-8")
    (home / "mine.yaml").write_text("model: {num_steps: 3}\n", encoding="utf-8")
    for name, size in {
        "photos": (70, 64, 3),
        "broken": (32, 32, 3),
        "blurred": (32, 32, 3),
        "noisy": (32, 32, 3),
        "small": (8, 8, 3),
        "masks": (32, 32),
    }.items():
        images(home / name, size)
    for i in range(2):
        mask = np.full((32, 32), 255, np.uint8)
        mask[8:20, 8 : 20 + i] = 0
        Image.fromarray(mask).save(home / f"masks/{i}.png")
    np.save(home / "kernel.npy", np.ones((3, 3)))
    scope: dict = {}
    exec(compile(MY_NETWORKS, "my_networks.py", "exec"), scope)
    save_file(scope["EDMPrecond"](16).state_dict(), home / "edm.safetensors")
    torch.save({"state_dict": scope["ScoreNet"]().state_dict()}, home / "score_net.pt")
    network = UNet(3, 64, (1, 2, 2), attention_levels=(2,), learn_variance=True)
    torch.save(network.state_dict(), home / "unet.pt")
    return home


@pytest.fixture
def home(house, monkeypatch):
    """The user is in this folder; nothing else is done to find the files there."""
    monkeypatch.chdir(house)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(house))])
    yield house
    for name in ("my_networks.py", *FILES):
        sys.modules.pop(name.removesuffix(".py"), None)


def run(words: list[str], out: Path) -> int:
    """Run a command on fewer images and steps."""
    return main([*words, *SHORT, f"--trainer.default_root_dir={out}"])


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_commands_restore(home, words, tmp_path):
    assert run(words, tmp_path) == 0
    assert (tmp_path / "grid.png").is_file()
    if "MeasurementFolderData" in words:
        assert (tmp_path / "restored/1.png").is_file()
        header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
        assert "psnr" not in header
        assert "residual" in header


@pytest.mark.parametrize(
    "words",  # test_verify.py, test_configs.py and test_fetch.py run the others
    [a for a in OURS if a not in RUN and a not in (["verify"], ["configs"]) and a[0] != "fetch"],
    ids=" ".join,
)
def test_commands_parse(home, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words if {"--print_config", "--help"} & {*words} else [*words, "--print_config"])
    assert ended.value.code in (0, None)
    if "bf16-mixed" in words:
        assert "bf16-mixed" in capsys.readouterr().out


def test_commands_for_many_devices(home, capsys):
    assert [c[0] for c in MANY] == ["cmi-lightning"] * 2 + ["torchrun", "srun"]
    for command in MANY:
        with pytest.raises(SystemExit) as ended:
            main([*arguments(command), "--print_config"])
        assert ended.value.code in (0, None)
        assert ("strategy: ddp" in capsys.readouterr().out) == ("ddp" in command)


def test_few_blocks_are_not_run():
    assert sum(bool(block.reason) for block in BLOCKS) == 6
    assert {block.language for block in BLOCKS} == {"bash", "python", "yaml"}
    assert {b.page for b in of("python") if b.code not in FILES.values()} == set(PYTHON)


def test_scripts_exist():
    for block in of("bash"):
        if "git checkout" not in block.code:
            for script in re.findall(r"python ((?:benchmarks|tests)/\S+)", block.code):
                assert (ROOT / script).is_file(), script


def test_there_is_an_example_of_every_source():
    sources = ["named", "unet", "callable", "flow", "classes", "latent", "diffusers"]
    assert list(EXAMPLES) == [*sources, "edm", "vp", "tiled"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_networks(home, name, tmp_path, capsys):
    if name == "diffusers" and not (home / "my_pipeline").exists():
        diffusers = pytest.importorskip("diffusers")
        pipeline = diffusers.DDPMPipeline(unet2d(sample_size=64), diffusers.DDPMScheduler())
        pipeline.save_pretrained("my_pipeline")
    if name == "latent" and not (home / "my_latents").exists():
        diffusers = pytest.importorskip("diffusers")
        network = unet2d(False, sample_size=32)
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        vqvae = autoencoder("VQModel", latent_channels=3)
        pipeline = diffusers.LDMPipeline(vqvae=vqvae, unet=network, scheduler=scheduler)
        pipeline.save_pretrained("my_latents")
    words = ["predict", "-c", f"{name}.yaml", "-c", "task/inpaint_box", "-c", "guidance/dps"]
    assert run(words, tmp_path) == 0, capsys.readouterr().err
    assert (tmp_path / "restored/1.png").is_file()


@pytest.mark.parametrize("page", PYTHON)
def test_python(home, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for library in ("deepinv", "diffusers") if page.endswith("coming.md") else ():
        pytest.importorskip(library)
    scope: dict = {}
    for block in of("python"):
        if block.page == page:
            code = re.sub(r"\blimit=\d+", "limit=2", block.code)
            code = re.sub(r"\bnum_steps=\d+", "num_steps=3", code)
            code = re.sub(r"\bsteps=50\b", "steps=2", code)
            code = re.sub(r"(\brestore\((?!.*steps=).*simulate=True)\)", r"\1, steps=2)", code)
            code = code.replace("L.Trainer(", 'L.Trainer(accelerator="cpu", ')
            exec(compile(code, page, "exec"), scope)
    for folder in re.findall(r'default_root_dir="(.*?)"', PAGES[page]):
        assert (tmp_path / folder / "metrics.csv").is_file()


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs(path):
    """They are run when the site is built; `test_the_site` runs them on small settings."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert sum("quick" in cell["metadata"] for cell in cells) == 1


def test_the_guidance_is_short():
    lines = [line for line in FILES["my_terms.py"].splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith("#")]) <= 15


def test_operator(shipped_images):
    scope: dict = {}
    exec(compile(FILES["my_operators.py"], "my_operators.py", "exec"), scope)
    x = shipped_images[:2].repeat(1, 3, 1, 1)
    A = scope["Luminance"]().bind((3, 32, 32), SampleNoise(0, ["a", "b"]), x)
    y = A(x)
    torch.testing.assert_close(A(A.pinv(y)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.adjoint(y), y.repeat(1, 3, 1, 1) / 3)


def test_nothing_is_left_to_fill_in():
    card = (ROOT / "cmi_lightning/assets/MODEL_CARD.md").read_text(encoding="utf-8")
    for text in (*PAGES.values(), card):
        assert not re.search(r"@\w+@|<!--(?! not run: )|TODO", text)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140


@pytest.mark.parametrize(
    ("page", "table"), [("photos.md", "photos-table.md"), ("garments.md", "table.md")]
)
def test_measured_numbers_are_those_of_the_results(page, table):
    """The README and the pages of results quote the tables of all cells."""
    quoted = [
        line
        for line in PAGES[f"docs/results/{page}"].splitlines()
        if line.startswith("| ") and line.count("±") == 5
    ]
    rows = [
        [part.strip() for part in line.split("|")[1:6]]
        for line in PAGES[f"docs/results/{table}"].splitlines()
        if line[:2] == "| "
    ]
    bases = [row for row in rows if row[1] in ("measurement A⁺y", "DPS", "ΠGDM", "MCG", "DSG")]
    assert len(bases) == 6 * 5
    for row in bases:
        assert any(f"| {row[0]} |" in line and row[2] in line for line in quoted), row
    if page == "photos.md":
        in_readme = [line for line in README.splitlines() if "±" in line and line[:2] == "| "]
        assert len(in_readme) == 6
        assert all(line in quoted for line in in_readme)


# The site


def test_the_gallery_has_every_task(monkeypatch):
    """Each page's code and command make the parts that they name."""
    pytest.importorskip("nbconvert", reason="the extra docs is not installed")
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    monkeypatch.syspath_prepend(str(DOCS))
    pages = importlib.import_module("hooks").gallery()
    tasks = [name.removeprefix("task/") for name in configs.summaries() if name[:5] == "task/"]
    assert list(pages) == [*tasks, "index"]
    given: list = []
    monkeypatch.setattr(cmi_lightning, "restore", lambda *args, **options: given.append(options))
    for task in tasks:
        assert 5e3 < (DOCS / f"gallery/{task}.jpg").stat().st_size < 5e4
        (words,) = re.findall(r"```bash\n(.*?)```", pages[task], re.DOTALL)
        words = shlex.split(words.replace("\\\n", " "))
        assert words[:4] == ["cmi-lightning", "predict", "-c", f"task/{task}"]
        for name in (words[3], words[5]):
            assert configs.find(name), name
        for code in re.findall(r"```python\n(.*?)```", pages[task], re.DOTALL):
            exec(compile(code, task, "exec"), {})
    assert len(given) == len(tasks) - 1  # `restore` has no photon noise
    assert {options["method"] for options in given} <= set(cmi_lightning.methods.methods())


def test_the_site(tmp_path):
    """A broken link or an unknown name stops the build; the pages are whole and fetch nothing."""
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    quick = {**os.environ, "QUICK": "1"}  # the notebooks are run
    built = subprocess.run(
        command, cwd=ROOT, env=quick, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    site = {str(p.relative_to(tmp_path)): p.read_text("utf-8") for p in tmp_path.rglob("*.html")}
    for page in PAGES:
        if page.startswith("docs/"):
            assert f"{page.removeprefix('docs/').removesuffix('.md')}.html" in site
    for page, html in site.items():
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), (page, tag)
        assert "unpkg.com" not in html, page
    for path in TUTORIALS:
        page = site[f"tutorials/{path.stem}.html"]
        assert page.count("Download this notebook") == 1
        pictures = re.findall(r'<img alt="[^"]*" src="([^"]+)"', page)
        assert any(
            src.startswith("data:") or (tmp_path / "tutorials" / src).is_file() for src in pictures
        )
    assert site["method.html"].count("<math") == PAGES["docs/method.md"].count("$$") // 2
    reference = "".join(html for page, html in site.items() if page.startswith("reference/"))
    shown = set(re.findall(r'id="(cmi_lightning[^"]*)"', reference))
    folders = [p.parent for p in (ROOT / "cmi_lightning").glob("*/__init__.py")]
    for package in ("cmi_lightning", *sorted(f"cmi_lightning.{f.name}" for f in folders)):
        names = getattr(importlib.import_module(package), "__all__", [])
        missing = [n for n in names if n != "__version__" and f"{package}.{n}" not in shown]
        assert not missing, f"{package}: {missing}"
