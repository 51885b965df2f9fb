"""Every operator against its definition: dense matrices, scipy, torch's resize, autograd."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import configured
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    AveragePool,
    BoxMask,
    ChannelMix,
    Colorize,
    Convolution,
    Demosaic,
    Dense,
    Downsample,
    GaussianBlur,
    GivenKernel,
    Identity,
    Inpaint,
    LinearOperator,
    MotionBlur,
    PixelMask,
    RandomMask,
    Separable,
)
from cmi_lightning.problem import Problem


@dataclass(frozen=True)
class Shear(LinearOperator):
    """A custom operator: forward alone, as a user would write it. y = (x + 2 · shifted x)[1:]."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 2 * x.roll(1, dims=3))[:, :, 1:]


@dataclass(frozen=True)
class Ragged(LinearOperator):
    """Masks that keep unequal numbers of pixels."""

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        mask = torch.ones(len(noise.ids), *image_shape[1:])
        for row, sample in enumerate(noise.ids):
            mask[row].view(-1)[int(sample) :: 2] = 0
        return PixelMask.from_mask(mask, like.new_empty(len(noise.ids), *image_shape))


@dataclass(frozen=True)
class Holes(LinearOperator):
    """A mask of the user's own with other pixels in every channel."""

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        holes = torch.rand(image_shape, generator=torch.Generator().manual_seed(9)) > 0.4
        return Inpaint(holes).bind(image_shape, noise, like)


KERNELS = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(8)).double() / 12

OPERATORS: dict[str, LinearOperator] = {
    "identity": Identity(),
    "random": RandomMask(0.9),
    "box": BoxMask((3, 2), margin=1),
    "ragged": Ragged(),
    "gaussian-reflect": GaussianBlur(61, 1.5),
    "gaussian-circular": GaussianBlur(9, 2.0, "circular"),
    "downsample": Downsample(2),
    "downsample-1": Downsample(1),
    "motion-reflect": MotionBlur(7),
    "motion-circular": MotionBlur(8, padding="circular"),
    "motion-large": MotionBlur(61, padding="circular"),
    "custom": Shear(),
    "holes": Holes(),
    "colorize": Colorize("luminance"),
    "demosaic": Demosaic("GBRG"),
    "average": AveragePool(2),
    "downsample-pillow": Downsample(2, "pillow"),
    "downsample-opencv": Downsample(2, "opencv"),
    "given": GivenKernel(KERNELS[0, 0]),
    "given-circular": GivenKernel(KERNELS[0], "circular"),
    "varying": GivenKernel(KERNELS),
    "dense": Dense(torch.ones(5, 1)),  # of as many columns as an image has numbers
}
EXACT = [
    "dense",
    *("identity", "random", "box", "ragged", "holes", "colorize", "demosaic", "average", "custom"),
    *("downsample", "downsample-1", "downsample-pillow", "downsample-opencv"),
]
TRUNCATED = [
    *("gaussian-reflect", "gaussian-circular", "motion-circular", "motion-large", "given-circular")
]
ITERATIVE = ["custom", "motion-reflect", "given", "varying"]
every = pytest.mark.parametrize("name", OPERATORS)


def bind(
    name: str,
    shape: tuple[int, int, int] = (1, 6, 4),
    ids: tuple[str, ...] = ("0", "1", "2"),
    dtype: torch.dtype = torch.float64,
) -> LinearOperator:
    operator = OPERATORS[name]
    if isinstance(operator, (Downsample, AveragePool)) and any(
        n % operator.factor for n in shape[1:]
    ):
        operator = replace(operator, factor=math.gcd(*shape[1:]))
    if name == "dense":
        return Dense(draw(5, math.prod(shape), dtype=dtype), shape)
    if name == "given-circular":  # a kernel for each image
        operator = GivenKernel(KERNELS[0][[int(i) for i in ids]], "circular")
    return operator.bind(shape, SampleNoise(0, ids), torch.zeros(1, dtype=dtype))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(name: str, shape: tuple[int, int, int] = (1, 6, 4)) -> Tensor:
    """Return A of each of three samples, (3, m, n), column by column."""
    operator, size = bind(name, shape), math.prod(shape)
    columns = torch.eye(size, dtype=torch.float64).reshape(size, 1, *shape).expand(-1, 3, *shape)
    return torch.stack([operator(c).flatten(1) for c in columns], 2)


def bound(operator: LinearOperator, x: Tensor) -> LinearOperator:
    """The operator as it meets images x."""
    return operator.bind(tuple(x.shape[1:]), SampleNoise(0, [str(i) for i in range(len(x))]), x)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm().clamp_min(1e-30))


# The contract, for all.


@every
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((1, 32, 32), torch.float64, 1e-12),
        ((3, 33, 28), torch.float32, 1e-5),
        ((4, 24, 40), torch.float64, 1e-12),
        ((3, 7, 5), torch.float64, 1e-12),
    ],
)
def test_adjoint(name, shape, dtype, tolerance):
    operator = bind(name, shape, dtype=dtype)
    x = draw(3, *shape, dtype=dtype)
    clean = operator(x)
    y = draw(*clean.shape, seed=1, dtype=dtype)
    back = operator.adjoint(y)
    assert clean.dtype == back.dtype == dtype
    assert back.shape == x.shape
    left, right = (clean * y).flatten(1).sum(1), (x * back).flatten(1).sum(1)
    scale = clean.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
    assert ((left - right).abs() <= tolerance * scale).all()
    assert torch.equal(operator.forward(x), clean)


@every
def test_gradients(name):
    operator = bind(name, (1, 4, 4) if name != "box" else (1, 6, 4), ("0", "1"))
    x = draw(2, *operator.image_shape).requires_grad_()
    assert gradcheck(operator, x)
    assert gradgradcheck(lambda z: operator(z) ** 2, x)
    y = draw(*operator(x).shape, seed=1)
    assert close(torch.autograd.grad(operator(x), x, y)[0], operator.adjoint(y))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_independent(name, dtype):
    shape = (3, 8, 6)
    whole = bind(name, shape, dtype=dtype)
    x = draw(3, *shape, dtype=dtype)
    y = whole(x)
    measured = y + 0.1 * draw(*y.shape, seed=1, dtype=dtype)
    shift = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-4
    for row, sample in enumerate(("0", "1", "2")):
        single = bind(name, shape, (sample,), dtype)
        alone, part = single(x[row : row + 1]), slice(row, row + 1)
        kept = alone.shape[-1]  # a list of pixels is padded to the batch's longest
        assert torch.allclose(alone, y[part, ..., :kept], atol=1e-6, rtol=1e-6)
        assert not y[part, ..., kept:].any()
        mine = measured[part, ..., :kept]
        for a, b in [
            (single.adjoint(mine), whole.adjoint(measured)[part]),
            (single.pinv(mine), whole.pinv(measured)[part]),
            (single.solve(mine, shift[part]), whole.solve(measured, shift)[part, ..., :kept]),
        ]:
            assert close(a, b, tolerance)


@every
@pytest.mark.parametrize("shape", [(3, 6, 4), (1, 9, 15), (4, 6, 8)])
def test_solve(name, shape):
    operator, matrix = bind(name, shape), dense(name, shape)
    y = draw(*operator(torch.zeros(3, *shape, dtype=torch.float64)).shape, seed=1)
    shifts: dict[str, Tensor | float] = {
        "number": 0.01,
        "sample": torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64),
        "channel": draw(*y.shape[:2], *(1 for _ in y.shape[2:]), seed=2).abs() + 0.01,
        "measurement": draw(*y.shape, seed=2).abs() + 0.05,
    }
    for kind, shift in shifts.items():
        added = torch.as_tensor(shift, dtype=torch.float64)
        added = added.reshape(3, *(1 for _ in y.shape[1:])) if added.ndim == 1 else added
        system = matrix @ matrix.mT + torch.diag_embed(added.expand(y.shape).flatten(1))
        expected = torch.linalg.solve(system, y.flatten(1)).reshape(y.shape)
        iterative = kind == "measurement" or name in ITERATIVE
        assert close(operator.solve(y, shift), expected, 1e-5 if iterative else 1e-10), kind


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(1, 6, 4), (3, 9, 15), (4, 6, 8)])  # 9×15: factor 3
def test_pinv_is_exact(name, shape):
    operator, matrix = bind(name, shape), dense(name, shape)
    x = draw(3, *shape)
    y = operator(x)
    tolerance = 1e-5 if name == "custom" else 1e-10
    assert close(operator(operator.pinv(y)), y, tolerance)
    noisy = draw(*y.shape, seed=1)
    expected = (torch.linalg.pinv(matrix) @ noisy.flatten(1)[..., None]).reshape(x.shape)
    assert close(operator.pinv(noisy), expected, tolerance)


def test_downsampling_by_sixteen():
    x = draw(1, 3, 48, 32)
    operator = bound(Downsample(16), x)
    y = operator(x)
    assert y.shape == (1, 3, 3, 2)
    assert close(operator(operator.pinv(y)), y, 1e-10)
    assert close(operator(operator.adjoint(operator.solve(y, 0.0))), y, 1e-10)


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("rcond", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 5, 7)])
def test_pinv_is_truncated(name, rcond, shape):
    operator = bound(replace(OPERATORS[name], rcond=rcond), draw(3, *shape))
    matrix = dense(name, shape)
    u, s, vh = torch.linalg.svd(matrix)
    kept = s > max(rcond, 1e-14) * s[:, :1]
    if rcond:
        assert (kept.sum(1) < s.shape[1]).any()
    inverse = torch.where(kept, 1 / s, 0)
    y = draw(3, *shape, seed=1)
    expected = vh.mT @ (inverse[..., None] * (u.mT @ y.flatten(1)[..., None]))
    # Rounding is magnified as noise is.
    magnified = 1e-14 / (s.where(kept, torch.inf).amin() / s.amax())
    assert close(operator.pinv(y).flatten(1), expected[..., 0], max(1e-10, 100 * float(magnified)))
    if rcond:
        z = operator.pinv(operator(operator.pinv(y)))
        assert close(z, operator.pinv(y))  # A⁺AA⁺ = A⁺
        assert close(
            operator(operator.pinv(operator(z))), operator(z)
        )  # AA⁺A = A on what A⁺ can reach
        assert operator.pinv(y).norm() <= y.norm() / (rcond * s[:, 0].amin())


def test_pinv_of_reflected_blur_is_damped():
    operator, matrix = bind("motion-reflect"), dense("motion-reflect")
    y = draw(3, 1, 6, 4, seed=1)
    system = matrix @ matrix.mT + 0.01 * torch.eye(24, dtype=torch.float64)
    expected = matrix.mT @ torch.linalg.solve(system, y.flatten(1))[..., None]
    assert close(operator.pinv(y).flatten(1), expected[..., 0], 1e-5)


MEAN = torch.full((4, 4), 0.25, dtype=torch.float64)


@pytest.mark.parametrize(
    "operator",
    [
        Separable(torch.ones(8, 5, dtype=torch.float64), MEAN),
        Convolution(torch.ones(1, 5, 2), "circular"),
        Ragged(),
    ],
)
def test_solve_without_shift_leaves_out_what_a_loses(operator):
    x = draw(3, 1, 5, 4)
    A = bound(operator, x)
    y = A(x)
    assert close(A(A.adjoint(A.solve(y, 0.0))), y)
    noisy = A.solve(draw(*y.shape, seed=1), 0.0)
    assert noisy.norm() < 100  # no division by rounding error
    assert close(A(A.pinv(y)), y)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("identity", "custom", "dense")])
def test_unbound_operators_say_so(name):
    x = torch.ones(1, 1, 6, 4)
    operator = OPERATORS[name]
    for act in (operator, operator.adjoint, operator.pinv, lambda y: operator.solve(y, 1.0)):
        with pytest.raises(InputError, match=f"{type(operator).__name__} is made for each batch"):
            act(x)


def test_binding_leaves_the_recipe_as_it_was():
    operator = Shear()
    assert bound(operator, torch.zeros(1, 1, 6, 4)).image_shape == (1, 6, 4)
    assert operator.image_shape == ()
    assert OPERATORS["random"] == RandomMask(0.9)


# Masks.


@pytest.mark.parametrize(("fraction", "removed"), [(0.9, 832), (0.5, 462), (0.0, 0), (0.333, 308)])
def test_random_mask_counts(fraction, removed):
    x = torch.ones(2, 3, 33, 28)
    operator = bound(RandomMask(fraction), x)
    y = operator(x)
    assert y.shape == (2, 3, 924 - removed)
    assert (y == 1).all()
    known = operator.adjoint(y)
    assert ((known == 0).sum((2, 3)) == removed).all()
    assert (known == known[:, :1]).all()


@pytest.mark.parametrize("recipe", [RandomMask(0.5), BoxMask(4, 2), MotionBlur(15)])
def test_draws_belong_to_the_image(recipe):
    def act(*ids: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (1, 32, 32)
        operator = recipe.bind(shape, SampleNoise(seed, ids), torch.zeros(1, dtype=dtype))
        x = draw(1, *shape, dtype=dtype).expand(len(ids), *shape)
        return operator.adjoint(operator(x))

    first = act("a", "b", "c")
    assert torch.allclose(act("c", "a"), first[[2, 0]], atol=1e-6)
    assert torch.allclose(act("a", dtype=torch.float64).float(), first[:1], atol=1e-5)
    for other in (first[1], first[2], act("a", seed=1)[0]):
        assert not torch.allclose(other, first[0], atol=1e-3)


def test_box_mask_positions():
    x = torch.ones(400, 2, 9, 11)
    operator = bound(BoxMask((3, 5), margin=2), x)
    y = operator(x)
    assert y.shape == (400, 2, 99 - 15)
    removed = operator.adjoint(y) == 0
    assert (removed == removed[:, :1]).all()
    tops, lefts = set(), set()
    for mask in removed[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        top, left = int(rows[0]), int(columns[0])
        assert mask[top : top + 3, left : left + 5].all()
        assert mask.sum() == 15
        tops.add(top)
        lefts.add(left)
    assert tops == {2, 3, 4}
    assert lefts == {2, 3, 4}


def test_mask_of_your_own():
    mask = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[0, 1, 1], [1, 0, 0]]])
    x = torch.arange(12.0).reshape(2, 1, 2, 3).expand(2, 4, 2, 3)
    operator = PixelMask.from_mask(mask.float(), x)
    expected = torch.tensor([[0.0, 5.0, 0.0], [7.0, 8.0, 9.0]])
    assert torch.equal(operator(x), expected[:, None].expand(2, 4, 3))
    assert torch.equal(operator.pinv(operator(x)), x * mask[:, None])
    assert torch.equal(operator.adjoint(torch.full((2, 4, 3), 9.0)), 9.0 * mask[:, None] + 0 * x)
    assert torch.equal(PixelMask.from_mask(mask[:1].bool(), x)(x)[:, 0], x[:, 0, [0, 1], [0, 2]])
    assert operator.solve(torch.ones(2, 4, 3), 0.0)[0, 0].tolist() == [1, 1, 0]
    assert operator.solve(torch.ones(2, 4, 3), 1.0)[0, 0].tolist() == [0.5, 0.5, 1]


def test_noise_is_on_measured_entries_only():
    noise = SampleNoise(0, ["a", "b"])
    x = torch.zeros(2, 3, 16, 16)
    problem = Problem.simulate(x, RandomMask(0.75), 0.1, noise)
    assert problem.y.shape == (2, 3, 64)
    assert (problem.y != 0).all()
    assert ((problem.operator.pinv(problem.y) != 0).sum((2, 3)) == 64).all()


# Blurs and downsampling against other people's code.


MODES = {"reflect": "mirror", "circular": "wrap"}
SIZES = [(32, 32), (33, 28), (3, 5), (1, 4), (2, 1)]


@pytest.mark.parametrize("padding", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_gaussian_blur_is_scipys(padding, size):
    x = draw(2, 3, *size)
    y = bound(GaussianBlur(61, 3.0, padding), x)(x)
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, 3, 3), mode=MODES[padding], truncate=4)
    assert close(y, torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "sd", "taps"), [(61, 5.0, 41), (61, 3.0, 25), (61, 9.0, 61), (4, 5.0, 3)]
)
def test_gaussian_kernel(kernel_size, sd, taps):
    kernel = GaussianBlur(kernel_size, sd).kernel()
    assert len(kernel) == taps
    assert float(kernel.sum()) == pytest.approx(1)
    assert float(kernel[0] / kernel[taps // 2]) == pytest.approx(
        math.exp(-((taps // 2) ** 2) / (2 * sd**2))
    )


@pytest.mark.parametrize("padding", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("taps", [(5, 5), (4, 7), (9, 40)])
def test_convolution_is_scipys(padding, size, taps):
    kernels, x = draw(2, *taps, seed=1), draw(2, 3, *size)
    y = bound(Convolution(kernels, padding), x)(x)
    for row in range(2):
        expected = ndimage.correlate(
            x[row].numpy(), kernels[row, None].numpy(), mode=MODES[padding]
        )
        assert close(y[row], torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_downsample_is_torchs_inside(factor):
    x = draw(1, 3, 16 * factor, 13 * factor)
    y = bound(Downsample(factor), x)(x)
    expected = torch.nn.functional.interpolate(
        x, scale_factor=1 / factor, mode="bicubic", antialias=True
    )
    assert y.shape == expected.shape
    inside = (..., slice(2, -2), slice(2, -2))  # torch renormalises at edges, MATLAB mirrors
    assert close(y[inside], expected[inside], 1e-6)
    assert not close(y, expected, 1e-6)


def test_downsample_mirrors_edges():
    x = draw(1, 1, 8, 12)
    outer = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (16, 16), (16, 16)), "symmetric"))
    y = bound(Downsample(4), x)(x)
    assert close(bound(Downsample(4), outer)(outer)[..., 4:-4, 4:-4], y, 1e-12)


def test_downsample_singular_values():
    operator = bound(Downsample(4), torch.zeros(1, 3, 256, 256, dtype=torch.float64))
    assert isinstance(operator, Separable)
    values = torch.linalg.svdvals(operator.height)
    assert float(values.min()) == pytest.approx(0.3485, abs=5e-5)
    assert float(values.max()) == pytest.approx(0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 61])
@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_motion_kernels(size, intensity):
    blur = MotionBlur(size, intensity)
    kernels = torch.stack([blur.kernel(np.random.default_rng(seed)) for seed in range(20)])
    assert kernels.shape == (20, size, size)
    assert kernels.min() >= 0
    assert torch.allclose(kernels.sum((1, 2)), torch.ones(20, dtype=torch.float64))
    if size > 3:
        assert len(kernels.flatten(1).unique(dim=0)) > 15


def test_straight_motion_is_straight():
    """A kernel's smaller second moment tells a line from a crooked path."""

    def crookedness(intensity: float) -> float:
        ratios = []
        place = torch.arange(61, dtype=torch.float64)
        for seed in range(40):
            k = MotionBlur(61, intensity).kernel(np.random.default_rng(seed))
            rows, columns = torch.meshgrid(place, place, indexing="ij")
            spread = torch.cov(
                torch.stack([rows.flatten(), columns.flatten()]), aweights=k.flatten()
            )
            low, high = torch.linalg.eigvalsh(spread)
            ratios.append(float((low / high).sqrt()))
        return float(np.median(ratios))

    assert crookedness(0.0) < 0.08 < 0.12 < crookedness(1.0)


@pytest.mark.parametrize("path", [[1e3 + 1e3j, 1e3 + 2e3j], [0j]])
def test_motion_that_draws_nothing_is_no_blur(monkeypatch, path):
    monkeypatch.setattr("cmi_lightning.operators.blur._path", lambda *_: np.array(path))
    kernel = MotionBlur(5).kernel(np.random.default_rng(0))
    assert kernel[2, 2] == kernel.sum() == 1


PILLOW = Image.Resampling.BICUBIC
TORCH: dict[str, dict[str, Any]] = {
    "pillow": {"antialias": True},
    "opencv": {},
    "aligned": {"align_corners": True},
}


@pytest.mark.parametrize("convention", TORCH)
@pytest.mark.parametrize(("factor", "size"), [(4, (32, 48)), (3, (9, 15)), (2, (2, 6))])
def test_conventions_of_bicubic_reduction_are_torchs(convention, factor, size):
    x = draw(2, 3, *size)
    y = bound(Downsample(factor, convention), x)(x)
    small = tuple(n // factor for n in size)
    theirs = torch.nn.functional.interpolate(x, small, mode="bicubic", **TORCH[convention])
    assert close(y, theirs, 1e-12)


def test_pillows_convention_is_pillows():
    x = draw(1, 1, 24, 32).float()
    y = bound(Downsample(4, "pillow"), x)(x)
    theirs = Image.fromarray(x[0, 0].numpy()).resize((8, 6), PILLOW)
    assert close(y[0, 0], torch.from_numpy(np.array(theirs)), 1e-6)


def test_channels():
    x = draw(2, 4, 5, 4)
    rgb = x[:, :3]
    assert close(bound(Colorize(), rgb)(rgb)[:, 0], rgb.mean(1), 1e-7)
    image = (torch.rand(5, 4, 3) * 255).byte()
    gray = np.array(Image.fromarray(image.numpy()).convert("L"))
    colours = image.permute(2, 0, 1)[None].double()
    ours = bound(Colorize("luminance"), colours)(colours)
    assert (ours[0, 0] - torch.from_numpy(gray)).abs().max() <= 0.51
    assert torch.equal(bound(Colorize(), x)(x)[:, 1], x[:, 3])  # alpha
    mosaic = bound(Demosaic("GBRG"), rgb)(rgb)[:, 0]
    for (row, column), channel in {(0, 0): 1, (0, 1): 2, (1, 0): 0, (1, 1): 1}.items():
        part = (slice(None), slice(row, None, 2), slice(column, None, 2))
        assert torch.equal(mosaic[part], x[:, channel][part])
    even = x[:, :, :4]
    assert close(bound(AveragePool(2), even)(even), torch.nn.functional.avg_pool2d(even, 2), 1e-12)


def test_a_blur_that_varies():
    x = draw(2, 2, 9, 12)
    same = bound(GivenKernel(KERNELS[0, 0].expand(2, 3, 3, 4)), x)
    assert close(same(x), bound(Convolution(KERNELS[:1, 0]), x)(x), 1e-12)
    y = bound(GivenKernel(KERNELS), x)(x)
    for row, corner in ((0, 0), (1, -1)):  # a corner is its own tile's alone
        alone = bound(Convolution(KERNELS[row, corner][None]), x)(x)
        assert close(y[..., corner, corner], alone[..., corner, corner], 1e-12)


def test_files_of_masks_and_kernels(tmp_path):
    x = draw(2, 3, 6, 4)
    mask = np.zeros((6, 4), np.uint8)
    mask[2:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    y = bound(Inpaint(str(tmp_path / "mask.png")), x)(x)
    assert torch.equal(y, x[:, :, 2:].flatten(2))
    np.save(tmp_path / "kernel.npy", 7 * KERNELS[0, 0].numpy())
    blur = bound(GivenKernel(str(tmp_path / "kernel.npy")), x)
    kernel = KERNELS[:1, 0] / KERNELS[0, 0].sum()
    assert close(blur(x), bound(Convolution(kernel), x)(x), 1e-6)


# What is refused.


def test_lengths_of_a_box_are_numbers_of_numpy_and_lists_too():
    x = torch.zeros(1, 1, 8, 8)
    masks = (BoxMask(4, 1), BoxMask(np.int64(4), np.uint8(1)), BoxMask([4, 0.5], np.float32(0.125)))
    one, *others = (bound(mask, x)(torch.arange(64.0).view(x.shape)) for mask in masks)
    for other in others:
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"class_path": "Identity"}, "Identity"),
        ({"class_path": "RandomMask", "init_args": {"fraction": 0.5}}, RandomMask(0.5)),
        ({"class_path": "BoxMask", "init_args": {"size": [3, 5]}}, BoxMask((3, 5))),
        ({"class_path": "BoxMask", "init_args": {"size": 3, "margin": 0}}, BoxMask(3, 0)),
        ({"class_path": "GaussianBlur", "init_args": {"sd": 3}}, GaussianBlur(sd=3.0)),
        ({"class_path": "Downsample", "init_args": {"factor": 8}}, Downsample(8)),
        (
            {"class_path": "MotionBlur", "init_args": {"padding": "circular"}},
            MotionBlur(padding="circular"),
        ),
    ],
)
def test_configuration(options, expected):
    options = {**options, "class_path": f"cmi_lightning.operators.{options['class_path']}"}
    made = configured({"operator": options}, operator=(LinearOperator, None)).operator
    assert made == expected or type(made).__name__ == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomMask(1.0), r"RandomMask\.fraction must be"),
        (lambda: RandomMask(-0.1), r"RandomMask\.fraction must be"),
        (lambda: BoxMask(0), r"BoxMask\.size must be"),
        (lambda: BoxMask("x"), r"BoxMask\.size must be"),
        (lambda: BoxMask(True), r"BoxMask\.size must be"),
        (lambda: BoxMask((3,)), r"BoxMask\.size must be"),
        (lambda: BoxMask(3, -1), "BoxMask.margin the same, or 0"),
        (lambda: GaussianBlur(0), r"GaussianBlur\.kernel_size must be"),
        (lambda: GaussianBlur(61, 0.0), r"GaussianBlur\.sd must be"),
        (lambda: GaussianBlur(rcond=1.0), r"GaussianBlur\.rcond must be"),
        (lambda: Downsample(0), r"Downsample\.factor must be"),
        (lambda: Downsample(2, "cubic"), "convention must be one of matlab, pillow"),
        (lambda: AveragePool(0), r"AveragePool\.factor must be"),
        (lambda: Colorize("red"), "one of mean, luminance"),
        (lambda: Demosaic("RGB"), "Demosaic.pattern must be one of RGGB, BGGR"),
        (lambda: ChannelMix(torch.ones(2, 3, 1, 1)), "in one y_k only"),
        (lambda: MotionBlur(0), r"MotionBlur\.kernel_size must be"),
        (lambda: MotionBlur(intensity=1.1), r"MotionBlur\.intensity must be"),
        (lambda: MotionBlur(rcond=-1.0), r"MotionBlur\.rcond must be"),
        (lambda: Convolution(torch.ones(3, 3)), r"\(batch, height, width\)"),
        (lambda: Separable(torch.eye(3), torch.eye(3), rcond=2), r"Separable\.rcond must be"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (BoxMask(28, 3), r"28×28 with a margin of 3 .* 33×28; lower"),
        (BoxMask((33, 28), 0), "every pixel"),
        (RandomMask(0.9999), "every pixel"),
        (Downsample(4), r"factor 4 .* 33×28: .*resize or crop"),
        (AveragePool(4), r"AveragePool with factor 4 .* 33×28: .*AveragePool.factor"),
        (Inpaint(torch.ones(8, 8)), "resize"),
        (Inpaint(torch.ones(2, 33, 28)), "resize"),
        (Inpaint("nowhere.png"), "nowhere.png"),
        (GivenKernel(torch.ones(3)), r"rows, columns, kh, kw\), got \(3,\)"),
        (GivenKernel("nowhere.npy"), "nowhere.npy"),
        (ChannelMix(torch.ones(1, 4, 1, 1)), r"\(4, 1, 1\), not \(3, 33, 28\)"),
        (Separable(torch.eye(28), torch.eye(28)), "28×28, not of 33×28"),
        (Convolution(torch.ones(3, 5, 5)), "3 blur kernels for 2 images"),
        (PixelMask.from_mask(torch.ones(2, 8, 8), torch.zeros(2, 3, 8, 8)), "made for images"),
        (PixelMask.from_mask(torch.ones(3, 33, 28), torch.zeros(3, 3, 33, 28)), "made for images"),
    ],
)
def test_bad_images(operator, words):
    with pytest.raises(InputError, match=words):
        bound(operator, torch.zeros(2, 3, 33, 28))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(8, 8), r"shape \(8, 8\)"),
        (torch.ones(3, 8, 8), "need \\(2, 8, 8\\)"),
        (torch.ones(2, 8, 7), "resize"),
        (torch.zeros(2, 8, 8), "every pixel"),
    ],
)
def test_bad_masks(mask, words):
    with pytest.raises(InputError, match=words):
        PixelMask.from_mask(mask, torch.zeros(2, 3, 8, 8))


def test_one_mask_serves_all_images():
    mask, x = torch.rand(1, 6, 4) > 0.5, draw(3, 2, 6, 4)
    one = bound(PixelMask.from_mask(mask, x[:1]), x)
    assert torch.equal(one(x), PixelMask.from_mask(mask, x)(x))


def test_numbers_drawn_for_pixels_do_not_depend_on_the_batch():
    shape, draws = (3, 6, 4), []
    for ids in (("0", "1", "2"), ("1",)):
        operator, noise = bind("ragged", shape, ids), SampleNoise(0, ids)
        y = operator(torch.zeros(len(ids), *shape, dtype=torch.float64))
        white = operator.sample_noise(lambda like, n=noise: n.normal("s", 0, like), y)
        assert white.shape == y.shape
        draws.append(white)
    kept = draws[1].shape[2]
    assert torch.equal(draws[0][1, :, :kept], draws[1][0])
    assert not draws[0][1, :, kept:].any()
    assert draws[1].all()
