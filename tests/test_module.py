"""The Lightning module, used as plain Python."""

import copy
import subprocess
import sys

import lightning as L
import pytest
import torch
from predicting import items, restore, trainer
from torch.utils.data import DataLoader

from cmi_lightning import GaussianNoise, InputError, PosteriorSampler
from cmi_lightning.denoisers import NetworkDenoiser
from cmi_lightning.exact import GaussianMixture, GaussianPrior
from cmi_lightning.guidance import CMI, DPS
from cmi_lightning.information import Lanczos, TraceLimit
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Downsample, Gamma, Identity
from cmi_lightning.predict.fingerprint import of_run
from cmi_lightning.predict.memory import Parts
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM, Resampled


def run(module: PosteriorSampler, data, *callbacks: L.Callback, size: int = 4, **options) -> list:
    """Restore images, or items, or what a data module has."""
    data = items(data) if torch.is_tensor(data) else data
    return restore(None, module, data, *callbacks, batch_size=size, **options)


@pytest.fixture
def module(prior) -> PosteriorSampler:
    return PosteriorSampler(
        prior,
        BoxMask(14, 4),
        DDPM(),
        [CMI(interval=1, estimator=Lanczos(krylov=2)), DPS()],
        num_steps=4,
    )


@pytest.mark.parametrize("inference_mode", [True, False])
def test_predict_equals_the_core_in_either_mode(module, prior, shipped_images, inference_mode):
    x = shipped_images[:2]
    (restoration,) = run(module, x, inference_mode=inference_mode)
    noise = SampleNoise(0, ["set/0", "set/1"])
    problem = Problem.simulate(x, BoxMask(14, 4), 0.05, noise)
    expected = Sampler(prior, DDPM(), [CMI(interval=1, estimator=Lanczos(krylov=2)), DPS()], 4).run(
        problem, noise, x
    )
    assert torch.equal(restoration["restored"], expected)
    assert torch.equal(restoration["details"].problem.y, problem.y)
    assert restoration["id"] == noise.ids
    assert restoration["details"].record.forwards == 4
    assert restoration["seconds"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(prior, shipped_images, precision):
    module = PosteriorSampler(copy.deepcopy(prior), BoxMask(14, 4), guidances=[DPS()], num_steps=4)
    (restoration,) = run(module, shipped_images[:2], precision=precision)
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert restoration["details"].problem.y.dtype == wanted  # the measurement is never lowered
    assert restoration["restored"].dtype == wanted
    reference = PosteriorSampler(prior, BoxMask(14, 4), guidances=[DPS()], num_steps=4)
    (full,) = run(reference, shipped_images[:2])
    difference = (restoration["restored"] - full["restored"]).abs().mean()
    assert 0 < float(difference) < (1e-4 if precision == "64-true" else 0.05)


def test_half_precision_on_the_cpu_is_bfloat16(prior, shipped_images):
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        half = trainer(None, precision="16-mixed")
    bfloat = trainer(None, precision="bf16-mixed")
    module = PosteriorSampler(prior, BoxMask(14, 4), guidances=[DPS()], num_steps=2)
    data = DataLoader(items(shipped_images[:2]), 2)
    a, b = (t.predict(module, data)[0]["restored"] for t in (half, bfloat))
    assert torch.equal(a, b)
    # a run of one is gone on with by the other
    assert of_run(module, half, None) == of_run(module, bfloat, None)


def test_double_precision_measures_in_double_precision(shipped_images):
    x = shipped_images[:2]
    module = PosteriorSampler(GaussianMixture(torch.zeros(1, 1, 32, 32), 0.2), Downsample(4))
    module.num_steps = 2
    (restoration,) = run(module, x, precision="64-true")
    noise = SampleNoise(0, ["set/0", "set/1"])
    operator = Downsample(4).bind((1, 32, 32), noise, x.double())
    wanted = Problem.simulate(x.double(), operator, 0.05, noise).y
    y = restoration["details"].problem.y
    assert y.dtype == restoration["restored"].dtype == torch.float64
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-14)
    single = Problem.simulate(x, Downsample(4), 0.05, noise).y
    assert float((single.double() - wanted).abs().max()) > 1e-9  # what single precision loses


@pytest.mark.parametrize("draws", [1, 2])
def test_residuals_of_the_draws_survive_a_batch_in_parts(prior, shipped_images, draws):
    module = PosteriorSampler(
        prior, BoxMask(14, 4), guidances=[DPS()], num_steps=2, samples_per_image=draws
    )
    batch = {"x": shipped_images[:5], "id": [f"set/{i}" for i in range(5)]}
    whole = module.predict_step(batch)
    problem = whole["details"].problem
    each = whole["restored"][:, None] if draws == 1 else whole["draws"]
    assert whole["residual_draws"].shape == (5, draws)
    for k, x in enumerate(each.unbind(1)):
        residual = (problem.y - problem.operator(x)).flatten(1).norm(dim=1)
        torch.testing.assert_close(whole["residual_draws"][:, k], residual)
    module.parts[shipped_images.shape[1:]].size = 2  # as after running out of memory
    parts = module.predict_step(batch)
    assert len(parts["details"].problem.y) == 1
    torch.testing.assert_close(parts["residual_draws"], whole["residual_draws"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("fit", [None, 2])
def test_a_noise_level_of_its_own_is_kept_with_each_image(prior, shipped_images, fit):
    levels = torch.tensor([0.1, 0.02, 0.3])
    batch = {"y_image": shipped_images[:3], "id": ["a", "b", "c"]}
    module = PosteriorSampler(prior, guidances=[DPS()], num_steps=2)
    module.parts[shipped_images.shape[1:]] = parts = Parts()
    parts.size = fit
    assert "sigma" not in module.predict_step(batch)["records"][0]
    records = module.predict_step({**batch, "sigma": levels})["records"]
    assert [record["sigma"] for record in records] == levels.tolist()
    assert [record["id"] for record in records] == ["a", "b", "c"]


def test_given_measurements_need_no_truth(prior, shipped_images):
    given = items(shipped_images[:2], given=True)
    for i, item in enumerate(given):
        item["mask"] = torch.rand(32, 32, generator=torch.manual_seed(i)) > 0.3 + 0.2 * i
    module = PosteriorSampler(prior, guidances=[DPS()], num_steps=3)
    (restoration,) = run(module, given)
    assert restoration["truth"] is None
    for i, item in enumerate(given):
        kept = item["mask"]
        assert torch.equal(restoration["measurement"][i][:, kept], item["y_image"][:, kept])
        assert bool((restoration["measurement"][i][:, ~kept] == 0).all())


@pytest.mark.parametrize("kind", ["kernel", "factor", "plain"])
def test_other_given_measurements(prior, shipped_images, kind):
    y = shipped_images[0, :, ::4, ::4] if kind == "factor" else shipped_images[0]
    extra = {"kernel": {"kernel": torch.full((3, 3), 1 / 9)}, "factor": {"factor": 4}}.get(kind, {})
    module = PosteriorSampler(prior, guidances=[DPS()], num_steps=3)
    (restoration,) = run(module, [{"y_image": y, "id": "a", **extra}])
    assert restoration["restored"].shape == (1, 1, 32, 32)
    assert bool(torch.isfinite(restoration["restored"]).all())


def test_plain_loaders_are_checked_too(prior):
    with pytest.raises(InputError, match="3×32×32"):
        run(PosteriorSampler(prior), torch.zeros(1, 3, 32, 32))


def test_images_are_checked_before_sampling(prior):
    class Images(L.LightningDataModule):
        image_shape = (1, 24, 32)

        def predict_dataloader(self):
            raise AssertionError("sampling must not start")

    with pytest.raises(InputError, match="1×24×32"):
        run(PosteriorSampler(prior), Images())
    Images.image_shape = (1, 32, 32)
    with pytest.raises(InputError, match="factor 5"):
        run(PosteriorSampler(prior, Downsample(5)), Images())


def test_noise_range_is_stated_and_converted(prior):
    assert GaussianNoise(0.05).level == 0.05
    assert GaussianNoise(0.05, "unit").level == 0.1
    described = PosteriorSampler(prior, noise=GaussianNoise(0.05, "unit")).describe()
    assert described["noise"] == "σ = 0.1 on [−1, 1] = 0.05 on [0, 1]"


def test_observers_see_every_step(shipped_images):
    prior = GaussianMixture(torch.zeros(1, 1, 8, 8), 0.2)
    seen = []

    class Watch(L.Callback):
        def on_sampling_start(self, trainer, pl_module, ids, problem):
            seen.append(ids)

        def on_sampling_step(self, trainer, pl_module, record):
            seen.append(record.index)

    module = PosteriorSampler(prior, Identity(), num_steps=3)
    run(module, torch.zeros(2, 1, 8, 8), Watch())
    assert seen == [["set/0", "set/1"], 2, 1, 0]


def test_import_is_light(tmp_path):
    heavy = "lpips torch_fidelity matplotlib torchvision.models torchmetrics scipy lightning"
    loaded = f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    code = (
        "import sys, cmi_lightning, cmi_lightning.guidance, cmi_lightning.solvers, "
        f"cmi_lightning.operators, cmi_lightning.denoisers; {loaded}; "
        "from PIL import Image; from cmi_lightning.operators import Downsample; "
        f"path = {str(tmp_path / 'x.png')!r}; Image.new('L', (8, 8)).save(path); "
        f"cmi_lightning.restore(path, Downsample(2), steps=1); {loaded}"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == ["[]", "[]"]


def test_a_run_says_at_which_steps_cmi_acts(prior):
    module = PosteriorSampler(prior, guidances=[CMI(), DPS()], num_steps=20)
    assert module.describe()["CMI"].startswith("acts at 4 of 20 steps, for 0.30 of the 40 passes")
    assert "CMI" not in PosteriorSampler(prior, guidances=[DPS()], num_steps=20).describe()
    module = PosteriorSampler(prior, Gamma(2.2), guidances=[CMI(), DPS()], num_steps=20)
    assert module.describe()["CMI"].startswith("acts at 2 of 20 steps, for 0.30 of the 40 passes")
    walks = Resampled(DDPM(), jump=5, repeats=3)
    module = PosteriorSampler(prior, solver=walks, guidances=[CMI(), DPS()], num_steps=20)
    said = "acts at 4 of 20 steps, for 0.30 of the 40 passes without it, in each of 3 walks"
    assert module.describe()["CMI"] == said


class Waves(torch.nn.Conv2d):
    """A network of one layer."""

    def forward(self, x, times):
        return torch.sin(super().forward(x) + times[:, None, None, None] / 1000)


def test_a_compiled_network_restores_the_same(monkeypatch):
    def restored(**options) -> torch.Tensor:
        prior = NetworkDenoiser(Waves(1, 1, 3, padding=1), None)
        module = PosteriorSampler(prior, BoxMask(4, 1), None, [CMI(), DPS()], 4, **options)
        return module.predict_step({"x": torch.ones(2, 1, 8, 8), "id": ["a", "b"]})["restored"]

    calls, torch_compile = [], torch.compile

    def quickly(model, **options):  # without a compiler of C++
        calls.append(model)
        return torch_compile(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quickly)
    torch.manual_seed(0)
    plain = restored()
    assert not calls
    torch.manual_seed(0)
    torch.testing.assert_close(restored(compile=True), plain, rtol=0, atol=1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("prior", "guidance", "words"),
    [
        (GaussianPrior(torch.zeros(1, 8, 8)), DPS(), "needs a network"),
        (None, CMI(estimator=TraceLimit()), "CMI.* takes second ones: leave compile out"),
    ],
)
def test_what_cannot_be_compiled_is_refused(prior, guidance, words):
    prior = prior or NetworkDenoiser(Waves(1, 1, 3, padding=1), None)
    batch = {"x": torch.ones(1, 1, 8, 8), "id": ["a"]}
    with pytest.raises(InputError, match=words):
        PosteriorSampler(prior, None, None, [guidance], 4, compile=True).predict_step(batch)
