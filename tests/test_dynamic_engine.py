"""Megatron's dynamic batching gives what static batching gives, however its requests come together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.config import ConfigError, ModelConfig
from megatron_tropd.config_rollout import DynamicEngineConfig, RolloutConfig
from megatron_tropd.prompt import Prompt
from megatron_tropd.trajectories import first_to_end
from megatron_tropd.types import Rollout, RolloutRequest
from tests.ranks import run_ranks
from tests.test_rollout import BUDGET, ENOUGH, EOS, MODEL, SEED, VOCAB_SIZE, requests
from tests.test_run import _metrics, _train, _weights, config_file
from tests.test_run import data as data  # the fixture

LAYOUTS = [(2, 1), (1, 2), (1, 1)]
"""(tensor, pipeline) on two ranks; in the last each rank is a replica of its own."""
BLOCK = 4
MOST_BLOCKS = 4
"""That a sequence of ``requests`` may need: 6 tokens of prompt and BUDGET."""
EXPERTS = replace(MODEL, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16)


def same_prompts() -> list[RolloutRequest]:
    """Six samples each of a prompt that ends within a block, and of one that fills its blocks."""
    prompts = [Prompt(str(length), "", tuple(range(2, 2 + length)), "") for length in (11, 12)]
    return [RolloutRequest(200 + i, prompts[i // 6], (5,) if i == 3 else ()) for i in range(12)]


def long_prompts() -> list[RolloutRequest]:
    """More tokens than one forward pass of 64 takes, and one prompt that alone has more."""
    prompts = [Prompt(str(length), "", tuple(2 + i % 40 for i in range(length)), "") for length in (30, 80, 25, 40)]
    return [RolloutRequest(300 + i, prompt, ()) for i, prompt in enumerate(prompts)]


# ----------------------------------------------------------------------------------------------- inside ranks


def _build(layout: Any, config: ModelConfig = MODEL) -> Any:
    from megatron_tropd.models import build_model

    return build_model(config, layout, vocab_size=VOCAB_SIZE, max_sequence_length=96, dtype=torch.float32, seed=3)


def _engine(
    model: Any, layout: Any, kind: str, *, max_batch_size: int = 9, entropies: bool = False, **dynamic: Any
) -> Any:
    from megatron_tropd.rollout import build_engine

    config = RolloutConfig(
        engine=kind,  # type: ignore[arg-type]
        max_batch_size=max_batch_size,
        temperature=dynamic.pop("temperature", 1.0),
        top_p=dynamic.pop("top_p", 1.0),
        dynamic=DynamicEngineConfig(**{"block_size_tokens": BLOCK, "cuda_graphs": False, **dynamic}),
    )
    options = {"vocab_size": VOCAB_SIZE, "eos_id": EOS, "seed": SEED, "with_entropies": entropies}
    return build_engine(model, layout, config, **options)


def _gb(engine: Any, num_blocks: int) -> float:
    return (num_blocks + 1) * engine._block_bytes() / 2**30


def _pairs(model: Any, layout: Any) -> dict[str, tuple[list[Rollout], list[Rollout], Any]]:
    """What static and dynamic batching make of the same requests, and how the latter went."""
    few = _gb(_engine(model, layout, "dynamic"), 2 * MOST_BLOCKS - 1)
    cases: dict[str, tuple[list[RolloutRequest], dict[str, Any]]] = {
        "ragged": (requests(), {"entropies": True}),
        "few blocks": (requests(), {"buffer_size_gb": few, "enable_prefix_caching": False}),
        "shared, few blocks": (same_prompts(), {"buffer_size_gb": few, "max_batch_size": 12}),
        "chunks": (long_prompts(), {"max_tokens": 64, "enable_prefix_caching": False}),
        "shared": (same_prompts(), {"max_batch_size": 12}),
        "shared chunks": (same_prompts() + long_prompts(), {"max_tokens": 64, "max_batch_size": 16}),
        "greedy": (requests(), {"temperature": 0.0}),
        "nucleus": (requests(), {"top_p": 0.6, "max_batch_size": 1000}),
    }
    if layout.device.type == "cuda":
        cases["graphs"] = requests(), {"cuda_graphs": True}
    found = {}
    for name, (what, options) in cases.items():
        dynamic = _engine(model, layout, "dynamic", **options)
        generated = dynamic.generate(what, max_response_length=BUDGET)
        static = _engine(model, layout, "static", **options).generate(what, max_response_length=BUDGET)
        found[name] = static, generated, dynamic.report
    paused = [replace(one.request, earlier=one.response[:3]) for one in found["ragged"][0] if len(one.response) > 3]
    static, generated = (
        _engine(model, layout, kind).generate(paused, max_response_length=BUDGET, max_new_tokens=2)
        for kind in ("static", "dynamic")
    )
    found["paused"] = static, generated, None
    return found


def _races(model: Any, layout: Any) -> dict[str, Any]:
    """By the options: what static and dynamic batching make of a race, and forward passes with and without one."""
    few = _gb(_engine(model, layout, "dynamic"), 2 * MOST_BLOCKS - 1)
    found: dict[str, Any] = {"whole": _engine(model, layout, "static").generate(requests(), max_response_length=BUDGET)}
    for name, options in {
        "waiting": {},
        "at once": {"max_batch_size": 100},
        "few blocks": {"buffer_size_gb": few, "enable_prefix_caching": False},
    }.items():
        rollouts, steps = {}, []
        for kind in ("static", "dynamic"):
            engine = _engine(model, layout, kind, **options)
            rollouts[kind] = engine.generate(requests(), max_response_length=BUDGET, enough=ENOUGH)
        steps.append(engine.report.num_steps)
        engine.generate(requests(), max_response_length=BUDGET)
        found[name] = rollouts, [*steps, engine.report.num_steps]
    engine = _engine(model, layout, "dynamic")
    found["over"] = engine.generate(requests(), max_response_length=BUDGET, enough=2), engine.report
    return found


def _errors(model: Any, layout: Any) -> list[str]:
    few = _engine(model, layout, "dynamic", buffer_size_gb=_gb(_engine(model, layout, "dynamic"), MOST_BLOCKS - 1))
    whole = _engine(model, layout, "dynamic", max_tokens=64, enable_chunked_prefill=False)
    plain = _engine(model, layout, "dynamic")
    messages = []
    for engine, what in ((few, requests()), (whole, long_prompts()), (plain, [_too_long()])):
        with pytest.raises(ValueError) as error:
            engine.generate([*requests(4), *what], max_response_length=BUDGET)
        messages.append(str(error.value))
    bad = [(replace(layout, expert_parallel_size=2), False)] + [(layout, True)] * (layout.device.type == "cpu")
    for where, cuda_graphs in bad:
        with pytest.raises(ConfigError) as error:
            _engine(model, where, "dynamic", cuda_graphs=cuda_graphs)
        messages.append(str(error.value))
    return messages


def _too_long() -> RolloutRequest:
    return RolloutRequest(1, Prompt("long", "", (2,) * 90, ""), ())


def _other_weights(model: Any, layout: Any) -> tuple[list[Rollout], list[Rollout]]:
    """Generated again by the same engine once the weights have moved, with prompts that were shared before."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from megatron_tropd import dynamic_engine

    made: list[tuple[StorageWeakRef, int]] = []

    class Watched(dynamic_engine._Context):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            buffer = self.memory_buffer
            made.append((StorageWeakRef(buffer.untyped_storage()), buffer.nbytes))

    engine = _engine(model, layout, "dynamic", max_batch_size=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_engine, "_Context", Watched)
        engine.generate(same_prompts(), max_response_length=BUDGET)
    # Nothing is collected before: memory that waits for a cycle to be found is not free either.
    ((memory, size),) = made
    assert size == engine.report.kv_cache_bytes > 0
    assert memory.expired(), "the KV cache, or a view of it, is there while the model trains"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    again = engine.generate(same_prompts(), max_response_length=BUDGET)
    return again, _engine(model, layout, "static").generate(same_prompts(), max_response_length=BUDGET)


def _results_of_a_rank() -> dict[tuple[int, int], dict[str, Any]]:
    from tests import tiny
    from tests.test_rollout import _train_around_a_rollout

    by_layout = {}
    for tp, pp in LAYOUTS:
        layout = tiny.start(tp=tp, pp=pp)
        model = _build(layout)
        by_layout[tp, pp] = {
            "pairs": _pairs(model, layout),
            "races": _races(model, layout),
            "errors": _errors(model, layout),
            "other weights": _other_weights(model, layout),
            "none": _engine(model, layout, "dynamic").generate([], max_response_length=BUDGET),
            **_train_around_a_rollout(
                layout, lambda model, layout, **options: _engine(model, layout, "dynamic", **options)
            ),
        }
    experts = _build(layout, EXPERTS)
    by_layout[1, 1]["experts"] = [
        _engine(experts, layout, kind).generate(requests(), max_response_length=BUDGET)
        for kind in ("static", "dynamic")
    ]
    with torch.no_grad():
        model.embedding.word_embeddings.weight[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        _engine(model, layout, "dynamic").generate(requests(), max_response_length=BUDGET)
    return by_layout


# ------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def results() -> list[dict[tuple[int, int], dict[str, Any]]]:
    """Of both ranks, by layout."""
    return run_ranks(2, _results_of_a_rank, timeout=300)


def _assert_same(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    assert [rollout.request for rollout in found] == [rollout.request for rollout in expected]
    assert [rollout.response for rollout in found] == [rollout.response for rollout in expected]
    assert [rollout.finished for rollout in found] == [rollout.finished for rollout in expected]
    for name in ("log_probs", "entropies"):
        both = [[value for rollout in side for value in getattr(rollout, name)] for side in (found, expected)]
        np.testing.assert_allclose(*both, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_responses_are_those_of_static_batching(results: Any, layout: Any) -> None:
    for by_layout in results:
        for static, dynamic, _ in by_layout[layout]["pairs"].values():
            _assert_same(dynamic, static)
        # Within a model replica not a bit may differ.
        pairs, first = by_layout[layout]["pairs"], results[0][layout]["pairs"]
        assert [pair[1] for pair in pairs.values()] == [pair[1] for pair in first.values()]
        assert by_layout[layout]["none"] == []
    ragged = results[0][layout]["pairs"]["ragged"][1]
    assert len({len(rollout.response) for rollout in ragged}) > 5 and ragged[0].response == ragged[1].response == ()
    assert all(len(rollout.entropies) == len(rollout.response) for rollout in ragged)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_way_to_share_the_memory_was_taken(results: Any, layout: Any) -> None:
    reports = {name: report for name, (_, _, report) in results[0][layout]["pairs"].items()}
    assert reports["few blocks"].num_evicted > 0 and reports["shared, few blocks"].num_evicted > 0
    assert reports["few blocks"].kv_cache_bytes < reports["ragged"].kv_cache_bytes
    assert reports["few blocks"].num_steps > reports["ragged"].num_steps
    assert reports["chunks"].num_chunks >= 2 and reports["chunks"].num_shared_tokens == 0
    assert reports["chunks"].num_prompt_tokens == sum(len(request.prompt.tokens) for request in long_prompts())
    # The prompts begin alike: the two whole blocks before the last token are read by the very first sample alone.
    assert reports["shared"].num_shared_tokens == 11 * 2 * BLOCK
    given = sum(len(request.prompt.tokens) + len(request.prefix) for request in same_prompts())
    assert reports["shared"].num_prompt_tokens == given - reports["shared"].num_shared_tokens
    assert reports["shared chunks"].num_shared_tokens > 0 and reports["shared chunks"].num_chunks > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_race_has_the_winners_of_static_batching_and_ends_sooner(results: Any, layout: Any) -> None:
    for by_layout in results:
        races = dict(by_layout[layout]["races"])
        whole, (untouched, report) = races.pop("whole"), races.pop("over")
        winners = first_to_end(whole, ENOUGH, BUDGET)
        last = max(len(rollout.response) for rollout in winners)
        assert 0 < last < max(len(rollout.response) for rollout in whole)  # else it would show nothing
        for name, (rollouts, (num_steps, num_steps_without)) in races.items():
            for found in rollouts.values():
                _assert_same(first_to_end(found, ENOUGH, BUDGET), winners)
            for rollout, reference in zip(rollouts["dynamic"], whole, strict=True):
                length = len(rollout.response)
                assert rollout.response == reference.response[:length]
                assert length == len(reference.response) or last <= length < len(reference.response)
            assert num_steps < num_steps_without, name
        # Two have ended before anything runs.
        assert report is None and not any(rollout.response for rollout in untouched)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_filled_by_other_weights_are_not_read(results: Any, layout: Any) -> None:
    for by_layout in results:
        _assert_same(*by_layout[layout]["other weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_after_a_rollout_is_training_without_one(results: Any, layout: Any) -> None:
    for by_layout in results:
        found = by_layout[layout]
        assert found["traces"] == [] and found["gradient norm"] > 0 and found["changed gradients"] == []


def test_experts(results: Any) -> None:
    static, dynamic = results[0][1, 1]["experts"]
    _assert_same(dynamic, static)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_fit_is_refused_by_the_option_to_change(results: Any, layout: Any) -> None:
    for by_layout in results:
        too_few_blocks, too_long_to_read, too_long, experts, *graphs = by_layout[layout]["errors"]
        assert "rollout.dynamic.buffer_size_gb" in too_few_blocks and "holds 3 blocks of 4 tokens" in too_few_blocks
        assert "80 tokens" in too_long_to_read and "rollout.dynamic.enable_chunked_prefill=true" in too_long_to_read
        assert "'long' of 90 tokens" in too_long
        assert "rollout.engine=static" in experts and all("dynamic.cuda_graphs" in message for message in graphs)


def test_a_run_learns_the_same_from_either_engine(tmp_path: Path, data: Path) -> None:
    """The responses are the same tokens, so that the weights are the same bits."""
    weights, metrics = [], []
    for kind in ("static", "dynamic"):
        rollout = {"engine": kind, "dynamic": {"block_size_tokens": 4}}
        path = config_file(tmp_path / kind, data, rollout=rollout, training={"train_iters": 3})
        run_ranks(1, _train, str(path), None, timeout=100, init_process_group=False)
        weights.append(_weights(tmp_path / kind / "run"))
        metrics.append(_metrics(tmp_path / kind / "run"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    for static, dynamic in zip(*metrics, strict=True):
        assert static == pytest.approx(dynamic, abs=1e-4)
