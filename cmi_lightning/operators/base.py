"""The contract of a forward model A, differentiable or linear, with generic defaults."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable
from functools import cached_property
from typing import Self, overload

import torch
from torch import Tensor

from cmi_lightning.checked import Checked
from cmi_lightning.errors import InputError
from cmi_lightning.linalg import conjugate_gradient, per_sample
from cmi_lightning.noise import SampleNoise


class Operator(Checked, ABC):
    """A in y = A(x₀) + n: images (B, C, H, W) to measurements (B, *m), every sample on its own.

    A measurement holds measured entries only: the y of a mask is the list of kept pixels. A new
    operator needs :meth:`forward` alone, if autograd can differentiate it; or :meth:`bind` alone,
    if it is drawn or built for each batch of images. A linear one derives from
    :class:`LinearOperator`. The options of one that is a dataclass are checked when it is made, see
    :class:`cmi_lightning.checked.Checked`.

    >>> class Squared(Operator):
    ...     def forward(self, x):
    ...         return x**2
    >>> x = torch.full((1, 1, 2, 2), 3.0)
    >>> Squared().vjp(x, torch.ones_like(x)).flatten()  # (∂A/∂x)ᵀ 1 = 2 x
    tensor([6., 6., 6., 6.])

    Attributes:
        image_shape: shape of one image, (C, H, W); set where the operator meets images.
        images: the number of images that it was made for; None for any number.
    """

    image_shape: tuple[int, ...] = ()
    images: int | None = None

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Operator:
        """Return this operator made concrete for a batch: a hook that ``Problem`` calls.

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

    def forward(self, x: Tensor) -> Tensor:
        """Return A(x), (B, C, H, W) → (B, *m); of an operator that was bound, if it needs that."""
        raise InputError(
            f"{type(self).__name__} is made for each batch of images: give it to Problem.simulate, "
            "and use the problem's operator (or give it a forward)."
        )

    def linearize(self, x: Tensor) -> LinearOperator:
        """Return A' = ∂A/∂x at x (B, C, H, W) as a linear operator, by automatic differentiation.

        The graph of A(x) is built once, and goes with the operator that is returned. Where x has a
        graph, that of A(x) continues it.
        """
        return Linearized(self, x)

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return (∂A/∂x)ᵀ v at x, (B, *m) → (B, C, H, W)."""
        return self.linearize(x).adjoint(v)

    def jvp(self, x: Tensor, u: Tensor) -> Tensor:
        """Return (∂A/∂x) u at x, (B, C, H, W) → (B, *m)."""
        return self.linearize(x).forward(u)

    def guess(self, y: Tensor) -> Tensor:
        """Return the image (B, C, H, W) that a person is shown as the measurement.

        By default y itself where it has the images' shape, else the middle gray.
        """
        if y.shape[1:] == self.image_shape:
            return y
        return y.new_zeros(len(y), *self.image_shape)

    def zero_padding(self, y: Tensor) -> Tensor:
        """Return y (B, *m) with zeros where a batch's common shape holds no measurement."""
        return y

    def sample_noise(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Return independent random numbers, one per measurement, shaped like y (B, *m).

        ``draw`` fills a tensor like the one given. A sample's numbers do not depend on its batch.
        """
        return draw(y)

    def __call__(self, x: Tensor) -> Tensor:
        """Return A(x); see :meth:`forward`."""
        return self.forward(x)

    def __matmul__(self, inner: Operator) -> Operator:
        """Return x ↦ A(inner(x)), linear if both are."""
        return Composition(self, inner)


class LinearOperator(Operator):
    """A linear A. The adjoint comes from autograd, A⁺ and the solve from conjugate gradients.

    Closed forms override these defaults.

    >>> class Grey(LinearOperator):
    ...     def forward(self, x):
    ...         return x.mean(1)
    >>> from cmi_lightning import Problem
    >>> problem = Problem.simulate(torch.ones(2, 3, 4, 4), Grey(), 0.0, SampleNoise(0, ["a", "b"]))
    >>> problem.operator.pinv(problem.y).shape
    torch.Size([2, 3, 4, 4])

    Attributes:
        value: A(x) (B, *m) with its graph, where this is the derivative of some A at x.
        cg_iterations: the most conjugate-gradient iterations of the defaults.
        cg_tolerance: relative residual at which they stop, per sample.
    """

    value: Tensor | None = None
    cg_iterations: int = 100
    cg_tolerance: float = 1e-6

    def bind(
        self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        bound = super().bind(image_shape, noise, like)
        assert isinstance(bound, LinearOperator)
        return bound

    def linearize(self, x: Tensor) -> LinearOperator:
        """Return A: it is its own derivative."""
        return self

    def adjoint(self, y: Tensor) -> Tensor:
        """Return Aᵀ y, (B, *m) → (B, C, H, W)."""
        keep_graph = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            x = y.new_zeros(y.shape[0], *self.image_shape, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, y, create_graph=keep_graph)[0]

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (A Aᵀ + diag(shift))⁻¹ y, (B, *m).

        ``shift`` ≥ 0 is a number, one per sample (B,), or one per measurement, broadcastable to y.
        """
        added = per_sample(shift, y)

        def matvec(v: Tensor) -> Tensor:
            return self.forward(self.adjoint(v)) + added * v

        return conjugate_gradient(matvec, y, self.cg_iterations, self.cg_tolerance)[0]

    def pinv(self, y: Tensor) -> Tensor:
        """Return A⁺ y = Aᵀ (A Aᵀ)⁺ y, (B, *m) → (B, C, H, W)."""
        return self.adjoint(self.solve(y, 0.0))

    def guess(self, y: Tensor) -> Tensor:
        return self.pinv(y)

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return V f(s) Vᵀ x of images (B, *), with A = U s Vᵀ; f(0) is for what A does not see.

        Raises:
            InputError: for an operator without closed form.
        """
        raise InputError(
            f"{type(self).__name__} has no singular values in closed form: use a method that needs "
            "none, such as solver/ddnm in place of solver/ddrm."
        )

    @overload
    def __matmul__(self, inner: LinearOperator) -> LinearOperator: ...
    @overload
    def __matmul__(self, inner: Operator) -> Operator: ...
    def __matmul__(self, inner: Operator) -> Operator:
        """Return A · inner, linear if both are."""
        return (LinearComposition if isinstance(inner, LinearOperator) else Composition)(
            self, inner
        )


class Linearized(LinearOperator):
    """u ↦ (∂A/∂x) u at a point x (B, C, H, W), from one graph of A(x).

    Raises:
        InputError: if autograd cannot differentiate A.
    """

    def __init__(self, operator: Operator, x: Tensor) -> None:
        self.operator, self.image_shape = operator, tuple(x.shape[1:])
        with torch.enable_grad():
            self.x = x if x.requires_grad else x.detach().requires_grad_()
            value = operator(self.x)
        self.value: Tensor = value
        if not value.requires_grad:
            raise InputError(
                f"{type(operator).__name__} is not differentiable: its result has no gradient. "
                "Write its forward with torch's functions of x, or give it a linearize."
            )

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.autograd.grad(self.value, self.x, y, retain_graph=True)[0]

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor]:
        """v and (∂A/∂x)ᵀ v, which is linear in v: its derivative is (∂A/∂x)."""
        with torch.enable_grad():
            v = torch.zeros_like(self.value, requires_grad=True)
            return v, torch.autograd.grad(self.value, self.x, v, create_graph=True)[0]

    def forward(self, x: Tensor) -> Tensor:
        v, pulled = self._pulled
        if not pulled.requires_grad:
            return torch.zeros_like(v)  # A is constant here
        return torch.autograd.grad(pulled, v, x, retain_graph=True)[0]

    def zero_padding(self, y: Tensor) -> Tensor:
        return self.operator.zero_padding(y)

    def sample_noise(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return self.operator.sample_noise(draw, y)


class Composition(Operator):
    """x ↦ outer(inner(x)), written ``outer @ inner``.

    >>> from cmi_lightning.operators import Dense
    >>> A = Dense(torch.tensor([[1.0, 1.0]])) @ Dense(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    >>> A(torch.tensor([[1.0, 1.0]])), isinstance(A, LinearOperator)
    (tensor([[5.]]), True)
    """

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner
        self.image_shape = inner.image_shape

    @property
    def images(self) -> int | None:  # type: ignore[override]
        """The number of images that one of both was made for."""
        return self.inner.images or self.outer.images

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        """Bind the inner one to the images, and the outer one to what comes out of it."""
        inner = self.inner.bind(image_shape, noise, like)
        with torch.no_grad():
            between = inner(like.new_zeros(len(noise.ids), *image_shape))
        bound = type(self)(self.outer.bind(tuple(between.shape[1:]), noise, between), inner)
        bound.image_shape = image_shape
        return bound

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def linearize(self, x: Tensor) -> LinearOperator:
        """Return the product of both derivatives (the chain rule), each from one graph."""
        inner = self.inner.linearize(x)
        between = self.inner(x) if inner.value is None else inner.value
        product = self.outer.linearize(between.detach()) @ inner
        with torch.enable_grad():
            product.value = self.outer(between)
        return product

    def guess(self, y: Tensor) -> Tensor:
        return self.inner.guess(self.outer.guess(y))

    def zero_padding(self, y: Tensor) -> Tensor:
        return self.outer.zero_padding(y)

    def sample_noise(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return self.outer.sample_noise(draw, y)


class LinearComposition(Composition, LinearOperator):
    """x ↦ outer inner x of two linear operators, written ``outer @ inner``."""

    outer: LinearOperator
    inner: LinearOperator

    def linearize(self, x: Tensor) -> LinearOperator:
        return self

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def guess(self, y: Tensor) -> Tensor:
        return self.pinv(y)
