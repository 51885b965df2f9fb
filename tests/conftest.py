"""Shared fixtures: exact priors and a dense operator that everything is checked against."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from cmi_lightning.denoisers import NetworkDenoiser, shipped_prior
from cmi_lightning.errors import warn_once
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Dense, LinearOperator
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import CLEAN, Level, Schedule
from cmi_lightning.step import Step

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads would only wait
    torch.set_num_threads(1)


SHAPE = (1, 2, 3)


@pytest.fixture(autouse=True)
def as_if_alone(request: pytest.FixtureRequest) -> None:
    """Numbers without a seed, and warnings given once, do not depend on the tests before."""
    torch.manual_seed(0)
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)
    warn_once.cache_clear()


DRAWN = ("test_callbacks", "test_loggers")  # where curves are drawn in earnest


@pytest.fixture(scope="module", autouse=True)
def curves_are_not_drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Elsewhere a blank stands for their plot, which takes a third of a short run."""
    runs = hasattr(request.module, "main") or "lightning" in sys.modules
    if request.module.__name__ in DRAWN or not runs:
        yield
        return
    from PIL import Image

    from cmi_lightning.callbacks import trajectory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trajectory,
            "plot_curves",
            lambda curves, *_: Image.new("RGB", (8, 8)) if curves else None,
        )
        yield


@pytest.fixture
def mixture() -> GaussianMixture:
    """Three well-separated components in six dimensions, float64."""
    g = torch.Generator().manual_seed(3)
    means = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64)
    variances = 0.05 + torch.rand(3, *SHAPE, generator=g, dtype=torch.float64) * 0.3
    return GaussianMixture(means, variances, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


@pytest.fixture
def dense() -> Dense:
    """A random 3x6 operator."""
    g = torch.Generator().manual_seed(4)
    return Dense(torch.randn(3, math.prod(SHAPE), generator=g, dtype=torch.float64), SHAPE)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class BatchNoise(SampleNoise):
    """Noise from one generator a step: quicker where the law of many samples is tested."""

    def normal(self, stream: str, step: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator(0, stream, step), dtype=like.dtype)


def numbered(count: int, seed: int = 0) -> BatchNoise:
    """The noise of many samples."""
    return BatchNoise(seed, [str(i) for i in range(count)])


class AllSigns:
    """Stands in for random signs: all 2^(m−1) sign vectors, one per probe, up to a global sign."""

    def __init__(self, noise) -> None:
        self.ids, self.normal = noise.ids, noise.normal

    def signs(self, stream: str, step: int, like: Tensor) -> Tensor:
        k, size = int(stream.split("/")[1]), like[0].numel()
        bits = [1.0] + [1.0 if k >> i & 1 else -1.0 for i in range(size - 1)]
        return torch.tensor(bits, dtype=like.dtype).reshape(like.shape[1:]).expand_as(like)


def make_step(
    denoiser: GaussianMixture,
    operator: LinearOperator,
    index: int = 300,
    batch: int = 4,
    sigma: float | Tensor = 0.1,
    schedule: Schedule | None = None,
    differentiable: bool = True,
) -> Step:
    """A step of a batch drawn from the prior and noised to a level."""
    schedule = schedule or denoiser.schedule
    g = torch.Generator().manual_seed(5)
    x0 = denoiser.sample(batch, g)
    noise = SampleNoise(0, [f"sample/{b}" for b in range(batch)])
    t: Level = schedule[index]
    x = t.alpha * x0 + t.sigma * noise.normal("test", 0, x0)
    problem = Problem.simulate(x0, operator, sigma, noise)
    s = schedule[index - 1] if index else CLEAN
    return Step(index, x, t, s, problem, denoiser, noise, differentiable)


def configured(options: dict[str, Any], **parts: tuple[Any, Any]) -> Any:
    """Make a configuration's parts, of a type and with a default each, as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    for name, (kind, default) in parts.items():
        parser.add_argument(f"--{name}", type=kind, default=default)
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its former name
    return make(parser.parse_object(options))


def jacobian(step: Step, denoiser: GaussianMixture, row: int) -> Tensor:
    """∂x̂₀/∂x_t of one row as a dense matrix, from reverse-mode differentiation."""

    def f(x: Tensor) -> Tensor:
        return denoiser(x.reshape(1, *SHAPE), step.t).x0.flatten()

    return torch.autograd.functional.jacobian(f, step.x[row].detach().flatten(), create_graph=True)


def dense_information(
    step: Step,
    row: int,
    std: Tensor | float,
    of: Callable[[Tensor], Tensor] = torch.logdet,
    hold: bool = False,
) -> tuple[Tensor, Tensor]:
    """½ log det(I + Σ_n^{-1/2} A' Σ A'ᵀ Σ_n^{-1/2}), A' = ∂A/∂x at x̂₀, and ∇ by autograd.

    With ``hold``, the gradient takes A' for constant.
    """

    def mean(z: Tensor) -> Tensor:
        return step.denoiser(z.reshape(1, *SHAPE), step.t).x0.flatten()

    def measure(z: Tensor) -> Tensor:
        return step.problem.operator(z.reshape(1, *SHAPE)).flatten()

    x = step.x[row].detach().flatten().requires_grad_()
    at, dense = mean(x), torch.autograd.functional.jacobian
    J = dense(mean, x, create_graph=True)
    A = dense(measure, at.detach() if hold else at, create_graph=not hold)
    A = A / torch.as_tensor(std, dtype=x.dtype).reshape(-1, 1)
    S = torch.eye(len(A), dtype=x.dtype) + step.covariance_factor * A @ J @ A.T
    value = 0.5 * of(S)
    return value.detach(), torch.autograd.grad(value, x)[0]


def assert_two_derivatives(
    f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor, p: Tensor, h: float = 1e-5
) -> None:
    """Jᵀ u and ∇⟨u, J p⟩ of f at x are those of central differences along p."""

    def product(z: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        return z, torch.autograd.grad(f(z), z, u, create_graph=graph)[0]

    with torch.no_grad():
        difference = (f(x + h * p) - f(x - h * p)) / (2 * h)
    z, first = product(x, graph=True)
    along = float((first.detach() * p).sum())
    assert along == pytest.approx(float((difference * u).sum()), rel=1e-6)
    (second,) = torch.autograd.grad((first * p).sum(), z)
    difference = (product(x + h * p)[1] - product(x - h * p)[1]) / (2 * h)
    torch.testing.assert_close(second, difference, rtol=1e-5, atol=1e-8)
    assert float(second.abs().max()) > 1e-4


def graph_bytes(network: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that the graph of what is run keeps, without the network's parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        if (key := x.untyped_storage().data_ptr()) not in own:
            kept[key] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(size for size, _ in kept.values())


@pytest.fixture(scope="session")
def prior() -> NetworkDenoiser:
    """The shipped Fashion-MNIST prior."""
    return shipped_prior("fashion-mnist")


@pytest.fixture(scope="session")
def shipped_images() -> Tensor:
    """The shipped test garments (64, 1, 32, 32) in [−1, 1]."""
    from cmi_lightning.data import ImageFolderData

    data = ImageFolderData("fashion-mnist-test", batch_size=64)
    data.setup("predict")
    return next(iter(data.predict_dataloader()))["x"]
