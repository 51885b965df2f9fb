"""`cmi-lightning verify`: green as it stands, and red when something is broken."""

import dataclasses

import pytest
import torch
from torch import nn

from cmi_lightning.cli import main
from cmi_lightning.denoisers import NetworkDenoiser
from cmi_lightning.errors import InputError
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import MomentMatching
from cmi_lightning.information import Lanczos, TraceLimit
from cmi_lightning.operators import (
    HDR,
    JPEG,
    Downsample,
    GaussianBlur,
    LinearOperator,
    MotionBlur,
    NonlinearBlur,
    Operator,
    PhaseRetrieval,
)
from cmi_lightning.verify import Check, command, exact, network_checks, operator_checks


def test_every_exact_check_passes(capsys):
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    assert "all 20 checks passed" in out
    assert "FAIL" not in out


def names_of_failures(checks) -> str:
    return "\n".join(check.name for check in checks if not check.passed)


def test_a_biased_estimator_is_caught(monkeypatch):
    honest = Lanczos.probe

    def biased(self, step, draw):
        information = honest(self, step, draw)
        return information._replace(gradient=1.1 * information.gradient)

    monkeypatch.setattr(Lanczos, "probe", biased)
    failed = names_of_failures(exact._estimators())
    assert "Lanczos: to exact ∇I" in failed
    assert "ImageProbes" not in failed


def test_a_wrong_value_is_caught(monkeypatch):
    honest = TraceLimit.probe
    monkeypatch.setattr(
        TraceLimit,
        "probe",
        lambda self, step, draw: (i := honest(self, step, draw))._replace(value=1.2 * i.value),
    )
    assert names_of_failures(exact._estimators()) == (
        f"TraceLimit: mean of {exact.PROBES} probes to exact I, in standard errors"
    )


def test_a_wrong_guidance_is_caught(monkeypatch):
    honest = MomentMatching.guide_denoised
    monkeypatch.setattr(
        MomentMatching,
        "guide_denoised",
        lambda self, step, x0: honest(dataclasses.replace(self, scale=0.99), step, x0),
    )
    assert "MomentMatching" in names_of_failures(exact._posterior_means())
    assert "ΠGDM" not in names_of_failures(exact._posterior_means())


def test_a_wrong_adjoint_is_caught(monkeypatch):
    concrete = type(Downsample(4).bind((3, 16, 12), None, torch.zeros(1)))
    honest = concrete.adjoint
    monkeypatch.setattr(concrete, "adjoint", lambda self, y: 1.001 * honest(self, y))
    assert "⟨Ax, y⟩ = ⟨x, Aᵀy⟩" in names_of_failures(exact._operators())


def test_exit_code_1_names_what_failed(monkeypatch, capsys):
    checks = [Check("sound", 0.5, 1.0), Check("broken", 2.0, 1.0), Check("read me", 9.0, None)]
    monkeypatch.setattr(command, "exact_checks", lambda: checks)
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 checks failed" in out
    assert [line.split()[2] for line in out.splitlines() if "broken" in line] == ["FAIL"]
    assert not Check("not a number", float("nan"), 1.0).passed


def test_a_network_from_the_command_line(capsys):
    assert main(["verify", "--denoiser", "cmi_lightning.denoisers.shipped_prior"]) == 0
    out = capsys.readouterr().out
    assert "first derivatives" in out
    assert "asymmetry of J" in out


def test_an_exact_prior_is_symmetric_and_positive(capsys):
    options = ["--denoiser=cmi_lightning.exact.power_law_prior"]
    options += ["--denoiser.init_args.image_shape=[1,8,8]", "--denoiser.init_args.std=0.5"]
    assert main(["verify", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    asymmetries = [float(line.split()[0]) for line in lines if "asymmetry" in line]
    assert len(asymmetries) == 3
    assert max(asymmetries) < 1e-3
    assert min(float(line.split()[0]) for line in lines if "smallest" in line) > 0


class Unsteady(nn.Module):
    """A network that looks at the whole batch, and whose gradient is wrong."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw = flaw

    def forward(self, x, times):
        smooth = torch.tanh(x)
        if self.flaw == "batch":
            return smooth * (1 + 0.1 * x.mean())
        if self.flaw == "gradient":
            return smooth + (torch.sin(3 * x)).detach()
        if self.flaw == "nan":
            return smooth * torch.nan
        return smooth


@pytest.mark.parametrize(
    ("flaw", "name"),
    [
        ("none", ""),
        ("batch", "alone = in a batch"),
        ("gradient", "first derivatives"),
        ("nan", "finite images"),
    ],
)
def test_a_broken_network_is_caught(flaw, name):
    network = NetworkDenoiser(Unsteady(flaw), None, image_shape=(1, None, None))
    failed = names_of_failures(network_checks(network, size=8))
    assert name in failed if name else not failed


def test_the_images_are_where_the_network_is():
    seen = []

    class Spy(NetworkDenoiser):
        def forward(self, x, level):
            seen.append(x.device.type)
            raise InputError("seen")

    network = Spy(nn.Conv2d(1, 1, 1, device="meta"), None, image_shape=(1, 8, 8))
    with pytest.raises(InputError, match="seen"):
        list(network_checks(network))
    assert seen == ["meta"]


class Stripes(LinearOperator):
    """A user's operator: every other column, brighter; and one flaw."""

    def __init__(self, flaw: str = "none") -> None:
        self.flaw = flaw

    def forward(self, x):
        y = 2 * x[..., ::2]
        if self.flaw == "nonlinear":
            return y + 0.1
        if self.flaw == "batch":
            return y - x.mean()
        if self.flaw == "type":
            return y.float()
        if self.flaw == "nan":
            return y * torch.nan
        return single(y) if self.flaw == "float32" else y

    def adjoint(self, y):
        if self.flaw == "adjoint":
            x = y.new_zeros(len(y), *self.image_shape)
            x[..., 1::2] = 2 * y
            return x
        return super().adjoint(y)

    def pinv(self, y):
        return super().pinv(y) * (1.1 if self.flaw == "inverse" else 1)


def single(y):
    if y.dtype == torch.float64:
        raise TypeError("float32 only")
    return y


@pytest.mark.parametrize(
    ("flaw", "names"),
    [
        ("none", []),
        ("adjoint", ["⟨Ax, y⟩ = ⟨x, Aᵀy⟩", "A A⁺ A x = A x"]),
        ("batch", ["an image alone = in a batch"]),
        ("nonlinear", ["A (2x + z) = 2 A x + A z"]),
        ("type", ["keep dtype"]),
        ("float32", ["keep dtype"]),
        ("nan", ["finite"]),
        ("inverse", ["A A⁺ A x = A x"]),
    ],
)
def test_a_broken_operator_is_caught(flaw, names):
    failed = names_of_failures(operator_checks(Stripes(flaw), (2, 6, 8)))
    assert all(name in failed for name in names)
    assert names or not failed


class Cubed(Operator):
    """A user's nonlinear operator, and one flaw."""

    def __init__(self, flaw: str = "none") -> None:
        self.flaw = flaw

    def forward(self, x):
        if self.flaw == "gradient":
            return x**3 + (9 * x).sin().detach()
        if self.flaw == "batch":
            return x**3 / x.square().mean()
        return x**3

    def vjp(self, x, v):
        return super().vjp(x, v) * (1.1 if self.flaw == "vjp" else 1)

    def guess(self, y):
        return y[..., :2] if self.flaw == "guess" else y


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (Cubed(), ""),
        (Cubed("vjp"), "⟨A'u, y⟩ = ⟨u, A'ᵀy⟩ at an image"),
        (Cubed("batch"), "an image alone = in a batch"),
        (Cubed("guess"), "guess(y) is a finite image"),
        *((operator, "") for operator in (HDR(), JPEG(), PhaseRetrieval(), NonlinearBlur())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nonlinear_operators_are_checked_by_their_derivatives(operator, name):
    failed = names_of_failures(operator_checks(operator, (3, 6, 8)))
    assert name in failed if name else not failed


def test_a_gradient_that_is_not_the_operators_is_read_from_a_note():
    for flaw, low, high in (("none", 0, 1e-6), ("gradient", 0.1, 10)):
        checks = operator_checks(Cubed(flaw), (1, 8, 8))
        (note,) = [c.figure for c in checks if c.bar is None]
        assert low <= note < high


@pytest.mark.parametrize("operator", [GaussianBlur(9, 2.0), MotionBlur(5, padding="circular")])
def test_what_a_truncated_inverse_leaves_out_is_a_note(operator):
    notes = [c for c in operator_checks(operator, (1, 8, 8)) if c.bar is None]
    assert [(c.name, "rcond" in c.remark) for c in notes] == [("A A⁺ A x = A x", True)]


def test_an_operator_from_the_command_line(tmp_path, capsys):
    options = ["--operator", "cmi_lightning.operators.BoxMask", "--operator.init_args.size", "8"]
    assert main(["verify", *options]) == 0
    out = capsys.readouterr().out
    assert "BoxMask" in out
    assert "asymmetry" not in out
    assert main(["verify", *options, "--size", "16"]) == 2
    assert "lower BoxMask.size" in capsys.readouterr().err
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  operator: {class_path: cmi_lightning.operators.Downsample}\n")
    assert main(["verify", "-c", "prior/power_law", "-c", str(config)]) == 0
    out = capsys.readouterr().out
    assert "Downsample" in out
    assert "asymmetry of J" in out


def test_a_prior_over_vectors():
    prior = GaussianPrior(torch.zeros(6, dtype=torch.float64), 1.0)
    assert not names_of_failures(network_checks(prior))


def test_help(capsys):
    assert main(["verify", "--help"]) == 0
    assert "--denoiser" in capsys.readouterr().out


def test_bad_size(capsys):
    assert main(["verify", "--size", "32"]) == 2
    assert "give --denoiser, --operator or -c" in capsys.readouterr().err
    assert main(["verify", "--size", "large"]) == 2
    assert "size must be a number of pixels" in capsys.readouterr().err
