"""The inference copy has the trainer's weights, cut otherwise, and generates what the trainer's own would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.config import ConfigError, ModelConfig
from megatron_tropd.config_checks import validate
from megatron_tropd.config_parser import load_config
from megatron_tropd.types import Rollout
from tests import test_run
from tests.ranks import run_ranks
from tests.test_rollout import BUDGET, EOS, MODEL, SEED, VOCAB_SIZE, requests
from tests.test_run import config_file

data = test_run.data

TIED = MODEL
UNTIED = replace(
    MODEL,
    num_layers=3,
    untie_embeddings_and_output_weights=True,
    add_qkv_bias=True,
    qk_layernorm=True,
    num_layers_in_first_pipeline_stage=2,
    make_vocab_size_divisible_by=16,
)
"""Uneven stages, and a padded vocabulary of 48 or 64 rows: the trainer's, whatever the copy's own would be."""
EXPERTS = replace(MODEL, num_moe_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2)
CASES: dict[int, list[tuple[str, int, int, tuple[int, ...]]]] = {
    2: [("tied", 2, 1, (1,)), ("tied", 1, 2, (1, 2)), ("tied", 1, 1, (1, 2)), ("untied", 1, 2, (2,))],
    4: [("tied", 2, 2, (1,)), ("untied", 2, 2, (1, 2)), ("experts", 2, 2, (1,)), ("experts", 1, 2, (2,))],
}
"""World size to (model, the trainer's tensor and pipeline size, the copy's tensor sizes)."""
MODELS = {"tied": TIED, "untied": UNTIED, "experts": EXPERTS}


# ------------------------------------------------------------------------------------------------- inside ranks


def _student(config: ModelConfig, layout: Any) -> Any:
    """A learner on the student alone, learning from the prefixes of ``tiny.sequences``."""
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.objectives import preset
    from tests import tiny

    return tiny.build_learner(
        layout, student=config, teacher=None, objective=preset("sft"), optimizer=OptimizerConfig(lr=0.05)
    )


def _copy_of(learner: Any, config: ModelConfig, tensor_parallel_size: int) -> Any:
    from megatron_tropd.models import padded_vocab_size
    from megatron_tropd.refit import build_inference_copy, inference_layout

    return build_inference_copy(
        config,
        ([learner.stage.module], learner.layout),
        inference_layout(learner.layout, tensor_model_parallel_size=tensor_parallel_size),
        padded_vocab_size=padded_vocab_size(
            VOCAB_SIZE,
            divisible_by=config.make_vocab_size_divisible_by,
            tensor_parallel_size=learner.layout.tensor_parallel_size,
        ),
        max_sequence_length=64,
        dtype=torch.float32,
        check_interval=1,
    )


def _rollouts(engine: Any, layout: Any) -> list[list[Rollout]]:
    """This replica's, of its share of the requests, then of requests that the first replica alone has; and the first
    tokens of the rest of its share's, where three are written already."""
    rank, size = layout.data_parallel_rank, layout.data_parallel_size
    shares = [requests()[rank::size], requests(7) if rank == 0 else []]
    whole = [engine.generate(share, max_response_length=BUDGET) for share in shares]
    paused = [replace(one.request, earlier=one.response[:3]) for one in whole[0] if len(one.response) > 3]
    return [*whole, engine.generate(paused, max_response_length=BUDGET, max_new_tokens=2)]


def _race(engine: Any, copy: Any, callers: Any) -> tuple[list[Rollout], list[Rollout], dict[str, float]]:
    """What the trainer's replica gets of 24 requests of which 16 are learned from; what it has to be of all replicas,
    from responses to their ends; and what is told of it."""
    from megatron_tropd.batch import balanced_shares
    from megatron_tropd.config import Config, DataConfig, RolloutConfig, TrainingConfig
    from megatron_tropd.rollout_source import build_source
    from megatron_tropd.trajectories import first_to_end

    class Requests:
        def begin(self, first: int, count: int, step: int) -> Any:
            return requests(count)

        def expected_length(self, request: Any) -> int:
            return len(request.prompt.tokens) + BUDGET

        def epochs(self, num_samples: int) -> dict[str, float]:
            return {}

    config = Config(
        student=MODEL,
        data=DataConfig(train=""),
        output_dir="",
        rollout=RolloutConfig(over_sampling=1.5, max_response_length=BUDGET),
        training=TrainingConfig(global_batch_size=16),
    )
    asked: Any = Requests()
    source = build_source(config, callers, engine, asked, before_generating=lambda: None, racing=copy.layout)
    taken, everything, size = source.take(0, 0), requests(24), copy.layout.data_parallel_size
    whole = engine.generate(everything, max_response_length=BUDGET)
    wanted = []
    for share in balanced_shares([asked.expected_length(one) for one in everything], size):
        wanted += first_to_end([whole[index] for index in share], 16 // size, BUDGET)
    return taken.rollouts, wanted, taken.metrics


def _train_and_generate(world_size: int) -> list[dict[str, Any]]:
    from megatron_tropd.config import RolloutConfig
    from megatron_tropd.engines import Engines
    from megatron_tropd.step import train_step
    from tests import tiny
    from tests.measured_bytes import storage_bytes

    found = []
    options = {"vocab_size": VOCAB_SIZE, "eos_id": EOS, "seed": SEED}
    for name, tp, pp, copies in CASES[world_size]:
        config = MODELS[name] if pp > 1 else replace(MODELS[name], num_layers_in_first_pipeline_stage=None)
        layout = tiny.start(tp=tp, pp=pp, sequence_parallel=name == "experts" and tp > 1)
        learner = _student(config, layout)
        batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=1)
        model = learner.stage.module
        own = Engines(model, layout).build(RolloutConfig(max_batch_size=9), **options)
        before = _rollouts(own, layout)
        copied = [_copy_of(learner, config, size) for size in copies]
        engines = [
            Engines(model, layout, copy=copy, version=lambda learner=learner: learner.scheduler.num_steps)
            for copy in copied
        ]
        on_copies = [each.build(RolloutConfig(max_batch_size=9), **options) for each in engines]
        copies_before = [_rollouts(engine, layout) for engine in on_copies]
        train_step(learner, batch)
        found.append(
            {
                "case": (name, tp, pp, copies),
                "before": (before, copies_before),
                "after": (_rollouts(own, layout), [_rollouts(engine, layout) for engine in on_copies]),
                "race": _race(on_copies[0], copied[0], layout) if pp > 1 and name != "untied" else None,
                "replica": layout.data_parallel_rank,
                "num_refits": [copy._num_refits for copy in copied],
                "trains": [parameter.requires_grad for copy in copied for parameter in copy.model.parameters()],
                "vocabulary": [copy.model.vocab_size - model.vocab_size for copy in copied],
                "bytes": [
                    (storage_bytes(copy.model.parameters()), _planned_bytes(config, tp, size))
                    for copy, size in zip(copied, copies, strict=True)
                ],
            }
        )
        if (name, tp, pp) == ("tied", 1, 2):
            found[-1]["errors"] = _corrupted(copied[1], layout)
    return found


def _planned_bytes(student: ModelConfig, trainer_size: int, copy_size: int) -> int:
    from megatron_tropd.config import Config, DataConfig, ParallelConfig, RolloutConfig, TrainingConfig
    from megatron_tropd.planner.memory import copy_bytes

    config = Config(
        student=replace(student, vocab_size=VOCAB_SIZE),
        data=DataConfig(train=""),
        output_dir="",
        rollout=RolloutConfig(tensor_model_parallel_size=copy_size),
        parallel=ParallelConfig(tensor_model_parallel_size=trainer_size),
        training=TrainingConfig(precision="fp32"),
    )
    return copy_bytes(config)


def _corrupted(copy: Any, layout: Any) -> list[str]:
    """What the check says of one flipped bit on rank 1: in the copy, then in the trainer's weights."""
    from megatron_tropd.refit import RefitError

    errors = []
    for module, wanted in ((copy.model, "linear_fc1"), (copy._source, "output_layer")):
        parameter = next(weight for name, weight in module.named_parameters() if wanted in name or layout.rank == 0)
        if layout.rank == 1:
            parameter.data.view(torch.int32)[-1, 3] ^= 1
        try:
            copy.check()
            errors.append("")
        except RefitError as error:
            errors.append(str(error))
        if layout.rank == 1:
            parameter.data.view(torch.int32)[-1, 3] ^= 1
    copy.check()
    return errors


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[list[dict[str, Any]]]]:
    """World size to what each rank found in each case."""
    return {size: run_ranks(size, _train_and_generate, size, timeout=400) for size in CASES}


@pytest.mark.parametrize("world_size", CASES)
def test_the_copy_generates_what_the_trainers_weights_do(
    ranks: dict[int, list[list[dict[str, Any]]]], world_size: int
) -> None:
    for found in zip(*ranks[world_size], strict=True):
        for rank in found:
            for own, copies in (rank["before"], rank["after"]):
                for copied in copies:
                    for share, wanted_share in zip(copied, own, strict=True):
                        _assert_same(share, wanted_share, rank["case"])
            assert rank["before"][0] != rank["after"][0], "the step has changed what is generated"
            # Two calls with the same weights are one refit.
            assert rank["num_refits"] == [2] * len(rank["case"][3])
            assert not any(rank["trains"]) and not any(rank["vocabulary"])
            for measured, planned in rank["bytes"]:
                assert measured == planned
            if "errors" in rank:
                in_copy, in_trainer = rank["errors"]
                assert in_copy.startswith(
                    "decoder.layers.0.mlp.linear_fc1.weight: after the refit the inference copy on"
                )
                assert "on ranks 0, 1 is not" in in_copy, "both hold a shard of the whole that is wrong"
                assert in_trainer.startswith(
                    "embedding.word_embeddings.weight: the trainer's weights on ranks 0 and 1 differ"
                )


def test_over_sampling_on_a_copy_keeps_what_ends_first_in_each_of_its_replicas(
    ranks: dict[int, list[list[dict[str, Any]]]],
) -> None:
    for world_size, results in ranks.items():
        races = [found for found in zip(*results, strict=True) if found[0]["race"] is not None]
        assert len(races) == {2: 1, 4: 3}[world_size]
        for found in races:
            case = world_size, found[0]["case"]
            replicas = {rank["replica"]: rank["race"] for rank in found}
            assert len({len(kept) for kept, _, _ in replicas.values()}) == 1, case
            kept = [rollout for mine, _, _ in replicas.values() for rollout in mine]
            _, wanted, metrics = replicas[0]
            _assert_same(*(sorted(all_of, key=_sample_id) for all_of in (kept, wanted)), case)
            assert len(kept) == 16 and 0 < metrics["dropped_token_share"] < 0.6, case
            assert all(rank["race"][2] == metrics for rank in found)
            for rank in found:  # every rank of a replica has the same
                _assert_same(rank["race"][0], replicas[rank["replica"]][0], case)


def _sample_id(rollout: Rollout) -> int:
    return rollout.request.sample_id


def _assert_same(found: Sequence[Rollout], wanted: Sequence[Rollout], case: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert replace(one, log_probs=()) == replace(other, log_probs=()), case
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5, err_msg=str(case))


# ------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"rollout": {"tensor_model_parallel_size": 3}},
            "4 processes cannot be split into rollout.tensor_model_parall",
        ),
        ({"rollout": {"tensor_model_parallel_size": 0}}, "rollout.tensor_model_parallel_size must be at least 1"),
        (
            {"rollout": {"tensor_model_parallel_size": 4}, "student": {"num_query_groups": 2}},
            "student.num_query_groups 2 is not divisible by rollout.tensor_model_parallel_size 4",
        ),
        (
            {"rollout": {"tensor_model_parallel_size": 2}, "student": {"make_vocab_size_divisible_by": 1}},
            "take a multiple of it for make_vocab_size_divisible_by",
        ),
        ({"rollout": {"refit_check_interval": -1}}, "rollout.refit_check_interval must be at least 0"),
    ],
)
def test_a_copy_that_cannot_be_is_refused(
    tmp_path: Path, data: Path, sections: dict[str, dict[str, int]], message: str
) -> None:
    config = load_config(config_file(tmp_path, data, **sections))
    with pytest.raises(ConfigError, match=message):
        validate(config, 4, "train")


def test_evaluation_starts_in_the_layout_of_the_copy(tmp_path: Path, data: Path) -> None:
    from megatron_tropd.config_checks import layout_sizes

    config = load_config(
        config_file(
            tmp_path, data,
            student={"num_layers": 3, "num_layers_in_first_pipeline_stage": 2},
            parallel={"pipeline_model_parallel_size": 2}, rollout={"tensor_model_parallel_size": 2},
        )
    )  # fmt: skip
    for command, sizes in (("train", (1, 2)), ("sft", (1, 2)), ("evaluate", (2, 1))):
        assert layout_sizes(config, command) == sizes
    validate(config, 2, "evaluate")
