"""Command-line options: configurations by name, and the parser of Lightning's own interface."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from cmi_lightning import configs
from cmi_lightning.errors import InputError, one_sentence
from cmi_lightning.files import write
from cmi_lightning.predict.messages import closest, explain, nearest

SETS, APPENDS = (re.compile(rf"\bguidances{end}\"?\s*:") for end in ("", r"\+"))

# Options of Lightning's Trainer that a prediction does not read.
TRAINING = {f"--trainer.{m}_{what}" for m in ("min", "max") for what in ("epochs", "steps")}
TRAINING |= {f"--trainer.limit_{stage}_batches" for stage in ("train", "val", "test")}
TRAINING |= {f"--trainer.gradient_clip_{what}" for what in ("val", "algorithm")}
TRAINING |= {
    f"--trainer.{name}"
    for name in (
        *("max_time", "overfit_batches", "val_check_interval", "check_val_every_n_epoch"),
        *("num_sanity_val_steps", "accumulate_grad_batches", "reload_dataloaders_every_n_epochs"),
    )
}


def _resolve(value: str) -> str:
    """Return a file's path as it is, and a packaged configuration as :func:`configs.find` does."""
    if Path(value).is_file():
        try:
            options = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"'{value}' is no UTF-8 text file: {error}.") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"'{value}' is no YAML file: {one_sentence(error)}.") from error
        if not isinstance(options, dict):
            raise InputError(f"'{value}' holds no options, such as model: {{num_steps: 50}}.")
        return value
    if (found := configs.find(value)) is None:
        names = {end: n for n in configs.summaries() for end in (n.rpartition("/")[2], n)}
        near = closest(value, names)
        raise InputError(
            f"No configuration '{value}': give a YAML file, or one that `cmi-lightning configs` "
            f"lists{f'; did you mean {names[near]}?' if near else '.'}"
        )
    return found


def resolved(args: Sequence[str]) -> list[str]:
    """Resolve the values of ``-c`` and ``--config``, in either spelling.

    Configurations that append (add_cmi) come behind those that set what they append to.
    """
    parts: list[list[str]] = []  # a configuration with its -c, and any other argument alone
    for arg in args:
        if parts and parts[-1] in (["-c"], ["--config"]):
            parts[-1] = ["-c", _resolve(arg)]
        elif arg.startswith("--config="):
            parts.append(["-c", _resolve(arg.removeprefix("--config="))])
        else:
            parts.append([arg])
    texts = {i: text_of(part[1]) for i, part in enumerate(parts) if len(part) == 2}
    last = max((i for i, text in texts.items() if SETS.search(text)), default=-1)
    moved = [i for i, text in texts.items() if i < last and APPENDS.search(text)]
    if not any(SETS.search(texts[i]) for i in moved):
        stay = [i for i in range(last + 1) if i not in moved]
        parts = [parts[i] for i in (*stay, *moved, *range(last + 1, len(parts)))]
    return [arg for part in parts for arg in part]


def text_of(config: str) -> str:
    """Return the YAML of a resolved configuration: a section's text, or a file's."""
    return config if config.startswith("{") else Path(config).read_text(encoding="utf-8")


def prediction_cli(args: list[str]) -> Any:
    """Return the sampler, data and trainer of ``predict``'s options, see :func:`lightning_cli`."""
    from cmi_lightning.predict.module import PosteriorSampler

    _refuse_unread(args)
    return lightning_cli(PosteriorSampler, args, default_config_files=[str(configs.BASE)])


def _refuse_unread(args: list[str]) -> None:
    """Refuse options that ``predict`` would not read: of training, and unknown step sizes."""
    names = [arg.partition("=")[0] for arg in args]
    for name in names:
        if name in TRAINING:
            raise InputError(f"{name} is of training, which `fit` does: leave it out.")
    sizes = [n.removeprefix("--step_sizes.") for n in names if n.startswith("--step_sizes.")]
    if not sizes:
        return
    texts = [path.read_text(encoding="utf-8") for path in configs.FOLDER.rglob("*.yaml")]
    texts += [*args, *(text_of(one) for flag, one in pairwise(resolved(args)) if flag == "-c")]
    read = set(re.findall(r"(?<!--)\bstep_sizes\.(\w+)", "\n".join(texts)))
    for size in sizes:
        if size not in read:
            raise InputError(f"No method reads a step size '{size}'{nearest(size, read)}")


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
    import cmi_lightning.data.crops
    import cmi_lightning.data.fashion
    import cmi_lightning.data.measurements
    import cmi_lightning.denoisers
    import cmi_lightning.guidance  # noqa: F401

    # ${name:${model.denoiser.class_path}}: the prior's name in the folders of configs/paper.yaml
    # omegaconf 2.4 deprecates this name, and 2.3 has no other.
    warnings.filterwarnings("ignore", r"register_new_resolver\(\) is deprecated")
    OmegaConf.register_new_resolver("name", lambda path: path.rpartition(".")[2], replace=True)

    command = "fit" if resumable else "predict"

    class CLI(LightningCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            if asked := {"-h", "--help", "--help.trainer"} & set(args):
                print(help_text(parser.format_help(), command, "--help.trainer" in asked))
                raise SystemExit(0)
            super().parse_arguments(parser, args)

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
            save_config_callback=config_writer(),
        )
    except ArgumentError as error:
        known = [*_names(model), "overwrite"]
        raise InputError(explain(str(error), known)) from error
    except Exception as error:
        if not _raised_by_library(error):
            raise
        raise InputError(f"Bad configuration: {explain(str(error), ())}") from error


def _names(model: type) -> list[str]:
    """Return the names of all options."""
    import inspect

    import lightning as L

    parts = {"model": model, "trainer": L.Trainer}
    inner = [f"{k}.{n}" for k, part in parts.items() for n in inspect.signature(part).parameters]
    further = ["model.noise.sigma", "model.noise.range", "data.folder", "data.limit"]
    return [*inner, *further, "data.batch_size", "config", "seed_everything", "step_sizes"]


def help_text(text: str, command: str, of_trainer: bool) -> str:
    """Return the parser's help with our options first, and Trainer's only where asked for."""
    _, *sections = re.split(r"\n\n(?=\S)", text)
    trainer = [part for part in sections if "--trainer." in part]
    own = [part for part in sections if part not in trainer and re.search(r"\n  -", part)]
    own.sort(key=lambda part: "--model." not in part)
    again = "  --overwrite           Remove an earlier run's results from the folder first\n"
    folder = "  --trainer.default_root_dir DIR\n                        Folder of the results"
    first = f"usage: cmi-lightning {command} [-c CONFIG]... [--option VALUE]..."
    last = f"where to, and more:\n{again if command == 'predict' else ''}{folder}\n"
    last += "  --help.trainer        Options of Lightning's Trainer: devices, precision, loggers"
    return "\n\n".join([first, *(trainer if of_trainer else [*own, last])])


def config_writer() -> type:
    """Return the callback that keeps a run's options as ``config.yaml`` in its own folder.

    Paths in that folder are kept as ``${trainer.default_root_dir}``: a run of the file in another
    folder leaves the first one alone.
    """
    from lightning.pytorch.cli import SaveConfigCallback

    class ConfigWriter(SaveConfigCallback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Wait until the module has opened the folder."""

        def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
            self._write(trainer)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self._write(trainer)

        def _write(self, trainer: Any) -> None:
            if trainer.is_global_zero:
                root = str(trainer.default_root_dir)
                config = self.config.clone()
                for key in ("logger", "callbacks"):
                    if config.trainer.get(key):
                        config.trainer[key] = _relative(config.trainer[key], root)
                text = self.parser.dump(config, skip_none=False, skip_validation=True)
                write(Path(root).expanduser() / "config.yaml", text.encode())

    return ConfigWriter


def _relative(value: Any, root: str) -> Any:
    """Return options with the run's folder as ``${trainer.default_root_dir}``."""
    if isinstance(value, list):
        return [_relative(item, root) for item in value]
    if isinstance(value, str) and (value == root or value.startswith(f"{root}/")):
        return "${trainer.default_root_dir}" + value.removeprefix(root)
    if hasattr(value, "items"):
        for key, item in list(value.items()):
            value[key] = _relative(item, root)
    return value


def _raised_by_library(error: BaseException) -> bool:
    """Whether the parser or Lightning refuses a value, and not a class that they make."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.partition(".")[0] in ("jsonargparse", "omegaconf", "yaml", "lightning")
