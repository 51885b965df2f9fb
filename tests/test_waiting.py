"""A step asks the device for no number and copies no table to it: an accelerator runs ahead."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from cmi_lightning import PosteriorSampler
from cmi_lightning.callbacks import SamplingProgress, TrajectoryLogger
from cmi_lightning.denoisers import NetworkDenoiser, Tiled, UNet
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, TMPD, PiGDM
from cmi_lightning.information import TraceLimit
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    HDR,
    JPEG,
    AveragePool,
    BoxMask,
    Colorize,
    Demosaic,
    Dense,
    Downsample,
    Gamma,
    GaussianBlur,
    GivenKernel,
    Identity,
    LinearOperator,
    MotionBlur,
    NonlinearBlur,
    Operator,
    PhaseRetrieval,
    Quantize,
    RandomMask,
    from_functions,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM, DDPM, DDRM, FPS, DDNMPlus, REDDiff

READS = (
    *("item", "tolist", "cpu", "numpy", "nonzero"),
    *("__bool__", "__float__", "__int__", "__index__", "__contains__"),
)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a value of a tensor is read: there, a GPU would have to be waited for."""
    count = [0]

    def counting(read):
        def counted(self, *args, **kwargs):
            count[0] += 1
            return read(self, *args, **kwargs)

        return counted

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    return count


@pytest.mark.parametrize(
    "guidances",
    [
        [DPS()],
        [CMI(interval=1), DPS()],
        [CMI(interval=1, estimator=TraceLimit()), DPS()],
        [PiGDM()],
        [MCG()],
        [DSG()],
    ],
    ids=["DPS", "CMI+DPS", "TraceLimit+DPS", "PiGDM", "MCG", "DSG"],
)
def test_more_steps_read_no_more_numbers(reads, tmp_path, guidances):
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    counts = []
    for steps in (6, 12):
        module = PosteriorSampler(GaussianPrior(x[0]), BoxMask(4, 1), None, guidances, steps)
        callbacks = [SamplingProgress(interval=3600), TrajectoryLogger(max_images=0)]
        trainer = L.Trainer(
            default_root_dir=tmp_path / str(steps), callbacks=callbacks, logger=False
        )
        before = reads[0]
        trainer.predict(module, DataLoader([{"x": x[i], "id": f"{i}"} for i in range(2)], 2))
        counts.append(reads[0] - before)
    assert counts[0] == counts[1] > 0


class Copies(TorchDispatchMode):
    """Counts copies to the "meta" device, which stands for an accelerator, and tensors of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ([x.device.type for x in tree_leaves(t) if isinstance(x, Tensor)]
                       for t in ((args, kwargs), result))  # fmt: skip
        copied = "cpu" in given and "meta" in made
        self.count += copied or func is torch.ops.aten.lift_fresh.default
        return result


@pytest.fixture
def device(monkeypatch):
    """Lets scalars count as tensors, and ends conjugate gradients, which ask when to stop."""
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: self.dtype != torch.bool)
    as_tensor = torch.as_tensor

    def counted(value: Any, *args: Any, **kwargs: Any) -> Tensor:
        return as_tensor(value if isinstance(value, Tensor) else torch.tensor(value), **kwargs)

    monkeypatch.setattr(torch, "as_tensor", counted)
    monkeypatch.setattr(Problem, "noisy", True)


def on_device(thing: Any) -> Any:
    """A copy of a thing whose tensors are on the device."""
    with pytest.MonkeyPatch.context() as patch:
        moved = lambda self, memo: torch.empty_like(self, device="meta")  # noqa: E731
        patch.setattr(torch.Tensor, "__deepcopy__", moved)
        return copy.deepcopy(thing)


KERNELS = torch.full((2, 3, 3, 3), 1 / 9)
OPERATORS = [
    *(Identity(), RandomMask(0.5), BoxMask(4, 1), GaussianBlur(5, 1.0), MotionBlur(5)),
    *(GaussianBlur(5, 1.0, "circular"), GivenKernel(KERNELS[0, 0]), GivenKernel(KERNELS)),
    *(Downsample(2), AveragePool(2), Colorize(), Demosaic(), Dense(torch.ones(5, 192))),
    *(HDR(), JPEG(50), Gamma(), Quantize(4), NonlinearBlur(), PhaseRetrieval()),
    from_functions(lambda x: x[..., ::2]),
]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
def test_an_operator_that_met_its_images_copies_nothing(device, operator):
    x = torch.rand(2, 3, 8, 8)
    bound = operator.bind((3, 8, 8), SampleNoise(0, ["a", "b"]), x)
    y = bound(x)

    def act(A: Operator, x: Tensor, y: Tensor) -> None:
        for each in (A.vjp(x, y), A.jvp(x, x), A.guess(y), A.zero_padding(y)):
            assert each.device == x.device
        if isinstance(A, LinearOperator):
            for each in (A.pinv(y), A.solve(y, 0.1), A.solve(y, x.new_zeros(2)), A.adjoint(y)):
                assert each.device == x.device

    act(bound, x, y)
    A, x, y = (on_device(thing) for thing in (bound, x, y))
    act(A, x, y)  # what is kept for later calls may be copied now
    with Copies() as copies:
        act(A, x, y)
    assert copies.count == 0


class Told(nn.Module):
    """A network that is told a number for each image, as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, times, w):
        return self.network(x).tanh() * w[:, None, None, None]


@pytest.mark.parametrize(
    "parts",
    [
        *[[DDPM(), guidance] for guidance in (DPS(), PiGDM(), MCG(), DSG(), TMPD())],
        *[[DDPM(), CMI(interval=1, estimator=e), DPS()] for e in (None, TraceLimit())],
        *[[s] for s in (DDIM(), DDRM(), DDNMPlus(), REDDiff(), FPS(particles=2))],
    ],
    ids=lambda parts: "+".join(type(part).__name__ for part in parts),
)
def test_more_steps_copy_no_more(device, monkeypatch, parts):
    here = dict(image_shape=(3, 8, 8), condition={"w": torch.tensor(1.0)})
    denoiser = Tiled(NetworkDenoiser(Told(), None, **here)).to("meta")
    denoiser.requires_grad_()  # then without autocast, which "meta" does not know
    x, solver, *guidances = torch.empty(2, 3, 8, 12, device="meta"), *parts
    noise = SampleNoise(0, ["a", "b"])
    operator = on_device(BoxMask(4, 1).bind((3, 8, 12), noise, torch.zeros(1)))
    # The numbers of a step are another matter: tests/test_noise.py.
    drawn = lambda self, stream, step, like: torch.empty_like(like)  # noqa: E731
    monkeypatch.setattr(SampleNoise, "normal", drawn)
    monkeypatch.setattr(SampleNoise, "signs", drawn)
    counts = []
    for steps in (2, 3, 5):
        with Copies() as copies:
            sampler = Sampler(denoiser, solver, guidances, steps)
            sampler.run(Problem(operator(x), operator, 0.05), noise, x)
        counts.append(copies.count)
    assert counts[1] == counts[2]


def test_the_network_copies_nothing():
    network = UNet(3, 32, (1, 1), attention_levels=(1,)).to("meta")
    with Copies() as copies:
        network(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, device="meta"))
    assert copies.count == 0
