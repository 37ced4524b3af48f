"""The config section about LoRA: what is refused, and the base that takes the teacher's place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.config import Config, ConfigError
from megatron_tropd.config_checks import problems, validate
from megatron_tropd.config_drift import DriftError, check_drift, snapshot
from megatron_tropd.config_parser import config_text, load_config
from tests.test_config import MODEL, write

SELF_DISTILLATION: dict[str, Any] = {
    "teacher": None,
    "lora": {"rank": 8, "base_is_teacher": True},
    "teacher_context": {"system_prompt": "The answer is {answer}."},
    "parallel": {"teacher_schedule": "ahead"},
    "guidance": {"schedule": "none"},
}


def _load(folder: Path, **changes: Any) -> Config:
    return load_config(write(folder, **(SELF_DISTILLATION | changes)))


def test_the_base_takes_the_teachers_place(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert config.teacher == config.student
    for command in ("train", "generate", "evaluate"):
        validate(config, 1, command)
    (tmp_path / "saved.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == config


EXPERTS = {**MODEL, "num_moe_experts": 4, "moe_ffn_hidden_size": 32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"rank": 0, "base_is_teacher": True}}, ["lora.base_is_teacher", "set lora.rank"]),
        ({"lora": {"rank": -1}}, ["lora.rank must be at least 0, found -1"]),
        ({"lora": {"rank": 8, "alpha": 0.0}}, ["lora.alpha must be above 0"]),
        ({"lora": {"rank": 8, "target_modules": []}}, ["lora.target_modules", "found []"]),
        ({"lora": {"rank": 8, "target_modules": ["linear_fc1", "linear_fc1"]}}, ["each once"]),
        ({"lora": {"rank": 8}, "student": EXPERTS, "teacher": MODEL}, ["experts'", "[linear_qkv, linear_proj]"]),
        (
            {"parallel": {"expert_model_parallel_size": 2}},
            ["expert_model_parallel_size 2 is not offered"],
        ),
        (
            {"parallel": {"virtual_pipeline_model_parallel_size": 2}},
            ["virtual_pipeline_model_parallel_size 2 is not offered"],
        ),
        ({"optimizer": {"overlap_param_gather": True}}, ["optimizer.overlap_param_gather is not offered"]),
        ({"student": {**MODEL, "fp8": "e4m3"}}, ["student.fp8 e4m3", "lora.rank=0"]),
        ({"teacher": {**MODEL, "num_layers": 2}}, ["leave the teacher section out"]),
        ({"tokenizer": {"teacher": "elsewhere"}}, ["leave tokenizer.teacher out"]),
        ({"teachers": {"other": "elsewhere"}}, ["leave teachers out"]),
        ({"parallel": {"teacher_schedule": "ahead", "offload_teacher": True}}, ["parallel.offload_teacher=True"]),
        ({"teacher_context": {}}, ["leaves nothing to learn", "teacher_context", "task_reward", "guidance"]),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    found = problems(_load(tmp_path, **changes), 1, "train")
    assert any(all(word in problem for word in words) for problem in found), found


def test_attention_adapters_of_a_student_with_experts_and_others_sources_of_learning(tmp_path: Path) -> None:
    attention = {"rank": 8, "target_modules": ["linear_qkv", "linear_proj"]}
    validate(_load(tmp_path, lora=attention, student=EXPERTS, teacher=MODEL), 1, "train")
    for more in ({"objective_options": {"task_reward": 1.0}}, {"guidance": {"schedule": "constant"}}):
        validate(_load(tmp_path, teacher_context={}, **more), 1, "train")


def test_target_modules_are_megatrons_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        _load(tmp_path, lora={"rank": 8, "target_modules": ["q_proj"]})


def test_what_a_resumed_run_may_have_otherwise(tmp_path: Path) -> None:
    config = _load(tmp_path)
    moved = replace(config.student, load="elsewhere")
    before = snapshot(config)
    other = replace(config, student=moved, teacher=moved, lora=replace(config.lora, export="peft"))
    changed = check_drift(before, snapshot(other), allow=False)
    assert len(changed) == 2 and "student.load" in changed[0] and "lora.export" in changed[1]
    with pytest.raises(DriftError, match="! lora.rank: the checkpoint has 8, this run 16"):
        check_drift(before, snapshot(replace(config, lora=replace(config.lora, rank=16))), allow=False)
