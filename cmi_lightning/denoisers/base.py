"""What a prior must provide: x̂₀(x_t), differentiable as often as the guidance asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level, Schedule

if TYPE_CHECKING:
    from cmi_lightning.problem import Problem


class Prediction(NamedTuple):
    """A denoiser's answer to x_t.

    Attributes:
        x0: x̂₀ = E[x₀ | x_t], (B, *), in the dtype of x_t.
        variance_fraction: where between the smallest (0) and the largest (1) posterior variance a
            network with learned variance puts each pixel, (B, *); None for other networks.
    """

    x0: Tensor
    variance_fraction: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """Return the prediction with ``function`` applied to its tensors.

        >>> Prediction(torch.ones(2, 1)).map(torch.neg).x0.tolist()
        [[-1.0], [-1.0]]
        """
        fraction = self.variance_fraction
        return Prediction(function(self.x0), None if fraction is None else function(fraction))


class Denoiser(nn.Module, ABC):
    """A prior p(x₀), given by its posterior mean at every noise level.

    A subclass sets the attributes, of which only ``schedule`` has no default. A denoiser around
    another one is a :class:`Wrapper`.

    >>> class Normal(Denoiser):  # x₀ ~ N(0, I): x̂₀ = α x_t / (α² + σ²)
    ...     schedule = Schedule.linear()
    ...     def forward(self, x, level):
    ...         return Prediction(level.alpha * x / (level.alpha**2 + level.sigma**2))
    >>> Normal()(torch.ones(1, 3, 8, 8), Level(0.6, 0.8, 500.0)).x0.unique()
    tensor([0.6000])

    Attributes:
        schedule: the noise levels that the denoiser knows.
        image_shape: (C, H, W) of its images, with None where any size will do.
        value_range: smallest and largest value of a clean image, or None when unbounded. Solvers
            clamp x̂₀ to it; derivatives are always taken of the unclamped x̂₀.
        learns_variance: predictions carry a variance fraction.
        derivatives: how often x̂₀ can be differentiated.
        size_multiple: both sides of an image must be multiples of this.
        latent: x_t is of latents; see :class:`cmi_lightning.denoisers.LatentPrior`.
        trained_side: side of the images it was trained on, in pixels; images of more than twice it
            are seen in windows of it. None if it makes no difference.
    """

    schedule: Schedule
    image_shape: tuple[int | None, ...] | None = None
    value_range: tuple[float, float] | None = None
    learns_variance: bool = False
    derivatives: int = 2
    size_multiple: int = 1
    latent: bool = False
    trained_side: int | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The attributes by name."""
        return {name: getattr(self, name) for name in Denoiser.__annotations__}

    @abstractmethod
    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return x̂₀ of x_t (B, *) = α x₀ + σ ε at ``level``."""

    def state(self, problem: Problem, like: Tensor) -> tuple[Problem, Tensor]:
        """Return the problem, and a tensor like images, as the chain sees them."""
        return problem, like

    def image(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W) that states x of the chain stand for."""
        return x

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of ``shape`` (C, H, W) that the spec excludes.

        Raises:
            InputError: for other channels or sizes, with the remedy.
        """
        wanted, multiple, given = self.image_shape, self.size_multiple, size_text(shape)
        if wanted and any(w not in (None, n) for w, n in zip(wanted, shape, strict=True)):
            latent = ""
            if wanted[0] in (4, 16) and shape[0] in (1, 3):
                latent = f" ({wanted[0]} channels are usually latents, not pixels)"
            raise InputError(
                f"The images are {given} (channels×height×width) and the network takes "
                f"{size_text(wanted)}{latent}; set data.channels or data.size, or use another "
                "network."
            )
        if any(n % multiple for n in shape[1:]):
            fit = size_text(tuple(n - n % multiple or multiple for n in shape[1:]))
            raise InputError(
                f"The images are {given} (channels×height×width) and the network needs sides that "
                f"are multiples of {multiple}; crop or enlarge them to {fit}, or set data.size for "
                "images that are measured here."
            )

    def rehearse(self, shape: tuple[int, ...]) -> None:
        """Refuse what :meth:`check` refuses, and what fails when it is tried on one image."""
        self.check(shape)


class Wrapper(Denoiser):
    """Another denoiser with a change around it: its attributes too, but for what a subclass sets.

    Attributes:
        of_latents: it suits priors of latents, too.

    Args:
        denoiser: the other one.

    Raises:
        InputError: for a prior of latents inside a wrapper that acts on pixels.
    """

    of_latents = False

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        if denoiser.latent and not self.of_latents:
            name = type(self).__name__
            raise InputError(
                f"{name} acts on pixels, and the prior's chain runs on latents: put it inside, "
                f"LatentPrior({name}(denoiser), decoder), or leave it out."
            )
        self.denoiser = denoiser
        for name, value in denoiser.spec.items():
            setattr(self, name, value)

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the other denoiser sees of images of ``shape`` (C, H, W)."""
        return shape

    def state(self, problem: Problem, like: Tensor) -> tuple[Problem, Tensor]:
        return self.denoiser.state(problem, like)

    def image(self, x: Tensor) -> Tensor:
        return self.denoiser.image(x)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        self.denoiser.check(self.inner(shape))

    def rehearse(self, shape: tuple[int, ...]) -> None:
        self.check(shape)
        self.denoiser.rehearse(self.inner(shape))


def size_text(shape: tuple[int | None, ...]) -> str:
    """Return "3×256×any" of (3, 256, None)."""
    return "×".join("any" if n is None else str(n) for n in shape)


class Autocast(Wrapper):
    """Another denoiser, its network run in low precision; x̂₀ comes back in the dtype of x_t.

    Args:
        denoiser: the denoiser to run.
        dtype: what autocast lowers to.

    >>> from cmi_lightning.denoisers import shipped_prior
    >>> prior = Autocast(shipped_prior("fashion-mnist"), torch.bfloat16)
    >>> prior(torch.zeros(1, 1, 32, 32), prior.schedule[500]).x0.dtype
    torch.float32
    """

    of_latents = True

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        super().__init__(denoiser)
        self.dtype = dtype

    def forward(self, x: Tensor, level: Level) -> Prediction:
        with torch.autocast(x.device.type, dtype=self.dtype):
            prediction = self.denoiser(x, level)
        return prediction.map(lambda part: part.to(x.dtype))
