"""The planner's bytes of every component against those of the real trainer, rank by rank, within 10 %."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_tropd.config_rollout import DynamicEngineConfig
from tests.ranks import run_ranks

TOLERANCE = 0.1
_RESIDENT = ("student_weights", "teacher_weights", "gradients", "optimizer")
DYNAMIC = DynamicEngineConfig(block_size_tokens=8)
BATCH, PROMPT, RESPONSE = 4, 12, 20
HEAD_CHUNK = 16
AHEAD = {"teacher_schedule": "ahead"}
MANY = {"micro_batch_size": 1}
"""So that a micro-batch is little beside a whole pass."""
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}, {}, {}),
    "tp2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}, {}),
    "cp2": (2, {"context_parallel_size": 2}, {}, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {}, {}),
    "dp2": (2, {}, {}, {}),
    "dp2 fp32": (2, {}, {"precision": "fp32"}, {}),
    "dp2 recompute": (2, {}, {"recompute": True}, {}),
    "tp2 logits": (2, {"tensor_model_parallel_size": 2}, {"output_head": "logits"}, {}),
    "pp2 logits": (2, {"pipeline_model_parallel_size": 2}, {"output_head": "logits"}, {}),
    "dp2 ahead": (2, AHEAD, MANY, {}),
    "tp2 ahead": (2, {"tensor_model_parallel_size": 2, "teacher_tensor_model_parallel_size": 1, **AHEAD}, MANY, {}),
    "pp2 ahead": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "teacher_tensor_model_parallel_size": 1,
            "teacher_pipeline_model_parallel_size": 1,
            **AHEAD,
        },
        MANY,
        {},
    ),
    "tp2 lora": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}, {"rank": 8}),
    "cp2 lora": (2, {"context_parallel_size": 2}, {}, {"rank": 8}),
    "pp2 lora": (
        2,
        {"pipeline_model_parallel_size": 2},
        {},
        {"rank": 8, "target_modules": ("linear_qkv", "linear_proj"), "base_is_teacher": True},
    ),
}


def _config(parallel: dict[str, Any], training: dict[str, Any], lora: dict[str, Any]) -> Any:
    """The tiny pair, wide enough that Megatron's alignment to 64 elements does not decide."""
    from megatron_tropd.config import Config, DataConfig, ParallelConfig, RolloutConfig, TrainingConfig
    from megatron_tropd.config_lora import LoraConfig
    from tests import tiny

    wider = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 64, "ffn_hidden_size": 160}
    return Config(
        student=replace(tiny.STUDENT, **wider, qk_layernorm=True),
        teacher=replace(tiny.TEACHER, **wider),
        data=DataConfig(train="", max_prompt_length=PROMPT),
        output_dir="",
        rollout=RolloutConfig(max_response_length=RESPONSE, max_batch_size=BATCH, engine="static", dynamic=DYNAMIC),
        parallel=ParallelConfig(**parallel),
        lora=LoraConfig(**lora),
        training=TrainingConfig(
            **{
                "micro_batch_size": BATCH,
                "global_batch_size": 2 * BATCH,
                "precision": "bf16",
                "head_chunk_size": HEAD_CHUNK,
            }
            | training
        ),
    )


def _measure(parallel: dict[str, Any], training: dict[str, Any], lora: dict[str, Any]) -> dict[str, int]:
    """Bytes of each component on this rank, and the pipeline stage it belongs to."""
    import torch

    from megatron_tropd.config_checks import teacher_sizes
    from tests import measured_bytes, tiny

    config = _config(parallel, training, lora)
    layout = tiny.start(
        tp=config.parallel.tensor_model_parallel_size,
        pp=config.parallel.pipeline_model_parallel_size,
        cp=config.parallel.context_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    learner = tiny.build_learner(
        layout,
        student=config.student,
        teacher=config.teacher,
        dtype=dtype,
        lora=config.lora if config.lora.rank else None,
        ahead=teacher_sizes(config) if config.parallel.teacher_schedule == "ahead" else None,
        output_head=config.training.output_head,
        head_chunk_size=config.training.head_chunk_size,
    )
    found = measured_bytes.resident_bytes(learner)
    parts = config.parallel.context_parallel_size  # which generate each a share of the rows, with the static engine
    for component, dynamic in {"kv_cache": None, "kv_cache of blocks": DYNAMIC if parts == 1 else None}.items():
        found[component] = measured_bytes.kv_cache_bytes(
            learner, rows=BATCH * parts, prompt_length=PROMPT, max_response_length=RESPONSE, dynamic=dynamic
        )
    if config.training.recompute:
        learner.stage.module.config.recompute_granularity = "full"
        learner.stage.module.config.recompute_method = "uniform"
        learner.stage.module.config.recompute_num_layers = 1
    rows, size = config.training.global_batch_size, config.training.micro_batch_size
    with (
        measured_bytes.watch_teacher_hidden(config.teacher.hidden_size) as teacher_hidden,
        measured_bytes.watch_head() as head,
        measured_bytes.watch_logits() as logits,
    ):
        found["activations"] = _saved_in_a_step(learner, rows // size, size)
    found |= {"teacher_hidden": teacher_hidden.peak, "head": head.peak, "logits": logits.peak}
    if learner.ahead is not None:
        found |= measured_bytes.ahead_bytes(learner, _longest_batch(learner, rows // size, size))
        found["teacher_hidden"] = found.pop("waiting")
    return found | {"stage": layout.pipeline_rank}


def _saved_in_a_step(learner: Any, num_micro_batches: int, size: int = BATCH) -> int:
    """The most that autograd holds at once during Megatron's schedule, all sequences at their longest."""
    from megatron_tropd.step import forward_backward
    from tests import measured_bytes

    batch = _longest_batch(learner, num_micro_batches, size)
    saved = measured_bytes.SavedBytes(*learner.pair.parameters())
    with saved.watch():
        forward_backward(learner, batch)
    return saved.peak


def _longest_batch(learner: Any, num_micro_batches: int, size: int) -> Any:
    """That many over all data-parallel ranks, of ``size`` sequences each."""
    import numpy as np

    from megatron_tropd.types import TokenRegion
    from tests import tiny

    length = PROMPT + RESPONSE
    regions = np.repeat([TokenRegion.NONE, TokenRegion.ON_POLICY], [PROMPT, RESPONSE]).astype(np.int64)
    row = {
        "tokens": np.full(length, 3),
        "labels": np.where(regions > 0, 4, 0),
        "regions": regions,
        "uniforms": np.full(length, 0.5, dtype=np.float32),
    }
    return tiny.batch_for_rank(
        learner.layout,
        [row] * size * num_micro_batches,
        num_micro_batches=num_micro_batches // learner.layout.data_parallel_size,
    )


def _measure_all(layouts: list[tuple[dict[str, Any], ...]]) -> list[dict[str, int]]:
    return [_measure(*sections) for sections in layouts]


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, int]]]:
    """By layout, what each rank measured."""
    by_rank = run_ranks(2, _measure_all, [sections for _, *sections in LAYOUTS.values()])
    return {name: [rank[index] for rank in by_rank] for index, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_every_component(name: str, measured: dict[str, list[dict[str, int]]]) -> None:
    from megatron_tropd.planner import rank_memory
    from megatron_tropd.planner.activations import layer_activations, layer_transient, norm_activations

    world_size, *sections = LAYOUTS[name]
    config = _config(*sections)
    kinds = rank_memory(config, world_size, layer_spec="local")
    has_dynamic = config.parallel.context_parallel_size == 1
    blocks = replace(config, rollout=replace(config.rollout, engine="dynamic" if has_dynamic else "static"))
    of_blocks = rank_memory(blocks, world_size, layer_spec="local")
    for stage, (kind, predicted) in enumerate(kinds.items()):
        ranks = [rank for rank in measured[name] if rank["stage"] == stage]
        expected = predicted.components() | {"kv_cache of blocks": of_blocks[kind].kv_cache}
        if config.training.recompute:
            # Beside the layers' inputs one layer at a time is whole again, which the planner counts as workspace; what
            # the final norm saved, as `activation_bytes` has it, is gone by then.
            hidden, tokens = config.student.hidden_size, BATCH * (PROMPT + RESPONSE)
            expected["activations"] += layer_activations(config.student, 1, 1, tokens, 2, "local", hidden)
            norm = norm_activations(config.student, hidden, 2, "local")
            expected["activations"] -= tokens * (norm - 2 * hidden + 16)
        blocks_of = () if config.parallel.context_parallel_size > 1 else ("kv_cache of blocks",)
        # Of data-parallel ranks the fullest counts: the last one's shard of the optimizer ends in padding.
        fullest = {component: max(rank[component] for rank in ranks) for component in ranks[0]}
        for component in (*_RESIDENT, "kv_cache", *blocks_of, "activations"):
            found = fullest[component]
            assert found > 0 or (component == "teacher_weights" and config.lora.base_is_teacher), component
            assert expected[component] == pytest.approx(found, rel=TOLERANCE), f"{component} of stage {stage}"
        is_last = stage == config.parallel.pipeline_model_parallel_size - 1
        is_ahead, has_logits = config.parallel.teacher_schedule == "ahead", config.training.output_head == "logits"
        for component, is_there in {
            "teacher_hidden": is_last or not is_ahead,
            "head": is_last and not has_logits,
            "logits": is_last and has_logits,
        }.items():
            if component != "head" or is_there:
                assert (fullest[component] > 0) == is_there, f"{component} of stage {stage}"
                assert expected[component] == pytest.approx(fullest[component], rel=TOLERANCE / 5), component
        if is_ahead:
            transient = layer_transient(config.teacher, 1, PROMPT + RESPONSE, 2)
            # What is delivered is let go of: one micro-batch alone is there twice.
            rows = RESPONSE * config.teacher.hidden_size * 2
            assert predicted.teacher_pass - transient == max(fullest["pass"], fullest["teacher_hidden"]) + rows
            for rank in ranks:
                assert 0 < rank["peak"] <= max(rank["pass"], rank["teacher_hidden"]) + rows
