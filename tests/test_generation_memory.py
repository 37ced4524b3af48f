"""What `generate` takes on a rank: weights and cache of the teacher, as of a student that generates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_tropd.config import Config
from megatron_tropd.config_parser import load_config
from megatron_tropd.planner import generation_engine, generation_layout, generation_memory, rank_memory

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _config(*overrides: str) -> Config:
    """Qwen3-1.7B from Qwen3-4B, both tensor parallel 4."""
    return load_config(EXAMPLES / "qwen3_8gpu" / "distill.yaml", list(overrides))


def test_the_teachers_bytes_worked_out_by_hand() -> None:
    (memory,) = generation_memory(_config("--rollout.max_batch_size=192"), 8).values()
    # 36 layers; of 8 key heads 2 are on a rank, of 128 numbers; keys and values; 2 bytes.
    token = 36 * 2 * (2 * 128) * 2
    # 1024 + 8192 tokens are 144 blocks of 64; one block more is written padding to.
    assert memory.kv_cache == (192 * 144 + 1) * 64 * token
    # A layer: from 2560 to 32 + 8 + 8 heads, back from 32, three matrices of 9728 columns, cut in four; norms of 2560
    # twice and of 128 twice. Embedding and output share 151936 rows, made a multiple of 128 x 4.
    layer = 2560 * 48 * 128 // 4 + 32 * 128 * 2560 // 4 + 3 * 2560 * 9728 // 4 + 2 * 2560 + 2 * 128
    rows = -(-151936 // 512) * 512 // 4
    assert memory.weights == 2 * (36 * layer + rows * 2560 + 2560)
    # One layer over the 16384 tokens of a pass, and fp32 logits of the whole vocabulary for every sequence.
    assert memory.prefill == 16384 * 2 * (3 * 2560 + 4 * 9728 // 4) + 192 * rows * 4 * 4
    assert memory.peak == memory.weights + memory.kv_cache + memory.prefill


def test_a_teacher_is_a_student_that_generates() -> None:
    parallel = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2"]
    config = _config(*parallel, "--rollout.max_batch_size=32")
    assert config.teacher is not None
    swapped = replace(config, student=config.teacher)
    wanted = rank_memory(swapped, 8)  # 512 sequences of a step fill its batches
    found = generation_memory(config, 8)
    assert generation_engine(config, 8).kind == "static", "with pipeline stages there are no CUDA graphs"
    assert list(found) == ["stage 0", "stage 1"] == list(wanted)
    for name, memory in found.items():
        assert (memory.kv_cache, memory.prefill) == (wanted[name].kv_cache, wanted[name].prefill)
        assert memory.weights == wanted[name].student_weights


def test_what_is_the_students_own_changes_nothing() -> None:
    config = _config("--rollout.max_batch_size=32")
    expected = generation_memory(config, 8)
    for overrides in (
        ["--rollout.tensor_model_parallel_size=2"],
        ["--rollout.over_sampling=1.5"],
        ["--lora.rank=8"],
        ["--parallel.context_parallel_size=2"],
        ["--training.global_batch_size=8", "--training.micro_batch_size=1"],
        ["--student.num_layers=2"],
    ):
        changed = _config("--rollout.max_batch_size=32", *overrides)
        assert generation_memory(changed, 8) == expected, overrides


def test_the_teachers_own_layout_and_prompts_count() -> None:
    config = _config("--rollout.max_batch_size=32")
    (expected,) = generation_memory(config, 8).values()
    ahead = ["--parallel.teacher_schedule=ahead", "--parallel.teacher_tensor_model_parallel_size=8"]
    cut = _config("--rollout.max_batch_size=32", *ahead)
    assert (generation_layout(cut, 8).tensor, generation_layout(cut, 8).data) == (8, 1)
    (found,) = generation_memory(cut, 8).values()
    assert found.kv_cache == expected.kv_cache // 2
    longer = replace(config, teacher_context=replace(config.teacher_context, max_prompt_length=2048))
    (found,) = generation_memory(longer, 8).values()
    assert found.kv_cache > expected.kv_cache * 1.1
