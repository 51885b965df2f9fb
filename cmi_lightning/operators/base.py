"""The contract of a linear operator A, with generic, slower defaults beside the forward map."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.linalg import conjugate_gradient, per_sample
from cmi_lightning.noise import SampleNoise


class LinearOperator(ABC):
    """A in y = A x₀ + n: images (B, C, H, W) to measurements (B, *m), every sample on its own.

    A measurement holds measured entries only: the y of a mask is the list of kept pixels. A new
    operator needs :meth:`forward` alone; the adjoint then comes from automatic differentiation, and
    the pseudo-inverse and the solve from conjugate gradients. Closed forms override them.

    >>> class Grey(LinearOperator):
    ...     def forward(self, x):
    ...         return x.mean(1)
    >>> from cmi_lightning import Problem
    >>> problem = Problem.simulate(torch.ones(2, 3, 4, 4), Grey(), 0.0, SampleNoise(0, ["a", "b"]))
    >>> problem.operator.pinv(problem.y).shape
    torch.Size([2, 3, 4, 4])

    Attributes:
        image_shape: shape of one image, (C, H, W); set where the operator meets images.
        cg_iterations: the most conjugate-gradient iterations of the defaults.
        cg_tolerance: relative residual at which they stop, per sample.
    """

    image_shape: tuple[int, ...]
    cg_iterations: int = 100
    cg_tolerance: float = 1e-6

    def bind(
        self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        """Return this operator made concrete for a batch: a hook that ``Problem.simulate`` calls.

        Args:
            image_shape: shape of one image, (C, H, W).
            noise: the batch's own random numbers, for masks and kernels.
            like: a tensor whose dtype and device the operator's tensors take.

        Raises:
            InputError: if the operator cannot act on such images.
        """
        bound = copy.copy(self)
        object.__setattr__(bound, "image_shape", image_shape)  # it may be a frozen dataclass
        return bound

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return A x, (B, C, H, W) → (B, *m)."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Return Aᵀ y, (B, *m) → (B, C, H, W)."""
        keep_graph = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            x = y.new_zeros(y.shape[0], *self.image_shape, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, y, create_graph=keep_graph)[0]

    def zero_padding(self, y: Tensor) -> Tensor:
        """Return y (B, *m) with zeros where a batch's common shape holds no measurement."""
        return y

    def sample_noise(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Return independent random numbers, one per measurement, shaped like y (B, *m).

        Args:
            draw: fills a tensor like the one given; a sample's numbers must not depend on the
                shape that its batch happens to have.
            y: measurements (B, *m).
        """
        return draw(y)

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (A Aᵀ + diag(shift))⁻¹ y.

        Args:
            y: right-hand side (B, *m).
            shift: ≥ 0; a number, one per sample (B,), or one per measurement, broadcastable to y.
        """
        added = per_sample(shift, y)

        def matvec(v: Tensor) -> Tensor:
            return self.forward(self.adjoint(v)) + added * v

        return conjugate_gradient(matvec, y, self.cg_iterations, self.cg_tolerance)[0]

    def pinv(self, y: Tensor) -> Tensor:
        """Return A⁺ y = Aᵀ (A Aᵀ)⁺ y, (B, *m) → (B, C, H, W)."""
        return self.adjoint(self.solve(y, 0.0))

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x; see :meth:`forward`."""
        return self.forward(x)


class OperatorFactory(LinearOperator):
    """Options of an operator that is drawn or built for each batch of images.

    A subclass overrides :meth:`bind` to return the operator that the options describe. The factory
    itself has no forward map.

    >>> class HalfMask(OperatorFactory):
    ...     def bind(self, image_shape, noise, like):
    ...         mask = torch.ones(1, *image_shape[1:])
    ...         mask[..., image_shape[2] // 2 :] = 0
    ...         return PixelMask.from_mask(mask, torch.empty(1, *image_shape))
    >>> from cmi_lightning import Problem
    >>> from cmi_lightning.operators import PixelMask
    >>> x = torch.zeros(1, 1, 4, 4)
    >>> Problem.simulate(x, HalfMask(), 0.05, SampleNoise(0, ["a"])).y.shape
    torch.Size([1, 1, 8])
    """

    @abstractmethod
    def bind(
        self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        """Return the operator for a batch."""

    def forward(self, x: Tensor, shift: object = None) -> Tensor:
        """Refuse: there is no operator before there are images.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{type(self).__name__} is made for each batch of images: give it to Problem.simulate, "
            "and use the problem's operator."
        )

    adjoint = solve = pinv = forward  # type: ignore[assignment]
