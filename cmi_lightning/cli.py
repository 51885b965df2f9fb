"""The command line, ``cmi-lightning``: predict, studio, fit, verify, tune, table, fetch.

``predict`` and ``fit`` are Lightning's own command-line interface over
:class:`cmi_lightning.PosteriorSampler` and :class:`cmi_lightning.training.ScoreTraining`: every
constructor argument is an option, files given by ``-c`` overlay each other, and a name that is no
file in reach is looked up among the packaged configurations. ``verify`` checks the mathematics, or
a network. ``table`` and ``tune`` run many predictions and compare them. ``studio`` serves a page.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from cmi_lightning import configs, errors
from cmi_lightning.errors import InputError

USAGE = """\
usage: cmi-lightning COMMAND [-c CONFIG] ... [--option VALUE] ...

  predict   restore images: measure them (or read measurements), sample, write images and metrics
  studio    restore photographs on a page in your browser
  fit       train a score network
  verify    check the mathematics on exact priors; with --denoiser or -c, check that network
  tune      choose the step sizes of a table on validation images
  table     methods with and without CMI on tasks: restore, compare, write a report
  lle       train the coefficients that make a method of few steps better
  configs   list the configurations that ship with the package
  fetch     bring the networks of LPIPS or FID: fetch lpips, fetch fid
  priors    list the priors that have a name, and what of them is on this machine
  info      what the folder of a run holds
  new       a guidance, operator or metric of your own, with a test: new guidance Mine
  completion  a script for your shell: source <(cmi-lightning completion bash)

  -q        before the command: no progress, no tables; NO_COLOR=1 leaves colours out

  cmi-lightning predict -c demo                                    eight photographs, 90 % missing
  cmi-lightning predict -c demo -c task/super_resolution -c guidance/dps -c add_cmi
  cmi-lightning predict -c demo --overwrite                        afresh; else it goes on
  cmi-lightning predict --help                                     all options
  cmi-lightning verify                                             the mathematics, in seconds
  cmi-lightning verify -c mine.yaml                                the network of a configuration
  cmi-lightning table -c table/smoke                               a small table in a minute

Configurations that ship with the package: """


COMMANDS = {  # imported when asked for: the help needs no torch
    "predict": "cmi_lightning.predict.command",
    "fit": "cmi_lightning.predict.command",
    "studio": "cmi_lightning.studio.command",
    "verify": "cmi_lightning.verify.command",
    "tune": "cmi_lightning.table.command",
    "table": "cmi_lightning.table.command",
    "fetch": "cmi_lightning.fetch",
    "priors": "cmi_lightning.zoo.command",
    "lle": "cmi_lightning.predict.lle",
    "info": "cmi_lightning.info",
    "new": "cmi_lightning.new",
    "completion": "cmi_lightning.completion",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0; 1 if a check failed, or for an error that nobody foresaw; 2 for bad input; 3 if images failed
    or could not be read and the others are restored. SIGINT and SIGTERM end a command with 130 and
    143.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:  # a console script lacks it, and users keep their classes here
        sys.path.insert(0, os.getcwd())
    before, errors.ON_COMMAND_LINE = errors.ON_COMMAND_LINE, True
    try:
        return _run(args)
    except InputError as error:
        told, code = errors.one_sentence(error), 2
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":  # Lightning's word for bad options
            told, code = errors.one_sentence(error), 2
        else:
            told, code = _unforeseen(error), 1
    finally:
        errors.ON_COMMAND_LINE = before
    print(f"cmi-lightning: error: {told}", file=sys.stderr)
    return code


def _unforeseen(error: Exception) -> str:
    """Keep an error's traceback in a file, and return a sentence that names it."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="cmi-lightning-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return f"{errors.cause(error)} (traceback: {file.name})"


def _run(args: list[str]) -> int:
    if args[:1] in (["-q"], ["--quiet"]):
        import rich

        rich.get_console().quiet = True
        try:
            return _run(args[1:])
        finally:
            rich.get_console().quiet = False
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    if command in ("--version", "configs") and rest:
        raise InputError(f"cmi-lightning {command} takes no options, got '{rest[0]}'.")
    if command in ("-h", "--help"):
        print(USAGE + ", ".join(configs.summaries()))
    elif command == "--version":
        from cmi_lightning import __version__

        print(f"cmi-lightning {__version__}")
    elif command == "configs":
        for name, line in configs.summaries().items():
            print(f"{name:26}{line}")
    elif command in COMMANDS:
        return getattr(importlib.import_module(COMMANDS[command]), command)(rest)
    else:
        raise InputError(f"Unknown command '{command}': use {', '.join(COMMANDS)}, configs.")
    return 0
