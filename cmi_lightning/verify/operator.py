"""Checks of a user's own operator: is it what it claims, are its derivatives and inverse right?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cmi_lightning.linalg import dot, norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import LinearOperator, Operator
from cmi_lightning.verify.check import Check

SHIFT = 0.1  # λ of the solve
STEP = 1e-5  # of the finite difference, in float64; 1e-2 where there is none


def operator_checks(
    operator: Operator, shape: tuple[int, ...], device: str = "cpu"
) -> Iterator[Check]:
    """Yield the checks of an operator on two images of random numbers, in float64 where it can.

    A linear one is checked for linearity, adjoint, solve and inverse, another for its derivatives.
    ``shape`` is that of an image, (C, H, W).
    """
    ids = ["verify/0", "verify/1"]
    noise = SampleNoise(0, ids)
    like = torch.empty(2, *shape, device=device)
    kept, wide = 0.0, like
    for dtype in (torch.float32, torch.float64):
        try:
            x = noise.normal("verify/x", 0, like.to(dtype))
            bound = operator.bind(shape, noise, x)
            y = bound(x)
            made, wide = [y, bound.vjp(x, y)], x
        except (RuntimeError, TypeError):  # no float64 here
            made = [like.bool()]
        kept = max(kept, *(float(t.dtype != dtype or t.device != like.device) for t in made))
    yield Check("A x and Aᵀy keep dtype (float32, float64) and device", kept, 0.0)

    def alone_and_together(rows: slice) -> Tensor:
        bound = operator.bind(shape, SampleNoise(0, ids[rows]), wide)
        return bound.vjp(wide[rows], bound(wide[rows]))

    A = operator.bind(shape, noise, wide)
    z = A(wide)
    rows = float(len(z) != len(wide) or not bool(torch.isfinite(z).all()))
    yield Check("A x has one finite row an image", rows, 0.0)
    if rows:
        return
    rounding = 1e-9 if wide.dtype == torch.float64 else 1e-4
    v = A.sample_noise(lambda t: noise.normal("verify/y", 0, t), z)
    other = noise.normal("verify/other", 0, wide)
    if isinstance(A, LinearOperator):
        yield from _linear(A, wide, other, v, rounding)
    else:
        yield from _differentiable(A, wide, other, v, rounding)
    single, both = alone_and_together(slice(0, 1)), alone_and_together(slice(0, 2))[:1]
    gap = norm(single - both) / _length(both)
    yield Check("AᵀA x of an image alone = in a batch", _largest(gap), max(1e-6, rounding))


def _linear(
    A: LinearOperator, x: Tensor, other: Tensor, v: Tensor, rounding: float
) -> Iterator[Check]:
    z = A(x)
    gap = (A(2 * x + other) - 2 * z - A(other)) / per_sample(_length(z), z)
    yield Check("A (2x + z) = 2 A x + A z", _largest(norm(gap)), rounding)
    gap = (dot(z, v) - dot(x, A.adjoint(v))).abs() / (_length(z) * norm(v))
    yield Check("⟨Ax, y⟩ = ⟨x, Aᵀy⟩", _largest(gap), rounding, "the adjoint dot test")
    w = A.solve(v, SHIFT)
    gap = norm(A.zero_padding(A(A.adjoint(w)) + SHIFT * w) - v) / norm(v)
    yield Check("(AAᵀ + λ) solve(y) = y", _largest(gap), max(1e-5, rounding))
    # An A⁺ that leaves small singular values out, by its option, is no exact one.
    cut = float(getattr(A, "rcond", 0.0)) > 0
    yield Check(
        "A A⁺ A x = A x",
        _largest(norm(A(A.pinv(z)) - z) / _length(z)),
        None if cut else 1e-3,
        "A⁺ leaves out or damps singular values below its rcond" if cut else "",
    )


def _differentiable(
    A: Operator, x: Tensor, u: Tensor, v: Tensor, rounding: float
) -> Iterator[Check]:
    x = (0.3 * x).clamp(-1, 1)  # as images are: beyond, an operator may clip
    slope = A.jvp(x, u)
    gap = (dot(slope, v) - dot(u, A.vjp(x, v))).abs() / (_length(slope) * norm(v))
    yield Check("⟨A'u, y⟩ = ⟨u, A'ᵀy⟩ at an image", _largest(gap), rounding, "jvp against vjp")
    h = STEP if x.dtype == torch.float64 else 1e-2
    difference = (A(x + h * u) - A(x - h * u)) / (2 * h)
    yield Check(
        "A'u: relative distance to the finite difference",
        _largest(norm(slope - difference) / _length(slope).maximum(_length(difference))),
        None,
        "0 for a smooth A; up to 1 where gradients pass through rounding or clipping",
    )
    image = A.guess(A(x))
    odd = float(image.shape != x.shape or not bool(torch.isfinite(image).all()))
    yield Check("guess(y) is a finite image", odd, 0.0)


def _length(a: Tensor) -> Tensor:
    return norm(a).clamp_min(torch.finfo(a.dtype).tiny)


def _largest(gap: Tensor) -> float:
    return float(gap.max()) if bool(torch.isfinite(gap).all()) else math.inf
