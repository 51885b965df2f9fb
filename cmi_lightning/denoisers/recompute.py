"""Layers that keep less for their derivatives, of every order, and compute it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


class Recomputed(torch.autograd.Function):
    """f(*inputs), with no graph of f kept: neither of its value nor of its derivatives.

    PyTorch's checkpointing recomputes f in the backward pass; but where that pass is itself to be
    differentiated (``create_graph``), it keeps the graph of every f after all. Here the backward
    pass of f, (g, inputs) ↦ Jᵀ g, is a recomputed function too, and so for every further order: an
    order costs the inputs of f, not its activations, and each pass a further run of f.

    ``Recomputed.apply(f, *inputs)`` returns f's tensor or tuple of tensors. f must be
    deterministic, and must see every tensor that is to have a gradient through ``inputs``.
    """

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Any], *inputs: Tensor) -> Any:  # type: ignore[override]
        """Return f(*inputs); autograd is off here."""
        ctx.f = f
        ctx.save_for_backward(*inputs)
        return f(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        """Return the products of ``grads`` with the Jacobians of the inputs that need them."""
        needed = ctx.needs_input_grad[1:]
        product = partial(_vector_jacobian, ctx.f, needed, len(grads))
        if torch.is_grad_enabled():  # the graph of the products is wanted, or not at all
            products = iter(Recomputed.apply(product, *grads, *ctx.saved_tensors))
        else:
            products = iter(product(*grads, *ctx.saved_tensors))
        return None, *(next(products) if wanted else None for wanted in needed)


def _vector_jacobian(
    f: Callable[..., Any], needed: Sequence[bool], count: int, *arguments: Tensor
) -> tuple[Tensor, ...]:
    """Return Jᵀ g of f for the inputs that are ``needed``.

    ``arguments`` are a cotangent g for each of f's ``count`` outputs, then its inputs.
    """
    grads, inputs = arguments[:count], list(arguments[count:])
    keep = torch.is_grad_enabled()
    for i, wanted in enumerate(needed):
        if wanted and not (keep and inputs[i].requires_grad):
            inputs[i] = inputs[i].detach().requires_grad_()
    with torch.enable_grad():
        outputs = f(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wrt = [x for x, wanted in zip(inputs, needed, strict=True) if wanted]
    pairs = [
        (get_gradient_edge(output), grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad
    ]
    del outputs  # their values are not needed
    if not pairs:  # f is constant
        return tuple(torch.zeros_like(x) for x in wrt)
    edges, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(edges, wrt, cotangents, create_graph=keep, materialize_grads=True)


class FrozenConvolution(torch.autograd.Function):
    """Convolution by a fixed kernel of odd size, stride 1, zero borders; its input is not kept.

    PyTorch's own keeps the input for a gradient of the kernel, which is not wanted here. Jᵀ of a
    convolution is the transposed convolution and back, so derivatives of every order follow.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False
    ) -> Tensor:
        """Return the convolution of x (B, C, *), or its transpose."""
        ctx.save_for_backward(weight)
        ctx.transposed, ctx.dtype = transposed, x.dtype
        flat = x.ndim == 3
        if transposed:
            convolve: Callable[..., Tensor] = F.conv_transpose1d if flat else F.conv_transpose2d
        else:
            convolve = F.conv1d if flat else F.conv2d
        return convolve(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """Return Jᵀ grad."""
        (weight,) = ctx.saved_tensors
        product = FrozenConvolution.apply(grad, weight, None, not ctx.transposed)
        return product.to(ctx.dtype), None, None, None


Runner = Callable[..., Tensor]


def run_plainly(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return layer(*inputs)."""
    return layer(*inputs)


def run_leanly(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return layer(*inputs), for a layer with frozen parameters, and keep no activation inside it.

    A convolution keeps nothing, and everything else the inputs alone. The other layers are
    recomputed in the precision of their inputs, which autocast has set before: it need not be on.
    """
    if isinstance(layer, nn.Identity):
        return layer(*inputs)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        bias = layer.bias
        if bias is not None:
            bias = bias.to(inputs[0].dtype)
        return FrozenConvolution.apply(*inputs, layer.weight, bias)
    return Recomputed.apply(layer, *inputs)
