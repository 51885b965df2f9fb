"""``cmi-lightning lle``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from torch import Tensor

from cmi_lightning.checked import check_value
from cmi_lightning.errors import InputError, counted
from cmi_lightning.files import write
from cmi_lightning.guidance import LLE, LLETraining
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.predict.module import PosteriorSampler
from cmi_lightning.predict.options import prediction_cli
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM

OVERLAY = """\
# LLE's coefficients for {steps} steps of {method}: cmi-lightning predict … -c {name}
# Mean squared error on {images} images of the prior: {before:.4g} without, {after:.4g} with them.
"""


def lle(args: list[str]) -> int:
    """Train LLE's coefficients for a method, a task and a number of steps, on the prior's images.

    It takes predict's options, with --model.num_steps small (3 to 15), and --output (lle.yaml),
    --images (50) and --prior_steps (100), which draw the training images. The result is an overlay:
    cmi-lightning predict with the same options and -c lle.yaml.
    """
    if {"-h", "--help"} & set(args):
        print(lle.__doc__)
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output", type=Path, default=Path("lle.yaml"))
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--prior_steps", type=int, default=100)
    try:
        own, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}.") from error
    check_value("--images", own.images, int, "[1, inf)")
    check_value("--prior_steps", own.prior_steps, int, "[1, inf)")
    cli = prediction_cli(rest)
    cli.datamodule.setup("predict")
    model: PosteriorSampler = cli.model.to("cuda" if torch.cuda.is_available() else "cpu")
    found, before, after = train(model, cli.datamodule.image_shape, own.images, own.prior_steps)
    head = OVERLAY.format(
        steps=len(found.seen),
        method=model.describe()["guidances"],
        name=own.output,
        images=own.images,
        before=before,
        after=after,
    )
    options = {"seen": found.seen, "unseen": found.unseen}
    entry = {"class_path": "cmi_lightning.guidance.LLE", "init_args": options}
    body = yaml.safe_dump({"model": {"guidances+": [entry]}}, default_flow_style=None)
    write(own.output, (head + body).encode())
    print(
        f"{own.output}: mean squared error {before:.4g} → {after:.4g} on "
        f"{counted(own.images, 'image')}"
    )
    return 0


@torch.no_grad()
def train(
    model: PosteriorSampler, shape: tuple[int, ...], images: int, prior_steps: int
) -> tuple[LLE, float, float]:
    """Return the coefficients, and the training images' mean squared error without and with them.

    Those images (C, H, W) are drawn from the prior by ``prior_steps`` of DDPM.
    """
    noise = SampleNoise(model.seed, [f"lle/{k}" for k in range(images)])
    like = torch.zeros(images, *shape, device=model.device)
    nothing = Problem(like, Identity(), 1.0)
    truth = Sampler(model.denoiser, DDPM(), (), prior_steps).run(nothing, noise, like)
    truth = truth.clamp(-1, 1)
    problem = Problem.simulate(truth, model.operator, model.measurement_noise, noise)
    training = LLETraining(truth)

    def error(guidances: list) -> float:
        sampler = Sampler(model.denoiser, model.solver, guidances, model.num_steps, model.clamp)
        restored: Tensor = sampler.run(problem, noise, like)
        return float((restored - truth).square().mean())

    given = model.guidances or []
    before, after = error(given), error([*given, training])
    return training.coefficients(), before, after
