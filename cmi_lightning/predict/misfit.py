"""Whether restorations fit their measurements."""

from __future__ import annotations

import math

from cmi_lightning.predict.restoration import Restoration

FAR = 2.0  # residuals, in units of the noise's, that no right restoration has


def fits(result: Restoration) -> list[float]:
    """Return ‖y − A x̂‖ / (σ√m) of the samples of a batch that did not fail."""
    pairs = zip(result["id"], (result["residual"] / result["noise_norm"]).tolist(), strict=True)
    return [fit for name, fit in pairs if name not in result["failed"]]


def misfit(fits: list[float], given: bool) -> str | None:
    """Return a sentence if ‖y − A x̂‖ / (σ√m) of each image is far above 1; None if they fit.

    >>> misfit([0.9, 1.1], given=True)
    """
    finite = sorted(fit for fit in fits if math.isfinite(fit))
    if not finite or (middle := finite[len(finite) // 2]) <= FAR:
        return None
    causes = "too few steps, or a step size (scale) that is too small or too large"
    if given:
        causes = (
            "a kernel of the other convention (data.kernel_convention), a reduction without "
            f"antialiasing, an inverted mask, a noise level that is too low, {causes}"
        )
    return (
        f"The restorations do not fit the measurements: ‖y − A x̂‖ is {middle:.3g} times what "
        f"noise alone leaves (median of {len(finite)} images). Usual causes: {causes}."
    )
