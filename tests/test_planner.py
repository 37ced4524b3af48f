"""The planner against published figures, and the layouts it offers against what the package accepts."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.config import (
    Config,
    DataConfig,
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_tropd.config_checks import problems
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.planner import (
    Sizes,
    activation_bytes,
    job_time,
    model_parameters,
    rank_memory,
    rollout_layout,
    stage_adapter_parameters,
    stage_layers,
    stage_parameters,
    weight_bytes,
)
from megatron_tropd.planner.candidates import in_stages
from megatron_tropd.planner.hardware import GPUS, LOCAL_LAYER_OVERHEAD, Assumptions
from megatron_tropd.planner.layouts import plans
from megatron_tropd.planner.lengths import Generation, generation, lengths
from megatron_tropd.planner.parameters import padded_vocabulary
from megatron_tropd.planner.plan import cost
from megatron_tropd.planner.shapes import SHAPES, find_model
from megatron_tropd.planner.timing import decoding, expert_dispatch_seconds, forward_flops, step_time


def config(student: str, teacher: str | None, **changes: object) -> Config:
    values = {
        "data": DataConfig(train="x", max_prompt_length=1024),
        "output_dir": "x",
        "guidance": GuidanceConfig(answers="x"),
        "rollout": RolloutConfig(max_response_length=3072),
    }
    return Config(student=SHAPES[student], teacher=SHAPES[teacher] if teacher else None, **values | changes)


@pytest.mark.parametrize(
    ("name", "billions"),
    # Model cards of Qwen/Qwen3-*: 0.6B, 1.7B, 4.0B, 8.2B, 32.8B; of Meta-Llama-3 on Hugging Face: 8.03B, 70.6B, 406B.
    [
        ("qwen3-0.6b", 0.6), ("qwen3-1.7b", 1.7), ("qwen3-4b", 4.0), ("qwen3-8b", 8.2), ("qwen3-32b", 32.8),
        ("llama3-8b", 8.03), ("llama3-70b", 70.6), ("llama3-405b", 406),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_model_cards(name: str, billions: float) -> None:
    assert model_parameters(SHAPES[name]) / 1e9 == pytest.approx(billions, rel=0.015)


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("pipeline", [1, 4])
def test_ranks_together_hold_the_model(tensor: int, pipeline: int) -> None:
    model = SHAPES["llama3-8b"]
    held = tensor * sum(stage_parameters(model, tensor, pipeline))
    padding = 2 * (padded_vocabulary(model, tensor) - 128256) * model.hidden_size
    norms = (2 * model.num_layers + 1) * model.hidden_size  # every tensor-parallel rank has them whole
    assert held == model_parameters(model) + padding + (tensor - 1) * norms


@pytest.mark.parametrize("data", [1, 8])
def test_bytes_of_a_parameter_are_those_of_megatrons_guide(data: int) -> None:
    # Megatron-Core user guide, "Distributed Optimizer": 18 and 16 bytes; distributed 6 + 12 / d and 8 + 8 / d.
    assert sum(weight_bytes(1000, 2, data=data, distributed=False)) == 18_000
    assert sum(weight_bytes(1000, 4, data=data, distributed=False)) == 16_000
    assert sum(weight_bytes(1000, 2, data=data, distributed=True)) == 6_000 + 12_000 / data
    assert sum(weight_bytes(1000, 4, data=data, distributed=True)) == 8_000 + 8_000 / data


@pytest.mark.parametrize("tensor", [1, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_are_those_of_korthikanti_et_al(tensor: int, sequence_parallel: bool) -> None:
    """arXiv 2205.05198, equations 2 to 4: a layer saves sbh (10 + 24 / t), with sequence parallelism sbh 34 / t, in
    bf16; two of the 10 are dropout masks, which distillation has none of. Fused attention has no scores [S, S]."""
    hidden, length, batch = 12288, 2048, 4
    gpt3 = ModelConfig(
        num_layers=2, hidden_size=hidden, num_attention_heads=96, ffn_hidden_size=4 * hidden, swiglu=False,
        normalization="LayerNorm", vocab_size=51200,
    )  # fmt: skip

    def saved(layers: int) -> int:
        return activation_bytes(
            replace(gpt3, num_layers=layers), 0, tensor=tensor, pipeline=1, batch=batch, length=length, element=2,
            layer_spec="transformer-engine", recompute=False, sequence_parallel=sequence_parallel,
        )  # fmt: skip

    share = 32 / tensor if sequence_parallel else 8 + 24 / tensor
    assert saved(2) - saved(1) == pytest.approx(length * batch * hidden * share, rel=2e-3)


def test_flops_are_those_of_llama_3() -> None:
    """arXiv 2407.21783, section 3.2: 3.8e25 FLOP for 15.6e12 tokens of the 405B model, at 8192 tokens a sequence."""
    forward = forward_flops(SHAPES["llama3-405b"], tokens=15.6e12, length=8192, head_tokens=15.6e12)
    assert 3 * forward == pytest.approx(3.8e25, rel=0.1)


def test_training_throughput_brackets_that_of_llama_3() -> None:
    """arXiv 2407.21783, table 4: 430 TFLOP/s on each of 8192 H100, tensor 8, pipeline 16, 16M tokens of 8192 each.

    Their stages were interleaved: a bubble between none and that of 1F1B, which is predicted here.
    """
    model = replace(SHAPES["llama3-405b"], num_layers_in_first_pipeline_stage=7, num_layers_in_last_pipeline_stage=7)
    run = Config(
        student=model,
        data=DataConfig(train="x", max_prompt_length=0),
        output_dir="x",
        rollout=RolloutConfig(max_response_length=8192),
        training=TrainingConfig(global_batch_size=2048, micro_batch_size=1),
        parallel=replace(
            config("llama3-8b", None).parallel, tensor_model_parallel_size=8, pipeline_model_parallel_size=16
        ),
    )
    time = step_time(run, 8192, GPUS["H100"], replace(Assumptions(), mean_length=1.0))
    tokens = 2048 * 8192
    flops = 3 * forward_flops(model, tokens=tokens, length=8192, head_tokens=tokens)
    work = time.student + time.gradients + time.optimizer
    with_bubble, without = flops / (work + time.bubble) / 8192 / 1e12, flops / work / 8192 / 1e12
    assert with_bubble < 430 < without
    assert without - with_bubble < 200, "a bracket that says something"


@pytest.mark.parametrize(
    ("model", "gpus", "generators", "tensor", "pipeline", "recompute", "mean_tokens", "published"),
    [
        ("llama3-8b", 16, None, 1, 2, True, 1060, 97.7),
        ("llama3-8b", 16, 8, 1, 2, True, 1129, 74.6),
        ("qwen3-32b", 32, None, 4, 4, False, 3206, 393),
        ("qwen3-32b", 64, 32, 4, 4, False, 3207, 215),
    ],
)
def test_published_steps_take_little_longer_than_predicted(
    model: str, gpus: int, generators: int | None, tensor: int, pipeline: int, recompute: bool, mean_tokens: int,
    published: float,
) -> None:  # fmt: skip
    """NeMo-RL 0.4, performance summary (GRPO on DGX H100, dense models) and the recipes it names: 2048 sequences of
    4096 tokens at most, four optimizer steps; generation by vLLM at the tensor size of training, log-probs of two
    models of the student's size, where TrOPD has one teacher. What is not predicted (rewards, data, weights on their
    way to another framework) takes time too, so theirs should be longer, but not by much."""
    off = generators is not None
    run = Config(
        student=SHAPES[model],
        teacher=SHAPES[model],
        data=DataConfig(train="x", max_prompt_length=512),
        output_dir="x",
        guidance=GuidanceConfig(schedule="none"),
        rollout=RolloutConfig(
            max_response_length=3584, samples_per_prompt=32, max_batch_size=2048, tensor_model_parallel_size=tensor
        ),
        training=TrainingConfig(global_batch_size=2048, micro_batch_size=1, recompute=recompute, one_step_off=off),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=tensor > 1,
            teacher_schedule="ahead" if off else "shared",
            generator_ranks=generators,
        ),
    )
    assert problems(run, gpus, "train") == []
    time = job_time(run, gpus, GPUS["H100"], Assumptions(mean_length=mean_tokens / 4096))
    predicted = time.total + time.teacher
    assert 1 < published / predicted < 1.6
    said = f"| {published:g} s | {predicted:.3g} s | {published / predicted:.2f} |"
    assert said in Path("docs/scaling.md").read_text(), said


def test_the_predictions_beside_the_measured_step_are_the_planners(tmp_path: Path) -> None:
    """benchmarks/one_gpu.md, whose run is `tools/bench_one_gpu.py` with these sizes on an H200 without Transformer
    Engine."""
    from megatron_tropd.config_parser import load_config
    from tools.bench_one_gpu import write_config

    sizes = Namespace(
        student="qwen3-0.6b", teacher="qwen3-1.7b", steps=5, prompts=16, samples=8, prompt_length=256,
        response_length=256, micro_batch_size=8,
    )  # fmt: skip
    path, assumed = (
        write_config(tmp_path, sizes),
        Assumptions(mean_length=1.0, training_layer_overhead=LOCAL_LAYER_OVERHEAD),
    )
    text = Path("benchmarks/one_gpu.md").read_text()
    for overrides, table in zip(([], ["--rollout.engine=static"]), text.split("rollout.engine=static`:"), strict=True):
        time = step_time(load_config(path, overrides), 1, GPUS["H200"], assumed)
        rows = {"rollout": time.rollout, "teacher": time.teacher, "student, forward and backward": time.student}
        for name, seconds in rows.items():
            assert re.search(rf"\| {name} \| [\d.]+ s \| {seconds:.3g} s \|", table), (name, seconds)


def test_dynamic_batching_waits_for_the_longest_once() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(global_batch_size=512, micro_batch_size=1))

    def decoded(engine: str, rows: int, mean: float) -> tuple[float, float, float]:
        sized = replace(run, rollout=replace(run.rollout, engine=engine, max_batch_size=rows))
        does = generation(sized, Assumptions(mean_length=mean))
        assert does is not None
        found = decoding(sized, does, rollout_layout(sized, 8))
        return found.steps, found.rows, found.context

    # Eight replicas of 64 rows each; prompts of 512 tokens on average, responses of at most 3072.
    assert decoded("static", 64, 0.5) == (3072, 64, 512 + 1536)
    assert decoded("static", 16, 0.5) == (4 * 3072, 16, 512 + 1536)
    # Spread evenly from 0 to 3072, a token has a third of the budget before it.
    assert decoded("dynamic", 64, 0.5) == pytest.approx((3072, 32, 512 + 1024), rel=1e-4)
    assert decoded("dynamic", 16, 0.5) == pytest.approx((5 * 1536, 64 / 5, 512 + 1024), rel=1e-4)
    # All as long as the budget: nothing ends sooner.
    assert decoded("dynamic", 16, 1.0) == decoded("static", 16, 1.0) == (4 * 3072, 16, 1024 + 1536)


def test_what_cuts_a_generation_short_is_priced() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(global_batch_size=512, micro_batch_size=1))
    assumed = Assumptions()

    def made(rollout: dict[str, object], **training: object) -> Generation:
        changed = replace(run, rollout=replace(run.rollout, **rollout), training=replace(run.training, **training))
        found = generation(changed, assumed)
        assert found is not None
        return found

    # Responses spread evenly from 0 to 3072: of pieces of 1024, a third of them has one, a third two, a third three.
    pieces = made({"partial_tokens": 1024})
    assert (pieces.sequences, pieces.longest, pieces.rounds) == (512, 1024, 1)
    assert pieces.tokens == pytest.approx(1536 / 2, rel=1e-2)
    assert pieces.read == pytest.approx(512 + (0 + (0 + 1024) + (0 + 1024 + 2048)) / 6, rel=1e-2)
    learned = lengths(replace(run, rollout=replace(run.rollout, partial_tokens=1024)), assumed)
    assert (learned.response, learned.prompt + learned.earlier) == (pieces.tokens, pieces.read)
    # Whole responses of twice the mean piece: two rounds of as many as a step learns from, one of twice as many.
    finished = {"partial_tokens": 1024, "partial_learn_from": "finished"}
    assert made(finished).rounds == 2 and made(finished | {"over_sampling": 2.0}).rounds == 1
    # The first three of four to end.
    first = made({"over_sampling": 4 / 3})
    assert first.longest == pytest.approx(0.75 * 3072, rel=1e-2)
    assert first.tokens == pytest.approx(0.75 * (0.375 * 3072) + 0.25 * (0.75 * 3072), rel=1e-2)
    assert made({}, steps_per_rollout=4) == made({}), "one generation after another"
    assert generation(replace(run, objective="seq-kd"), assumed) is None

    def seconds(**rollout: object) -> float:
        return step_time(replace(run, rollout=replace(run.rollout, **rollout)), 8, GPUS["H100"], assumed).rollout

    assert seconds(partial_tokens=1024) < seconds(over_sampling=1.25) < seconds()
    assert step_time(replace(run, objective="seq-kd"), 8, GPUS["H100"], assumed).rollout == 0


def test_what_waits_in_host_memory_is_counted() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(global_batch_size=64, micro_batch_size=1))
    ahead = replace(run.parallel, teacher_schedule="ahead", teacher_tensor_model_parallel_size=4)
    (device,) = rank_memory(replace(run, parallel=ahead), 8).values()
    away = replace(run, parallel=replace(ahead, teacher_hidden="host", offload_teacher=True))
    (host,) = rank_memory(away, 8).values()
    assert device.on_host == 0
    weights = stage_parameters(SHAPES["qwen3-32b"], 4, 1)[0] * 2
    assert host.on_host == weights + device.teacher_hidden and host.teacher_hidden == 0
    offloaded = OptimizerConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5)
    (half,) = rank_memory(replace(run, parallel=ahead, optimizer=offloaded), 8).values()
    assert half.on_host == half.optimizer
    found = plans(run, 8, GPUS["H100"], Assumptions(host_memory=1.0), most=10)
    assert found and not any(plan.config.parallel.offload_teacher for plan in found)
    for name, value in (("mean_length", 0.0), ("network_efficiency", -1.0), ("memory_reserve", -1.0)):
        with pytest.raises(ValueError, match=name):
            Assumptions(**{name: value})


def test_stages_of_models_that_do_not_divide() -> None:
    # Llama 3 405B: 126 layers in 16 stages, the first and the last one layer fewer (arXiv 2407.21783, section 3.3.2).
    assert stage_layers(in_stages(SHAPES["llama3-405b"], 16), 16) == [7, *[8] * 14, 7]
    assert in_stages(SHAPES["llama3-8b"], 8) == SHAPES["llama3-8b"]
    alone = config("llama3-405b", None, guidance=GuidanceConfig(schedule="none"))
    best, *_ = plans(alone, 1024, GPUS["H100"], Assumptions(), command="sft", most=1)
    assert best.sizes[0].pipeline > 2 and problems(best.config, 1024, "sft") == []


def test_experts_elsewhere_cost_messages() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=64, num_moe_experts=8, moe_router_topk=2,
        moe_ffn_hidden_size=32, vocab_size=64,
    )  # fmt: skip
    gpu, assumed = GPUS["H100"], Assumptions(network_efficiency=1.0, collective_latency=0.0)

    def seconds(*, tensor: int, spread: int, shared_by: int) -> float:
        sizes = Sizes(tensor, 1, 16 // tensor, experts=spread * shared_by, experts_shared_by=shared_by)
        return expert_dispatch_seconds(model, 450e9, sizes, gpu, assumed)

    assert seconds(tensor=1, spread=1, shared_by=1) == 0
    assert seconds(tensor=1, spread=4, shared_by=1) == pytest.approx(2 * 3 / 4)
    assert seconds(tensor=2, spread=4, shared_by=1) == pytest.approx(3 / 4)
    assert seconds(tensor=2, spread=4, shared_by=2) == pytest.approx(3 / 4 + 1)
    assert seconds(tensor=1, spread=16, shared_by=1) == pytest.approx(2 * 15 / 16 * 9), "over the network"
    assert expert_dispatch_seconds(SHAPES["qwen3-8b"], 1.0, Sizes(1, 1, 8), gpu, assumed) == 0


def test_interleaved_stages_send_more_and_launches_bound_small_layers() -> None:
    run = config("qwen3-8b", None, training=TrainingConfig(micro_batch_size=1))
    run = replace(run, parallel=replace(run.parallel, pipeline_model_parallel_size=4))
    chunked = replace(run, parallel=replace(run.parallel, virtual_pipeline_model_parallel_size=3))
    one, three = (step_time(each, 16, GPUS["H100"], Assumptions()) for each in (run, chunked))
    hidden = (512 + 1536) * 4096 * 2  # bytes, to the next stage and back, for each of 128 micro-batches
    assert three.student - one.student == pytest.approx(128 * 2 * 2 * hidden / (50e9 * 0.8))
    assert three.bubble < one.bubble / 2
    slow = step_time(run, 16, GPUS["H100"], Assumptions(training_layer_overhead=1.0))
    assert slow.student == pytest.approx(128 * 9 * 3, rel=1e-2)


@pytest.mark.parametrize(
    ("student", "teacher", "gpus"),
    [("qwen3-1.7b", "qwen3-4b", 8), ("qwen3-8b", "qwen3-32b", 16), ("llama3-8b", "llama3-70b", 64)],
)
def test_every_layout_is_accepted_fits_and_is_in_order(student: str, teacher: str, gpus: int) -> None:
    gpu, assumed = GPUS["H100"], Assumptions()
    found = plans(config(student, teacher), gpus, gpu, assumed, most=20)
    assert found
    for plan in found:
        assert problems(plan.config, gpus, "train") == []
        assert plan.peak <= gpu.memory - assumed.memory_reserve
    costs = [round(cost(plan.config, plan.time), 2) for plan in found]
    assert costs == sorted(costs)
    assert {plan.config.parallel.teacher_schedule for plan in found} == {"shared", "ahead"}


def test_what_cannot_fit_is_not_offered() -> None:
    run = config("llama3-8b", "llama3-70b")
    assert plans(run, 1, GPUS["H100"], Assumptions()) == []
    small = replace(run, training=TrainingConfig(global_batch_size=8))
    assert plans(small, 16, GPUS["H100"], Assumptions(), most=1)
    assert plans(replace(run, training=TrainingConfig(global_batch_size=3)), 16, GPUS["H100"], Assumptions()) == []


def test_an_offloaded_optimizer_leaves_the_device_and_costs_time() -> None:
    plain = config("qwen3-8b", "qwen3-32b", parallel=ParallelConfig(tensor_model_parallel_size=8))
    half = OptimizerConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5)
    cases = [
        plain,
        replace(plain, optimizer=half),
        replace(plain, optimizer=OptimizerConfig(optimizer_cpu_offload=True)),
    ]
    states = [rank_memory(case, 8)["stage 0"].optimizer for case in cases]
    assert states[1] == states[0] // 2 and states[2] == 0
    seconds = [step_time(case, 8, GPUS["H100"], Assumptions()).optimizer for case in cases]
    # 30 bytes a parameter through the host's memory, 8 over the bus.
    parameters = stage_parameters(plain.student, 8, 1)[0]
    assert seconds[2] == pytest.approx(parameters * (30 / 40e9 + 8 / 20e9), rel=1e-6)
    assert seconds[0] < seconds[1] < seconds[2]


def test_every_teacher_has_its_weights_on_the_device_unless_they_are_offloaded() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(micro_batch_size=1))
    one = replace(run, parallel=replace(run.parallel, teacher_schedule="ahead"))
    three = replace(one, teachers={"math": "a", "code": "b"})
    ((alone,), (together,)) = (rank_memory(each, 8).values() for each in (one, three))
    assert together.teacher_weights == 3 * alone.teacher_weights > 0
    away = [replace(each, parallel=replace(each.parallel, offload_teacher=True)) for each in (one, three)]
    ((alone,), (together,)) = (rank_memory(each, 8).values() for each in away)
    assert together.teacher_weights == alone.teacher_weights == 0


def test_an_inference_copy_takes_memory_and_saves_decoding_the_pipeline() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(micro_batch_size=1))
    run = replace(run, parallel=replace(run.parallel, tensor_model_parallel_size=2, pipeline_model_parallel_size=4))
    run = replace(run, rollout=replace(run.rollout, max_batch_size=512, engine="static"))
    copied = replace(run, rollout=replace(run.rollout, tensor_model_parallel_size=1))
    assert problems(copied, 8, "train") == []
    without, with_copy = (list(rank_memory(each, 8).values()) for each in (run, copied))
    for stage, (own, copy) in enumerate(zip(without, with_copy, strict=True)):
        assert own.student_copy == 0 and copy.resident == own.resident + copy.student_copy
        # bf16: 2 bytes of each of 8.2 B parameters on every rank.
        assert copy.student_copy / 2e9 == pytest.approx(8.2, rel=0.015)
        # Eight replicas of one rank have an eighth of the rows each, of all 36 layers instead of 9, with all heads.
        assert copy.kv_cache == own.kv_cache, stage
    own_time, copy_time = (step_time(each, 8, GPUS["H100"], Assumptions()) for each in (run, copied))
    assert own_time.refit == 0 < copy_time.refit < 0.1
    assert copy_time.rollout < own_time.rollout and copy_time.student == own_time.student


def test_the_engine_is_the_one_that_a_gpu_runs() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(micro_batch_size=1))
    run = replace(run, rollout=replace(run.rollout, max_batch_size=512))
    parallel = replace(run.parallel, tensor_model_parallel_size=2)
    staged = replace(parallel, pipeline_model_parallel_size=4)

    def planned(engine: str, **layout: object) -> tuple[int, float]:
        asked = replace(run, rollout=replace(run.rollout, engine=engine), **layout)
        # Responses of one length: nothing ends sooner where batching is dynamic.
        return (
            rank_memory(asked, 8)["stage 0"].kv_cache,
            step_time(asked, 8, GPUS["H100"], Assumptions(mean_length=1.0)).rollout,
        )

    # One stage: dynamic batching with CUDA graphs, blocks of 64 and one more. Without graphs, the other overhead.
    assert planned("auto", parallel=parallel) == planned("dynamic", parallel=parallel)
    (blocks, graphs), (whole, eager) = planned("auto", parallel=parallel), planned("static", parallel=parallel)
    assert blocks - whole == 64 * 36 * 2 * 1024 // 2 * 2  # tokens, layers, keys and values, width / tp, bf16
    assert eager - graphs == pytest.approx(3072 * 36 * (1600e-6 - 150e-6))
    # Four: static batching.
    assert planned("auto", parallel=staged) == planned("static", parallel=staged)


def test_fused_heads_make_logits_absent() -> None:
    run = config("qwen3-8b", "qwen3-32b", training=TrainingConfig(micro_batch_size=1))
    (fused,) = rank_memory(run, 8).values()
    (whole,) = rank_memory(replace(run, training=replace(run.training, output_head="logits")), 8).values()
    assert fused.logits == 0 and fused.head > 0
    assert whole.logits == 3072 * 2 * 2 * 151936  # tokens, bf16, both models, a vocabulary that needs no padding


def test_adapters_leave_the_student_its_weights_alone() -> None:
    model, lora = SHAPES["llama3-8b"], LoraConfig(rank=16, base_is_teacher=True)
    (count,) = stage_adapter_parameters(model, lora, 1, 1)
    # PEFT counts 41,943,040 for rank 16 on all linear layers, with an A each for q, k and v, and for gate and up.
    assert count == 41_943_040 - 32 * 3 * 16 * 4096
    whole = config("llama3-8b", "llama3-8b", training=TrainingConfig(micro_batch_size=1))
    ((trained,), (adapted,)) = (rank_memory(each, 8).values() for each in (whole, replace(whole, lora=lora)))
    assert adapted.gradients == 4 * count and adapted.optimizer == 12 * count // 8
    assert adapted.student_weights == trained.student_weights + 2 * count
    assert adapted.teacher_weights == 0 < trained.teacher_weights
    assert adapted.head == trained.head - 128256 * 4096 * 4
    assert adapted.activations < trained.activations
    seconds = [step_time(each, 8, GPUS["H100"], Assumptions()) for each in (whole, replace(whole, lora=lora))]
    assert seconds[1].student == pytest.approx(seconds[0].student * 2 / 3) and seconds[1].rollout == seconds[0].rollout


def test_a_model_by_name_folder_or_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "model.yaml"
    path.write_text("{num_layers: 2, hidden_size: 8, num_attention_heads: 2, ffn_hidden_size: 16, vocab_size: 5}")
    assert find_model(str(path)).hidden_size == 8
    for text, message in (
        ("{num_layers: 2, hidden: 8}", "fields of a model"),
        ("[1]", "fields of a model"),
        (
            "{num_layers: 2, hidden_size: 8, num_attention_heads: 2, ffn_hidden_size: 16, vocab_size: five}",
            "is a number",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_model(str(path))
    with pytest.raises(ValueError, match="no built-in shape"):
        find_model("gpt5")


def test_the_tool_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.plan_run import main

    assert main(["--student", "qwen3-8b", "--gpus", "8"]) == 2
    assert "give --student and --teacher" in capsys.readouterr().err
    assert main(["--student", "qwen3-8b", "--teacher", "gpt5", "--gpus", "8"]) == 2
    assert "'gpt5' is no built-in shape" in capsys.readouterr().err
    assert main(["--student", "llama3-8b", "--teacher", "llama3-70b", "--gpus", "1"]) == 1
    assert "no layout fits on 1 H100 of 80 GB" in capsys.readouterr().out
    assert main(["--student", "qwen3-0.6b", "--teacher", "qwen3-1.7b", "--gpus", "2", "--layout", "999"]) == 2
    assert "--layout 999 is not one of" in capsys.readouterr().err
    models = ["--student", "qwen3-0.6b", "--teacher", "qwen3-1.7b", "--gpus"]
    example = ["--config", "examples/qwen3_8gpu/distill.yaml", "--gpus", "8"]
    for arguments, message in (
        ([*models, "0"], "--gpus must be at least 1"),
        ([*models, "2", "--mean-length", "2"], "mean_length is a share"),
        ([*models, "2", "--memory-reserve=-1"], "memory_reserve must be at least 0"),
        (
            [*models, "2", "--samples-per-prompt", "3"],
            "cannot start in any layout:\n  - training.global_batch_size 512",
        ),
        ([*models, "2", "--max-response-length", "0"], "rollout.max_response_length must be at least 1"),
        ([*models, "2", "--write", "nowhere/run.yaml"], "there is no folder nowhere"),
        ([*example, "--student", "qwen3-8b", "--global-batch-size", "64"], "--student, --global-batch-size"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_tool_plans_two_sides_beside_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_tropd.config_parser import load_config
    from tools.plan_run import main

    written = tmp_path / "run.yaml"
    arguments = ["--gpus", "4", "--top", "100"]
    models = ["--student", "qwen3-1.7b", "--teacher", "qwen3-4b", "--max-response-length", "512"]
    one_sided = tmp_path / "one_sided.yaml"
    assert main([*models, *arguments, "--write", str(one_sided)]) == 0
    assert "one step off" not in capsys.readouterr().out
    assert main([*models, *arguments, "--one-step-off"]) == 0
    both = capsys.readouterr().out
    row = next(line.split()[0] for line in both.splitlines() if "one step off" in line)
    assert main([*models, *arguments, "--one-step-off", "--layout", row, "--write", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "generates, stage 0" in shown and f"train {written} --dry-run --world-size=4" in shown
    assert "not in these seconds: prefixes of teacher answers" in shown
    planned = load_config(written)
    assert planned.training.one_step_off and planned.student.load == "checkpoints/qwen3-1.7b"
    assert problems(planned, 4, "train") == []
    assert main(["--config", str(written), "--gpus", "1"]) == 1
    assert "no layout fits on 1 H100" in capsys.readouterr().out
    adapted = tmp_path / "adapted.yaml"
    for config_text, option in ((written.read_text(), "--top=1"), (one_sided.read_text(), "--one-step-off")):
        adapted.write_text(config_text + "lora: {rank: 8}\n")
        assert main(["--config", str(adapted), "--gpus", "4", option]) == 2
        assert "lora.rank is not offered with training.one_step_off" in capsys.readouterr().err
    adapted.write_text(one_sided.read_text() + "monitoring: {profile: true, profile_ranks: [0, 3]}\n")
    assert main(["--config", str(adapted), "--gpus", "2"]) == 2
    assert "profile_ranks [3] are not among 2 ranks" in capsys.readouterr().err
    assert main(["--config", str(adapted), "--gpus", "4", "--top=1"]) == 0
    capsys.readouterr()
    assert main(["--config", str(written), "--gpus", "4"]) == 0
    alone = capsys.readouterr().out
    assert "one step off" in alone and "shared" not in alone
