"""Whole runs with interleaved stages and with spread experts, which generate on an inference copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import config_file

data = test_run.data

DEEP: dict[str, Any] = {"student": {"num_layers": 4}, "teacher": {"num_layers": 4}}
EXPERTS: dict[str, Any] = {
    "student": {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_aux_loss_coeff": 0.01},
    "teacher": {"num_moe_experts": 2, "moe_ffn_hidden_size": 16},
}
RUNS: dict[str, dict[str, Any]] = {
    "stages": {**DEEP, "parallel": {"pipeline_model_parallel_size": 2}},
    "interleaved": {
        **DEEP,
        "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "rollout": {"tensor_model_parallel_size": 1, "engine": "dynamic"},
    },
    "experts": EXPERTS,
    "spread": {
        **EXPERTS,
        "parallel": {"expert_model_parallel_size": 2},
        "rollout": {"tensor_model_parallel_size": 2, "engine": "dynamic"},
        "optimizer": {"overlap_param_gather": True},
    },
}


def test_interleaved_stages_and_spread_experts_change_nothing(tmp_path: Path, data: Path) -> None:
    training = {"train_iters": 3, "micro_batch_size": 4}
    paths = {name: config_file(tmp_path / name, data, training=training, **run) for name, run in RUNS.items()}
    run_ranks(2, test_run._train_each, [str(path) for path in paths.values()], timeout=300)
    found = {name: test_run._metrics(path.parent / "run") for name, path in paths.items()}
    for name, wanted in (("interleaved", "stages"), ("spread", "experts")):
        for step, wanted_step in zip(found[name], found[wanted], strict=True):
            assert step == pytest.approx(wanted_step, rel=2e-5, abs=2e-6), name
    assert found["stages"][0]["loss"] != found["stages"][1]["loss"]
    assert found["spread"][0]["load_balancing_loss"] >= 1
