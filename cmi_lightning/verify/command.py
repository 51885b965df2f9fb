"""``cmi-lightning verify``."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cmi_lightning.errors import InputError
from cmi_lightning.predict.options import prediction_cli
from cmi_lightning.verify import Check, exact_checks, network_checks


def verify(args: list[str]) -> int:
    """Print a table of checks and return 1 if one failed.

    Without arguments, the mathematics is checked on exact priors. With ``--denoiser`` (short for
    ``--model.denoiser``) or a configuration that names one, that network is; ``--size`` gives the
    side of the images where the network takes any.
    """
    size, args = _take(args, "--size")
    if size is not None and not size.isdecimal():
        raise InputError(f"--size must be a number of pixels, got '{size}'.")
    if not args:
        if size is not None:
            raise InputError(
                "--size is for the images of a network: give --denoiser or -c as well."
            )
        return _print_checks("exact priors, float64", exact_checks())
    if args[0] in ("-h", "--help"):
        print(str(verify.__doc__).partition("\n\n")[2])
        return 0
    options = [f"--model.{a[2:]}" if a.startswith("--denoiser") else a for a in args]
    cli = prediction_cli(options)
    denoiser = cli.model.denoiser
    denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
    checks = network_checks(denoiser, int(size) if size else None)
    return _print_checks(str(cli.config.model.denoiser.class_path), checks)


def _take(args: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of ``option``, in either spelling, and the other arguments."""
    value, rest = None, []
    remaining = iter(args)
    for arg in remaining:
        if arg == option:
            value = next(remaining, "")
        elif arg.startswith(f"{option}="):
            value = arg.removeprefix(f"{option}=")
        else:
            rest.append(arg)
    return value, rest


def _print_checks(title: str, checks: Iterable[Check]) -> int:
    """Print checks as they come, and return 1 if one failed, else 0."""
    import rich
    from rich.markup import escape

    colours = {"ok": "green", "FAIL": "bold red", "note": "yellow"}
    console = rich.get_console()
    console.print(f"[bold]{escape(title)}[/]\n   figure      bar  verdict", highlight=False)
    failed = total = 0
    for check in checks:
        total += check.bar is not None
        failed += not check.passed
        bar = "" if check.bar is None else f"{check.bar:g}"
        remark = f"  [dim]({escape(check.remark)})[/]" if check.remark else ""
        console.print(
            f"{check.figure:9.2g} {bar:>8}  [{colours[check.verdict]}]{check.verdict:7}[/] "
            f"{escape(check.name)}{remark}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"[bold red]{failed} of {total} checks failed[/]"
        if failed
        else f"all {total} checks passed"
    )
    return int(failed > 0)
