"""Experiment trackers beside TensorBoard: Weights & Biases and MLflow, imported only where the config asks for one.

Both get the redacted config and the metrics; neither is given the command line, the environment, code or console
output, which may hold what nobody wants to publish. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any, Protocol

from megatron_tropd.config import Config, ConfigError
from megatron_tropd.redaction import redact, redacted

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes a run's metrics to somewhere else; on rank 0 alone."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite values of ``step``."""

    def close(self, *, succeeded: bool) -> None:
        """The run is over."""


def require_trackers(config: Config) -> None:
    """Raise ConfigError where the config asks for a tracker whose package is not installed."""
    monitoring = config.monitoring
    wanted = {"wandb_project": ("wandb", "wandb"), "mlflow_experiment": ("mlflow", "mlflow-skinny")}
    for name, (package, distribution) in wanted.items():
        if getattr(monitoring, name) is not None and not _is_installed(package):
            raise ConfigError(
                f"monitoring.{name} needs the package {package}: pip install {distribution}, or leave the field out "
                "(metrics.jsonl and TensorBoard are always written)"
            )


def build_trackers(config: Config, folder: Path) -> list[Tracker]:
    """The trackers that the config asks for. A run that is resumed continues its run there."""
    trackers: list[Tracker] = []
    if config.monitoring.wandb_project is not None:
        trackers.append(WandbTracker(config, folder))
    if config.monitoring.mlflow_experiment is not None:
        trackers.append(MlflowTracker(config, folder))
    return trackers


class WandbTracker:
    """Weights & Biases. WANDB_MODE=offline keeps everything in the run folder, WANDB_API_KEY logs in."""

    def __init__(self, config: Config, folder: Path):
        import wandb

        monitoring = config.monitoring
        self._run = wandb.init(
            project=monitoring.wandb_project,
            entity=monitoring.wandb_entity,
            name=folder.name,
            id=_remembered(folder / "wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=str(folder),
            config=redacted(asdict(config)),
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, silent=True, x_disable_meta=True, x_disable_stats=True
            ),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log under ``step``; W&B itself leaves out steps that it already has."""
        self._run.log(dict(values), step=step)

    def close(self, *, succeeded: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=0 if succeeded else 1)


class MlflowTracker:
    """MLflow, at ``monitoring.mlflow_tracking_uri`` or where MLFLOW_TRACKING_URI says."""

    def __init__(self, config: Config, folder: Path):
        from mlflow.tracking import MlflowClient

        monitoring = config.monitoring
        name = monitoring.mlflow_experiment
        self._client = MlflowClient(tracking_uri=monitoring.mlflow_tracking_uri)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)

        def create() -> str:
            run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
            for key, value in _flat(redacted(asdict(config))):
                self._client.log_param(run_id, key, value)
            return run_id

        self._run_id = _remembered(folder / "mlflow_run_id", create)
        self._client.update_run(self._run_id, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log under ``step``. A server that does not answer is a warning: no run ends for want of it."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time() * 1000)
        try:
            self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in values.items()])
        except MlflowException as error:
            logger.warning("MLflow did not take step %d: %s", step, redact(str(error)))

    def close(self, *, succeeded: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")


def _is_installed(package: str) -> bool:
    """A folder of that name, such as the one W&B leaves where it ran, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _remembered(path: Path, create: Callable[[], str]) -> str:
    """The id in ``path``, or a new one that is put there."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    value = create()
    path.write_text(value + "\n", encoding="utf-8")
    return value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
