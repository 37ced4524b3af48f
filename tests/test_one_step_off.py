"""One step off: two sides of a job do what one would that generates a step ahead, and continue bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.config import ConfigError
from megatron_tropd.config_checks import validate
from megatron_tropd.config_parser import load_config
from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import _metrics, _weights, config_file

data = test_run.data

TWO_SIDES: dict[str, Any] = {
    "parallel": {"teacher_schedule": "ahead", "generator_ranks": 1},
    "rollout": {"tensor_model_parallel_size": 1, "refit_check_interval": 1},
    "training": {"one_step_off": True, "train_iters": 4, "save_interval": 2, "micro_batch_size": 4},
    "guidance": {"max_prefix_length": 2},
}
MORE: dict[str, Any] = {
    # The teacher reads longer prompts: its micro-batches are padded, and its positions count, otherwise.
    "teacher_context": {"prompt_template": "{answer}={prompt}", "max_prompt_length": 14},
    "rollout": {"over_sampling": 1.5},
}
"""What the second reference has, and the layouts that are compared with it; one replica generates in each of them."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 + 1": (2, {}),
    "tensor 2 + tensor 2": (
        4,
        {
            **MORE,
            "parallel": {
                "generator_ranks": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "teacher_tensor_model_parallel_size": 2,
            },
            "rollout": MORE["rollout"] | {"tensor_model_parallel_size": 2},
            "training": {"micro_batch_tokens": 44},
        },
    ),
    "tensor 2 + 1, packed": (
        3,
        {
            **MORE,
            "parallel": {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "teacher_tensor_model_parallel_size": 1,
            },
            "training": {"micro_batch_tokens": 44, "sequence_packing": True},
        },
    ),
    "pipeline 2 x data 2 + replicas": (
        6,
        {
            "parallel": {
                "generator_ranks": 2,
                "pipeline_model_parallel_size": 2,
                "teacher_pipeline_model_parallel_size": 1,
                "teacher_hidden": "host",
                "offload_teacher": True,
            },
            "rollout": {"engine": "dynamic"},
            "training": {"micro_batch_tokens": 30, "async_save": True},
        },
    ),
}


def _config(folder: Path, data: Path, **sections: Any) -> Path:
    merged = {name: {**TWO_SIDES.get(name, {}), **sections.get(name, {})} for name in {*TWO_SIDES, *sections}}
    return config_file(folder, data, **merged)


# ------------------------------------------------------------------------------------------------- inside ranks


def _train(path: str, overrides: tuple[str, ...] = ()) -> None:
    from megatron_tropd.trainer import train

    train(load_config(path, list(overrides)))


def _train_a_step_ahead(paths: list[str]) -> None:
    """The same on one side: what the next step learns from is generated before this one trains."""
    from megatron_tropd import trainer
    from megatron_tropd.trajectories import Trajectories

    build_source = trainer.build_source

    class Ahead:
        def __init__(self, config: Any, *args: Any, **options: Any):
            self.source, self.end = build_source(config, *args, **options), config.training.train_iters
            self.next: Trajectories | None = None

        def take(self, step: int, batch: int) -> Trajectories:
            found = self.next or self.source.take(step, batch)
            if step + 1 < self.end:
                made = self.source.take(step + 1, batch + 1)
                stamped = [replace(one, versions=(step,) * len(one.response)) for one in made.rollouts]
                self.next = replace(made, rollouts=stamped)
            return found

        def can_pause(self) -> bool:
            return True

        def files(self, *, last: bool = False) -> dict[str, str]:
            return {}

        def restore(self, checkpoint: Path) -> None:
            raise AssertionError("not resumed here")

    trainer.build_source = Ahead  # type: ignore[assignment]
    objective = trainer._objective
    trainer._objective = lambda config: objective(  # type: ignore[assignment]
        replace(config, training=replace(config.training, one_step_off=True))
    )
    for path in paths:
        trainer.train(load_config(path, []))


def _die(path: str, rank: int, at_step: int) -> None:
    """In ``at_step``; a checkpoint that is written in the background is there by then."""
    import os
    import signal

    from megatron_tropd import generator
    from megatron_tropd import step as step_module
    from megatron_tropd.writing import BackgroundWriter

    def kill(original: Any, step: Any) -> Any:
        def or_die(*args: Any, **options: Any) -> Any:
            if int(os.environ["RANK"]) == rank and step(*args) == at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return or_die

    step_module._refuse_non_finite = kill(step_module._refuse_non_finite, lambda learner, batch, *_: batch.step)
    generator.Generator._inputs = kill(  # type: ignore[method-assign]
        generator.Generator._inputs, lambda _, rollouts, step: step
    )
    BackgroundWriter.poll = BackgroundWriter.finish  # type: ignore[method-assign]
    _train(path)


def _sigterm_to_a_generator(path: str, at_step: int) -> None:
    import os
    import signal

    from megatron_tropd import generator

    inputs = generator.Generator._inputs

    def or_signal(self: Any, rollouts: Any, step: int) -> Any:
        if step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs(self, rollouts, step)

    generator.Generator._inputs = or_signal  # type: ignore[method-assign]
    _train(path)


def _hang(path: str, what: str) -> None:
    """The only rank that generates."""
    import os
    import signal
    import time

    from megatron_tropd import generator

    def hang(*_: Any) -> Any:
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)

    generator.Generator._inputs = hang  # type: ignore[method-assign]
    _train(path)


def _refuse_once(path: str, at_step: int) -> None:
    from megatron_tropd import trainer
    from megatron_tropd.guard import RefusedStepError

    train_step, refused = trainer.train_step, []

    def or_refuse(learner: Any, batch: Any) -> dict[str, float]:
        if batch.step == at_step and not refused:
            refused.append(at_step)
            raise RefusedStepError("this one", ())
        return train_step(learner, batch)

    trainer.train_step = or_refuse  # type: ignore[assignment]
    _train(path)


# -------------------------------------------------------------------------------------------------------- tests


def _samples(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one_step_off")
    references = {
        name: config_file(
            folder / name, data,
            parallel={"teacher_schedule": "ahead"},
            training={"train_iters": 4, "save_interval": 2, "micro_batch_size": 4},
            guidance=TWO_SIDES["guidance"],
            **sections,
        )
        for name, sections in {"reference": {}, "second reference": MORE}.items()
    }  # fmt: skip
    run_ranks(1, _train_a_step_ahead, [str(path) for path in references.values()])
    found = {name: folder / name / "run" for name in references}
    for name, (size, sections) in LAYOUTS.items():
        path = _config(folder / name, data, **sections)
        run_ranks(size, _train, str(path), init_process_group=False, timeout=180)
        found[name] = folder / name / "run"
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_sides_do_what_one_does_that_generates_a_step_ahead(runs: dict[str, Path], name: str) -> None:
    has_more = "teacher_context" in LAYOUTS[name][1]
    reference, found = _metrics(runs["second " * has_more + "reference"]), _metrics(runs[name])
    assert [line["step"] for line in found] == [line["step"] for line in reference]
    for wanted, line in zip(reference[:4], found[:4], strict=True):
        for key in {
            "loss",
            "grad_norm",
            "outlier_share",
            "stale_token_share",
            "log_prob_gap",
            "dropped_token_share",
            "accuracy",
        } & wanted.keys():
            assert line[key] == pytest.approx(wanted[key], rel=2e-5, abs=2e-6), (name, line["step"], key)
    assert [line["rollout_age"] for line in found[:4]] == [0.0, 1.0, 1.0, 1.0]
    assert found[0]["stale_token_share"] == 0 and found[1]["stale_token_share"] == 1
    assert _samples(runs[name], 0) == _samples(runs["reference"], 0) or name != "1 + 1"
    plain = _metrics(runs["reference"])[0]["loss"]
    assert has_more == (found[0]["loss"] != pytest.approx(plain, rel=1e-2))


def test_a_step_takes_what_was_waited_for_it_at_a_save_too(runs: dict[str, Path]) -> None:
    for name in LAYOUTS:
        for line in [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()][:4]:
            before = line["seconds_waiting"] + line["seconds_refit"]
            assert line["seconds_rollout"] >= before, (name, line["step"])
            parts = before + line["seconds_student"] + line["seconds_optimizer"]
            assert line["response_tokens"] / line["tokens_per_second"] >= parts, (name, line["step"])


def test_a_killed_rank_ends_the_job_which_then_continues_bit_for_bit(
    runs: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    import torch

    for name, rank in (("trainer", 0), ("generator", 1)):
        path = _config(tmp_path / name, data, training={"async_save": name == "trainer"})
        with pytest.raises(AssertionError, match="ended without a word"):
            run_ranks(2, _die, str(path), rank, 3, init_process_group=False)
        checkpoints = tmp_path / name / "run" / "checkpoints"
        head, *samples = [json.loads(line) for line in (checkpoints / "step_2" / "next_rollouts.jsonl").open()]
        assert {name: head[name] for name in ("step", "batch", "weights_of")} == {
            "step": 2,
            "batch": 2,
            "weights_of": 1,
        }
        assert len(samples) == 16
        assert all(version == 1 for sample in samples for version, _ in sample["versions"])
        run_ranks(2, _train, str(path), init_process_group=False)
        wanted, found = _weights(runs["1 + 1"]), _weights(tmp_path / name / "run")
        assert wanted.keys() == found.keys()
        for key, tensor in wanted.items():
            assert torch.equal(tensor, found[key]), (name, key)
        assert _metrics(runs["1 + 1"]) == _metrics(tmp_path / name / "run")
        assert all(_samples(runs["1 + 1"], step) == _samples(tmp_path / name / "run", step) for step in range(4))


def test_after_a_rollback_rollouts_are_of_the_weights_of_then(tmp_path: Path, data: Path) -> None:
    path = _config(tmp_path, data, guard={"on_refused": "rollback"}, training={"async_save": True})
    run_ranks(2, _refuse_once, str(path), 3, init_process_group=False)
    steps = [line for line in _metrics(tmp_path / "run") if "loss" in line]
    # Step 2 a second time, with the fifth batch, for which nothing was prepared; then a step ahead again.
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert [line["rollout_age"] for line in steps] == [0, 1, 0, 1]
    assert max(line["log_prob_gap"] for line in steps if line["rollout_age"] == 0) < 1e-5
    assert _samples(tmp_path / "run", 2)[0]["sample_id"] == 4 * 16


def test_after_a_skipped_step_rollouts_are_of_the_weights_that_stayed(
    runs: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    path, run = _config(tmp_path, data, guard={"on_refused": "skip"}), tmp_path / "run"
    run_ranks(2, _refuse_once, str(path), 1, init_process_group=False)
    first, refused, after, last, _ = _metrics(run)
    assert first == _metrics(runs["1 + 1"])[0]
    assert refused["refused_steps"] == 1 and "loss" not in refused
    # The checkpoint after the refused step has the rollouts that were made beside it.
    head, *_ = [json.loads(line) for line in (run / "checkpoints" / "step_2" / "next_rollouts.jsonl").open()]
    assert (head["step"], head["batch"], head["weights_of"]) == (2, 2, 1)
    # One step later, the weights that sampled are still those that learn.
    assert after["rollout_age"] == 1 and after["stale_log_prob_gap"] < 1e-5
    assert last["rollout_age"] == 1 and last["stale_log_prob_gap"] > 1e-4
    assert [_samples(run, step)[0]["sample_id"] for step in (0, 2, 3)] == [0, 2 * 16, 3 * 16]


def test_sigterm_to_a_generator_stops_the_run_which_continues_with_more_of_them(
    runs: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    path, run = _config(tmp_path, data, training={"save_interval": 0, "async_save": True}), tmp_path / "run"
    run_ranks(2, _sigterm_to_a_generator, str(path), 2, init_process_group=False)
    # Told with the rollouts of step 2, at whose end the run is saved.
    assert (run / "checkpoints" / "latest").read_text() == "step_3"
    report = json.loads((run / "generators" / "logs" / "rank_0.exit.json").read_text())
    assert report["outcome"] == "sigterm"
    run_ranks(3, _train, str(path), ("--parallel.generator_ranks=2",), init_process_group=False)
    for wanted, line in zip(_metrics(runs["1 + 1"])[:4], _metrics(run)[:4], strict=True):
        for key in ("loss", "grad_norm", "rollout_age", "stale_token_share"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), (line["step"], key)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sleep", "hung: generator rank 0 in .*hang .* did nothing and waited for no other rank for 6 s"),
        pytest.param("stop", "hung: generator rank 0 in .* sent no sign of life", marks=pytest.mark.slow),
    ],
)
def test_the_only_rank_of_a_side_that_hangs_ends_the_job_and_is_named(
    tmp_path: Path, data: Path, what: str, message: str
) -> None:
    path = _config(tmp_path, data, parallel={"distributed_timeout_minutes": 0.1}, training={"eval_interval": 0})
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _hang, str(path), what, init_process_group=False)
    run = tmp_path / "run"
    for folder in (run, run / "generators") if what == "sleep" else (run,):
        report = json.loads((folder / "logs" / "rank_0.exit.json").read_text())
        assert report["outcome"] == "hung" and re.match(message, report["message"]), report


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"generator_ranks": None}}, "needs parallel.generator_ranks"),
        ({"parallel": {"generator_ranks": 2}}, "generator_ranks 2 of 2 processes leaves none"),
        ({"training": {"one_step_off": False}}, "needs training.one_step_off=true"),
        ({"parallel": {"teacher_schedule": "shared"}}, "set parallel.teacher_schedule=ahead"),
        ({"rollout": {"tensor_model_parallel_size": None}}, "set rollout.tensor_model_parallel_size"),
        ({"rollout": {"partial_tokens": 2}}, "rollout.partial_tokens is not offered"),
        ({"training": {"steps_per_rollout": 2}}, "training.steps_per_rollout is not offered"),
        ({"rollout": {"tensor_model_parallel_size": 2}}, "1 processes cannot be split into rollout.tensor"),
        ({"parallel": {"teacher_tensor_model_parallel_size": 2}}, "1 processes cannot be split into the teacher's"),
        ({"lora": {"rank": 4}}, "lora.rank is not offered"),
    ],
)
def test_what_cannot_be_one_step_off_is_refused(
    tmp_path: Path, data: Path, sections: dict[str, Any], message: str
) -> None:
    path = _config(tmp_path, data, **sections)
    with pytest.raises(ConfigError, match=message):
        validate(load_config(path, []), 2, "train")


def test_other_commands_use_all_ranks(tmp_path: Path, data: Path) -> None:
    config = load_config(_config(tmp_path, data), [])
    for command in ("sft", "evaluate", "generate"):
        validate(config, 1, command)


def test_the_plan_knows_both_sides(tmp_path: Path, data: Path) -> None:
    """The ranks that train are those of a job without the rest, the others hold teacher, copy and cache alone."""
    from megatron_tropd.planner import job_memory, job_time, rank_memory, stage_parameters
    from megatron_tropd.planner.hardware import GPUS, Assumptions

    config = load_config(_config(tmp_path, data, parallel={"generator_ranks": 4, "tensor_model_parallel_size": 2}), [])
    student, teacher = (replace(model, vocab_size=12) for model in (config.student, config.teacher) if model)
    parallel = replace(config.parallel, teacher_tensor_model_parallel_size=4)
    config = replace(config, student=student, teacher=teacher, parallel=parallel)
    memory = job_memory(config, 8)
    assert list(memory) == ["trains, stage 0", "generates, stage 0"]
    trains, generates = memory.values()
    plain = replace(config, parallel=replace(parallel, teacher_schedule="shared", generator_ranks=None), teacher=None)
    (alone,) = rank_memory(plain, 4).values()
    for name in ("student_weights", "gradients", "optimizer", "activations"):
        assert getattr(trains, name) == getattr(alone, name) and getattr(generates, name) == 0
    assert trains.student_copy == 0 and 0 < trains.teacher_weights < generates.teacher_weights
    assert generates.teacher_weights == 2 * stage_parameters(teacher, 4, 1)[0]
    assert generates.student_copy == 2 * stage_parameters(student, 1, 1)[0] and generates.kv_cache > 0
    time = job_time(config, 8, GPUS["H100"], Assumptions())
    sides = time.rollout + time.teacher, time.student + time.bubble + time.gradients + time.optimizer
    assert time.total == pytest.approx(max(sides) + time.refit + time.transfer)


def test_rollouts_of_a_damaged_checkpoint_are_refused(tmp_path: Path) -> None:
    from megatron_tropd.integrity import CheckpointError
    from megatron_tropd.one_step_off import FILE, OneStepOff

    source = OneStepOff.__new__(OneStepOff)
    source._requests = type("Requests", (), {"again": staticmethod(lambda *_: None)})()  # type: ignore[assignment]
    source.restore(tmp_path)  # an older one has none
    head = {"step": 2, "batch": 2, "weights_of": 1, "metrics": {}}
    sample = {"sample_id": 1, "prefix": [], "response": [3, 4], "log_probs": [-1.0, -2.0], "entropies": [],
              "versions": [[1, 2]], "finished": True}  # fmt: skip
    for change in ({"response": [3]}, {"log_probs": [None, 1]}, {"versions": [[1, 1]]}, {"finished": 1}, {"prefix": 3}):
        lines = [head, sample | change]
        (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(CheckpointError, match="is damaged"):
            source.restore(tmp_path)
    for bad in ({"step": -1}, {"metrics": []}, {"weights_of": None}):
        (tmp_path / FILE).write_text(json.dumps(head | bad) + "\n")
        with pytest.raises(CheckpointError, match="is damaged"):
            source.restore(tmp_path)
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in (head, sample)))
    source.restore(tmp_path)
    assert source._given is not None and source._given.rollouts[0].versions == (1, 1)
