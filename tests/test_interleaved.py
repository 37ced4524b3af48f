"""Interleaved pipeline stages: several model chunks of a rank take turns, and the gradient is one rank's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    2: {
        "pp2 vp2": ({"pp": 2, "vp": 2}, {}),
        "pp2 vp2 recompute, odd": ({"pp": 2, "vp": 2}, {"recompute": True}),
        "pp2 vp2 ahead": ({"pp": 2, "vp": 2}, {"ahead": (1, 2)}),
        "pp2 vp2 ahead tp2": ({"pp": 2, "vp": 2}, {"ahead": (2, 1)}),
    },
    1: {"one rank": ({}, {})},
    4: {
        "pp2 vp2 dp2": ({"pp": 2, "vp": 2}, {}),
        "tp2 pp2 vp2 sequence": ({"tp": 2, "pp": 2, "vp": 2, "sequence_parallel": True}, {}),
    },
}
"""World size -> name -> arguments of `tiny.start` and of the learner. The first writes the checkpoint that the others
load."""
NUM_MICRO_BATCHES = 4


def _student() -> Any:
    from tests import tiny

    # With its biases a chunk's buffer has a bucket whose end is padded, which Megatron leaves out of a checkpoint.
    return dataclasses.replace(tiny.STUDENT, num_layers=4, add_qkv_bias=True)


def _start(**sizes: Any) -> Any:
    from tests import tiny

    return tiny.start(**{"tp": 1, "pp": 1, **sizes})


def _learner(layout: Any, *, distributed: bool = False, **rest: Any) -> Any:
    """Without the distributed optimizer every replica keeps the whole reduced gradient."""
    from megatron_tropd.config import OptimizerConfig
    from tests import tiny

    optimizer = OptimizerConfig(lr=1e-2, use_distributed_optimizer=distributed)
    return tiny.build_learner(layout, student=_student(), optimizer=optimizer, **rest)


def _batch(layout: Any, number: int = NUM_MICRO_BATCHES) -> Any:
    from tests import tiny

    return tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=number // layout.data_parallel_size)


def _run(folder: str, world_size: int) -> dict[str, Any]:
    """By layout the losses of the steps behind a checkpoint; and what else there is. Gradients go to the folder."""
    from megatron_tropd.step import forward_backward
    from tests import tiny

    found: dict[str, Any] = {}
    for name, (sizes, options) in LAYOUTS[world_size].items():
        layout = _start(**sizes)
        learner = _learner(layout, **options)
        # One micro-batch: its group is filled up with one of padding.
        sums, _ = forward_backward(learner, _batch(layout, 1 if name.endswith("odd") else NUM_MICRO_BATCHES))
        gradients = tiny.whole_gradients(learner)
        if layout.tensor_parallel_rank == 0:
            rank = f"{layout.data_parallel_rank}-{layout.pipeline_rank}"
            torch.save((gradients, sums), Path(folder) / f"{name}-{rank}.pt")
        if not options:
            found[name] = _steps_behind_a_checkpoint(layout, Path(folder) / "checkpoints")
    if world_size == 2:
        found["bytes"] = _measured_bytes()
        found["messages"] = _sent_widths()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    """The folder of gradients, and what every rank returned, by world size."""
    folder = tmp_path_factory.mktemp("gradients")
    return folder, {size: run_ranks(size, _run, str(folder), size, timeout=280) for size in LAYOUTS}


@pytest.mark.parametrize("name", [name for size, named in LAYOUTS.items() if size > 1 for name in named])
def test_gradients_of_interleaved_stages_are_those_of_one_rank(results: Any, name: str) -> None:
    folder, _ = results
    reference, reference_sums = torch.load(folder / "one rank-0-0.pt")
    norm = torch.cat([gradient.flatten() for gradient in reference.values()]).norm()
    replicas = 2 if "dp2" in name else 1
    for replica in range(replicas):
        stages = [torch.load(folder / f"{name}-{replica}-{stage}.pt") for stage in range(2)]
        assert set().union(*(gradients for gradients, _ in stages)) == set(reference)
        for gradients, sums in stages:
            assert sums == pytest.approx(reference_sums, rel=1e-4, abs=1e-4)
            for parameter, gradient in gradients.items():
                assert (gradient - reference[parameter]).norm() < 1e-5 * norm, parameter
    layers = {parameter.split(".")[2] for parameter in stages[0][0] if parameter.startswith("decoder.layers")}
    assert layers == {"0", "2"}, "the first rank's chunks are not neighbours"


def _steps_behind_a_checkpoint(layout: Any, folder: Path) -> float:
    """The loss of the second step behind two that were saved; the first to come takes and saves these."""
    from megatron_tropd.checkpoint import (
        Description,
        architecture,
        latest_checkpoint,
        load_checkpoint,
        load_weights,
        save_checkpoint,
    )
    from megatron_tropd.distributed import from_main
    from megatron_tropd.step import train_step
    from tests import tiny

    learner, batch = _learner(layout, distributed=True), _batch(layout)
    description = Description(2, 1, tiny.VOCAB_SIZE, "tokenizer", architecture(_student()))
    path = from_main(latest_checkpoint(folder))
    if path is None:
        train_step(learner, batch)
        train_step(learner, batch)
        path = save_checkpoint(folder, learner, description, keep=1)
        weights = [parameter.clone() for parameter in learner.pair.parameters()]
        for student in learner.students:
            for parameter in student.parameters():
                parameter.data.zero_()
        size = {"vocab_size": tiny.VOCAB_SIZE, "tokenizer": "tokenizer"}
        load_weights(path, torch.nn.ModuleList(learner.students), _student(), **size)
        assert all(torch.equal(one, other) for one, other in zip(learner.pair.parameters(), weights, strict=True))
    else:
        load_checkpoint(path, learner, description)
    train_step(learner, batch)
    return train_step(learner, batch)["loss"]


def test_a_checkpoint_of_interleaved_stages_continues_in_every_layout(results: Any) -> None:
    _, found = results
    losses = [loss for size in LAYOUTS for rank in found[size] for name, loss in rank.items() if name in LAYOUTS[size]]
    assert len(losses) == 11
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def _sent_widths() -> dict[str, list[int]]:
    """The last dimensions of what this rank sends forward and backward."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_tropd.step import forward_backward

    layout = _start(pp=2, vp=2)
    learner = _learner(layout)
    sent: dict[str, set[int]] = {"next": set(), "prev": set()}
    communicate = P2PCommunicator._communicate

    def recorded(self, *, tensor_send_next, tensor_send_prev, **rest):  # type: ignore[no-untyped-def]
        for direction, tensor in (("next", tensor_send_next), ("prev", tensor_send_prev)):
            if tensor is not None:
                sent[direction].add(tensor.shape[-1])
        return communicate(self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, **rest)

    P2PCommunicator._communicate = recorded
    try:
        forward_backward(learner, _batch(layout))
    finally:
        P2PCommunicator._communicate = communicate
    return {direction: sorted(widths) for direction, widths in sent.items()}


def test_both_hidden_states_travel_in_a_ring_and_the_students_gradient_alone_back(results: Any) -> None:
    from tests import tiny

    both = tiny.STUDENT.hidden_size + tiny.TEACHER.hidden_size
    for rank in results[1][2]:
        assert rank["messages"] == {"next": [both], "prev": [tiny.STUDENT.hidden_size]}


# -------------------------------------------------------------------------------------------------- planner and config


def _config() -> Any:
    from megatron_tropd.config import Config, DataConfig, ParallelConfig, RolloutConfig, TrainingConfig
    from tests import tiny

    wider = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 64, "ffn_hidden_size": 160}
    return Config(
        student=dataclasses.replace(_student(), **wider),
        teacher=dataclasses.replace(tiny.TEACHER, **wider),
        data=DataConfig(train="", max_prompt_length=12),
        output_dir="",
        rollout=RolloutConfig(max_response_length=20, samples_per_prompt=1),
        parallel=ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        training=TrainingConfig(micro_batch_size=4, global_batch_size=16, precision="bf16"),
    )


def _measured_bytes() -> dict[str, int]:
    from tests import measured_bytes, tiny
    from tests.test_planner_bytes import _saved_in_a_step

    layout = _start(pp=2, vp=2)
    config = _config()
    learner = tiny.build_learner(layout, student=config.student, teacher=config.teacher, dtype=torch.bfloat16)
    found = measured_bytes.resident_bytes(learner)
    with measured_bytes.watch_teacher_hidden(config.teacher.hidden_size) as teacher_hidden:
        found["activations"] = _saved_in_a_step(learner, 4)
    return found | {"teacher_hidden": teacher_hidden.peak}


def test_the_planner_knows_the_bytes_of_interleaved_stages(results: Any) -> None:
    from megatron_tropd.planner import rank_memory

    kinds = rank_memory(_config(), 2, layer_spec="local")
    for rank, predicted in zip(results[1][2], kinds.values(), strict=True):
        for component, found in rank["bytes"].items():
            assert predicted.components()[component] == pytest.approx(found, rel=0.1), component


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("sft", {"parallel": {"virtual_pipeline_model_parallel_size": 0}}, "must be at least 1"),
        ("sft", {"parallel": {"pipeline_model_parallel_size": 1}}, "there is only one: set"),
        ("sft", {"student": {"num_layers": 6}}, "a pipeline rank's 3 layers do not divide into"),
        ("sft", {"student": {"num_layers_in_first_pipeline_stage": 1}}, "a pipeline rank's 1 or 3 layers do not"),
        ("train", {"teacher": {"num_layers": 6}}, "teacher: a pipeline rank's 3 layers do not divide into"),
        ("sft", {"training": {"global_batch_size": 12}}, "each data-parallel rank has 3: choose"),
        ("sft", {"data": {"validation": "held_out.jsonl"}}, "chunks that cannot generate: give rollouts a copy"),
        (
            "sft",
            {"optimizer": {"overlap_param_gather": True, "use_distributed_optimizer": False}},
            "overlap_param_gather is about the sharded optimizer",
        ),
        ("train", {}, "chunks that cannot generate: give rollouts a copy"),
    ],
)
def test_what_cannot_run_is_refused(command: str, changes: dict[str, dict[str, Any]], message: str) -> None:
    from megatron_tropd.config import ConfigError
    from megatron_tropd.config_checks import validate

    config = _config()
    config = dataclasses.replace(config, guidance=dataclasses.replace(config.guidance, schedule="none"))
    validate(config, 2, "sft")
    for section, fields in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    with pytest.raises(ConfigError, match=message):
        validate(config, 2, command)
