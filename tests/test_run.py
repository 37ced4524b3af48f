"""Whole runs of the program as a user starts it: resumption after a kill, SIGTERM, broken numbers, wrong inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent
TIMING_KEYS = {"tokens_per_second", "seconds_rollout", "seconds_teacher", "seconds_student", "seconds_optimizer"}
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "make_vocab_size_divisible_by": 8,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of two-digit numbers, and a store of (reference) answers to them."""
    from megatron_tropd.answers import AnswerHeader, AnswerWriter
    from megatron_tropd.data import CharacterTokenizer, read_prompts

    folder = tmp_path_factory.mktemp("data")
    make_data = REPOSITORY / "examples" / "addition" / "make_data.py"
    options = ["--digits=2", "--num-train=64", "--num-validation=16", f"--out={folder}"]
    subprocess.run([sys.executable, make_data, *options], check=True, capture_output=True)
    tokenizer = CharacterTokenizer("0123456789+=")
    prompts, _ = read_prompts(folder / "train.jsonl", tokenizer, 16, "refuse")
    with AnswerWriter(folder / "answers.jsonl", AnswerHeader(tokenizer.fingerprint, {}, {})) as writer:
        for prompt in prompts:
            writer.write(prompt, [*tokenizer.encode(prompt.answer), tokenizer.eos_id], True)
    return folder


def config_file(folder: Path, data: Path, **sections: Any) -> Path:
    """A tiny TrOPD run writing to ``folder/run``; ``sections`` update the config section by section."""
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "student": dict(MODEL),
        "teacher": {**MODEL, "hidden_size": 48, "num_layers": 2, "init_method_std": 0.2},
        "objective_options": {"top_k": 4},
        "guidance": {"answers": str(data / "answers.jsonl")},
        "tokenizer": {"alphabet": "0123456789+="},
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": str(data / "validation.jsonl"),
            "max_prompt_length": 6,
        },
        "rollout": {"samples_per_prompt": 2, "max_response_length": 5},
        "parallel": {},
        "optimizer": {"lr": 0.01},
        "training": {
            "train_iters": 6,
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "eval_interval": 3,
            "eval_samples": 16,
            "save_interval": 2,
        },
    }
    for name, section in sections.items():
        config[name] = {**config[name], **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _train(path: str, die_at_step: int | None) -> None:
    from megatron_tropd import step as step_module
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.trainer import train

    refuse_non_finite = step_module._refuse_non_finite

    def die(learner, batch, *rest):  # type: ignore[no-untyped-def]
        # After the backward, before the optimizer: the middle of a step.
        if batch.step == die_at_step and learner.layout.rank == learner.layout.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        refuse_non_finite(learner, batch, *rest)

    step_module._refuse_non_finite = die
    train(load_config(path, []))


def _weights(folder: Path) -> dict[str, Any]:
    """Every tensor of the newest checkpoint, weights and optimizer state, by name."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    name = (folder / "checkpoints" / "latest").read_text().strip()
    reader = checkpoint.FileSystemReader(folder / "checkpoints" / name)
    import torch

    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}])
def test_a_run_killed_in_the_middle_of_a_step_continues_bit_for_bit(tmp_path: Path, data: Path, layout: dict) -> None:
    import torch

    whole = config_file(tmp_path / "whole", data, parallel=layout)
    run_ranks(2, _train, str(whole), None, timeout=200, init_process_group=False)
    killed = config_file(tmp_path / "killed", data, parallel=layout)
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _train, str(killed), 3, timeout=200, init_process_group=False)
    assert (tmp_path / "killed" / "run" / "checkpoints" / "latest").read_text() == "step_2"
    run_ranks(2, _train, str(killed), None, timeout=200, init_process_group=False)
    expected, found = _weights(tmp_path / "whole" / "run"), _weights(tmp_path / "killed" / "run")
    assert expected.keys() == found.keys() and any("exp_avg_sq" in key for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    metrics = _metrics(tmp_path / "whole" / "run")
    assert metrics == _metrics(tmp_path / "killed" / "run")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "outlier_share", "reward", "reward_min", "p_trust", "teacher_top_k_mass"} <= metrics[
        0
    ].keys()
    assert metrics[0]["on_policy_share"] < metrics[5]["on_policy_share"]
    assert max(line["log_prob_gap_max"] for line in metrics[:-1]) < 1e-4
