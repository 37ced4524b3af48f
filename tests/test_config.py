"""Reading, overriding and refusing configurations."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tropd.config import Config, ConfigError, OptimizerConfig, resolved_schedule
from megatron_tropd.config_checks import validate
from megatron_tropd.config_parser import config_text, field_names, load_config

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 128}


def write(tmp_path: Path, **changes: Any) -> Path:
    """A valid config file with sections updated (a value of None removes the section)."""
    values: dict[str, Any] = {
        "output_dir": "runs/x",
        "student": dict(MODEL),
        "teacher": dict(MODEL),
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "guidance": {"answers": "answers.jsonl"},
        "training": {"global_batch_size": 32, "micro_batch_size": 4},
    }
    for name, change in changes.items():
        if change is None:
            del values[name]
        else:
            values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def refused(path: Path, *, world_size: int = 1, command: str = "train") -> str:
    with pytest.raises(ConfigError) as error:
        validate(load_config(path), world_size, command)
    return str(error.value)


def test_file_defaults_and_overrides_come_together(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, optimizer={"min_lr": 1e-7}), ["--optimizer.lr=5e-6", "--student.num_layers", "2"]
    )
    assert config.student.num_layers == 2 and config.teacher is not None and config.teacher.num_layers == 4
    assert config.optimizer == OptimizerConfig(lr=5e-6, min_lr=1e-7)
    validate(config, 1, "train")


def test_yaml_floats_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "optimizer:\n  lr: 5e-6\n")
    assert load_config(path).optimizer.lr == 5e-6


@pytest.mark.parametrize("alphabet", ["1e3", "yes", "null", "a: b\n#'\"{}[]%@`|>", " lead ", "é\u2028\x85", "😀"])
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, alphabet: str) -> None:
    path = write(tmp_path, tokenizer={"alphabet": alphabet})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()), default_style='"'))
    assert load_config(path).tokenizer.alphabet == alphabet


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["--objective_options.top_k=7", "--teacher.load=some/where"])
    (tmp_path / "saved.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == config


CONFIGS = sorted(set(EXAMPLES.glob("*/*.yaml")) - {EXAMPLES / "study" / "study.yaml"})
RANKS = {"study": 1, "paper": 8, "qwen3_8gpu": 8, "qwen3_2nodes": 16, "llama3_slurm": 64}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_is_valid_for_the_ranks_it_is_written_for(path: Path) -> None:
    config = load_config(path)
    command = "sft" if config.teacher is None else "train"
    validate(config, RANKS.get(path.parent.name, 2), command)


def test_unknown_fields_name_the_nearest_valid_one(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config.yaml: unknown config field student.num_layer; .*student.num_layers\?"
    ):
        load_config(write(tmp_path, student={"num_layer": 3}))
    with pytest.raises(
        ConfigError, match=r"command line: unknown config field optimiser.lr; did you mean optimizer.lr"
    ):
        load_config(write(tmp_path), ["--optimiser.lr=1"])
    with pytest.raises(ConfigError, match=r"unknown config field samples_per_prompt; did you mean rollout.samples_per"):
        load_config(write(tmp_path), ["--samples_per_prompt=1"])
    with pytest.raises(ConfigError, match="written --section.field=value"):
        load_config(write(tmp_path), ["optimizer.lr=1"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": {"num_layers": "many"}}, ["student.num_layers", "int", "many"]),
        ({"objective_options": {"gate": "sometimes"}}, ["objective_options.gate", "bernoulli", "sometimes"]),
        ({"optimizer": {"lr": [1]}}, ["optimizer.lr", "float"]),
        ({"training": {"recompute": "perhaps"}}, ["training.recompute", "bool"]),
        ({"student": None}, ["student"]),
        ({"output_dir": None}, ["output_dir"]),
        ({"teacher": {"num_layers": "many"}}, ["teacher.num_layers", "int", "many"]),
        ({"optimizer": {"lr": 10**400}}, ["config.yaml", "too large"]),
    ],
)
def test_wrong_and_missing_values_are_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, **change))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(("section", "found"), [("optimizer", None), ("student", 5), ("teacher", "other.yaml")])
def test_a_section_without_fields_is_refused(tmp_path: Path, section: str, found: object) -> None:
    path = write(tmp_path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), section: found}))
    with pytest.raises(ConfigError, match=f"{section} is a section of fields, found .*: fill it in or take it out"):
        load_config(path)


def test_a_missing_field_of_the_teacher_is_named_alone(tmp_path: Path) -> None:
    path = write(tmp_path, teacher=None)
    with pytest.raises(ConfigError, match=r"required: teacher.hidden_size, [a-z_., ]*$"):
        load_config(path, ["--teacher.num_layers=3"])


def test_the_teacher_can_be_dropped_and_added(tmp_path: Path) -> None:
    assert load_config(write(tmp_path), ["--teacher", "null"]).teacher is None
    path = write(tmp_path, teacher=None)
    added = load_config(path, [f"--teacher.{name}={value}" for name, value in MODEL.items()])
    assert added.teacher == added.student
    path.write_text(path.read_text() + "teacher:\n")
    assert load_config(path).teacher is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--student=5"], "student is a section; override its fields, --student.FIELD=value"),
        (["--training.train_iters", "--optimizer.lr=3"], "--training.train_iters needs a value"),
        (["--training.recompute"], "--training.recompute needs a value"),
    ],
)
def test_overrides_without_a_field_or_a_value_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path), overrides)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "just words", "\x00"])
def test_what_is_not_a_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read the config .*missing.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")


TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
AHEAD_2 = {"teacher_schedule": "ahead", "teacher_tensor_model_parallel_size": 2}
AHEAD_3 = {"teacher_schedule": "ahead", "teacher_tensor_model_parallel_size": 3}


@pytest.mark.parametrize(
    ("changes", "world_size", "command", "message"),
    [
        ({"parallel": TP2}, 3, "train", "3 processes cannot be split .* a multiple of 2"),
        ({"parallel": {**TP2, **PP2}}, 2, "train", "= 4: start a multiple of 4"),
        ({"parallel": TP2, "student": {"num_attention_heads": 1}}, 2, "train", "student.num_attention_heads 1 is not"),
        (
            {"parallel": TP2, "teacher": {"num_query_groups": 1}},
            2,
            "train",
            "teacher.num_query_groups 1 is not divisible",
        ),
        ({"parallel": TP2, "teacher": {"ffn_hidden_size": 65}}, 2, "train", "teacher.ffn_hidden_size 65 is not"),
        ({"student": {"hidden_size": 60}}, 1, "train", "student.hidden_size 60 .* set student.kv_channels"),
        ({"student": {"num_query_groups": 3}}, 1, "train", "student.num_attention_heads 8 .* num_query_groups 3"),
        ({"student": {"num_layers": 0}}, 1, "train", "student.num_layers must be at least 1"),
        ({"parallel": PP2, "teacher": {"num_layers": 5}}, 2, "train", "teacher.num_layers 5 cannot be split"),
        ({"student": {"num_layers_in_first_pipeline_stage": 1}}, 1, "train", "needs pipeline_model_parallel_size > 1"),
        ({"parallel": {"tensor_model_parallel_size": 0}}, 1, "train", "at least 1, found tensor 0"),
        ({"training": {"micro_batch_tokens": 64}}, 1, "train", "less than the longest sequence"),
        ({"training": {"sequence_packing": True}}, 1, "train", "sequence_packing needs training.micro_batch_tokens"),
        ({"parallel": {"context_parallel_size": 0}}, 1, "train", "parallel.context_parallel_size must be at least 1"),
        (
            {"parallel": CP2},
            3,
            "train",
            "tensor 1 x pipeline 1 x parallel.context_parallel_size 2 = 2: start a multiple",
        ),
        ({"parallel": {**CP2, **AHEAD_2}}, 2, "train", "tensor 2 x pipeline 1 x .* = 4: start a multiple of 4"),
        (
            {"parallel": CP2, "teacher": {"num_moe_experts": 4, "moe_ffn_hidden_size": 8}},
            2,
            "train",
            "context_parallel_size 2 is for dense models, and teacher has experts",
        ),
        (
            {"parallel": {**CP2, "teacher_schedule": "ahead"}, "teacher_context": {"system_prompt": "Judge."}},
            2,
            "train",
            "cuts student's and teacher's sequences at the same positions",
        ),
        (
            {"parallel": CP2, "rollout": {"tensor_model_parallel_size": 1}},
            2,
            "train",
            "tensor_model_parallel_size makes an inference copy, and parallel.context_parallel_size 2",
        ),
        ({"parallel": CP2, "rollout": {"over_sampling": 2.0}}, 2, "train", "choose among all samples of a replica"),
        ({"parallel": CP2, "training": {"log_tokens": 1}}, 2, "train", "leaves each rank a part"),
        ({"parallel": {"sequence_parallel": True}}, 1, "train", "set tensor_model_parallel_size above 1"),
        ({"parallel": {"offload_teacher": True}}, 1, "train", "needs parallel.teacher_schedule=ahead"),
        ({"parallel": AHEAD_3}, 2, "train", "teacher's tensor 3 x pipeline 1 = 3"),
        ({"parallel": AHEAD_3}, 3, "train", "teacher.ffn_hidden_size 128 is not divisible by .* 3"),
        ({"parallel": AHEAD_3}, 2, "generate", "2 processes cannot be split"),
        (
            {"training": {"global_batch_size": 30}},
            1,
            "train",
            "30 must be a multiple of micro_batch_size 4 .* 28 or 32",
        ),
        ({"training": {"global_batch_size": 4}}, 2, "train", "data-parallel size 2 .* try 8"),
        ({"training": {"global_batch_size": -4}}, 1, "train", "global_batch_size must be at least 1, found -4"),
        ({"training": {"save_interval": -3}}, 1, "train", "training.save_interval must be at least 0, found -3"),
        ({"student": {"num_query_groups": 0}}, 1, "train", "student.num_query_groups must be at least 1, found 0"),
        ({"teacher": {"kv_channels": -8}}, 1, "train", "teacher.kv_channels must be at least 1, found -8"),
        ({"student": {"vocab_size": 0}}, 1, "sft", "student.vocab_size must be at least 1, found 0"),
        ({"optimizer": {"lr": float("inf")}}, 1, "train", "optimizer.lr must be a finite number, found inf"),
        ({"training": {"steps_per_rollout": 0}}, 1, "train", "steps_per_rollout must be at least 1"),
        ({"training": {"steps_per_rollout": 4}}, 1, "train", "save_interval 50 must be a multiple of"),
        ({"teacher_context": {"prompt_template": "{answer}{prompt}"}}, 1, "train", "needs parallel.teacher_schedule"),
        ({"teachers": {"math": "folder"}}, 1, "train", "teachers needs parallel.teacher_schedule=ahead"),
        ({"teacher_context": {"max_prompt_length": 0}}, 1, "train", "max_prompt_length must be at least 1"),
        ({"training": {"target_accuracy": 0.5}}, 1, "sft", "training.eval_interval of at least 1"),
        ({"optimizer": {"lr": -1}}, 1, "train", "optimizer.lr must be at least 0, found -1"),
        ({"optimizer": {"min_lr": 1}}, 1, "train", "optimizer.min_lr 1.* is above optimizer.lr"),
        (
            {"optimizer": {"optimizer_cpu_offload": True, "use_distributed_optimizer": False}},
            1,
            "train",
            "optimizer_cpu_offload needs optimizer.use_distributed_optimizer",
        ),
        (
            {"optimizer": {"optimizer_cpu_offload": True}, "training": {"precision": "fp32"}},
            1,
            "train",
            "is for bf16 weights",
        ),
        ({"optimizer": {"optimizer_offload_fraction": 0}}, 1, "train", r"must be in \(0, 1\], found 0"),
        ({"optimizer": {"adam_beta1": 2}}, 1, "train", r"optimizer.adam_beta1 must be in \[0, 1\), found 2"),
        ({"rollout": {"samples_per_prompt": 3}}, 1, "train", "rollout.samples_per_prompt 3: try 24 or 36"),
        ({"rollout": {"temperature": -1}}, 1, "train", "rollout.temperature must be >= 0"),
        ({"rollout": {"top_p": 0}}, 1, "train", "rollout.top_p must be in"),
        ({"training": {"head_chunk_size": 0}}, 1, "train", "training.head_chunk_size must be at least 1"),
        ({"training": {"output_head": "logits", "fp32_logits": True}}, 1, "train", "set training.output_head=fused"),
        ({"rollout": {"max_response_length": 0}}, 1, "train", "rollout.max_response_length must be at least 1"),
        ({"rollout": {"dynamic": {"max_tokens": 0}}}, 1, "train", "rollout.dynamic.max_tokens must be at least 1"),
        ({"rollout": {"dynamic": {"buffer_size_gb": 0}}}, 1, "train", "rollout.dynamic.buffer_size_gb must be above 0"),
        (
            {"rollout": {"dynamic": {"cuda_graphs": True}}, "parallel": {"pipeline_model_parallel_size": 2}},
            2,
            "train",
            "rollout.dynamic.cuda_graphs=true is not offered where there are 2 pipeline stages: leave it out",
        ),
        ({"objective": "topd"}, 1, "train", "unknown objective 'topd': did you mean 'opd'|'tropd'"),
        ({"guidance": {"answers": None}}, 1, "train", "half-cosine needs teacher answers: set guidance.answers"),
        ({"guidance": {"answers": None}, "objective": "tropd-aopd"}, 1, "train", "half-cosine needs teacher answers"),
        ({"guidance": {"answers": None}, "objective": "seq-kd"}, 1, "train", "constant needs teacher answers"),
        ({"guidance": {"schedule": "none"}, "objective": "seq-kd"}, 1, "train", "use guidance.schedule=constant"),
        ({"guidance": {"answers": None}}, 1, "generate", "`generate` needs guidance.answers"),
        ({"guidance": {"answers_per_shard": -1}}, 1, "generate", "answers_per_shard must be at least 1, or 0 for one"),
        ({"data": {"train": {}}}, 1, "train", "data.train is a mixture without files"),
        ({"tokenizer": {"teacher": "x"}}, 1, "train", "tokenizer.teacher is a path, and kind=characters has none"),
        ({"tokenizer": {"chat_template": "x"}}, 1, "train", "need control tokens; kind=characters has none"),
        ({"tokenizer": {"megatron_options": {"pattern": "v1"}}}, 1, "train", "are those of kind=tiktoken, found char"),
        ({"data": {"train": {"a.jsonl": 1, "b.jsonl": 0}}}, 1, "train", "weight of b.jsonl must be a positive number"),
        ({"guidance": {"max_prefix_length": 9999}}, 1, "train", "must be between 0 and rollout.max_response_length"),
        ({"guidance": {"fraction": 1.5}}, 1, "train", r"guidance.fraction must be in \[0, 1\]"),
        ({"teacher": None}, 1, "train", "`train` needs a teacher"),
        ({"teacher": None}, 1, "generate", "`generate` needs a teacher"),
        ({"data": {"validation": None}}, 1, "evaluate", "`evaluate` needs data.validation or evaluation.files"),
        ({"data": {"train": "reasoning-gym:train"}}, 1, "train", "reasoning-gym:train needs tasks.kinds"),
        ({"data": {"train": "reasoning-gym"}}, 1, "train", "'reasoning-gym' is neither a file nor reasoning-gym:train"),
        (
            {"data": {"validation": "reasoning-gym:train"}, "tasks": {"kinds": {"gcd": {}}}},
            1,
            "train",
            "held-out prompts must not be those of training",
        ),
        ({"tasks": {"level": -1}}, 1, "train", "tasks.level must be at least 0"),
        ({"evaluation": {"num_samples": 4}}, 1, "evaluate", "num_samples 4 at temperature 0 .* evaluation.temperature"),
        ({"evaluation": {"num_samples": 0}}, 1, "train", "evaluation.num_samples must be at least 1"),
        ({"evaluation": {"pass_at": [2]}}, 1, "evaluate", "pass_at 2 needs 1 <= k <= evaluation.num_samples 1"),
        (
            {"evaluation": {"max_response_length": 9000}},
            1,
            "evaluate",
            "between 1 and rollout.max_response_length 8192",
        ),
        ({"evaluation": {"files": ["a/x.jsonl", "b/x.jsonl"]}}, 1, "evaluate", r"two files named \['x'\]"),
        ({"evaluation": {"top_p": 0}}, 1, "train", "evaluation.top_p must be in"),
        ({"evaluation": {"program_seconds": 0}}, 1, "train", "evaluation.program_seconds must be above 0"),
        ({"data": {"prompt_template": "Q:"}}, 1, "train", "prompt_template must contain {prompt} once"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(
    tmp_path: Path, changes: dict[str, Any], world_size: int, command: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load_config(write(tmp_path, **changes)), world_size, command)


def test_uneven_pipeline_splits_that_fit_are_taken(tmp_path: Path) -> None:
    uneven = {"num_layers": 5, "num_layers_in_first_pipeline_stage": 3}
    validate(load_config(write(tmp_path, parallel=PP2, student=uneven)), 2, "train")


def test_the_automatic_schedule_guides_the_tropd_family_alone(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert resolved_schedule(config) == "half-cosine"
    assert resolved_schedule(replace(config, objective="tropd-exact")) == "half-cosine"
    assert resolved_schedule(replace(config, objective="seq-kd")) == "constant"
    assert resolved_schedule(replace(config, objective="opd")) == "none"
    unguided = load_config(write(tmp_path, guidance={"answers": None}, objective="opd"))
    validate(unguided, 1, "train")


def test_the_objectives_of_the_config_are_the_presets() -> None:
    from megatron_tropd.config import OBJECTIVES
    from megatron_tropd.objectives import PRESETS

    assert set(OBJECTIVES) == set(PRESETS) - {"sft"}


def test_the_options_of_the_config_are_options_of_the_presets() -> None:
    from megatron_tropd.config import ObjectiveOptions
    from megatron_tropd.objectives import Objective

    assert set(field_names(ObjectiveOptions)) <= set(field_names(Objective)) | {"alpha", "beta"}


def test_help_documents_every_field_and_nothing_else() -> None:
    from megatron_tropd.config_parser import build_parser

    text = build_parser("train", "").format_help()
    documented = set(re.findall(r"^  --([a-z_0-9.]+)", text, flags=re.MULTILINE))
    sections = {name.split(".")[0] for name in field_names(Config) if "." in name}
    assert documented == set(field_names(Config)) - sections
    assert "Number of transformer layers. (required, type: int)" in text


def test_a_prefix_budget_of_zero_is_not_the_default(tmp_path: Path) -> None:
    from megatron_tropd.training_requests import longest_prefix

    config = load_config(write(tmp_path, rollout={"max_response_length": 10}))
    assert longest_prefix(config, 0) == 10
    assert longest_prefix(load_config(tmp_path / "config.yaml", ["--guidance.max_prefix_length=0"]), 0) == 0
    assert longest_prefix(load_config(tmp_path / "config.yaml", ["--guidance.max_prefix_length=4"]), 0) == 4


def test_a_refusal_is_one_line_and_a_defect_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_tropd import __main__ as program

    path = str(write(tmp_path, student={"num_layer": 3}))
    assert program.main(["train", path]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: unknown config field student.num_layer")
    # A ValueError out of the standard library is not ours to word.
    path = str(write(tmp_path))
    monkeypatch.setattr(program, "_run", lambda command, config: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        program.main(["train", path])
