"""``cmi-lightning predict`` and ``fit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cmi_lightning.errors import InputError, cause, counted, first_line
from cmi_lightning.files import make_folder
from cmi_lightning.predict.checks import check
from cmi_lightning.predict.options import lightning_cli, prediction_cli
from cmi_lightning.predict.processes import end_at_sigterm, refuse_strategy


def predict(args: list[str]) -> int:
    """Restore images, and return 3 if some were left out.

    What the folder has is kept and not restored again, but with ``--overwrite``.
    """
    options = [arg for arg in args if arg != "--overwrite"]
    cli = prediction_cli(options)
    cli.model.overwrite = options != args
    # Checked before the trainer starts, so that a refused run touches no file of an earlier one.
    cli.datamodule.setup("predict")
    check(cli.model, cli.trainer, cli.datamodule)
    if cli.model.guidances is None and not cli.model.solver.conditional:
        raise InputError(
            "There is no guidance to restore by: give one, such as -c guidance/dps (`cmi-lightning "
            "configs` lists them); -c guidance/none draws images from the prior."
        )
    make_folder(Path(cli.trainer.default_root_dir).expanduser(), "trainer.default_root_dir")
    try:
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    except SystemExit as stop:  # Lightning ends a Ctrl-C with code 1
        if not cli.trainer.interrupted:
            raise
        if cli.trainer.is_global_zero:
            done = cli.model.run.count()
            print(
                f"cmi-lightning: stopped; {counted(done, 'image')} done in "
                f"'{cli.model.run.folder}'. Run "
                "the same command again to go on.",
                file=sys.stderr,
            )
        raise SystemExit(130 if stop.code == 1 else stop.code) from None
    finally:
        cli.model.run.close()
    left_out = cli.model.run.failures or getattr(cli.datamodule, "skipped", None)
    # Lightning takes any code of a further process for a crash.
    return 3 if left_out and cli.trainer.is_global_zero else 0


def fit(args: list[str]) -> int:
    """Train a score network and write its weights, network.safetensors.

    Ctrl-C and SIGTERM end it with 130 and 143; the weights so far are written all the same.
    """
    from cmi_lightning.denoisers.weights import save_weights
    from cmi_lightning.training import ScoreTraining

    cli = lightning_cli(ScoreTraining, args, resumable=True)
    refuse_strategy(cli.trainer, forked=True)
    folder = Path(cli.trainer.default_root_dir).expanduser()
    make_folder(folder, "trainer.default_root_dir")
    for name in ("max_steps", "max_epochs"):
        if getattr(cli.trainer, name) == 0:
            raise InputError(f"trainer.{name}=0 leaves nothing to train.")
    if resume := cli.config.ckpt_path:
        _check_checkpoint(Path(resume), cli.model)
    cli.datamodule.setup("fit")
    _check_images(cli.model, getattr(cli.datamodule, "image_shape", None))
    cli.trainer.callbacks.insert(0, _stopping())
    code = 0
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    except SystemExit as stop:
        if not cli.trainer.interrupted:
            raise
        code = 130 if stop.code == 1 else int(stop.code or 0)
    if cli.trainer.is_global_zero:
        save_weights(cli.model.network, folder / "network.safetensors")
        print(f"weights: {folder / 'network.safetensors'}")
        if code:
            checkpoint = folder / "stopped.ckpt"
            print(
                f"cmi-lightning: stopped at step {cli.trainer.global_step}; go on with "
                f"--ckpt_path {checkpoint}",
                file=sys.stderr,
            )
    if code:
        raise SystemExit(code)
    return 0


def _stopping() -> Any:
    """Return a callback that ends training at SIGTERM as at Ctrl-C, with a checkpoint."""
    import lightning as L

    class Stopping(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            end_at_sigterm(trainer)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if isinstance(exception, (KeyboardInterrupt, SystemExit)) and trainer.world_size == 1:
                folder = Path(trainer.default_root_dir).expanduser()
                trainer.save_checkpoint(folder / "stopped.ckpt")
                for callback in trainer.callbacks:  # the average is what a training makes
                    if isinstance(callback, L.pytorch.callbacks.WeightAveraging):
                        callback.on_train_end(trainer, pl_module)

    return Stopping()


def _check_images(model: Any, shape: tuple[int, int, int] | None) -> None:
    """Refuse images that the network cannot take, before any training."""
    import torch

    if shape is None:
        return
    try:
        with torch.no_grad():
            model.network(torch.zeros(1, *shape), torch.zeros(1))
    except RuntimeError as error:
        size = "×".join(map(str, shape))
        raise InputError(
            f"The network does not take images of {size} (channels×height×width): "
            f"{first_line(error)}. Set data.channels, data.size or the network's in_channels."
        ) from error


def _check_checkpoint(path: Path, model: Any) -> None:
    """Refuse a checkpoint that is missing, damaged, could run code, or is not of this training."""
    import torch

    if not path.is_file():
        raise InputError(f"--ckpt_path: there is no checkpoint '{path}'.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(
            f"--ckpt_path: cannot read '{path}' ({cause(error)}); only tensors and plain values "
            "are loaded (weights_only=True), as `fit` writes them."
        ) from error
    wanted = {"state_dict", "optimizer_states", "pytorch-lightning_version"}
    if not isinstance(state, dict) or not wanted <= set(state):
        raise InputError(
            f"--ckpt_path: '{path}' is no checkpoint of a training by `fit`, which alone can be "
            "gone on with; leave --ckpt_path out to train from the start."
        )
    own = {name: v.shape for name, v in model.state_dict().items()}
    other = {name: v.shape for name, v in state["state_dict"].items()}
    if differ := [name for name in {**own, **other} if own.get(name) != other.get(name)]:
        raise InputError(
            f"--ckpt_path: '{path}' is of another network, by {counted(len(differ), 'tensor')} "
            f"('{differ[0]}' is one). Give the configuration that it was trained with."
        )
