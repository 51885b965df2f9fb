"""Command-line options: configurations by name, and the parser of Lightning's own interface."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmi_lightning import configs
from cmi_lightning.errors import InputError, one_sentence


def _resolve(value: str) -> str:
    """Return a file's path as it is, and a packaged configuration as :func:`configs.find` does."""
    if Path(value).is_file():
        try:
            Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"'{value}' is no UTF-8 text file: {error}.") from error
        return value
    if (found := configs.find(value)) is None:
        names = ", ".join(configs.summaries())
        raise InputError(f"No configuration '{value}': give a YAML file, or one of {names}.")
    return found


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


def prediction_cli(args: list[str]) -> Any:
    """Return the sampler, data and trainer of ``predict``'s options, see :func:`lightning_cli`."""
    from cmi_lightning.predict.module import PosteriorSampler

    return lightning_cli(PosteriorSampler, args, default_config_files=[str(configs.BASE)])


def lightning_cli(model: type, args: list[str], resumable: bool = False, **kwargs: Any) -> Any:
    """Parse ``args`` as typed and instantiate model, data and trainer; nothing is run.

    Raises:
        InputError: for a wrong key, type or class, in one sentence.
    """
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 5 will drop; no user can mend that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import lightning as L
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from omegaconf import OmegaConf

    # Imported so that short class names and component lists of the help know them.
    import cmi_lightning.callbacks
    import cmi_lightning.data
    import cmi_lightning.denoisers
    import cmi_lightning.guidance  # noqa: F401

    # ${name:${model.denoiser.class_path}}: the prior's name in the folders of configs/paper.yaml
    # omegaconf 2.4 deprecates this name, and 2.3 has no other.
    warnings.filterwarnings("ignore", r"register_new_resolver\(\) is deprecated")
    OmegaConf.register_new_resolver("name", lambda path: path.rpartition(".")[2], replace=True)

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
