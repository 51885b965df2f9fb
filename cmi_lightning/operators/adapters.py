"""Forward models that others wrote: plain functions, and deepinv's physics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.linalg import dot, norm
from cmi_lightning.measurement_noise import (
    GaussianNoise,
    MeasurementNoise,
    PoissonGaussianNoise,
    PoissonNoise,
)
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator, Operator

if TYPE_CHECKING:
    from deepinv.physics import Physics

Function = Callable[[Tensor], Tensor]
TOLERANCE = 1e-3  # relative mismatch of ⟨Ax, y⟩ and ⟨x, Aᵀy⟩, and of A(2x) and 2 A(x)


class FunctionOperator(Operator):
    """A differentiable function as a forward model; see :func:`from_functions`."""

    def __init__(self, A: Function) -> None:
        self.A = A

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)


class LinearFunctions(LinearOperator):
    """Linear functions as a forward model; see :func:`from_functions`."""

    def __init__(self, A: Function, At: Function | None, pinv: Function | None) -> None:
        self.A, self.At, self.A_pinv = A, At, pinv

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        """Check that A is linear and that Aᵀ is its adjoint."""
        bound = super().bind(image_shape, noise, like)
        check_adjoint(bound, like.new_empty(len(noise.ids), *image_shape), noise)
        assert isinstance(bound, type(self))
        return bound

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return super().adjoint(y) if self.At is None else self.At(y)

    def pinv(self, y: Tensor) -> Tensor:
        return super().pinv(y) if self.A_pinv is None else self.A_pinv(y)


def from_functions(
    A: Function,
    At: Function | None = None,
    pinv: Function | None = None,
    linear: bool = True,
) -> Operator:
    """Return an operator of functions of batches: A, its adjoint Aᵀ and pseudo-inverse A⁺.

    What is not given follows by automatic differentiation and conjugate gradients. Where the
    operator meets images, A(2x) = 2 A(x) and ⟨Ax, y⟩ = ⟨x, Aᵀy⟩ are checked on random numbers.

    >>> A = from_functions(lambda x: 2 * x, lambda y: 2 * y)
    >>> A.adjoint(torch.ones(1, 2))
    tensor([[2., 2.]])

    Args:
        A: (B, C, H, W) → (B, *m).
        At: (B, *m) → (B, C, H, W).
        pinv: (B, *m) → (B, C, H, W).
        linear: False for a function that is not; it must be differentiable.

    Raises:
        InputError: for an adjoint or pseudo-inverse of what is not linear; when it meets images,
            if A is not linear or Aᵀ not its adjoint, with the measured mismatch.
    """
    if linear:
        return LinearFunctions(A, At, pinv)
    if At is not None or pinv is not None:
        raise InputError(
            "from_functions: what is not linear has no At or pinv; leave them out, or set linear."
        )
    return FunctionOperator(A)


def check_adjoint(operator: LinearOperator, like: Tensor, noise: SampleNoise) -> None:
    """Compare A(2x) with 2 A(x) and ⟨Ax, y⟩ with ⟨x, Aᵀy⟩ on random numbers.

    Raises:
        InputError: with the measured mismatch, for the worst image of the batch.
    """
    name = type(operator).__name__
    x = noise.normal("adjoint/x", 0, like)
    with torch.no_grad():
        z = operator(x)
        y = noise.normal("adjoint/y", 0, z)
        tiny = torch.finfo(z.dtype).tiny
        apart = norm(operator(2 * x) - 2 * z) / norm(z).clamp_min(tiny)
        if float(apart.max()) > TOLERANCE:
            raise InputError(
                f"{name}: A is not linear, A(2x) and 2 A(x) differ by {float(apart.max()):.2g} of "
                "A(x); derive it from Operator, or set linear=False."
            )
        left, right = dot(z, y), dot(x, operator.adjoint(y))
        scale = (norm(z) * norm(y)).clamp_min(tiny)
        gap = (left - right).abs() / scale
    if float(gap.max()) > TOLERANCE:
        worst = int(gap.argmax())
        raise InputError(
            f"{name}: Aᵀ is not the adjoint of A. For random x and y, ⟨Ax, y⟩ = "
            f"{float(left[worst]):.4g} and ⟨x, Aᵀy⟩ = {float(right[worst]):.4g}, apart by "
            f"{float(gap[worst]):.2g} of ‖Ax‖‖y‖; mend Aᵀ, or have it derived "
            "(from_functions without At, from_deepinv with adjoint='autograd')."
        )


class DeepinvBase(Operator):
    """What linear and other physics of deepinv share: how their tensors become ours."""

    real = False  # a gray image is the first of two channels, the other is 0
    cast = False  # a real image becomes a complex tensor

    def __init__(self, physics: Physics, adjoint: str = "deepinv") -> None:
        self.physics, self.derived = physics, adjoint == "autograd"
        self.parts: list[tuple[torch.Size, bool]] = []

    @property
    def noise(self) -> MeasurementNoise | None:
        """The physics' noise model as ours, on images in [−1, 1]; None for kinds we lack."""
        return noise_of(self.physics)

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        """Copy the physics to the images' device, and look at what it measures."""
        bound = copy.copy(self)
        bound.image_shape = tuple(image_shape)
        bound.physics = copy.deepcopy(self.physics)
        tensors = [*bound.physics.buffers(), *bound.physics.parameters()]
        lossy = any(t.is_complex() for t in tensors)
        bound.physics.to(like.device, None if lossy else like.dtype)
        bound.real = image_shape[0] == 1 and _is_mri(self.physics)
        zeros = like.new_zeros(len(noise.ids), *image_shape)
        refused: list[Exception] = []
        for bound.cast in (False, True):
            try:
                with torch.no_grad():
                    y = bound.physics.A(bound.to_theirs(zeros))
                break
            except (RuntimeError, ValueError, AssertionError) as error:
                refused.append(error)
        else:
            raise InputError(
                f"deepinv's {type(self.physics).__name__} does not take images {image_shape} "
                f"({str(refused[0]).splitlines()[0]}); resize the images, or make it for this size."
            ) from refused[0]
        bound.parts = [(t.shape[1:], t.is_complex()) for t in _listed(y)]
        if isinstance(bound, LinearOperator):
            check_adjoint(bound, zeros, noise)
        return bound

    def to_theirs(self, x: Tensor) -> Tensor:
        """Return an image as the physics takes it: a real one with an imaginary part of 0."""
        x = torch.complex(x, torch.zeros_like(x)) if self.cast else x
        return torch.cat([x, torch.zeros_like(x)], 1) if self.real else x

    def to_ours(self, y: Any) -> Tensor:
        """Return a measurement as one real tensor: complex numbers as pairs, lists end to end."""
        real = [torch.view_as_real(t) if t.is_complex() else t for t in _listed(y)]
        return real[0] if len(real) == 1 else torch.cat([t.flatten(1) for t in real], 1)

    def measured(self, y: Tensor) -> Any:
        """Return our measurement as the physics has it."""
        sizes = [shape.numel() * (2 if pair else 1) for shape, pair in self.parts]
        found = []
        for part, (shape, pair) in zip(y.flatten(1).split(sizes, 1), self.parts, strict=True):
            t = part.reshape(len(y), *shape, *([2] if pair else []))
            found.append(torch.view_as_complex(t.contiguous()) if pair else t)
        if len(found) == 1:
            return found[0]
        from deepinv.utils import TensorList

        return TensorList(found)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_ours(self.physics.A(self.to_theirs(x)))

    def signed(self, y: Tensor) -> Tensor:
        """Return 2 y − A(1), the measurement of (2u − 1) where y is that of an image u in [0, 1].

        Its noise is twice as much: give σ with the range "unit".
        """
        return 2 * y - self.forward(y.new_ones(len(y), *self.image_shape))


class DeepinvOperator(DeepinvBase):
    """A physics of deepinv that is not linear; see :func:`from_deepinv`."""


class LinearDeepinvOperator(DeepinvBase, LinearOperator):
    """A linear physics of deepinv; see :func:`from_deepinv`."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Return deepinv's ``A_adjoint`` of y, or the derivative's."""
        if self.derived:
            return super().adjoint(y)
        return self._image(self.physics.A_adjoint(self.measured(y)))

    def pinv(self, y: Tensor) -> Tensor:
        """Return deepinv's ``A_dagger`` of y."""
        if self.real or self.derived:  # its A⁺ has an imaginary part, which a real image has not
            return super().pinv(y)
        with torch.no_grad():
            return self._image(self.physics.A_dagger(self.measured(y)))

    def _image(self, x: Tensor) -> Tensor:
        x = x.real if x.is_complex() else x
        return x[:, :1] if self.real else x


def from_deepinv(
    physics: Physics, adjoint: Literal["deepinv", "autograd"] = "deepinv"
) -> DeepinvOperator | LinearDeepinvOperator:
    """Return a physics of deepinv as an operator on images in our range, [−1, 1].

    The adjoint and A⁺ are deepinv's; ``operator.noise`` is its noise model. Complex measurements
    become pairs of real numbers, lists of them one vector, and a gray image meets an MRI as the
    real part of a complex one; give an image of two channels for a complex one.

    ``from_deepinv(physics)`` measures x in [−1, 1]. Where y was measured of images in [0, 1], bind
    the operator and take ``operator.signed(y)``.

    Args:
        physics: any ``deepinv.physics.Physics``; a ``LinearPhysics`` makes a linear operator.
        adjoint: whose Aᵀ and A⁺ to take. "autograd" derives them from A, for physics whose own
            adjoint is none, such as ``CompressiveSpectralImaging`` of deepinv 0.5.0.

    Raises:
        InputError: when it meets images, if they do not suit the physics, or its adjoint is none.

    Source: Tachella et al. (2025), "DeepInverse".
    """
    from deepinv.physics import LinearPhysics

    if adjoint not in (ways := ("deepinv", "autograd")):
        raise InputError(f"from_deepinv: adjoint must be {' or '.join(ways)}, got {adjoint!r}.")
    kind = LinearDeepinvOperator if isinstance(physics, LinearPhysics) else DeepinvOperator
    return kind(physics, adjoint)


def noise_of(physics: Physics) -> MeasurementNoise | None:
    """Return a physics' noise model as ours: its levels are numbers on its own images' range.

    >>> from deepinv.physics import Denoising, GaussianNoise as Theirs  # doctest: +SKIP
    >>> noise_of(Denoising(Theirs(0.1)))  # doctest: +SKIP
    GaussianNoise(sigma=0.1, range='signed')
    """
    model = physics.noise_model
    name = type(model).__name__
    values = {n: getattr(model, n, None) for n in ("sigma", "gain")}
    numbers = {
        n: float(v) for n, v in values.items() if v is not None and torch.as_tensor(v).numel() == 1
    }
    if name == "ZeroNoise":
        return GaussianNoise(0.0)
    if name == "GaussianNoise" and "sigma" in numbers:
        return GaussianNoise(numbers["sigma"])
    if name == "PoissonNoise" and "gain" in numbers:
        return PoissonNoise(1 / numbers["gain"])
    if name == "PoissonGaussianNoise" and len(numbers) == 2:
        return PoissonGaussianNoise(1 / numbers["gain"], numbers["sigma"], "unit")
    return None


def _listed(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def _is_mri(physics: Any) -> bool:
    """Whether the physics takes real and imaginary parts as two channels."""
    return any(kind.__name__ == "MRIMixin" for kind in type(physics).__mro__)
