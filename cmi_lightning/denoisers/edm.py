"""Networks of Karras et al. (EDM), and what answers like them: consistency models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import one_hot

from cmi_lightning.checked import check
from cmi_lightning.denoisers.wrapped import WrappedNetwork
from cmi_lightning.schedule import Level, Schedule, ScheduleName


class EDMDenoiser(WrappedNetwork):
    """x̂₀ = D(x_t/α; σ/α), for a network that denoises x₀ + σ ε, or for the raw F inside one.

    With ``preconditioned`` the network is D(x; σ) itself, as NVlabs' EDM objects are, called with
    (x, σ (B,)). Otherwise it is F, called with (c_in x, c_noise (B,)), and
    D(x; σ) = c_skip x + c_out F(c_in x; c_noise), where with s = ``sigma_data``

        c_skip = s²/(σ² + s²), c_out = σ s/√(σ² + s²), c_in = 1/√(σ² + s²), c_noise = ln(σ)/4.

    Dividing by α brings any other schedule, such as "linear" or "vp", to these terms, so that an
    EDM network also runs on the levels of a DDPM chain.

    Args:
        network: D, or F. NVlabs' ``.pkl`` files hold code: save ``ema.state_dict()`` of one as
            ``.safetensors`` once, and give the class (``EDMPrecond``) here.
        weights: see :class:`NetworkDenoiser`.
        schedule: levels; the default is 100 of Karras et al.'s from σ = 0.002 to 80.
        preconditioned: the network is D rather than F.
        sigma_data: standard deviation of the images, s, which F was trained with.
        image_shape: (C, H, W), with None where the network takes any size.
        value_range: see :class:`NetworkDenoiser`.
        options: ``sha256``, ``weights_part``, ``condition``, ``unconditional``, ``guidance_scale``,
            see there. A class is told as NVlabs' networks take it, as a vector of ``label_dim``
            numbers.

    Raises:
        InputError: see :class:`NetworkDenoiser`.

    Source: Karras et al. (2022), Table 1 and Eq. 7.
    """

    def __init__(
        self,
        network: nn.Module | Callable,
        weights: str | None,
        schedule: Schedule | ScheduleName = "edm",
        preconditioned: bool = True,
        sigma_data: float = 0.5,
        image_shape: tuple[int | None, int | None, int | None] | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(
            network,
            weights,
            schedule,
            "x0",
            image_shape,
            value_range,
            time="c_noise",
            learns_variance=False,
            **options,
        )
        self.preconditioned, self.sigma_data = preconditioned, sigma_data
        check(self, sigma_data="(0, inf)")

    def _call(self, u: Tensor, level: Level, told: dict[str, Any]) -> Tensor:
        x, sigma = u / level.alpha, level.sigma / level.alpha
        if (classes := getattr(self.network, "label_dim", 0)) and "class_labels" in told:
            labels = told["class_labels"]
            if not labels.is_floating_point():
                told = told | {"class_labels": one_hot(labels, classes).to(u.dtype)}
        output: Tensor
        if self.preconditioned:
            output = self.network(x, self._fill(u, sigma), **told)
            return output
        total = sigma**2 + self.sigma_data**2
        output = self.network(x / math.sqrt(total), self._fill(u, math.log(sigma) / 4), **told)
        c_out = sigma * self.sigma_data / math.sqrt(total)
        return self.sigma_data**2 / total * x + c_out * output
