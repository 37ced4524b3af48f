"""Trackers: refused where they are not installed; where they are, what the real clients keep of a run that resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd import trackers
from megatron_tropd.config import ConfigError
from megatron_tropd.config_parser import load_config
from megatron_tropd.config_watch import MonitoringConfig
from tests.test_observability import PLANTED, SECRETS, URI
from tests.test_run import REPOSITORY, config_file, data

__all__ = ["data"]  # a fixture


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(config_file(tmp_path, data))
    trackers.require_trackers(config)
    for package, distribution, field in (
        ("wandb", "wandb", {"wandb_project": "p"}),
        ("mlflow", "mlflow-skinny", {"mlflow_experiment": "e"}),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        wanted = f"monitoring.{next(iter(field))} needs the package {package}: pip install {distribution}"
        with pytest.raises(ConfigError, match=wanted):
            trackers.require_trackers(replace(config, monitoring=MonitoringConfig(**field)))


def test_a_folder_that_only_bears_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_a_tracker").mkdir()
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("left_by_a_tracker")
    assert trackers._is_installed("a_package")


def _train(path: Path, environment: dict[str, str], *overrides: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", "megatron_tropd", "train", str(path), *overrides],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | SECRETS | environment,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def _secrets_in(folder: Path) -> list[tuple[Path, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(path, secret) for path in files for secret in PLANTED if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_mlflow_has_every_step_once_and_the_config_without_secrets(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("mlflow")
    store = f"file:{tmp_path / 'mlruns'}"
    environment = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_FILE_STORE": "true"}
    path = config_file(tmp_path, data)
    options = ["--monitoring.mlflow_experiment=tests", "--monitoring.log_interval=2"]
    _train(path, environment, *options, "--training.train_iters=2", f"--monitoring.wandb_entity={URI}")
    _train(path, environment, *options, "--training.train_iters=4")
    code = (
        "import json, sys; from mlflow.tracking import MlflowClient\n"
        "client = MlflowClient(tracking_uri=sys.argv[1])\n"
        "(run,) = client.search_runs([client.get_experiment_by_name('tests').experiment_id])\n"
        "history = client.get_metric_history(run.info.run_id, 'loss')\n"
        "print(json.dumps([run.info.status, run.data.params, sorted(run.data.metrics), [m.step for m in history]]))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, store],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=True,
    )
    status, params, names, steps = json.loads(found.stdout.splitlines()[-1])
    assert status == "FINISHED" and steps == [0, 1, 2, 3]
    assert params["student.hidden_size"] == "32" and params["monitoring.wandb_entity"].startswith("https://[redacted]@")
    assert {"grad_norm", "accuracy", "phases/rollout_seconds_slowest"} <= set(names)
    assert not _secrets_in(tmp_path / "run") and not _secrets_in(tmp_path / "mlruns")


@pytest.mark.slow
def test_wandb_offline_keeps_metrics_and_config_and_nothing_else(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("wandb")
    path = config_file(tmp_path, data)
    options = ["--monitoring.wandb_project=tests", f"--monitoring.mlflow_tracking_uri={URI}"]
    environment = {"WANDB_MODE": "offline"}
    output = _train(path, environment, *options, "--training.train_iters=2")
    _train(path, environment, *options, "--training.train_iters=4")
    assert "wandb: " not in output and "W&B" not in output
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    for folder in folders:
        content = (folder / f"run-{run_id}.wandb").read_bytes()
        for wanted in (b"grad_norm", b"outlier_share", b"hidden_size", b"[redacted]@tracking.invalid"):
            assert wanted in content, (folder, wanted)
        assert not (folder / "files" / "wandb-metadata.json").exists()  # it would hold the command line
        assert not (folder / "files" / "output.log").exists()
    assert not _secrets_in(tmp_path / "run")
