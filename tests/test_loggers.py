"""What loggers get, and that none of them can cost a result."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from predicting import cli, items, restore

from cmi_lightning import InputError, PosteriorSampler
from cmi_lightning.callbacks import (
    ImageWriter,
    RestorationMetrics,
    TrajectoryLogger,
    default_logger,
)
from cmi_lightning.exact import GaussianMixture


class Recording(Logger):
    """Keeps what it gets; takes images as Weights & Biases does."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.values: list[dict[str, float]] = []
        self.images: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    @property
    def experiment(self) -> Any:
        return self

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values.append(metrics)

    def log_hyperparams(self, params: dict[str, Any], *args: Any) -> None:
        self.options |= params

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images[key] = images[0].size


class MLflow(MLFlowLogger):
    """Takes images as MLflow's client does, which is not installed."""

    def __init__(self) -> None:
        self.images: dict[str, Any] = {}

    run_id, experiment = "run", property(lambda self: self)

    def log_image(self, run_id: str, image: Any, artifact_file: str) -> None:
        self.images[artifact_file] = image.shape[1::-1]

    def log_metrics(self, *args: Any) -> None: ...

    log_hyperparams = finalize = save = after_save_checkpoint = log_metrics


class Broken(Recording):
    """Fails whatever it is given."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("dict contains fields not in fieldnames\nmore")

    log_hyperparams = log_image = log_metrics


def predict(folder: Path, *loggers: Logger, callbacks: list[L.Callback] | None = None) -> None:
    """Restore two images."""
    callbacks = callbacks or [
        *(RestorationMetrics(lpips=None, fid=False), ImageWriter(), TrajectoryLogger())
    ]
    module = PosteriorSampler(GaussianMixture(torch.zeros(1, 1, 16, 16)), num_steps=2)
    data, ids = torch.zeros(2, 1, 16, 16), ["0", "1"]
    restore(folder, module, items(data, ids=ids), *callbacks, logger=list(loggers))


def test_every_logger_gets_values_options_and_images(tmp_path):
    kept, mlflow = Recording(), MLflow()
    board, files = TensorBoardLogger(tmp_path / "tb", name="", version=""), CSVLogger(tmp_path)
    predict(tmp_path, kept, mlflow, board, files)
    assert set(kept.images) == {"grid", "film", "trajectory"}
    assert mlflow.images == {f"{name}/0.png": size for name, size in kept.images.items()}
    assert kept.options["model.seed"] == "0"
    assert kept.options["model.denoiser"].endswith("GaussianMixture")
    names = {name for values in kept.values for name in values}
    assert {"metrics/psnr", "trajectory/residual"} <= names
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["images"]) == set(kept.images)
    assert "model.seed" in (Path(files.log_dir) / "hparams.yaml").read_text()


def test_a_logger_that_fails_costs_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        predict(tmp_path, Broken())
    for name in ("summary.json", "metrics.csv", "grid.png", "trajectory.csv", "film.png"):
        assert (tmp_path / name).is_file()
    for what in ("the values", "the options", "the image grid"):
        assert f"Broken did not take {what} (ValueError: dict contains fields" in caplog.text
    assert "more" not in caplog.text


def test_two_writers_of_one_file_are_refused_before_sampling(tmp_path):
    with pytest.raises(InputError, match=r"set trainer\.logger\.init_args\.name to logs"):
        predict(tmp_path, CSVLogger(tmp_path, name="", version=""))
    assert not (tmp_path / "run.json").exists()


def test_without_tensorboard_and_matplotlib(tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    absent = ("tensorboard", "tensorboardX")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in absent else find(n, *a)
    )
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    logger = default_logger(str(tmp_path))
    assert isinstance(logger, CSVLogger)
    with caplog.at_level(logging.WARNING):
        predict(tmp_path, logger)
    assert "There is no plot of the curves: matplotlib is not installed" in caplog.text
    assert not (tmp_path / "trajectory.png").exists()
    assert (tmp_path / "trajectory.csv").is_file()
    assert "metrics/psnr" in (tmp_path / "logs/metrics.csv").read_text()
    assert "psnr" in (tmp_path / "metrics.csv").read_text()
    monkeypatch.undo()
    assert isinstance(default_logger(str(tmp_path)), TensorBoardLogger)


def test_a_csv_logger_on_the_command_line_loses_nothing(tmp_path):
    command = "predict -c demo/garments --model.num_steps=1 --data.limit=1"
    command += f" --trainer.logger=CSVLogger --trainer.default_root_dir={tmp_path}"
    for _ in range(2):  # and again on a folder that has all
        assert cli(command, "--trainer.accelerator=cpu") == 0
        assert "psnr" in (tmp_path / "metrics.csv").read_text()
        assert (tmp_path / "summary.json").is_file()
    assert "metrics/psnr" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
