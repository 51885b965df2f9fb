"""The command line: ``cmi-lightning predict``, ``fit``, ``verify``, ``tune`` and ``table``.

``predict`` and ``fit`` are Lightning's own command-line interface over
:class:`cmi_lightning.PosteriorSampler` and :class:`cmi_lightning.training.ScoreTraining`: every
constructor argument is an option, files given by ``-c`` overlay each other, and a name that is no
file in reach is looked up among the packaged configurations. ``verify`` checks the mathematics, or
a network. ``table`` and ``tune`` run many predictions and compare them.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmi_lightning.errors import InputError, first_line

if TYPE_CHECKING:
    from cmi_lightning.verify import Check

USAGE = """usage: cmi-lightning {predict,fit,verify,tune,table} [-c CONFIG]... [--option VALUE]...

  predict   restore images: measure them (or read measurements), sample, write images and metrics
  fit       train a score network
  verify    check the mathematics on exact priors; with --denoiser or -c, check that network
  tune      choose the step sizes of a table on validation images
  table     methods with and without CMI on tasks: restore, compare, write a report

  cmi-lightning predict -c demo                                    sixteen garments under a box
  cmi-lightning predict -c demo -c task/super_resolution -c guidance/dps -c add_cmi
  cmi-lightning predict -c demo --overwrite                        afresh; else it goes on
  cmi-lightning predict --help                                     all options
  cmi-lightning verify                                             the mathematics, in a minute
  cmi-lightning verify -c mine.yaml                                the network of a configuration
  cmi-lightning table -c table/smoke                               a small table in two minutes

Configurations that ship with the package: """


def configs() -> Path:
    """Return the folder of the packaged configurations."""
    import cmi_lightning.configs as packaged

    return Path(str(packaged.__file__)).parent


def shipped_configs() -> list[str]:
    """Return the names that ``-c`` understands without a path."""
    root = configs()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def _resolve(value: str) -> str:
    """Return the path of a configuration: a file, or a packaged one by name."""
    if Path(value).is_file():
        try:
            Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"'{value}' is no UTF-8 text file: {error}.") from error
        return value
    for candidate in (value, f"{value}.yaml", value.removeprefix("configs/")):
        if (path := configs() / candidate).is_file():
            return str(path)
    raise InputError(
        f"No configuration '{value}': give a YAML file, or one of {', '.join(shipped_configs())}."
    )


def resolved(args: Sequence[str]) -> list[str]:
    """Resolve the values of ``-c`` and ``--config``, in either spelling."""
    out: list[str] = []
    for arg in args:
        if out and out[-1] in ("-c", "--config"):
            out.append(_resolve(arg))
        elif arg.startswith("--config="):
            out.append(f"--config={_resolve(arg.removeprefix('--config='))}")
        else:
            out.append(arg)
    return out


def _lightning_cli(model: type, args: list[str], resumable: bool = False, **kwargs: Any) -> Any:
    """Parse ``args`` as typed and instantiate model, data and trainer; nothing is run.

    Raises:
        InputError: for a wrong key, type or class, in one sentence.
    """
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 5 will drop; no user can mend that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import lightning as L
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    # Imported so that short class names and component lists of the help know them.
    import cmi_lightning.callbacks
    import cmi_lightning.data
    import cmi_lightning.denoisers
    import cmi_lightning.guidance  # noqa: F401

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            if not resumable:
                parser.add_argument(
                    "--step_sizes",
                    type=dict[str, int | float],
                    default={},
                    help="the task's step sizes, by name; the packaged guidance/*.yaml read them",
                )
            if resumable:
                parser.add_argument(
                    "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from"
                )

    # What Lightning says to its own authors, and advertisements, would bury what the user must see.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    # args, not sys.argv: that must stay whole, because Lightning starts further ranks with it.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    try:
        return CLI(
            model,
            L.LightningDataModule,
            subclass_mode_data=True,
            run=False,
            args=resolved(args),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
                **kwargs,
            },
            save_config_kwargs={"overwrite": True},
        )
    except ArgumentError as error:
        raise InputError(one_sentence(str(error))) from error
    except Exception as error:
        if not _raised_by_parser(error):
            raise
        raise InputError(f"Bad configuration: {one_sentence(str(error))}") from error


def _raised_by_parser(error: BaseException) -> bool:
    """Whether an error is the parser's word for a bad value, not one of a class it instantiates."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    parsers = ("jsonargparse", "omegaconf", "yaml")
    return module.partition(".")[0] in parsers or module == "lightning.pytorch.cli"


def one_sentence(message: str) -> str:
    """Return a parser message on one line, without its repetitions."""
    parts = [part.strip(" -") for part in message.splitlines()]
    return " ".join(dict.fromkeys(part for part in parts if part))


def predict(args: list[str]) -> Any:
    """Restore images; returns the CLI object with its trainer, model and datamodule.

    What the folder has is kept and not restored again, but with ``--overwrite``.
    """
    from cmi_lightning.predict.module import PosteriorSampler

    base = [str(configs() / "base.yaml")]
    options = [arg for arg in args if arg != "--overwrite"]
    cli = _lightning_cli(PosteriorSampler, options, default_config_files=base)
    cli.model.overwrite = options != args
    # Checked before the trainer starts, so that a refused run touches no file of an earlier one.
    cli.datamodule.setup("predict")
    cli.model.check(cli.trainer, cli.datamodule)
    try:
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    except SystemExit as stop:  # Lightning ends a Ctrl-C with code 1
        if not cli.trainer.interrupted:
            raise
        if cli.trainer.is_global_zero:
            done = cli.model.run.count()
            print(
                f"cmi-lightning: stopped; {done} images are done in '{cli.model.run.folder}'. Run "
                "the same command again to go on.",
                file=sys.stderr,
            )
        raise SystemExit(130 if stop.code == 1 else stop.code) from None
    return cli


def _exit_code(result: Any) -> int:
    """Return a command's own exit code, or 3 if a prediction left images out.

    Only the first process says 3: Lightning takes any code of another one for a crash.
    """
    if isinstance(result, int):
        return result
    left_out = getattr(getattr(result.model, "run", None), "failures", None)
    left_out = left_out or getattr(result.datamodule, "skipped", None)
    return 3 if left_out and result.trainer.is_global_zero else 0


def fit(args: list[str]) -> Any:
    """Train a score network and write its weights, network.safetensors; returns the CLI object."""
    import torch
    from safetensors.torch import save_file

    from cmi_lightning.training import ScoreTraining

    cli = _lightning_cli(ScoreTraining, args, resumable=True)
    if resume := cli.config.ckpt_path:
        _check_checkpoint(Path(resume))
    path = Path(cli.trainer.default_root_dir) / "network.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    if cli.trainer.is_global_zero:
        whole = torch.contiguous_format
        state = cli.model.network.state_dict()
        weights = {name: v.cpu().clone(memory_format=whole) for name, v in state.items()}
        save_file(weights, path)  # averaged, where an averaging callback is on
        print(f"weights: {path}")
    return cli


def _check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint that is missing, damaged, or could run code when it is loaded."""
    import torch

    if not path.is_file():
        raise InputError(f"--ckpt_path: there is no checkpoint '{path}'.")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"--ckpt_path: cannot read '{path}' ({type(error).__name__}: {reason}); only tensors "
            "and plain values are loaded (weights_only=True), as `fit` writes them."
        ) from error


def verify(args: list[str]) -> int:
    """Print a table of checks and return 1 if one failed.

    Without arguments, the mathematics is checked on exact priors. With ``--denoiser`` (short for
    ``--model.denoiser``) or a configuration that names one, that network is; ``--size`` gives the
    side of the images where the network takes any.
    """
    import torch

    from cmi_lightning.verify import exact_checks, network_checks

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
    from cmi_lightning.predict.module import PosteriorSampler

    base = [str(configs() / "base.yaml")]
    options = [f"--model.{a[2:]}" if a.startswith("--denoiser") else a for a in args]
    cli = _lightning_cli(PosteriorSampler, options, default_config_files=base)
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


def table(args: list[str]) -> int:
    """Run bases with and without CMI on tasks, and write tables and a report."""
    from cmi_lightning.table.command import table as run

    return run(args)


def tune(args: list[str]) -> int:
    """Choose a table's step sizes on validation images."""
    from cmi_lightning.table.command import tune as run

    return run(args)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "predict": predict,
    "fit": fit,
    "verify": verify,
    "tune": tune,
    "table": table,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0; 1 if a check failed; 2 for bad input; 3 if images failed or could not be read and the others
    are restored. SIGINT and SIGTERM end a prediction with 130 and 143.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:  # a console script lacks it, and users keep their classes here
        sys.path.insert(0, os.getcwd())
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    try:
        if command in ("-h", "--help"):
            print(USAGE + ", ".join(shipped_configs()))
        elif command == "--version":
            from cmi_lightning import __version__

            print(f"cmi-lightning {__version__}")
        elif command in COMMANDS:
            return _exit_code(COMMANDS[command](rest))
        else:
            raise InputError(f"Unknown command '{command}': use {', '.join(COMMANDS)}.")
    except Exception as error:
        # Lightning's own word for bad options; importing it here would slow down --help.
        lightnings = type(error).__name__ == "MisconfigurationException"
        if not isinstance(error, InputError) and not lightnings:
            raise
        print(f"cmi-lightning: error: {one_sentence(str(error))}", file=sys.stderr)
        return 2
    return 0
