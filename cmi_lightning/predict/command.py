"""``cmi-lightning predict`` and ``fit``."""

from __future__ import annotations

import sys
from pathlib import Path

from cmi_lightning.errors import InputError, first_line
from cmi_lightning.predict.options import lightning_cli, prediction_cli


def predict(args: list[str]) -> int:
    """Restore images, and return 3 if some were left out.

    What the folder has is kept and not restored again, but with ``--overwrite``.
    """
    options = [arg for arg in args if arg != "--overwrite"]
    cli = prediction_cli(options)
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
    left_out = cli.model.run.failures or getattr(cli.datamodule, "skipped", None)
    # Lightning takes any code of a further process for a crash.
    return 3 if left_out and cli.trainer.is_global_zero else 0


def fit(args: list[str]) -> int:
    """Train a score network and write its weights, network.safetensors."""
    import torch
    from safetensors.torch import save_file

    from cmi_lightning.training import ScoreTraining

    cli = lightning_cli(ScoreTraining, args, resumable=True)
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
    return 0


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
