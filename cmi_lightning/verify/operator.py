"""Checks of a user's own operator: is it linear, are its adjoint and inverse those of it?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cmi_lightning.linalg import dot, norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import LinearOperator
from cmi_lightning.verify.check import Check

SHIFT = 0.1  # λ of the solve


def operator_checks(
    operator: LinearOperator, shape: tuple[int, ...], device: str = "cpu"
) -> Iterator[Check]:
    """Yield the checks of an operator on two images of random numbers, in float64 where it can.

    Args:
        operator: A.
        shape: (C, H, W) of the images.
        device: where to check it.
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
            made, wide = [y, bound.adjoint(y)], x
        except (RuntimeError, TypeError):  # no float64 here
            made = [like.bool()]
        kept = max(kept, *(float(t.dtype != dtype or t.device != like.device) for t in made))
    yield Check("A x and Aᵀy keep dtype (float32, float64) and device", kept, 0.0)

    def alone_and_together(rows: slice) -> Tensor:
        of = SampleNoise(0, ids[rows])
        bound = operator.bind(shape, of, wide)
        return bound.adjoint(bound(wide[rows]))

    x, other = wide, noise.normal("verify/other", 0, wide)
    A = operator.bind(shape, noise, x)
    z = A(x)
    rows = float(len(z) != len(x) or not bool(torch.isfinite(z).all()))
    yield Check("A x has one finite row an image", rows, 0.0)
    if rows:
        return
    rounding = 1e-9 if x.dtype == torch.float64 else 1e-4
    v = A.sample_noise(lambda t: noise.normal("verify/y", 0, t), z)
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
    single, both = alone_and_together(slice(0, 1)), alone_and_together(slice(0, 2))[:1]
    gap = norm(single - both) / _length(both)
    yield Check("AᵀA x of an image alone = in a batch", _largest(gap), max(1e-6, rounding))


def _length(a: Tensor) -> Tensor:
    return norm(a).clamp_min(torch.finfo(a.dtype).tiny)


def _largest(gap: Tensor) -> float:
    return float(gap.max()) if bool(torch.isfinite(gap).all()) else math.inf
