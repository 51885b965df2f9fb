"""The packaged configurations; the paper's: what they say, and that they run on its network."""

import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from cmi_lightning import configs
from cmi_lightning.cli import main
from cmi_lightning.denoisers import card_unet
from cmi_lightning.predict.options import prediction_cli, resolved

GUIDANCES = ["dps", "pigdm", "mcg", "dsg"]
WEIGHTS = {"ffhq": "ffhq_10m.pt", "imagenet": "256x256_diffusion_uncond.pt"}
OPERATORS = {
    "inpaint_random": ("RandomMask", {"fraction": 0.9}),
    "inpaint_box": ("BoxMask", {"size": 128, "margin": 16}),
    "gaussian_blur": ("GaussianBlur", {"kernel_size": 61, "sd": 5.0}),
    "motion_blur": ("MotionBlur", {"kernel_size": 61, "intensity": 0.5}),
    "sr4": ("Downsample", {"factor": 4}),
    "sr16": ("Downsample", {"factor": 16}),
    "denoise": ("Identity", {}),
}
TASKS = list(OPERATORS)


def arguments(prior: str, task: str, guidance: str, cmi: bool) -> list[str]:
    names = [f"prior/{prior}", f"paper/{task}", f"guidance/{guidance}", *["add_cmi"] * cmi]
    return resolved([word for name in names for word in ("-c", name)])


# What one file for each prior and task said before prior/ and paper.yaml: {"ffhq/sr4": options}.
FORMER = json.loads((Path(__file__).parent / "paper_options.json").read_text())


def test_every_configuration_says_what_it_is():
    lines = configs.summaries()
    assert all(len(line) > 10 for line in lines.values())
    assert all(len(line) <= 100 for line in lines.values())
    assert {"demo", "add_cmi", "guidance/dps", "task/denoise", "paper/sr4"} <= set(lines)
    files = list(configs.FOLDER.rglob("*.yaml"))
    assert len(files) <= 30
    assert len({path.read_text(encoding="utf-8") for path in files}) == len(files)


def test_names_are_found_in_every_spelling():
    assert configs.find("demo") == configs.find("demo.yaml") == str(configs.FOLDER / "demo.yaml")
    section = configs.find("guidance/dps")
    assert section == configs.find("configs/guidance/dps.yaml")
    assert "cmi_lightning.guidance.DPS" in section
    assert configs.find("guidance") is configs.find("guidance/dpss") is None


def test_configurations_are_listed(capsys):
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(configs.summaries())
    assert any("  Deterministic; two network evaluations" in line for line in printed)


@pytest.fixture(scope="module")
def parser():
    """The parser of ``cmi-lightning predict``; it reads configurations and makes nothing."""
    with mock.patch.object(LightningCLI, "instantiate_classes"):
        return prediction_cli([]).parser


@pytest.mark.parametrize("prior", ["ffhq", "imagenet"])
def test_every_combination_parses(parser, prior):
    for i, (task, guidance) in enumerate(itertools.product(TASKS, GUIDANCES)):
        if prior == "imagenet" and i % 4 != i // 4 % 4:  # whose guidances are those of FFHQ
            continue
        cmi = (i + i // len(GUIDANCES)) % 2 == 0  # with half of the guidances of every task
        config = parser.parse_args(arguments(prior, task, guidance, cmi))
        model, data = config.model, config.data.init_args
        assert model.denoiser.class_path == f"cmi_lightning.denoisers.{prior}"
        assert model.denoiser.init_args.weights == WEIGHTS[prior]
        name, options = OPERATORS[task]
        assert model.operator.class_path == f"cmi_lightning.operators.{name}"
        found = vars(model.operator.get("init_args", {})) if options else {}
        assert options.items() <= found.items()
        assert model.solver.init_args.variance == "learned"
        noise = model.noise.init_args
        assert (model.num_steps, noise.sigma, noise.range) == (1000, 0.05, "signed")
        assert (data.size, data.channels, data.limit) == (256, 3, 1000)
        assert config.trainer.logger.init_args.save_dir == f"runs/{prior}/{task}"
        classes = [g.class_path.rpartition(".")[2].lower() for g in model.guidances]
        assert classes == [guidance, *(["cmi"] if cmi else [])]
        # the step size is the task's own, although the guidance comes from a general file
        sizes = FORMER[f"{prior}/{task}"]["step_sizes"]
        options = vars(model.guidances[0].init_args)
        assert options["rate" if guidance == "dsg" else "scale"] == sizes[guidance]
        if guidance == "dsg":
            assert options["interval"] == sizes["dsg_interval"]


@pytest.mark.parametrize("former", FORMER)
def test_overlays_say_what_one_file_said(parser, former):
    new = arguments(*former.split("/"), "dsg", True)
    old = ["-c", json.dumps(FORMER[former]), *new[4:]]
    new, old = (vars(parser.parse_args(args)) for args in (new, old))
    assert new | {"config": None} == old | {"config": None}


def test_step_sizes_are_the_tasks_and_options_override_them(parser):
    def scale(task: str, *options: str) -> float:
        config = parser.parse_args([*arguments("ffhq", task, "dps", False), *options])
        return config.model.guidances[0].init_args.scale

    assert (scale("inpaint_box"), scale("sr4")) == (0.5, 0.3)
    assert scale("sr4", "--step_sizes.dps=0.7") == 0.7
    assert scale("sr4", "--model.guidances.init_args.scale=0.8") == 0.8


@pytest.mark.parametrize("name", ["ffhq", "imagenet"])
def test_missing_weights_and_images_are_named(name, capsys, tmp_path):
    args = ["predict", "-c", f"prior/{name}", "-c", "paper/sr4", "-c", "guidance/dps"]
    root = f"--trainer.default_root_dir={tmp_path / 'out'}"
    # on the meta device: the network is made before its weights are looked for, and it is large
    with torch.device("meta"):
        assert main([*args, root]) == 2
    assert WEIGHTS[name] in capsys.readouterr().err


# On FFHQ's architecture, with random weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random checkpoint whose every layer contributes."""
    torch.manual_seed(0)
    network = card_unet("ffhq-256")
    for p in network.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.1 * p[0].numel() ** -0.5)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with one photograph, 512×512."""
    from PIL import Image
    from skimage.data import astronaut

    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(astronaut()).save(folder / "astronaut.png")
    return folder


CMI_IN_TWO_STEPS = [
    "--model.guidances.init_args.min_signal=0",  # so that it acts in the first of the two
    "--model.guidances.init_args.estimator=Lanczos",
    "--model.guidances.init_args.estimator.init_args.krylov=1",  # for time
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("cmi", [False, True])
def test_every_combination_restores(weights, photographs, task, guidance, cmi):
    args = [
        *arguments("ffhq", task, guidance, cmi),
        f"--model.denoiser.init_args.weights={weights}",
        f"--data.folder={photographs}",
        "--model.num_steps=2",
        *(CMI_IN_TWO_STEPS if cmi else []),
        "--step_sizes.dsg_interval=1",
    ]
    cli = prediction_cli(args)
    cli.datamodule.setup("predict")
    (batch,) = cli.datamodule.predict_dataloader()
    result = cli.model.predict_step(batch)
    assert result["restored"].shape == (1, 3, 256, 256)
    assert result["restored"].isfinite().all()
    assert float(result["restored"].std()) > 0.01
    record = result["details"].record
    assert record.forwards >= 2
    assert record.vjps >= (4 if cmi else 1)  # the guidances did act


@pytest.mark.slow
def test_a_photograph_from_the_command_line(weights, photographs, tmp_path):
    command = [
        *[sys.executable, "-m", "cmi_lightning", "predict"],
        *["-c", "prior/ffhq", "-c", "paper/sr4", "-c", "guidance/dps", "-c", "add_cmi"],
        f"--model.denoiser.init_args.weights={weights}",
        f"--data.folder={photographs}",
        "--model.num_steps=2",
        "--model.guidances.init_args.min_signal=0",
        f"--trainer.default_root_dir={tmp_path / 'out'}",
    ]
    subprocess.run(command, check=True)
    assert (tmp_path / "out/restored/astronaut.png").is_file()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 12 * 2**20  # in KiB
