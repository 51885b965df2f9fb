"""One call: `restore` and `Restorer`."""

import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predicting import cli

from cmi_lightning import InputError, Restorer, configs, restore
from cmi_lightning.api import StoppedError
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import CMI, DPS
from cmi_lightning.methods import Method, methods, step_sizes
from cmi_lightning.operators import BoxMask, Downsample, GivenKernel, Identity, Inpaint, Operator

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (8, 8, 3), np.uint8)
TENSOR = torch.from_numpy(BYTES).permute(2, 0, 1)


def exact(channels: int = 3) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, channels, 8, 8), 0.2)


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer(exact(), steps=3)


KINDS = {
    "PIL": Image.fromarray(BYTES),
    "gray PIL": Image.fromarray(BYTES).convert("L"),
    "uint8": BYTES,
    "float64": BYTES / 255,
    "float32": (BYTES / 255).astype(np.float32),
    "the other byte order": (BYTES / 255).astype(np.dtype(np.float32).newbyteorder()),
    "gray": BYTES[..., 0],
    "batch": np.stack([BYTES, BYTES]),
    "tensor": TENSOR,
    "float tensor": TENSOR / 255,
    "gray tensor": TENSOR[0].double() / 255,
    "two": torch.stack([TENSOR, TENSOR]),
}


@pytest.mark.parametrize("image", KINDS.values(), ids=KINDS)
def test_the_same_kind_comes_out(restorer, image):
    result = restorer(image, samples=2, trajectory=1)
    for made in (result.image, *result.samples, result.measurement, *result.trajectory):
        assert type(made) is type(image)
        if isinstance(image, Image.Image):
            assert (made.size, made.mode) == (image.size, image.mode)
        else:
            wanted = np.float32 if getattr(image.dtype, "kind", "") == "f" else image.dtype
            assert (made.shape, made.dtype) == (image.shape, wanted)
    most = 1 if "float" in str(np.asarray(image).dtype) else 255
    assert float(np.asarray(result.image).max()) <= most


def test_a_file_is_its_picture(restorer, tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "mine.png")
    result = restorer(str(tmp_path / "mine.png"))
    assert result.names == ["mine"]
    alike = restorer(Image.open(tmp_path / "mine.png"), name="mine")
    assert np.array_equal(np.asarray(result.image), np.asarray(alike.image))
    (path,) = result.save(tmp_path / "out")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(result.image))


# The command line ------------------------------------------------------------------------------


def _predict(folder: Path, words: str, *options: str) -> dict[str, np.ndarray]:
    quiet = "--trainer.accelerator=cpu --trainer.logger=false --model.num_steps=3"
    quiet += f" --trainer.callbacks=[ImageWriter] --trainer.default_root_dir={folder}"
    assert cli(f"predict {words} {quiet}", *options) == 0
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path))
        for path in folder.glob("*/**/*.png")
    }


def test_pixels_are_those_of_the_command_line(tmp_path):
    """Given measurements with a mask, two draws, a size that the network does not take whole."""
    (tmp_path / "y").mkdir()
    image = Image.fromarray(RNG.integers(0, 256, (21, 19, 3), np.uint8))
    image.save(tmp_path / "y/a.png")
    mask = np.full((21, 19), 255, np.uint8)
    mask[5:12, 3:9] = 0
    Image.fromarray(mask).save(tmp_path / "m.png")
    options = "-c guidance/dps -c add_cmi --data=MeasurementFolderData --data.kind=inpaint"
    options += f" --data.measurements={tmp_path}/y --data.masks={tmp_path}/m.png"
    options += " --model.samples_per_image=2 --model.seed=3"
    written = _predict(tmp_path / "out", options, *_sizes(Inpaint("")))
    mask, own = Inpaint(str(tmp_path / "m.png")), {"steps": 3, "samples": 2, "seed": 3}
    result = restore(tmp_path / "y/a.png", mask, method="dps+cmi", device="cpu", **own)
    assert np.array_equal(written["restored/a.png"], np.asarray(result.image))
    for k, draw in enumerate(result.samples):
        assert np.array_equal(written[f"draws/a/{k}.png"], np.asarray(draw))


def test_simulated_damage_is_that_of_the_command_line(tmp_path):
    (tmp_path / "x").mkdir()
    Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "x/a.png")
    options = "-c task/super_resolution -c guidance/pigdm -c solver/ddim"
    written = _predict(tmp_path / "out", options, f"--data.folder={tmp_path / 'x'}")
    made = Restorer(method="pigdm", solver="ddim", steps=3, device="cpu")
    result = made(tmp_path / "x/a.png", Downsample(4), simulate=True)
    assert np.array_equal(written["restored/a.png"], np.asarray(result.image))


def _sizes(operator) -> list[str]:
    return [f"--step_sizes.{name}={size}" for name, size in step_sizes(operator).items()]


# Operators -------------------------------------------------------------------------------------


def test_what_the_mask_hides_is_not_used(restorer):
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[2:5, 2:5] = False
    other = TENSOR.clone()
    other[:, ~mask] = 0
    first, second = (restorer(x, Inpaint(mask)) for x in (TENSOR, other))
    assert torch.equal(first.image, second.image)
    assert not torch.equal(first.image, restorer(TENSOR).image)


def test_an_inverted_mask_is_told(restorer):
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[2:5, 2:5] = False
    painted = TENSOR.clone()
    painted[:, ~mask] = 255
    notes = [restorer(painted, Inpaint(m), name="beach").notes for m in (mask, ~mask)]
    told = ["The known pixels of 'beach' are of one colour" in "".join(n) for n in notes]
    assert told == [False, True]


def test_a_mask_of_an_operator_of_ones_own_is_its_own_affair():
    class Faded(Operator):
        mask = torch.ones(8, 8)

        def forward(self, x):
            return (self.mask * x).tanh()

    assert Restorer(exact(), "dps", steps=2)(TENSOR, Faded()).image.shape == (3, 8, 8)


def test_operators_that_change_the_size_and_that_do_not():
    restorer = Restorer(GaussianMixture(torch.zeros(1, 3, 16, 16), 0.2), steps=2)
    assert restorer(TENSOR, Downsample(2)).image.shape == (3, 16, 16)
    blurred = Restorer(exact(), steps=2)(TENSOR, GivenKernel(torch.ones(3, 3) / 9))
    assert blurred.measurement.shape == (3, 8, 8)


@pytest.mark.parametrize("size", [(64, 64), (72, 40), (67, 90), (13, 30)])
def test_any_size(size):
    result = restore(np.full((*size, 3), 100, np.uint8), steps=1)
    assert result.image.shape == (*size, 3)


def test_numbers_of_the_result(restorer):
    result = restorer(TENSOR / 255, sigma=0.1, samples=3)
    draws = torch.stack(result.samples)
    inside = (draws > 0).all(0) & (draws < 1).all(0)  # draws are clamped, their spread is not
    torch.testing.assert_close(result.std[inside], draws.std(0)[inside], atol=1e-5, rtol=0)
    single = restorer(TENSOR / 255, sigma=0.1)
    left = (TENSOR / 255 - single.image).norm() / (0.1 * 192**0.5)
    assert single.residual == [pytest.approx(float(left), rel=0.05)]
    assert single.std is None
    assert torch.equal(single.image, result.samples[0])  # the first draw is the only one's


def test_step_sizes_are_the_tasks():
    for operator, task in ((Identity(), "denoise"), (Downsample(2), "super_resolution")):
        assert step_sizes(operator) == configs.sections("task")[task]["step_sizes"]
    assert step_sizes(Downsample(4))["mcg"] != step_sizes(Identity())["mcg"]
    assert Method.of("dps", {"dps": 4.0}) == Method([DPS(4.0)])
    sizes = {"dsg": np.float32(0.5), "dsg_interval": np.int64(2)}
    assert repr(Restorer(exact(), "dsg", step_sizes=sizes).step_sizes) == str(
        {"dsg": 0.5, "dsg_interval": 2}
    )
    dsg, cmi = Method.of("dsg+cmi", {}).guidances
    assert type(dsg).__name__ == "DSG"
    assert cmi == CMI()


def test_a_method_brings_its_solver_and_steps():
    assert {"dps", "diffpir", "ddrm", "sitcom"} <= set(methods())
    assert not {"none", "ddim", "ddpm"} & set(methods())
    sitcom = Method.of("sitcom", {})
    assert (sitcom.steps, type(sitcom.solver).__name__) == (20, "Renoise")
    own = Restorer(exact(), "ddrm", steps=2)(BYTES)
    assert np.isfinite(own.residual[0])


# Steps, threads, stopping ----------------------------------------------------------------------


def test_steps_can_be_watched_and_left(restorer):
    seen = [(step.done, step.total, step.result is None) for step in restorer.steps(BYTES)]
    assert seen == [(1, 3, True), (2, 3, True), (3, 3, True), (3, 3, False)]
    for step in restorer.steps(BYTES):
        assert step.image.shape == BYTES.shape
        break


def test_a_call_in_a_thread_can_be_stopped(restorer):
    stop, begun = threading.Event(), threading.Event()

    class Slow(GaussianMixture):
        def forward(self, x, level):
            begun.set()
            stop.wait(60)
            return super().forward(x, level)

    slow = Restorer(Slow(torch.zeros(1, 3, 8, 8), 0.2), steps=50)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(slow, BYTES, stop=stop)
        assert begun.wait(60)
        stop.set()
        with pytest.raises(StoppedError, match="after 1 of 50"):
            running.result(60)


def test_threads_do_not_disturb_each_other(restorer):
    alone = [restorer(BYTES, seed=seed).image for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: restorer(BYTES, seed=seed).image, range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not np.array_equal(alone[0], alone[1])


def test_progress(restorer, capsys):
    restorer(BYTES)
    assert capsys.readouterr().err == ""
    restorer(BYTES, progress=True)
    assert "3/3" in capsys.readouterr().err


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        (BYTES.astype(np.float32), {}, "values from"),
        (TENSOR / 127.5 - 1, {}, "use (x + 1) / 2"),
        (BYTES.astype(np.int64), {}, "int64"),
        (BYTES.astype(object), {}, "must be uint8, or float in [0, 1]; got an array of object"),
        (BYTES * float("nan"), {}, "no numbers"),
        (TENSOR.numpy(), {}, "has 8 channels"),
        (torch.from_numpy(BYTES), {}, "come first in a tensor"),
        ([1, 2], {}, "got list"),
        (np.zeros((0, 3)), {}, "got an array (0, 3)"),
        ("no/such/file.png", {}, "There is no image file 'no/such/file.png'"),
        (BYTES, {"operator": Inpaint(torch.ones(4, 4))}, "(1, 4, 4)"),
        (BYTES, {"operator": Inpaint("no.png")}, "There is no file 'no.png' to take the mask from"),
        (BYTES, {"operator": GivenKernel("no.npy")}, "'no.npy' to take the kernel from"),
        (
            BYTES,
            {"operator": "inpaint"},
            "such as Inpaint(mask), GivenKernel(kernel) or Downsample",
        ),
        (BYTES, {"operator": Downsample}, "operator must be an operator"),
        (BYTES, {"num_steps": 3}, "restore has no argument 'num_steps'; did you mean steps?"),
        (BYTES, {"sigm": 0.1}, "did you mean sigma?"),
        (BYTES, {"quux": 1}, "restore has no argument 'quux'; help() lists them."),
        (BYTES, {"sigma": -1}, "sigma must be at least 0"),
        (BYTES, {"sigma": "much"}, "sigma must be at least 0, or 'estimate'"),
        (np.zeros((8, 8), np.uint8), {"sigma": "estimate"}, "cannot be estimated"),
        (BYTES, {"samples": 0}, "samples must be a whole number, at least 1, got 0"),
        (BYTES, {"samples": 1.5}, "samples must be a whole number, at least 1, got 1.5"),
        (BYTES, {"seed": 0.5}, "seed must be a whole number, got 0.5"),
        (BYTES, {"name": ["a", "b"]}, "2 names for 1 image"),
        (np.zeros((9, 8, 3), np.uint8), {"operator": BoxMask(2, 1)}, None),
        (np.zeros((7, 8, 3), np.uint8), {}, "3×7×8"),
    ],
)
def test_wrong_input_is_one_sentence(restorer, image, options, words):
    if words is None:
        assert restorer(image, **options).image.shape == image.shape  # tiled
        return
    with pytest.raises(InputError) as error:
        restorer(image, **options)
    assert words in str(error.value)
    assert "--" not in str(error.value)  # no flags: Python asks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "dbs"}, "There is no method 'dbs': use "),
        ({"solver": "euler9"}, "There is no solver 'euler9': use "),
        ({"prior": "faces"}, "'faces'"),
        ({"prior": 3}, "prior must be a name such as photos-64, or a Denoiser; got 3"),
        ({"method": DPS}, "list of guidances; got the class DPS"),
        ({"method": [DPS]}, "list of guidances; got the class DPS"),
        ({"solver": 3}, "solver must be a name such as ddim, or a Solver; got 3"),
        ({"method": "dsg", "solver": "heun"}, "DSG steers the solver's noise"),
        ({"method": "dsg", "step_sizes": {"dps": 1}}, "no step size 'dps': it reads dsg, d"),
        ({"method": [DPS()], "step_sizes": {"dps": 1}}, "no step size 'dps': it reads none"),
        ({"method": "dps", "step_sizes": {"dps": "4"}}, "step_sizes.dps must be a number, fin"),
        ({"device": "gpu"}, "device must be cpu, cuda or mps, as this machine has; got 'gpu'."),
        ({"device": "xpu:7"}, "as this machine has; got 'xpu:7'."),
    ],
)
def test_wrong_parts_are_refused_at_once(options, words):
    with pytest.raises(InputError) as error:
        Restorer(**options)
    assert words in str(error.value)


def test_cmi_needs_noise():
    with pytest.raises(InputError, match="give a sigma above 0"):
        Restorer(exact(), "dps+cmi", steps=2)(BYTES, sigma=0)


def test_a_restoration_that_does_not_fit_says_so():
    result = Restorer(exact(), [], steps=2)(BYTES, sigma=0.01)
    (note,) = result.notes
    assert note.startswith("The restorations do not fit the measurements")


# Notebooks -------------------------------------------------------------------------------------


def test_a_notebook_shows_before_and_after(restorer):
    result = restorer(BYTES, samples=2, name="<script>x</script>")
    tags: list[tuple[str, dict]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Parser().feed(result._repr_html_())
    assert not [tag for tag, _ in tags if tag == "script"]
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 3  # after, before, and the spread of the draws
    assert all(image["alt"] and image["src"].startswith("data:image/png") for image in images)
    (slider,) = [attrs for tag, attrs in tags if tag == "input"]
    assert slider["aria-label"] == "before and after"
    assert result._repr_png_().startswith(b"\x89PNG")
    assert repr(result) == "Restored(1 image of 8×8 pixels, 2 draws, seed 0)"
