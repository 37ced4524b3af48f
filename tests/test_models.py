"""Models from the config: every architecture option builds, trains and is the same model in every layout."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "llama 3": {"rotary_base": 500000, "rope_scaling_factor": 8.0, "untie_embeddings_and_output_weights": True},
    "qwen 2.5": {"add_qkv_bias": True},
    "qwen 3": {"qk_layernorm": True, "kv_channels": 16},
    "layer norm and gelu": {"normalization": "LayerNorm", "swiglu": False, "num_query_groups": None},
    "uneven stages": {"num_layers": 3},
}


def _losses_and_norms(tp: int, pp: int, recompute: bool) -> dict[str, tuple[float, float]]:
    from megatron_tropd.step import train_step
    from tests import tiny

    layout = tiny.start(tp=tp, pp=pp)
    results = {}
    for name, options in VARIANTS.items():
        student = replace(tiny.STUDENT, **options)
        if pp == 2 and student.num_layers == 3:
            student = replace(student, num_layers_in_first_pipeline_stage=2)
        learner = tiny.build_learner(layout, student=student, recompute=recompute)
        metrics = train_step(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2))
        results[name] = (metrics["loss"], metrics["grad_norm"])
    return results


def test_every_architecture_trains_the_same_in_every_layout_and_with_recomputation() -> None:
    (expected,) = run_ranks(1, _losses_and_norms, 1, 1, False)
    assert len(set(expected.values())) == len(VARIANTS)
    for tp, pp, recompute in ((2, 1, False), (1, 2, True)):
        for found in run_ranks(2, _losses_and_norms, tp, pp, recompute):
            for name, values in expected.items():
                assert found[name] == pytest.approx(values, rel=1e-5), (name, tp, pp)


def _build(caplog_level: int) -> list[str]:
    from megatron_tropd import layer_spec
    from tests import tiny

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    layer_spec.logger.addHandler(handler)
    layer_spec.logger.setLevel(caplog_level)
    layout = tiny.start(tp=1, pp=1)
    model = tiny.build_learner(layout, teacher=None).stage.module
    weight = model.embedding.word_embeddings.weight
    assert weight.shape[0] == 48 and not weight[tiny.VOCAB_SIZE :].any() and weight[: tiny.VOCAB_SIZE].any()
    # Output projections are scaled by 1 / sqrt(2 layers); norms start at 1.
    layer = model.decoder.layers[0]
    assert layer.mlp.linear_fc2.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert layer.mlp.linear_fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(32))
    teacher = tiny.build_teacher(
        tiny.TEACHER, layout, vocab_size=45, max_sequence_length=8, dtype=torch.float32, seed=2
    )
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    return records


def test_fresh_weights_padding_and_the_log_line_about_the_layer_spec() -> None:
    (records,) = run_ranks(1, _build, logging.INFO)
    assert any("layer spec: local" in record for record in records)


def test_the_embedding_is_padded_to_a_multiple_for_every_rank() -> None:
    from megatron_tropd.models import padded_vocab_size

    # 45 rounded up to a multiple of 8 x 2 = 16 is 48; Qwen2.5's 151665 to one of 128 x 8 = 1024 is 149 x 1024.
    assert padded_vocab_size(45, divisible_by=8, tensor_parallel_size=2) == 48
    assert padded_vocab_size(151665, divisible_by=128, tensor_parallel_size=8) == 152576
    assert padded_vocab_size(48, divisible_by=8, tensor_parallel_size=2) == 48
