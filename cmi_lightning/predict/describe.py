"""What will be run, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmi_lightning.denoisers.base import size_text
from cmi_lightning.denoisers.tiled import Tiled, suited
from cmi_lightning.measurement_noise import GaussianNoise
from cmi_lightning.operators import LinearOperator

if TYPE_CHECKING:
    from cmi_lightning.predict.module import PosteriorSampler

DRAWS = "none: the images are draws from the prior"


def described(module: PosteriorSampler) -> dict[str, str]:
    """Return what will be run, for people."""
    noise, shape = short_name(module.measurement_noise), module.denoiser.image_shape
    if isinstance(module.measurement_noise, GaussianNoise):
        std = module.measurement_noise.level
        noise = f"σ = {std:g} on [−1, 1] = {std / 2:g} on [0, 1]"
    size, sampler = size_text(shape) if shape else "any", module.sampler()
    seen = [suited(module.denoiser, shape) for shape in module.shapes] or [module.denoiser]
    if windows := dict.fromkeys(size_text(d.window) for d in seen if isinstance(d, Tiled)):
        some = "" if all(isinstance(d, Tiled) for d in seen) else "some "
        size += f", {some}in windows of {' or '.join(windows)}"
    if module.compiled:
        size += "; the first batch of each size waits for the compiler"
    datamodule = getattr(module._trainer, "datamodule", None)
    given = getattr(datamodule, "given", None)
    parts, linear = [given] if given else [], not module.denoiser.latent
    if not given or getattr(datamodule, "takes_operator", False):
        parts.append(short_name(module.operator))
        linear = linear and isinstance(module.operator, LinearOperator)
    walks = f", in each of {k} walks" if (k := module.solver.repeats) > 1 else ""
    return {
        "prior": f"{short_name(module.denoiser)}, images {size}",
        "operator": ", ".join(parts),
        "noise": getattr(datamodule, "given_noise", None) or noise,
        "solver": short_name(module.solver),
        "guidances": ", ".join(map(short_name, module.guidances or ()))
        or ("none" if module.solver.conditional else DRAWS),
        **{
            type(g).__name__: f"acts {plan}{walks}"
            for g in sampler.guidances
            if (plan := g.plan(linear))
        },
        "steps": str(len(sampler.schedule)),
        "seed": str(module.seed),
        **({"samples per image": str(k)} if (k := module.samples_per_image) > 1 else {}),
    }


def short_name(part: object) -> str:
    """Return a short description: dataclasses print their options, others their class."""
    return repr(part) if hasattr(part, "__dataclass_fields__") else type(part).__name__
