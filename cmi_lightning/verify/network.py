"""Checks of a user's own network: are its derivatives right, and is its Σ_post a covariance?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cmi_lightning.denoisers import Autocast, Denoiser
from cmi_lightning.errors import InputError
from cmi_lightning.information.base import contraction
from cmi_lightning.linalg import dot, krylov, norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM
from cmi_lightning.step import Step
from cmi_lightning.verify.check import Check

STEPS = 20  # of the unguided run that the points x_t are taken from
VISITED = (4, 10, 16)  # numbers of its steps after which the network is checked
DIMENSION = 10  # of the Krylov space that the eigenvalues come from


def network_checks(denoiser: Denoiser, size: int | None = None) -> Iterator[Check]:
    """Yield the checks of a denoiser, at three noise levels along an unguided run of two samples.

    About 200 passes over two images. Figures without a bar say what to expect of guidances that
    use the Jacobian: a learned network's is neither symmetric nor positive.
    ``size`` is the images' side where it takes any; by default 64, or the next that it takes.
    """
    shape = image_shape(denoiser, size)
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    like = torch.zeros(2, *shape, device=next((t.device for t in tensors), None))
    noise = SampleNoise(0, ["verify/0", "verify/1"])
    problem = Problem(like, Identity().bind(shape, noise, like), 0.05)
    sampler = Sampler(denoiser, DDIM(), num_steps=min(STEPS, len(denoiser.schedule)))
    records = list(sampler.iterate(problem, noise, like))
    stopped = bool(records[-1].stopped.any())  # the sampler keeps a lost sample's last finite state
    out_of_range = math.inf if stopped else _out_of_range(denoiser, records[-1].x)
    yield Check(
        "unguided DDIM ends in finite images", float(not bool(out_of_range < math.inf)), 0.0
    )
    yield Check("… share of values outside the declared range", out_of_range, None)
    if out_of_range == math.inf:
        return
    visited = [r for r in records if r.num_steps - r.index in VISITED] or records[:1]
    points = [
        Step(r.index, r.x, r.s, r.s, problem, denoiser, noise) for r in visited if r.s.sigma > 0
    ]
    yield from _types(points)
    yield from _derivatives(denoiser, points)
    yield from _covariance(points)


def image_shape(denoiser: Denoiser, size: int | None) -> tuple[int, ...]:
    """Return the shape of images to check with, ``size`` where the network takes any."""
    shape = denoiser.image_shape or (None, None, None)
    if None not in shape:
        return tuple(n for n in shape if n is not None)
    if len(shape) != 3:
        raise InputError(f"image_shape must be (channels, height, width), got {shape}.")
    multiple = denoiser.size_multiple
    side = size or -(-64 // multiple) * multiple
    return tuple(free if n is None else n for n, free in zip(shape, (3, side, side), strict=True))


def _out_of_range(denoiser: Denoiser, x: Tensor) -> float:
    if not bool(torch.isfinite(x).all()):
        return math.inf
    if denoiser.value_range is None:
        return 0.0
    low, high = denoiser.value_range
    slack = 0.05 * (high - low)
    return float(((x < low - slack) | (x > high + slack)).float().mean())


def _widened(denoiser: Denoiser, points: list[Step]) -> tuple[list[Step], bool]:
    """Return the steps in float64 and True, or as they are if the network does not run in it."""
    try:
        wide = copy.deepcopy(denoiser).double()
        steps = [replace(s, x=s.x.detach().double(), denoiser=wide, log={}) for s in points]
        _ = [step.x0 for step in steps]
        return steps, True
    except (RuntimeError, TypeError, ValueError):  # code that insists on float32
        return points, False


def _direction(step: Step, name: str) -> Tensor:
    return step.noise.normal(f"verify/{name}", step.index, step.x.detach())


def _slope(step: Step, p: Tensor, f: Callable[[Step], Tensor], length: float) -> Tensor:
    """Return the central difference of f along p over a distance of ``length``·σ_t·√n."""
    x = step.x.detach()
    h = length * step.t.sigma * math.sqrt(x[0].numel()) / norm(p)
    ahead, behind = (f(step.at(x + per_sample(s * h, x) * p, step.t)) for s in (1, -1))
    return (ahead - behind) / per_sample(2 * h, ahead)


def _relative(a: Tensor, b: Tensor) -> float:
    """Return the largest ‖a − b‖/‖b‖ of a sample."""
    return float((norm(a - b) / norm(b).clamp_min(torch.finfo(b.dtype).tiny)).max())


def _types(points: list[Step]) -> Iterator[Check]:
    shapes, alone, low = 0.0, 0.0, 0.0
    for step in points:
        x0 = step.x0.detach()
        right = x0.shape == step.x.shape and x0.dtype == step.x.dtype
        shapes = max(shapes, float(not (right and bool(torch.isfinite(x0).all()))))
        with torch.no_grad():
            single = step.denoiser(step.x.detach()[:1], step.t).x0
            lowered = Autocast(step.denoiser, torch.bfloat16)(step.x.detach(), step.t).x0
        alone = max(alone, _relative(single, x0[:1]))
        low = max(low, _relative(lowered, x0) if lowered.dtype == x0.dtype else math.inf)
    yield Check("x̂₀ has the shape and type of x_t, and is finite", shapes, 0.0)
    yield Check("x̂₀ of a sample alone = in a batch", alone, 1e-3)
    yield Check("x̂₀ under bfloat16 autocast: relative change", low, None, "comes back in float32")


def _derivatives(denoiser: Denoiser, points: list[Step]) -> Iterator[Check]:
    steps, widened = _widened(denoiser, points)
    remark = "float64" if widened else "float32: the network's code does not run in float64"
    first, second = 0.0, 0.0
    for step in steps:
        u, p = _direction(step, "u"), _direction(step, "p")
        exact = dot(step.vjp(u), p)
        slope = _slope(step, p, lambda s: s.x0.detach(), 1e-4 if widened else 1e-2)
        first = max(first, float(((exact - dot(u, slope)).abs() / norm(u) / norm(slope)).max()))
        if denoiser.derivatives >= 2:
            length = 1e-4 if widened else 3e-2
            by_difference = contraction(step, u, p, "difference", length)
            second = max(second, _relative(contraction(step, u, p), by_difference))
    yield Check("first derivatives = finite differences", first, 1e-5 if widened else 1e-2, remark)
    if denoiser.derivatives >= 2:
        bar = 1e-3 if widened else 0.1
        yield Check("second derivatives = finite differences", second, bar, remark)
    else:
        yield Check(
            "second derivatives",
            math.nan,
            None,
            "none, by the network's own account: estimators need derivative: difference",
        )


def _covariance(points: list[Step]) -> Iterator[Check]:
    for step in points:
        u = _direction(step, "u")
        transposed = step.vjp(u)
        forward = _slope(step, u, lambda s: s.x0.detach(), 1e-2)
        space = krylov(step.vjp, u, DIMENSION)
        # In units of σ_t²/α_t², the variance of x₀ given x_t alone: Σ = (σ_t²/α_t) J.
        values = step.t.alpha * space.values
        at = f"σ/α = {step.t.sigma / step.t.alpha:.2g}"
        yield Check(
            f"asymmetry of J, ‖Jv − Jᵀv‖/‖Jᵀv‖, at {at}", _relative(forward, transposed), None,
            "0 for an exact score",
        )  # fmt: skip
        lowest, highest = float(values.min()), float(values.max())
        yield Check(
            f"smallest eigenvalue of Σ (largest {highest:.2g}), at {at}", lowest, None,
            "in σ²/α², at most this; below 0, Σ is no covariance: solves are clipped",
        )  # fmt: skip
