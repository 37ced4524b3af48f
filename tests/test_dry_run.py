"""`--dry-run` of `train` and `generate`: every problem at once, nothing started and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from tests.ranks import run_ranks

VOCAB_SIZE = 43
MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "num_query_groups": 2}
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
}


def _write(folder: Path, **changes: Any) -> str:
    """A config that can start, with sections updated; returns its path."""
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "config.json").write_text(json.dumps(HF_CONFIG))
    (folder / "prompts.jsonl").write_text('{"prompt": "1+2="}\n{"prompt": "3+4="}\n')
    untied = {"untie_embeddings_and_output_weights": True, "load": str(folder / "hf")}
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "student": dict(MODEL),
        "teacher": MODEL | untied,
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_length": 16},
        "guidance": {"answers": str(folder / "answers.jsonl")},
        "rollout": {"max_response_length": 48},
        "training": {"global_batch_size": 32, "micro_batch_size": 4},
    }
    values["tokenizer"] = {"alphabet": "0123456789+-=., abcdefghijklmnopqrstuvwxyz"[: VOCAB_SIZE - 2]}
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def _run(*arguments: str, command: str = "train") -> tuple[int, str]:
    from megatron_tropd.__main__ import main

    output = StringIO()
    with redirect_stdout(output):
        status = main([command, *arguments])
    return status, output.getvalue()


def _plan_of_a_good_config(folder: Path) -> None:
    path = _write(folder, parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    before = sorted(folder.rglob("*"))
    status, text = _run(path, "--dry-run", "--world-size", "8")
    assert status == 0
    assert "8 ranks = tensor 2 x pipeline 2 x data 2" in text
    assert "8 prompts x 4 rollouts; at most 2,048 tokens (64 each)" in text
    assert "micro-batches  4 of 4" in text
    by_positions = _run(path, "--dry-run", "--world-size=8", "--training.micro_batch_tokens=150")[1]
    assert "micro-batches  8 of 2 on each data-parallel rank, fewer of more where" in by_positions
    adapted = _run(path, "--dry-run", "--world-size=8", "--lora.rank=400")[1]
    assert "adapters   0.6 M parameters of rank 400; on a rank of each stage 0.2 M, 0.2 M\n" in adapted
    # Twice as many sequences at once of the same length take as much as that many rows.
    one, two = (
        _run(path, "--dry-run", "--world-size=8", option)[1].split("memory")[1]
        for option in ("--training.micro_batch_tokens=128", "--training.micro_batch_size=2")
    )
    assert one == two != text.split("memory")[1]
    assert "no weights" in text and "student starts with random weights" in text and "`python -m" in text
    assert sorted(folder.rglob("*")) == before, "a dry run writes nothing"
    # Without an option one model replica is meant, and torchrun's WORLD_SIZE where it is set.
    assert "4 ranks = tensor 2 x pipeline 2 x data 1" in _run(path, "--dry-run")[1]
    options = "teacher_schedule=ahead", "pipeline_model_parallel_size=1", "teacher_tensor_model_parallel_size=1"
    ahead = [f"--parallel.{option}" for option in (*options, "teacher_pipeline_model_parallel_size=4")]
    assert "4 ranks = tensor 2 x pipeline 1 x data 2" in _run(path, "--dry-run", *ahead)[1]
    os.environ["WORLD_SIZE"] = "16"
    assert "16 ranks = tensor 2 x pipeline 2 x data 4" in _run(path, "--dry-run")[1]
    del os.environ["WORLD_SIZE"]


def _all_problems_at_once(folder: Path) -> None:
    path = _write(
        folder,
        student={"load": str(folder / "nowhere"), "num_query_groups": 3},
        teacher={"hidden_size": 64},
        data={"train": str(folder / "missing.jsonl"), "validation": str(folder / "config.yaml")},
        parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3},
        training={"global_batch_size": 33},
        output_dir=str(folder / "prompts.jsonl" / "run"),
    )
    status, text = _run(path, "--dry-run", "--world-size=6")
    assert status == 1
    for problem in (
        "student.num_query_groups 3 is not divisible by tensor_model_parallel_size 2",
        "student.num_attention_heads 4 is not divisible by num_query_groups 3",
        "student.num_layers 4 cannot be split over pipeline_model_parallel_size 3",
        "teacher.num_layers 4 cannot be split over pipeline_model_parallel_size 3",
        "training.global_batch_size 33 must be a multiple",
        "prompts.jsonl is a file, not a folder",
        "cannot read " + str(folder / "missing.jsonl"),
        f"{folder / 'config.yaml'}:1",
        f"student.load {folder / 'nowhere'} is not there",
        "hidden_size: the folder has 32, this run 64",
    ):
        assert problem in text, problem
    assert "this run cannot start, 10 problems" in text


def _one_problem_each(folder: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": {"vocab_size": 40}}, "vocab_size: the folder has 43, this run 40"),
        ({"tokenizer": {"kind": "huggingface", "model": "nowhere"}}, "is not a folder with tokenizer.json"),
        ({"student": {"num_attention_heads": 0}}, "student.num_attention_heads must be at least 1, found 0"),
        ({"parallel": {"tensor_model_parallel_size": 0}}, "parallel sizes must be at least 1"),
    ]
    gone = {"teachers": {"math": "nowhere"}, "parallel": {"teacher_schedule": "ahead"}}
    cases.append((gone, "teachers.math.load nowhere is not there"))
    for changes, message in cases:
        status, text = _run(_write(folder, **changes), "--dry-run")
        assert status == 1 and message in text, text
    path = _write(folder)
    status, text = _run(path, "--dry-run", "--student.num_layer=3")
    assert status == 1 and "did you mean" in text
    (folder / "hf" / "config.json").write_text("{")
    status, text = _run(path, "--dry-run")
    assert status == 1 and "config.json cannot be read" in text
    (folder / "hf" / "config.json").write_text(json.dumps(HF_CONFIG))
    (folder / "hf" / "model.safetensors").write_bytes(b"not tensors")
    status, text = _run(path, "--dry-run")
    assert status == 1 and "model.safetensors" in text
    (folder / "answers.jsonl").write_text("{}\n")
    status, text = _run(path, "--dry-run")
    assert status == 1 and "2 problems" in text and "not a store of teacher answers" in text


def _plan_and_problems_of_generate(folder: Path) -> None:
    path = _write(folder, teacher={"num_layers": 4}, rollout={"engine": "dynamic", "max_batch_size": 10})
    before = sorted(folder.rglob("*"))
    options = ("--dry-run", "--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2")
    status, text = _run(path, *options, "--world-size=8", command="generate")
    assert status == 0 and "8 ranks = tensor 2 x pipeline 2 x data 2" in text, text
    assert "on GPUs dynamic batching" in text and "rollout.max_batch_size = 10 sequences" in text
    assert "teacher.load" in text and "student" not in text and sorted(folder.rglob("*")) == before
    table = text.split("NCCL\n")[1].splitlines()
    assert table[0].split() == ["rank", "of", "stage", "0", "stage", "1"] and table[-1] == "nothing was started"
    assert "4 ranks = tensor 2 x pipeline 2 x data 1" in _run(path, *options, command="generate")[1]
    broken = _write(
        folder,
        teacher={"load": str(folder / "nowhere"), "num_query_groups": 3},
        data={"train": str(folder / "missing.jsonl")},
        guidance={"answers": str(folder / "prompts.jsonl" / "answers.jsonl")},
    )
    status, text = _run(broken, "--dry-run", command="generate")
    assert status == 1 and "this run cannot start, 4 problems" in text, text
    for problem in (
        "teacher.num_attention_heads 4 is not divisible by num_query_groups 3",
        "cannot read " + str(folder / "missing.jsonl"),
        "prompts.jsonl is a file, not a folder",
        f"teacher.load {folder / 'nowhere'} is not there",
    ):
        assert problem in text, problem
    status, text = _run(_write(folder, teacher=None), "--dry-run", command="generate")
    assert status == 1 and "this run cannot start, 1 problem:\n  - `generate` needs a teacher" in text


def _a_store_that_generate_has_begun(folder: Path) -> None:
    from megatron_tropd.answers import AnswerWriter
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.data import read_prompts
    from megatron_tropd.generate import answer_header
    from megatron_tropd.tokenizer_builder import build_tokenizers

    path, store = _write(folder), folder / "answers.jsonl"
    config = load_config(path)
    tokenizer, _ = build_tokenizers(config.tokenizer)
    prompts, _ = read_prompts(folder / "prompts.jsonl", tokenizer, 16, "refuse")
    header = answer_header(config, tokenizer)
    states = {store.read_bytes(): "nothing follows the header" for _ in [AnswerWriter(store, header).close()]}
    states |= {b"": "the file is empty", store.read_bytes()[:-9]: "the header is cut off"}
    with AnswerWriter(store, header) as writer:
        writer.write(prompts[0], (3, 4, 1), True)
    whole = store.read_bytes()
    states[whole] = "no teacher answer for prompt '2'"
    states[store.read_bytes()[:-9]] = "the last line is cut off"
    for content, found in states.items():
        store.write_bytes(content)
        status, text = _run(path, "--dry-run")
        assert status == 0 and found in text and "which has to come first" in text, text
        status, text = _run(path, "--dry-run", command="generate")
        assert status == 0 and f"guidance.answers {store} is there: what it lacks is added" in text, text
        assert store.read_bytes() == content
    assert b"[3, 4, 1]" in whole
    store.write_bytes(whole.replace(b"[3, 4, 1]", b"[3, 999, 1]").rstrip())
    status, text = _run(path, "--dry-run")
    assert status == 1 and "999" in text and "cut off" not in text, "whole, but of another vocabulary"
    store.write_bytes(whole)
    other = _write(folder, rollout={"temperature": 0.5})
    status, text = _run(other, "--dry-run", command="generate")
    assert status == 1 and "the file exists with another header" in text
    status, text = _run(path, "--dry-run", "--guidance.answers_per_shard=5", command="generate")
    assert status == 1 and "answers.jsonl is one file: set guidance.answers_per_shard=0" in text


def _check_all(folder: str) -> None:
    import torch.distributed as dist

    checks: list[Callable[[Path], None]] = [
        _plan_of_a_good_config,
        _all_problems_at_once,
        _one_problem_each,
        _plan_and_problems_of_generate,
        _a_store_that_generate_has_begun,
    ]
    del os.environ["WORLD_SIZE"]
    for check in checks:
        own = Path(folder) / check.__name__
        own.mkdir()
        check(own)
        assert not dist.is_initialized(), "a dry run starts no process group"


def test_dry_runs(tmp_path: Path) -> None:
    run_ranks(1, _check_all, str(tmp_path), init_process_group=False)
