"""Whole runs of the program as a user starts it: resumption after a kill, SIGTERM, broken numbers, wrong inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent
TIMING_KEYS = ("tokens_per_second", "seconds_")
"""How they begin."""
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
    from megatron_tropd.data import read_prompts
    from megatron_tropd.tokenizer import CharacterTokenizer

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


def config_file(folder: Path, inputs: Path, **sections: Any) -> Path:
    """A tiny TrOPD run writing to ``folder/run``; ``sections`` update the config section by section."""
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "student": dict(MODEL),
        "teacher": {**MODEL, "hidden_size": 48, "num_layers": 2, "init_method_std": 0.2},
        "objective_options": {"top_k": 4},
        "guidance": {"answers": str(inputs / "answers.jsonl")},
        "tokenizer": {"alphabet": "0123456789+="},
        "data": {
            "train": str(inputs / "train.jsonl"),
            "validation": str(inputs / "validation.jsonl"),
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
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
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
    return [{key: value for key, value in line.items() if not key.startswith(TIMING_KEYS)} for line in lines]


@pytest.mark.parametrize("layout", [{"pipeline_model_parallel_size": 2}, {}])  # tensor parallel: test_faults.py
def test_a_run_killed_in_the_middle_of_a_step_continues_bit_for_bit(tmp_path: Path, data: Path, layout: dict) -> None:
    import torch

    training = {} if layout else {"steps_per_rollout": 2, "max_log_prob_gap": 1e-4}
    whole = config_file(tmp_path / "whole", data, parallel=layout, training=training)
    run_ranks(2, _train, str(whole), None, timeout=200, init_process_group=False)
    killed = config_file(tmp_path / "killed", data, parallel=layout, training=training)
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
    ages = [line["rollout_age"] for line in metrics[:-1]]
    assert ages == ([0] * 6 if layout else [0, 1] * 3)
    fresh, stale = ([line for age, line in zip(ages, metrics, strict=False) if age == wanted] for wanted in (0, 1))
    assert max(line["log_prob_gap_max"] for line in fresh) < 1e-4
    assert not any(line["stale_token_share"] for line in fresh)
    assert not any(line["clipped_ratio_share"] for line in fresh)
    if stale:  # the engine sampled with the weights before the last step
        assert max(line["stale_log_prob_gap"] for line in stale) > 1e-3
        assert all(line["stale_token_share"] == (line["on_policy_share"] > 0) for line in stale)
        assert not any(line["log_prob_gap_max"] for line in stale)  # over tokens of these weights: there are none
    _check_falling_back(tmp_path / "killed" / "run", killed, expected)


def _check_falling_back(run: Path, config: Path, expected: dict[str, Any]) -> None:
    """With its last checkpoint damaged the run stops or, by option, takes the one before and ends as it had ended."""
    import torch

    shard = max((run / "checkpoints" / "step_6").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    falling_back = config.with_name("falling_back.yaml")
    sections = yaml.safe_load(config.read_text())
    sections["training"]["fall_back"] = True
    falling_back.write_text(yaml.safe_dump(sections))
    refused, resumed = _messages(config, falling_back)
    assert all(f"{shard.name} is damaged" in text and "training.fall_back=true" in text for text in refused)
    assert resumed == ["no error"] * 2
    events = [json.loads(line) for line in (run / "logs" / "rank_0.jsonl").read_text().splitlines()]
    assert any("falling back to step_4" in (event.get("message") or "") for event in events)
    found = _weights(run)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def _train_to_a_target(path: str) -> None:
    from megatron_tropd import trainer
    from megatron_tropd.config_parser import load_config

    class Rising(trainer.Evaluator):
        def __call__(self) -> dict[str, float]:
            called.append(1)
            return super().__call__() | {"accuracy": 0.4 * len(called)}

    called: list[int] = []
    trainer.Evaluator = Rising  # type: ignore[misc]
    trainer.train(load_config(path, ["--training.target_accuracy=0.7"]))


def test_a_run_ends_where_an_evaluation_reaches_the_target(tmp_path: Path, data: Path) -> None:
    training = {"eval_interval": 3, "train_iters": 10_000, "save_interval": 2, "target_accuracy": 0.0}
    path = config_file(tmp_path, data, training=training)
    metrics, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"
    process = _start(path)
    assert process.wait(timeout=100) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0]  # reached before any step
    run_ranks(1, _train_to_a_target, str(path), timeout=100, init_process_group=False)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "loss" in lines[2] and "loss" not in lines[3] and lines[3]["accuracy"] == pytest.approx(1.2)
    assert (checkpoints / "latest").read_text() == "step_3"
    assert _exit_report(tmp_path / "run", 0)["outcome"] == "finished"


def _exit_report(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / "logs" / f"rank_{rank}.exit.json").read_text())


def _start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_tropd", "train", str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )


def test_sigterm_saves_a_checkpoint_and_exits_0(tmp_path: Path, data: Path) -> None:
    # Rollouts in use are in no checkpoint: the step in hand is followed by those that are left of its rollout.
    training = {"train_iters": 10_000, "save_interval": 0, "eval_interval": 0, "steps_per_rollout": 5}
    path = config_file(tmp_path, data, training=training)
    process = _start(path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    steps_done = metrics.read_text().count("\n")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{steps_done}"
    assert steps_done % 5 == 0
    assert "SIGTERM: saved" in output
    report = _exit_report(tmp_path / "run", rank=0)
    assert (report["outcome"], report["error"], report["steps_done"]) == ("sigterm", None, steps_done)
    assert f"sigterm: {steps_done} of 10000 steps in" in output


def test_what_a_user_got_wrong_is_one_line_and_exit_2(tmp_path: Path, data: Path) -> None:
    process = _start(config_file(tmp_path, data), "--student.num_layer=3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        output.strip()
        == "error: command line: unknown config field student.num_layer; did you mean student.num_layers?"
    )


# ------------------------------------------------------------------------------ refusals that all ranks must agree on


def _messages_of(paths: list[str], command: str) -> list[str]:
    """The errors that this rank gets from the same command on several configs."""
    import importlib

    from megatron_tropd.__main__ import COMMANDS
    from megatron_tropd.config_parser import load_config

    module, function, _ = COMMANDS[command]
    messages = []
    for path in paths:
        try:
            getattr(importlib.import_module(module), function)(load_config(path))
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def _messages(*paths: Path, command: str = "train") -> list[list[str]]:
    """For each config, what the two ranks said."""
    arguments = ([str(path) for path in paths], command)
    found = run_ranks(2, _messages_of, *arguments, timeout=180)
    return [list(both) for both in zip(*found, strict=True)]


def test_inputs_that_do_not_fit_are_refused_on_every_rank(tmp_path: Path, data: Path) -> None:
    bad_prompts = tmp_path / "prompts.jsonl"
    bad_prompts.write_text('{"prompt": "1+1="}\n{"prompt": }\n')
    long_prompts = tmp_path / "long.jsonl"
    long_prompts.write_text('{"prompt": "123456789+1="}\n')
    other_store = tmp_path / "answers.jsonl"
    lines = (data / "answers.jsonl").read_text().splitlines()
    header = {**json.loads(lines[0]), "tokenizer": "0" * 64}
    other_store.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    tp2 = {"tensor_model_parallel_size": 2}
    cases = {
        "prompts.jsonl:2: not valid JSON": {"data": {"train": str(bad_prompts)}},
        "long.jsonl:1: the prompt has 12 tokens": {"data": {"train": str(long_prompts)}},
        "are ids of another tokenizer": {"guidance": {"answers": str(other_store)}},
        "no checkpoint at": {"teacher": {"load": str(tmp_path / "nowhere")}},
        "student.num_attention_heads 3 is not divisible": {"student": {"num_attention_heads": 3}, "parallel": tp2},
        "2 processes cannot be split": {"parallel": {"pipeline_model_parallel_size": 3}},
        "'ttropd'; did you mean 'tropd'": {"objective": "ttropd"},
        "training.global_batch_size 20 must be a multiple": {"training": {"global_batch_size": 20}},
    }
    if not torch.cuda.is_available():
        cases |= {
            "optimizer_cpu_offload moves state from GPUs": {"optimizer": {"optimizer_cpu_offload": True}},
            "teacher.fp8 hybrid needs a GPU and Transformer Engine": {"teacher": {"fp8": "hybrid"}},
        }
    paths = [config_file(tmp_path / str(index), data, **sections) for index, sections in enumerate(cases.values())]
    for message, both in zip(cases, _messages(*paths), strict=True):
        assert all(message in text for text in both), (message, both)
    for rank in range(2):
        report = _exit_report(tmp_path / "0" / "run", rank)
        assert (report["outcome"], report["error"]) == ("error", "DataError")
        assert "prompts.jsonl:2: not valid JSON" in report["message"]
    assert not (tmp_path / "7" / "run").exists()  # refused before anything started: nothing but the message


def test_a_store_of_another_teacher_is_refused_on_every_rank_and_left_alone(tmp_path: Path, data: Path) -> None:
    before = (data / "answers.jsonl").read_bytes()
    (both,) = _messages(config_file(tmp_path, data), command="generate")
    assert all("the file exists with another header" in text for text in both)
    assert (data / "answers.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused(tmp_path: Path, data: Path) -> None:
    path = config_file(tmp_path / "first", data, training={"train_iters": 1})
    run_ranks(2, _train, str(path), None, timeout=120, init_process_group=False)
    checkpoints = str(tmp_path / "first" / "run")
    wider = config_file(tmp_path / "wider", data, student={"load": checkpoints, "ffn_hidden_size": 64})
    other = config_file(tmp_path / "other", data, student={"load": checkpoints}, tokenizer={"alphabet": "=+0123456789"})
    kept = tmp_path / "first" / "run" / "config.yaml"
    before = kept.read_text()
    resumed = config_file(tmp_path / "first", data, training={"train_iters": 2, "seed": 5})
    by_width, by_seed = _messages(wider, resumed)
    assert "train_iters: 1\n" in before and kept.read_text() == before  # that of the run whose checkpoints lie there
    forced = config_file(tmp_path / "first", data, training={"train_iters": 2, "seed": 5, "allow_config_changes": True})
    (by_force,) = _messages(forced)
    (by_tokenizer,) = _messages(other, command="evaluate")
    assert all("ffn_hidden_size: the checkpoint has 48, this run 64" in text for text in by_width)
    for text in by_seed:
        assert "! training.seed: the checkpoint has 1234, this run 5" in text
        assert "\n  training.train_iters: the checkpoint has 1, this run 2" in text
    assert by_force == ["no error"] * 2 and _metrics(tmp_path / "first" / "run")[-1]["step"] == 2
    assert "train_iters: 2\n" in kept.read_text()
    assert all("trained with another tokenizer" in text for text in by_tokenizer)


def test_an_engine_that_disagrees_with_the_trainer_stops_the_run_and_the_samples_are_kept(
    tmp_path: Path, data: Path
) -> None:
    # No guidance: every token of step 0 is the engine's.
    training = {"max_log_prob_gap": 1e-12, "eval_interval": 0}
    path = config_file(tmp_path, data, training=training, guidance={"schedule": "none"})
    (both,) = _messages(path)
    wanted = "step 0: the log-probs of the engine that generated and of the trainer differ by"
    assert all(wanted in text for text in both), both
    kept = [json.loads(line) for file in (tmp_path / "run" / "refused").iterdir() for line in file.open()]
    assert sorted(sample["sample_id"] for sample in kept) == list(range(16))
    assert not (tmp_path / "run" / "checkpoints").exists()
    for rank in range(2):
        report = _exit_report(tmp_path / "run", rank)
        assert (report["outcome"], report["error"], report["step"]) == ("refused step", "LogProbGapError", 0)
        assert (report["phase"], report["steps_done"]) == ("optimizer", 0) and wanted in report["message"]


def _teach_answer_distil_evaluate(folder: str, paths: dict[str, str]) -> dict[str, Any]:
    """Every command in turn, as the demo runs them; `generate` twice, since it has to continue."""
    import torch.distributed as dist

    from megatron_tropd.config_parser import load_config
    from megatron_tropd.evaluate import evaluate
    from megatron_tropd.generate import generate
    from megatron_tropd.trainer import sft, train

    sft(load_config(paths["teacher"]))
    distil = load_config(paths["student"])
    store = Path(folder) / "answers.jsonl"
    generate(distil)
    written = store.read_bytes()
    dist.barrier()
    if os.environ["RANK"] == "0":
        # As if a crash had cut the file off in the middle of a line.
        store.write_bytes(written[: len(written) // 2])
    dist.barrier()
    generate(distil)
    train(distil)
    evaluate(distil)
    return {"same store": store.read_bytes() == written, "lines": written.count(b"\n")}


def test_the_commands_work_together_on_two_tensor_parallel_ranks(tmp_path: Path, data: Path) -> None:
    tp2 = {"tensor_model_parallel_size": 2}
    teacher = config_file(
        tmp_path / "teacher", data, parallel=tp2, training={"train_iters": 40, "eval_interval": 0, "save_interval": 0}
    )
    student = config_file(
        tmp_path / "student",
        data,
        parallel=tp2,
        teacher={**MODEL, "load": str(tmp_path / "teacher" / "run")},
        guidance={"answers": str(tmp_path / "answers.jsonl")},
    )
    benchmark = tmp_path / "aime.jsonl"
    benchmark.write_text(
        '{"id": "I-1", "prompt": "1+2=", "answer": 204, "verifier": "math"}\n'
        '{"prompt": "3+4=", "answer": "25", "verifier": "number"}\n'
    )
    values = yaml.safe_load(student.read_text())
    values["evaluation"] = {"files": [str(benchmark)]}
    values["teacher"] = {**MODEL, "load": str(tmp_path / "teacher" / "run")}
    student.write_text(yaml.safe_dump(values))
    paths = {"teacher": str(teacher), "student": str(student)}
    for found in run_ranks(2, _teach_answer_distil_evaluate, str(tmp_path), paths, timeout=200):
        assert found == {"same store": True, "lines": 65}
    taught = _metrics(tmp_path / "teacher" / "run")
    assert taught[39]["loss"] < taught[0]["loss"] / 1.5
    folder = tmp_path / "student" / "run"
    last = _metrics(folder)[-1]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["num_prompts"] == 16 and evaluation["accuracy"] == last["accuracy"]
    assert last["aime/num_prompts"] == 2 and evaluation["aime/num_samples"] == 1
    judged = [json.loads(line) for line in (folder / "evaluation" / "aime.jsonl").open()]
    assert [(line["id"], line["answer"]) for line in judged] == [("I-1", "204"), ("2", "25")]
    assert all(line["finished"] or line["num_tokens"] == 5 for line in judged)
    assert (folder / "report" / "training.png").exists() and (folder / "config.yaml").exists()
    sample = json.loads((folder / "rollouts" / "step_000000.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith("=") and sample["prefix"] + sample["response"]


LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "ahead": {"tensor_model_parallel_size": 2, "teacher_schedule": "ahead", "teacher_hidden": "host"},
    "packed": {"tensor_model_parallel_size": 2},
    "inference copy": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "context, packed in one row": {"context_parallel_size": 2},
    "own layout": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "teacher_schedule": "ahead",
        "teacher_tensor_model_parallel_size": 1,
        "teacher_pipeline_model_parallel_size": 2,
        "offload_teacher": True,
    },
}


def _train_each(paths: list[str], to_evaluate: str | None = None) -> None:
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.evaluate import evaluate
    from megatron_tropd.trainer import train

    for path in paths:
        train(load_config(path, []))
    if to_evaluate is not None:
        evaluate(load_config(to_evaluate, []))


def test_how_the_work_is_spread_changes_nothing(tmp_path: Path, data: Path) -> None:
    paths = {
        name: config_file(
            tmp_path / name, data, parallel=parallel,
            rollout={"tensor_model_parallel_size": 2 if name == "inference copy" else None},
            training={
                "train_iters": 3,
                "micro_batch_tokens": 40 if "packed" in name else None,
                "sequence_packing": "one row" in name,
            },
        )
        for name, parallel in LAYOUTS.items()
    }  # fmt: skip
    copied = paths["inference copy"]
    run_ranks(2, _train_each, [str(path) for path in paths.values()], str(copied), timeout=300)
    wanted, *others = [_metrics(path.parent / "run") for path in paths.values()]
    assert wanted[0]["grad_norm"] > 0 and any(step.get("outlier_share", 0) > 0 for step in wanted)
    with (copied.parent / "run" / "metrics.jsonl").open() as lines:
        assert ["seconds_refit" in line for line in lines] == [True] * 3 + [False]
    # `evaluate` starts in the copy's layout, and samples what the copy did at the end of the run.
    measured = json.loads((copied.parent / "run" / "evaluation.json").read_text())
    assert measured == pytest.approx({name: _metrics(copied.parent / "run")[-1][name] for name in measured})
    for found in others:
        for wanted_step, found_step in zip(wanted, found, strict=True):
            wanted_padding, padding = wanted_step.get("padding_share", 0), found_step.pop("padding_share", 0)
            assert found_step | {"padding_share": wanted_padding} == pytest.approx(
                wanted_step | {"padding_share": wanted_padding}, rel=2e-5, abs=2e-6
            )
            assert 0 <= padding < 0.9


def test_what_is_known_of_the_global_batch_alone_is_the_same_in_every_layout(tmp_path: Path, data: Path) -> None:
    layouts = {"dp": {}, "tp": {"tensor_model_parallel_size": 2}, "pp": {"pipeline_model_parallel_size": 2}}
    paths = {
        (objective, name): config_file(
            tmp_path / objective / name, data, parallel=parallel, objective=objective,
            training={"train_iters": 2, "eval_interval": 0}, objective_options={}, guidance={"schedule": "none"},
        )
        for objective in ("entropy-opd", "reopold-two-stage")
        for name, parallel in layouts.items()
    }  # fmt: skip
    paths |= {
        ("gkd", name): config_file(
            tmp_path / "gkd" / name, data, parallel=parallel, objective="gkd",
            training={"train_iters": 2, "eval_interval": 0},
            objective_options={"task_reward": 0.5, "importance_cap": 2.0},
        )
        for name, parallel in layouts.items()
    }  # fmt: skip
    run_ranks(2, _train_each, [str(path) for path in paths.values()], timeout=300)
    found = {key: _metrics(path.parent / "run")[:2] for key, path in paths.items()}
    for (objective, name), steps in found.items():
        for step, wanted in zip(steps, found[objective, "dp"], strict=True):
            # How full the micro-batches are does depend on the layout.
            spread = {name: step[name] for name in ("padding_share", "rollout_imbalance")}
            assert step == pytest.approx(wanted | spread, rel=2e-5, abs=2e-6), (
                objective,
                name,
            )
    for step in found["gkd", "dp"]:
        assert 0 < step["on_policy_share"] < 1 and 0 < step["task_reward"] < 1
    for step in found["entropy-opd", "dp"]:
        assert 0 < step["response_tokens"] < 0.3 * 16 * 5 and step["entropy_threshold"] > 0
    first, second = found["reopold-two-stage", "dp"]
    assert "entropy_threshold" not in first and first["response_tokens"] > 3 * second["response_tokens"]


def _evaluate(path: str) -> None:
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.evaluate import evaluate

    evaluate(load_config(path))


def test_several_samples_of_every_prompt_are_the_same_on_one_rank_and_on_two(tmp_path: Path, data: Path) -> None:
    evaluation = {"num_samples": 3, "temperature": 1.0, "pass_at": [1, 2], "max_response_length": 4}
    found = []
    for size in (1, 2):
        path = config_file(tmp_path / str(size), data, evaluation=evaluation, data={"verifier": "number"})
        run_ranks(size, _evaluate, str(path), timeout=120, init_process_group=False)
        folder = tmp_path / str(size) / "run"
        lines = [json.loads(line) for line in (folder / "evaluation" / "validation.jsonl").open()]
        found.append((json.loads((folder / "evaluation.json").read_text()), lines))
    assert found[0] == found[1]
    metrics, lines = found[0]
    assert [line["sample"] for line in lines] == [0, 1, 2] * 16
    assert max(line["num_tokens"] for line in lines) == 4
    assert len({line["response"] for line in lines}) > 30  # draws differ between samples and prompts
    assert metrics["num_samples"] == 3 and metrics["pass_at_1"] == metrics["accuracy"] <= metrics["pass_at_2"]


def test_a_prompt_that_cannot_be_judged_is_refused_on_every_rank_before_training(tmp_path: Path, data: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "="}\n')
    (both,) = _messages(config_file(tmp_path, data, data={"validation": str(prompts), "verifier": "number"}))
    wanted = "prompt '1' cannot be evaluated with the verifier number: its reference answer '=' is not a number"
    assert all(wanted in text for text in both), both
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
