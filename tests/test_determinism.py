"""Deterministic mode: what it switches on, and that a whole run works in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import _metrics, _weights, config_file

data = test_run.data


@pytest.fixture
def mode() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [1, 2, 45, 1000])
def test_the_running_sum_of_deterministic_mode_is_the_running_sum(mode: Any, size: int) -> None:
    from megatron_tropd.sampling import running_sum

    probabilities = torch.softmax(8 * torch.randn(3, size, dtype=torch.float64), dim=-1)
    probabilities[:, ::3] = 0.0
    expected = probabilities.cumsum(dim=-1)
    torch.use_deterministic_algorithms(True)
    found = running_sum(probabilities)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    # An id of probability 0 has no share of the unit interval.
    nothing = probabilities[:, 1:] == 0
    assert not found.diff(dim=-1)[nothing].any()


def test_an_environment_that_contradicts_the_mode_is_refused(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd.determinism import ENVIRONMENT, enable_determinism

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="needs CUBLAS_WORKSPACE_CONFIG to be one of :4096:8, :16:8"):
        enable_determinism()
    assert not torch.are_deterministic_algorithms_enabled()


def _train(config: str) -> dict[str, Any]:
    from megatron_tropd import trainer
    from megatron_tropd.config_parser import load_config

    build, found = trainer.build_learner, {}

    def watched(*arguments: Any, **options: Any) -> Any:
        learner = build(*arguments, **options)
        models = (learner.stage.module, learner.stage.teacher)
        found["megatron"] = [model.config.deterministic_mode for model in models]
        return learner

    trainer.build_learner = watched
    trainer.train(load_config(config))
    return {**found, "torch": torch.are_deterministic_algorithms_enabled(), "nccl": os.environ.get("NCCL_ALGO")}


@pytest.mark.slow
def test_a_run_in_deterministic_mode_twice(tmp_path: Path, data: Path) -> None:
    training = {"train_iters": 2, "deterministic": True}
    tp2, top_p = {"tensor_model_parallel_size": 2}, {"top_p": 0.9}
    for name in ("first", "second"):
        path = config_file(tmp_path / name, data, parallel=tp2, training=training, rollout=top_p)
        found = run_ranks(2, _train, str(path), timeout=200, init_process_group=False)
        assert found == [{"megatron": [True, True], "torch": True, "nccl": "Ring"}] * 2
    first, second = (_weights(tmp_path / name / "run") for name in ("first", "second"))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert _metrics(tmp_path / "first" / "run") == _metrics(tmp_path / "second" / "run")
