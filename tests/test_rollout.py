"""Generation on the trainer's weights: reproducible, correct token by token, and harmless to training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.config import ModelConfig
from megatron_tropd.prompt import Prompt
from megatron_tropd.sampling import sample_tokens
from megatron_tropd.types import Rollout, RolloutRequest
from tests.ranks import run_ranks

LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2)]}
"""World size -> (tensor, pipeline); the rest is data parallel."""
CASES = [(world_size, tp, pp) for world_size, layouts in LAYOUTS.items() for tp, pp in layouts]
VOCAB_SIZE, EOS, BUDGET, SEED = 45, 1, 10, 5
ENOUGH = 6
"""Requests that a race waits for; two have ended before it begins."""
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    num_query_groups=2,
    make_vocab_size_divisible_by=8,
    init_method_std=0.3,
)
"""Wide enough weights that distributions are uneven and greedy answers have no ties; vocabulary padded to
48."""


def requests(count: int = 24, *, first: int = 100) -> list[RolloutRequest]:
    """Ragged prompts and prefixes; the first two leave nothing to generate.

    Every other prompt has an end token inside or at its end, as chat templates do: it ends nothing.
    """
    generator = np.random.default_rng(first)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.integers(2, VOCAB_SIZE, length).tolist())

    result = []
    for index in range(count):
        turn = (EOS,) * (index % 2)
        prompt_tokens = (
            *tokens(int(generator.integers(1, 4))),
            *turn,
            *tokens(int(generator.integers(0, 4))),
        )
        prompt = Prompt(id=f"p{index}", text="", tokens=prompt_tokens, answer="")
        prefix = {0: (*tokens(3), EOS), 1: tokens(BUDGET)}.get(index) or tokens(int(generator.integers(0, 6)))
        result.append(RolloutRequest(sample_id=first + index, prompt=prompt, prefix=prefix))
    return result


# ----------------------------------------------------------------------------------------------- inside ranks


def _build(layout: Any, config: ModelConfig = MODEL) -> Any:
    from megatron_tropd.models import build_model

    return build_model(config, layout, vocab_size=VOCAB_SIZE, max_sequence_length=64, dtype=torch.float32, seed=3)


def _engine(model: Any, layout: Any, **options: Any) -> Any:
    from megatron_tropd.sampling import SamplingOptions
    from megatron_tropd.static_engine import StaticEngine

    defaults = {"max_batch_size": 9, "temperature": 1.0, "top_p": 1.0, "seed": SEED}
    return StaticEngine(model, layout, SamplingOptions(vocab_size=VOCAB_SIZE, eos_id=EOS, **(defaults | options)))


def _generate(engine: Any, what: Sequence[RolloutRequest]) -> list[Rollout]:
    return engine.generate(what, max_response_length=BUDGET)


def _results_of_a_rank(world_size: int) -> dict[tuple[int, int], dict[str, Any]]:
    """By (tensor, pipeline): what this rank generated and found."""
    from tests import tiny

    by_layout = {}
    for tp, pp in LAYOUTS[world_size]:
        layout = tiny.start(tp=tp, pp=pp)
        model = _build(layout)
        engine = _engine(model, layout)
        results = {
            "data_parallel_rank": layout.data_parallel_rank,
            "sampled": _generate(engine, requests()),
            "greedy": _generate(_engine(model, layout, temperature=0.0), requests()),
            "evaluation": _evaluate(layout),
            "mine": _generate_own_share(engine, layout),
            "pieces": _generate_in_pieces(engine, 3),
            "enough": _race(engine),
            "enough in one batch": _race(_engine(model, layout, max_batch_size=100)),
            "errors": _errors(engine),
            **_train_around_a_rollout(layout),
        }
        if world_size == 1:
            results |= _single_process_results(model, layout)
        by_layout[tp, pp] = results
    return by_layout


def _generate_own_share(engine: Any, layout: Any) -> list[list[Rollout]]:
    """Replicas with different requests, then replicas of which only the first has any."""
    rank, size = layout.data_parallel_rank, layout.data_parallel_size
    shares = [requests()[rank::size], requests() if rank == 0 else []]
    return [_generate(engine, share) for share in shares]


def _race(engine: Any) -> list[Rollout]:
    return engine.generate(requests(), max_response_length=BUDGET, enough=ENOUGH)


def _generate_in_pieces(engine: Any, most: int) -> list[Rollout]:
    """Calls of at most ``most`` new tokens until every request has ended; put together."""
    whole = {request.sample_id: Rollout(request, (), (), False) for request in requests()}
    waiting = list(whole.values())
    while waiting:
        asked = [replace(rollout.request, earlier=rollout.response) for rollout in waiting]
        pieces = engine.generate(asked, max_response_length=BUDGET, max_new_tokens=most)
        assert [piece.request for piece in pieces] == asked and all(len(piece.response) <= most for piece in pieces)
        for before, new in zip(waiting, pieces, strict=True):
            response, log_probs = before.response + new.response, before.log_probs + new.log_probs
            whole[before.request.sample_id] = replace(
                before, response=response, log_probs=log_probs, finished=new.finished
            )
        waiting = [
            whole[piece.request.sample_id] for piece in pieces if len(piece.response) == most and not piece.finished
        ]
    return list(whole.values())


class _Script:
    """Engine and tokenizer in one: prompt i is answered with the id i + 2, cut off where i is a multiple of
    3."""

    def generate(self, requests: Sequence[RolloutRequest], *, max_response_length: int) -> list[Rollout]:
        assert max_response_length == BUDGET
        cut_off = [int(request.prompt.id) % 3 == 0 for request in requests]
        return [
            Rollout(r, r.prompt.tokens if cut else (*r.prompt.tokens, EOS), (-1.0,) * (1 if cut else 2), not cut)
            for r, cut in zip(requests, cut_off, strict=True)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens if token != EOS)


def _evaluate(layout: Any) -> dict[str, Any]:
    """Seven prompts, more than one rank's even share; the references of the last two are wrong."""
    from megatron_tropd.estimators import summarize
    from megatron_tropd.evaluate import evaluate_prompts

    prompts = [Prompt(str(i), "", (i + 2,), str(i + 2) if i < 5 else "wrong") for i in range(7)]
    script: Any = _Script()

    def evaluate(what: list[Prompt]) -> dict[str, float]:
        return summarize(evaluate_prompts(script, what, layout, script, max_response_length=BUDGET))

    messages = []
    for bad in ([], [replace(prompts[0], answer="")]):
        with pytest.raises(ValueError) as error:
            evaluate(bad)
        messages.append(str(error.value))
    return {"report": evaluate(prompts), "errors": messages}


def _errors(engine: Any) -> list[str]:
    prompt = Prompt(id="long", text="", tokens=(2,) * 60, answer="")
    bad = [
        RolloutRequest(1, prompt, ()),
        RolloutRequest(2, replace(prompt, tokens=(2,)), (3,) * (BUDGET + 1)),
        RolloutRequest(3, replace(prompt, tokens=()), ()),
    ]
    messages = []
    for request in bad:
        with pytest.raises(ValueError) as error:
            _generate(engine, [*requests(4), request])
        messages.append(str(error.value))
    return messages


def _train_around_a_rollout(layout: Any, make_engine: Callable[..., Any] = _engine) -> dict[str, Any]:
    """Gradients before and after a rollout on the same model, and every trace that inference could leave."""
    import gc

    from megatron.core.inference.utils import InferenceMode

    from megatron_tropd.step import forward_backward
    from tests import tiny

    learner = tiny.build_learner(layout)
    batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
    forward_backward(learner, batch)
    before = tiny.whole_gradients(learner)
    random_state = torch.get_rng_state()
    student, teacher = learner.stage.module, learner.stage.teacher
    assert teacher is not None
    for model in (student, teacher):
        # More sequences than the step has, so that no buffer made in training is large enough.
        _generate(make_engine(model, layout, max_batch_size=100), requests(100))
    traces = {
        "rng moved": not torch.equal(random_state, torch.get_rng_state()),
        "inference mode": InferenceMode.is_active() or torch.is_inference_mode_enabled(),
        "wrong training flags": not student.training or teacher.training,
        "inference tensors": any(type(o) is torch.Tensor and o.is_inference() for o in gc.get_objects()),
        "input tensor": student.decoder.input_tensor is not None,
    }
    forward_backward(learner, batch)
    after = tiny.whole_gradients(learner)
    return {
        "traces": [name for name, found in traces.items() if found],
        "changed gradients": [name for name in before if not torch.equal(before[name], after[name])],
        "gradient norm": sum(float(gradient.norm()) for gradient in before.values()),
    }


def _single_process_results(model: Any, layout: Any) -> dict[str, Any]:
    sampled = _engine(model, layout)
    many = [RolloutRequest(i, requests()[5].prompt, ()) for i in range(8000)]
    singles = _engine(model, layout, max_batch_size=8000).generate(many, max_response_length=1)
    results = {
        "alone": [rollout for request in requests() for rollout in _generate(sampled, [request])],
        "reversed": _generate(_engine(model, layout, max_batch_size=1000), requests()[::-1])[::-1],
        "other seed": _generate(_engine(model, layout, seed=SEED + 1), requests()),
        "none": _generate(sampled, []),
        "naive greedy": [_naive_response(model, r, _argmax) for r in requests()],
        "naive sampled": [_naive_response(model, r, _inverse_cdf) for r in requests()],
        "full log-probs": [_full_log_probs(model, rollout) for rollout in _generate(sampled, requests())],
        "first tokens": [rollout.response[0] for rollout in singles],
        "first token log-probs": _log_softmax(model, many[0].prompt.tokens)[-1].numpy(),
    }
    with torch.no_grad():
        rows = model.embedding.word_embeddings.weight[VOCAB_SIZE:]
        rows[0], rows[1] = 1e3, -1e3
    results["padded wins"] = bool(model(*_inputs(many[0].prompt.tokens))[0, -1].argmax() >= VOCAB_SIZE)
    results["huge padding"] = _generate(sampled, requests())
    results["greedy, huge padding"] = _generate(_engine(model, layout, temperature=0.0), requests())
    with torch.no_grad():
        model.embedding.word_embeddings.weight[:] = torch.nan
    with pytest.raises(ValueError) as error:
        _generate(sampled, requests())
    results["not finite"] = str(error.value)
    return results


def _inputs(tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, None]:
    return torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0), None


def _log_softmax(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """The training forward's log-probs ``[S, shared ids]``."""
    assert model.training
    with torch.no_grad():
        return model(*_inputs(tokens))[0, :, :VOCAB_SIZE].log_softmax(dim=-1)


def _naive_response(
    model: Any, request: RolloutRequest, choose: Callable[[torch.Tensor, RolloutRequest, int], int]
) -> tuple[int, ...]:
    """Token by token with a full forward each, no cache."""
    tokens = [*request.prompt.tokens, *request.prefix]
    given, end = len(tokens), len(request.prompt.tokens) + BUDGET
    while len(tokens) < end and (len(tokens) == len(request.prompt.tokens) or tokens[-1] != EOS):
        tokens.append(choose(_log_softmax(model, tokens)[-1], request, len(tokens)))
    return tuple(tokens[given:])


def _argmax(log_probs_V: torch.Tensor, _request: RolloutRequest, _position: int) -> int:
    return int(log_probs_V.argmax())


def _inverse_cdf(log_probs_V: torch.Tensor, request: RolloutRequest, position: int) -> int:
    from megatron_tropd.draws import Stream, uniforms

    uniform = float(uniforms(SEED, Stream.SAMPLING, request.sample_id, position))
    return int(np.searchsorted(np.cumsum(np.exp(log_probs_V.double().numpy())), uniform, side="right"))


def _full_log_probs(model: Any, rollout: Rollout) -> list[float]:
    given = [*rollout.request.prompt.tokens, *rollout.request.prefix]
    if not rollout.response:
        return []
    log_probs_SV = _log_softmax(model, [*given, *rollout.response])[len(given) - 1 : -1]
    return log_probs_SV.gather(1, torch.tensor(rollout.response).unsqueeze(1)).squeeze(1).tolist()


# ------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    """By (world size, tensor, pipeline): the results of every rank."""
    by_world_size = {
        world_size: run_ranks(world_size, _results_of_a_rank, world_size, timeout=120) for world_size in LAYOUTS
    }
    return {
        (world_size, tp, pp): [by_layout[tp, pp] for by_layout in by_world_size[world_size]]
        for world_size, tp, pp in CASES
    }


@pytest.fixture(scope="module")
def single(results: dict[tuple[int, int, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """Results of one process."""
    return results[1, 1, 1][0]


def _responses(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response for rollout in rollouts]


def _log_probs(rollouts: Sequence[Rollout]) -> list[float]:
    return [log_prob for rollout in rollouts for log_prob in rollout.log_probs]


@pytest.mark.parametrize("case", CASES)
def test_layouts_and_ranks_agree(results: Any, single: dict[str, Any], case: Any) -> None:
    for rank_results in results[case]:
        for kind in ("sampled", "greedy"):
            assert [rollout.request for rollout in rank_results[kind]] == requests()
            assert _responses(rank_results[kind]) == _responses(single[kind])
            np.testing.assert_allclose(_log_probs(rank_results[kind]), _log_probs(single[kind]), atol=1e-5)
            # Within a model replica not a bit may differ: ranks would otherwise train on different
            # trajectories.
            assert rank_results[kind] == results[case][0][kind]


@pytest.mark.parametrize("case", CASES)
def test_replicas_with_different_requests_or_none(results: Any, single: dict[str, Any], case: Any) -> None:
    world_size, tp, pp = case
    num_replicas = world_size // (tp * pp)
    for rank_results in results[case]:
        replica = rank_results["data_parallel_rank"]
        spread, first_only = rank_results["mine"]
        assert _responses(spread) == _responses(single["sampled"][replica::num_replicas])
        assert _responses(first_only) == (_responses(single["sampled"]) if replica == 0 else [])


@pytest.mark.parametrize("case", CASES)
def test_what_is_generated_in_pieces_is_what_one_call_generates(
    results: Any, single: dict[str, Any], case: Any
) -> None:
    for rank_results in results[case]:
        pieces = rank_results["pieces"]
        assert [(r.request, r.response, r.finished) for r in pieces] == [
            (r.request, r.response, r.finished) for r in single["sampled"]
        ]
        np.testing.assert_allclose(_log_probs(pieces), _log_probs(single["sampled"]), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_race_ends_when_enough_have_ended(results: Any, single: dict[str, Any], case: Any) -> None:
    whole = single["sampled"]
    lengths = [len(rollout.response) for rollout in whole]
    last = sorted(lengths)[ENOUGH - 1]
    assert lengths[:2] == [0, 0] and 0 < last < max(lengths)  # else the test would show nothing
    for rank_results in results[case]:
        for kind, most in (("enough", 1.0), ("enough in one batch", 0.95)):
            generated = 0
            for rollout, reference in zip(rank_results[kind], whole, strict=True):
                assert rollout.request == reference.request
                if len(reference.response) <= last:
                    assert (rollout.response, rollout.finished) == (reference.response, reference.finished)
                else:
                    assert rollout.response == reference.response[: len(rollout.response)] and not rollout.finished
                generated += len(rollout.response)
            assert generated < most * sum(lengths), kind


def test_sequences_of_very_different_lengths_do_not_share_a_batch() -> None:
    from megatron_tropd.sampling import SamplingOptions
    from megatron_tropd.static_engine import StaticEngine

    options = SamplingOptions(vocab_size=9, eos_id=1, max_batch_size=3, temperature=1.0, top_p=1.0, seed=0)
    engine = StaticEngine(None, None, options)
    prompts = [Prompt(str(length), "", (2,) * length, "") for length in (20, 3, 4, 9, 10, 21, 2)]
    what = [RolloutRequest(index, prompt, ()) for index, prompt in enumerate(prompts)]
    # Lengths 2 3 4 | 9 10 | 20 21: ten steps over the gap, or one batch more of at most four steps.
    assert list(engine._batches(what, range(7), 4)) == [(6, 1, 2), (3, 4), (0, 5)]
    assert list(engine._batches(what, range(7), 10)) == [(6, 1, 2), (3, 4, 0), (5,)]
    assert list(engine._batches(what, [], 4)) == []


@pytest.mark.parametrize("case", CASES)
def test_training_after_a_rollout_is_training_without_one(results: Any, case: Any) -> None:
    for rank_results in results[case]:
        assert rank_results["traces"] == []
        assert rank_results["gradient norm"] > 0 and rank_results["changed gradients"] == []


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_by_name(results: Any, case: Any) -> None:
    for rank_results in results[case]:
        too_long, prefix_over_budget, no_prompt = rank_results["errors"]
        assert "'long' of 60 tokens" in too_long and "64" in too_long
        assert "sample 2" in prefix_over_budget and "11 tokens" in prefix_over_budget
        assert "no tokens" in no_prompt


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_of_all_prompts_on_every_rank(results: Any, case: Any) -> None:
    for rank_results in results[case]:
        report = rank_results["evaluation"]["report"]
        assert (report["num_prompts"], report["accuracy"]) == (7, 5 / 7)
        assert report["truncation_rate"] == 3 / 7  # prompts 0, 3 and 6
        assert report["mean_response_length"] == (3 * 1 + 4 * 2) / 7
        # Wilson, by hand: centre (5/7 + z^2/14) / (1 + z^2/7), half-width z sqrt(10/343 + z^2/196) / (1 +
        # z^2/7).
        assert (report["accuracy_low"], report["accuracy_high"]) == pytest.approx((0.35893, 0.91778), abs=1e-5)


def test_evaluation_refuses_what_it_cannot_score(single: dict[str, Any]) -> None:
    no_prompts, no_answer = single["evaluation"]["errors"]
    assert (
        "no prompts" in no_prompts
        and "prompt '0' cannot be evaluated with the verifier exact: it has no reference answer" in no_answer
    )


def test_greedy_is_the_argmax_of_full_forwards(single: dict[str, Any]) -> None:
    assert _responses(single["greedy"]) == single["naive greedy"]


def test_sampling_is_the_inverse_cdf_of_full_forwards(single: dict[str, Any]) -> None:
    # Equal tokens mean that prompt and prefix were read in place and that the draw's position counts from the
    # prompt.
    assert _responses(single["sampled"]) == single["naive sampled"]
    assert _responses(single["sampled"]) != _responses(single["other seed"])


def test_log_probs_are_the_training_forwards(single: dict[str, Any]) -> None:
    for rollout, expected in zip(single["sampled"], single["full log-probs"], strict=True):
        np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-5)


def test_responses_do_not_depend_on_the_batch(single: dict[str, Any]) -> None:
    for kind in ("alone", "reversed"):
        assert _responses(single[kind]) == _responses(single["sampled"])
        np.testing.assert_allclose(_log_probs(single[kind]), _log_probs(single["sampled"]), atol=1e-5)


def test_responses_end_at_the_end_token_or_the_budget(single: dict[str, Any]) -> None:
    rollouts = single["sampled"]
    for rollout in rollouts:
        length = len(rollout.request.prefix) + len(rollout.response)
        whole = rollout.request.prefix + rollout.response
        assert len(rollout.log_probs) == len(rollout.response)
        assert EOS not in whole[:-1]
        assert rollout.finished == (whole[-1] == EOS)
        assert length == BUDGET or (length < BUDGET and rollout.finished)
    assert rollouts[0].response == () and rollouts[0].finished  # its prefix has the end token
    assert rollouts[1].response == () and not rollouts[1].finished  # its prefix fills the budget
    ended = [rollout.finished for rollout in rollouts[2:]]
    assert any(ended) and not all(ended)


def test_no_requests_no_rollouts(single: dict[str, Any]) -> None:
    assert single["none"] == []


def test_first_tokens_follow_the_softmax(single: dict[str, Any]) -> None:
    expected = np.exp(single["first token log-probs"].astype(np.float64)) * len(single["first tokens"])
    _assert_frequencies(np.bincount(single["first tokens"], minlength=VOCAB_SIZE), expected)


def test_padded_ids_take_no_part(single: dict[str, Any]) -> None:
    assert single["padded wins"]  # the test would show nothing otherwise
    for kind, reference in (("huge padding", "sampled"), ("greedy, huge padding", "greedy")):
        assert _responses(single[kind]) == _responses(single[reference])
        np.testing.assert_allclose(_log_probs(single[kind]), _log_probs(single[reference]), atol=1e-5)


def test_logits_that_are_not_finite_are_an_error(single: dict[str, Any]) -> None:
    assert "not finite" in single["not finite"] and "sample 1" in single["not finite"]


# --------------------------------------------------------------------------------------------- sampling alone


def _assert_frequencies(observed: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square within 4 standard deviations of its mean; rare ids share a bin."""
    rare = expected < 5
    bins = [(o, e) for o, e in zip(observed[~rare], expected[~rare], strict=True)]
    bins.append((observed[rare].sum(), max(float(expected[rare].sum()), 1e-9)))
    statistic, freedom = sum((o - e) ** 2 / e for o, e in bins), len(bins) - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)


def _histogram(logits_V: torch.Tensor, *, temperature: float, top_p: float, count: int = 20000) -> np.ndarray:
    """Counts of the tokens that ``count`` evenly spread uniforms give."""
    uniforms_B = (torch.arange(count) + 0.5) / count
    tokens_B, _ = sample_tokens(logits_V.expand(count, -1), uniforms_B, temperature=temperature, top_p=top_p)
    return np.bincount(tokens_B.numpy(), minlength=len(logits_V)) / count


def test_temperature_divides_the_logits_and_leaves_the_log_probs() -> None:
    logits_V = torch.tensor([2.0, 0.0, 1.0, -1.0])
    expected_V = torch.softmax(logits_V / 0.5, dim=0)
    np.testing.assert_allclose(_histogram(logits_V, temperature=0.5, top_p=1.0), expected_V, atol=1e-4)
    for temperature in (0.0, 0.5, 1.0):
        tokens_B, log_probs_B = sample_tokens(
            logits_V.unsqueeze(0), torch.tensor([0.99]), temperature=temperature, top_p=1.0
        )
        assert log_probs_B.dtype == torch.float32
        np.testing.assert_allclose(log_probs_B, logits_V.log_softmax(dim=0)[tokens_B], rtol=1e-6)


def test_top_p_keeps_the_fewest_ids_that_reach_the_mass() -> None:
    logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64).log()
    np.testing.assert_allclose(_histogram(logits_V, temperature=1.0, top_p=0.5), [0, 1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(_histogram(logits_V, temperature=1.0, top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=1e-4)
    np.testing.assert_allclose(
        _histogram(logits_V, temperature=1.0, top_p=0.76), [0, 5 / 9, 1.5 / 9, 2.5 / 9], atol=1e-4
    )


def test_an_id_without_mass_is_never_drawn() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniforms_B = torch.tensor([0.0, 0.5, 1.0 - 2.0**-24])
    tokens_B, log_probs_B = sample_tokens(logits_BV, uniforms_B, temperature=1.0, top_p=1.0)
    assert tokens_B.tolist() == [1, 3, 3]
    np.testing.assert_allclose(log_probs_B, -np.log(2.0), rtol=1e-6)


def test_greedy_takes_the_lowest_id_at_a_tie() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 3.0], [1.0, 1.0, 1.0]])
    tokens_B, _ = sample_tokens(logits_BV, torch.tensor([0.9, 0.9]), temperature=0.0, top_p=1.0)
    assert tokens_B.tolist() == [1, 0]


def test_logits_are_not_modified() -> None:
    logits_BV = torch.randn(4, 9, dtype=torch.float64)
    copy = logits_BV.clone()
    sample_tokens(logits_BV, torch.rand(4), temperature=1.0, top_p=0.9)
    assert torch.equal(copy, logits_BV)
