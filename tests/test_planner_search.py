"""What the planner proposes beyond tensor, pipeline and data parallelism: each where it makes sense, none otherwise."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from megatron_tropd.config import Config, DataConfig, GuidanceConfig, ModelConfig, RolloutConfig, TrainingConfig
from megatron_tropd.config_checks import problems
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.config_teacher import TeacherContextConfig
from megatron_tropd.planner import job_memory, job_time, layouts
from megatron_tropd.planner.hardware import GPUS, Assumptions
from megatron_tropd.planner.layouts import plans
from megatron_tropd.planner.plan import WORTH, Plan
from megatron_tropd.planner.shapes import SHAPES
from tools.plan_run import _table

GPU, ASSUMED = GPUS["H100"], Assumptions()
EXPERTS = ModelConfig(  # Qwen/Qwen3-30B-A3B
    num_layers=48, hidden_size=2048, num_attention_heads=32, num_query_groups=4, kv_channels=128, ffn_hidden_size=6144,
    num_moe_experts=128, moe_ffn_hidden_size=768, moe_router_topk=8, qk_layernorm=True, vocab_size=151936,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
NARROW = ModelConfig(  # Qwen/Qwen2.5-0.5B, whose two groups of heads allow two tensor-parallel ranks
    num_layers=24, hidden_size=896, num_attention_heads=14, num_query_groups=2, ffn_hidden_size=4864, vocab_size=151936,
    add_qkv_bias=True,
)  # fmt: skip


def _run(
    student: ModelConfig, teacher: ModelConfig | None, *, response: int = 8192, batch: int = 512, **changes: Any
) -> Config:
    return Config(
        student=student,
        teacher=teacher,
        data=DataConfig(train="x"),
        output_dir="x",
        rollout=RolloutConfig(max_response_length=response),
        **{"guidance": GuidanceConfig(answers="x"), "training": TrainingConfig(global_batch_size=batch)} | changes,
    )


def _plans(config: Config, num_gpus: int, *, most: int = 10) -> list[Plan]:
    """What the planner finds: all of it accepted and in memory, and only what pays its way before what is simpler."""
    found = plans(config, num_gpus, GPU, ASSUMED, most=most)
    assert found
    for plan in found:
        assert problems(plan.config, num_gpus, "train") == []
        assert plan.peak <= GPU.memory - ASSUMED.memory_reserve
    assert found[0].time.total <= (1 + 3 * WORTH) * min(plan.time.total for plan in found)
    assert "limit" in _table(found)
    return found


def _extras(plan: Plan) -> dict[str, Any]:
    """What the layout has besides tensor and pipeline sizes, by a short name."""
    parallel = plan.config.parallel
    found = {
        "chunks": parallel.virtual_pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "experts": parallel.expert_model_parallel_size,
        "teacher's experts": parallel.teacher_expert_model_parallel_size or 1,
        "copy": plan.config.rollout.tensor_model_parallel_size or 1,
    }
    return {name: size for name, size in found.items() if size > 1}


def test_a_student_in_pipeline_stages_gets_an_inference_copy() -> None:
    best, *_ = _plans(_run(SHAPES["llama3-70b"], SHAPES["llama3-70b"]), 64)
    student, _ = best.sizes
    assert student.pipeline > 1 and _extras(best) == {"copy": 8}
    (own,) = plans(best.config, 64, GPU, ASSUMED, most=1)
    assert own.config == best.config, "a plan is planned again as it is"


def test_stages_interleave_where_the_bubble_is_large() -> None:
    # Long prompts and few sequences: training takes as long as rollouts, and 16 micro-batches share four stages.
    run = _run(SHAPES["llama3-70b"], SHAPES["llama3-70b"], response=512, batch=16)
    best, *_ = _plans(replace(run, data=DataConfig(train="x", max_prompt_length=16384)), 32)
    assert best.sizes[0].pipeline == 4 and _extras(best) == {"chunks": 4, "copy": 8}


def test_sequences_are_cut_where_nothing_fits_otherwise() -> None:
    best, *others = _plans(_run(NARROW, NARROW, response=2**20, batch=8), 8)
    assert all(_extras(plan) == {"context": 2} for plan in (best, *others))
    assert best.sizes[0].world == 8
    assert all(not _extras(plan) for plan in _plans(_run(NARROW, NARROW), 8)[:10])


def test_experts_are_spread_where_they_do_not_fit_otherwise() -> None:
    # Three layers divide over no more than three stages, four groups of heads over four tensor-parallel ranks.
    student = replace(EXPERTS, num_layers=3, moe_ffn_hidden_size=12288)
    best, *_ = _plans(_run(student, SHAPES["qwen3-1.7b"], response=4096), 16)
    assert _extras(best)["experts"] > 1 and "copy" in _extras(best)
    best, *_ = _plans(_run(SHAPES["qwen3-1.7b"], student), 8)
    assert not _extras(best).keys() - {"teacher's experts"}


def test_a_base_that_is_the_teacher_judges_ahead_where_it_has_to() -> None:
    run = _run(
        SHAPES["qwen3-8b"],
        SHAPES["qwen3-8b"],
        lora=LoraConfig(rank=16, base_is_teacher=True),
        teacher_context=TeacherContextConfig(system_prompt="The answer is {answer}."),
        guidance=GuidanceConfig(schedule="none"),
    )
    assert {plan.config.parallel.teacher_schedule for plan in _plans(run, 8)} == {"ahead"}


def test_two_sides_are_planned_where_they_are_asked_for() -> None:
    run = _run(SHAPES["qwen3-8b"], SHAPES["qwen3-32b"], training=TrainingConfig(one_step_off=True))
    found = _plans(run, 16, most=10)
    assert len({(plan.config.parallel.generator_ranks, plan.sizes) for plan in found}) == len(found) == 10
    for plan in found:
        count, (student, teacher) = plan.config.parallel.generator_ranks, plan.sizes
        assert count is not None and (student.world, teacher.world) == (16 - count, count)
        time = plan.time
        trains = time.student + time.bubble + time.gradients + time.optimizer
        longer = max(trains, time.rollout + time.teacher)
        assert time.total == pytest.approx(longer + time.transfer + time.refit)
        assert plan.memory == job_memory(plan.config, 16)
        slower = ("rollout", "teacher") if time.rollout + time.teacher > trains else ("student", "bubble")
        assert time.limit in slower
    assert "one step off" in _table(found) and "hidden" in _table(found)
    assert [plan.config for plan in _plans(found[3].config, 16, most=10)] == [plan.config for plan in found]
    # No pair of layouts by hand is faster, whatever the number of ranks that generate.
    compared = 0
    for count, tensor, copy, rows in itertools.product((4, 8, 12), (1, 2, 4), (1, 2, 4), (64, 128, 256)):
        parallel = replace(
            run.parallel,
            generator_ranks=count,
            teacher_schedule="ahead",
            tensor_model_parallel_size=4,
            sequence_parallel=True,
            teacher_tensor_model_parallel_size=tensor,
            teacher_pipeline_model_parallel_size=count // tensor if tensor == 4 else 2,
        )
        rollout = replace(run.rollout, tensor_model_parallel_size=copy, max_batch_size=rows)
        training = replace(run.training, micro_batch_size=1, recompute=True)
        mine = replace(run, parallel=parallel, rollout=rollout, training=training)
        if problems(mine, 16, "train"):
            continue
        peak = max(memory.peak for memory in job_memory(mine, 16).values())
        if peak <= GPU.memory - ASSUMED.memory_reserve:
            compared += 1
            assert job_time(mine, 16, GPU, ASSUMED).total >= found[0].time.total - 0.01
    assert compared >= 10


@pytest.mark.parametrize(("gpus", "batch"), [(24, 512), (48, 320)])
def test_two_sides_of_numbers_that_are_no_powers_of_two(gpus: int, batch: int) -> None:
    training = TrainingConfig(one_step_off=True, global_batch_size=batch)
    best, *_ = _plans(_run(SHAPES["llama3-8b"], SHAPES["llama3-70b"], training=training), gpus, most=1)
    count, copy = best.config.parallel.generator_ranks, best.config.rollout.tensor_model_parallel_size
    assert count is not None and copy is not None
    assert (gpus - count) % copy == (gpus - count) % best.sizes[1].tensor == 0, "tensor parallel within a node"


def test_trainers_that_evaluate_leave_the_engine_fewer_rows() -> None:
    run = _run(SHAPES["qwen3-1.7b"], SHAPES["qwen3-4b"], training=TrainingConfig(one_step_off=True))
    evaluates = replace(run, data=replace(run.data, validation="y"))
    without, fewer = (_plans(each, 2, most=1)[0] for each in (run, evaluates))
    assert fewer.config.rollout.max_batch_size < without.config.rollout.max_batch_size
    assert fewer.time.total > without.time.total


def test_a_run_is_planned_anew_from_any_layout_it_has() -> None:
    wanted = _plans(_run(SHAPES["qwen3-1.7b"], SHAPES["qwen3-4b"]), 4)
    chosen = next(plan.config for plan in wanted if plan.config.parallel.offload_teacher)
    assert [plan.config for plan in _plans(chosen, 4)] == [plan.config for plan in wanted]


@pytest.mark.parametrize("student", [SHAPES["qwen3-8b"], EXPERTS], ids=["dense", "experts"])
def test_the_search_leaves_out_what_cannot_be_among_the_fastest(
    student: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Config] = []
    every = layouts._Search._sized
    monkeypatch.setattr(layouts._Search, "_sized", lambda self, config: tried.append(config) or every(self, config))
    _plans(_run(student, SHAPES["qwen3-32b"]), 1024, most=100)
    assert 100 <= len(tried) < 1000  # of several thousand
