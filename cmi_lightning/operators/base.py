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

    A measurement holds measured entries only: the y of a mask is the list of kept pixels. An
    operator is first *bound* to the images it will act on (:meth:`bind`), which is where masks and
    kernels are drawn and matrices are made. A new operator needs :meth:`forward` alone; the adjoint
    then comes from automatic differentiation, and the pseudo-inverse and the solve from conjugate
    gradients. Closed forms override them.

    Attributes:
        image_shape: (C, H, W) of one image; set by :meth:`bind`.
        cg_iterations: the most conjugate-gradient iterations of the defaults.
        cg_tolerance: relative residual at which they stop, per sample.
    """

    image_shape: tuple[int, int, int]
    cg_iterations: int = 100
    cg_tolerance: float = 1e-6

    def bind(
        self, image_shape: tuple[int, int, int], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        """Return this operator made concrete for a batch.

        Args:
            image_shape: (C, H, W) of one image.
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

    def measured(self, y: Tensor) -> Tensor:
        """Return y (B, *m) with zeros where a batch's common shape holds no measurement."""
        return y

    def white(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
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


class Recipe(LinearOperator):
    """An operator that is drawn or built by :meth:`bind`, and is of no use before.

    A subclass holds the options and overrides :meth:`bind` to return the operator they describe.
    """

    @abstractmethod
    def bind(
        self, image_shape: tuple[int, int, int], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        """Return the operator for a batch; see :meth:`LinearOperator.bind`."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse: only what :meth:`bind` returns acts on images.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{type(self).__name__} is not bound to images yet; call "
            "operator.bind(image_shape, noise, like) and use the operator that it returns."
        )

    def adjoint(self, y: Tensor) -> Tensor:
        """Refuse, like :meth:`forward`."""
        return self.forward(y)

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Refuse, like :meth:`forward`."""
        return self.forward(y)

    def pinv(self, y: Tensor) -> Tensor:
        """Refuse, like :meth:`forward`."""
        return self.forward(y)
