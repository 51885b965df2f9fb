"""``cmi-lightning verify``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from cmi_lightning.errors import InputError
from cmi_lightning.predict.options import prediction_cli
from cmi_lightning.verify import Check, exact_checks, image_shape, network_checks, operator_checks


def verify(args: list[str]) -> int:
    """Print a table of checks and return 1 if one failed.

    Without arguments, the installation is checked on exact priors. With ``--denoiser`` (short for
    ``--model.denoiser``) that network is, with ``--operator`` (``--model.operator``) that operator,
    with a configuration (``-c``) both of its. ``--size`` gives the side of the images where the
    network takes any; an operator alone is checked on three channels of that size, or 64.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--size", nargs="?", const="")
    found, args = own.parse_known_args(args)
    size: str | None = found.size
    if size is not None and not (size.isdecimal() and int(size) > 0):
        raise InputError(f"--size must be a number of pixels, got '{size}'.")
    if not args:
        if size is not None:
            raise InputError(
                "--size is for the images of a network or an operator: give --denoiser, --operator "
                "or -c as well."
            )
        return _print_checks("exact priors, float64", exact_checks())
    if args[0] in ("-h", "--help"):
        print(str(verify.__doc__).partition("\n\n")[2])
        return 0
    short = ("--denoiser", "--operator")
    cli = prediction_cli([f"--model.{a[2:]}" if a.startswith(short) else a for a in args])
    side, denoiser, operator = int(size) if size else None, cli.model.denoiser, cli.model.operator
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = {name: any(a.startswith(name) for a in args) for name in short}
    configured = any(a.startswith(("-c", "--config")) for a in args)
    failed = 0
    if named["--denoiser"] or not named["--operator"]:
        checks = network_checks(denoiser.to(device), side)
        failed |= _print_checks(str(cli.config.model.denoiser.class_path), checks)
    if named["--operator"] or (configured and not named["--denoiser"]):
        alone = not (configured or named["--denoiser"])
        shape = (3, side or 64, side or 64) if alone else image_shape(denoiser, side)
        failed |= _print_checks(type(operator).__name__, operator_checks(operator, shape, device))
    return failed


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
