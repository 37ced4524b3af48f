"""Partial rollouts: who is continued, with which weights and what is learned from it; and what a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.prompt import Prompt
from megatron_tropd.types import Rollout, RolloutRequest
from tests.ranks import run_ranks
from tests.test_config import refused, write

BUDGET, EOS = 5, 1


class Script:
    """Engine and `Requests` in one: sample i writes ``lengths[i]`` tokens, the last of them the end token, if its
    budget lets it; a token says its position, a log-prob the weights (a number) that sampled it."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths
        self.weights = 0
        self.asked: list[list[int]] = []

    def generate(
        self, requests: Sequence[RolloutRequest], *, max_response_length: int, max_new_tokens: int
    ) -> list[Rollout]:
        self.asked.append([request.sample_id for request in requests])
        rollouts = []
        for request in requests:
            prefix = len(request.prefix)
            start, length = prefix + len(request.earlier), prefix + self.lengths[request.sample_id]
            end = min(length, max_response_length, start + max_new_tokens)
            response = [100 + position for position in range(start, end)]
            if end == length:
                response[-1] = EOS
            log_probs = (-float(self.weights),) * len(response)
            rollouts.append(Rollout(request, tuple(response), log_probs, end == length, log_probs))
        return rollouts

    def begin(self, first_sample_id: int, count: int, step: int) -> list[RolloutRequest]:
        return [self.again(i, (50 + step,) if i == 5 else ()) for i in range(first_sample_id, first_sample_id + count)]

    def again(self, sample_id: int, prefix: tuple[int, ...]) -> RolloutRequest:
        return RolloutRequest(sample_id, Prompt(str(sample_id), "", (10, sample_id), ""), prefix)

    def expected_length(self, request: RolloutRequest, max_new_tokens: int) -> int:
        return 2 + len(request.prefix) + len(request.earlier) + max_new_tokens

    def epochs(self, num_samples: int) -> dict[str, float]:
        return {"epoch/x": num_samples / 8}


def _layout(group: Any) -> Any:
    import torch
    import torch.distributed as dist

    return SimpleNamespace(
        data_parallel_rank=dist.get_rank(group),
        data_parallel_size=group.size(),
        groups=SimpleNamespace(dp=group),
        device=torch.device("cpu"),
    )


def _steps(source: Any, script: Script, steps: Sequence[int], *, batches_ahead: int = 0) -> list[dict[str, Any]]:
    """What every step's rank learned from, and its metrics."""
    found = []
    for step in steps:
        script.weights = step
        taken = source.take(step, step + batches_ahead)
        rollouts = {rollout.request.sample_id: rollout for rollout in taken.rollouts}
        found.append({"rollouts": rollouts, "metrics": taken.metrics, "asked": script.asked})
        script.asked = []
    return found


SEGMENTS = {"learn_from": "segments", "max_new_tokens": 2, "num_learned": 4, "num_in_flight": 4}
SEGMENT_LENGTHS = [1, 3, 9, 2, 1, 4, *[9] * 12]
FINISHED = {"learn_from": "finished", "max_new_tokens": 2, "num_learned": 2, "num_in_flight": 4}
FINISHED_LENGTHS = [9, 1, 3, 2, 1, 1, *[9] * 10]


def _two_ranks_and_one(folder: str) -> dict[str, Any]:
    """Both modes on two ranks and on one; half way through, from what the others have left."""
    import torch.distributed as dist

    from megatron_tropd.partial import Pace, PartialRollouts

    assert dist.group.WORLD is not None
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    results: dict[str, Any] = {}
    for name, options, lengths in (
        ("segments", SEGMENTS, SEGMENT_LENGTHS),
        ("finished", FINISHED, FINISHED_LENGTHS),
        ("rounds", FINISHED | {"num_in_flight": 2}, [9] * 16),
    ):
        pace = Pace(**options, max_response_length=BUDGET)  # type: ignore[arg-type]

        def start(group: Any, pace: Pace = pace, lengths: Any = lengths) -> tuple[Any, Script]:
            script: Any = Script(lengths)
            return PartialRollouts(script, _layout(group), pace, script), script

        both, script = start(dist.group.WORLD)
        results[f"{name} 2"] = _steps(both, script, range(4))
        whole, script = start(alone)
        results[f"{name} 1"] = _steps(whole, script, range(2))
        checkpoint = Path(folder) / f"{name} {dist.get_rank()}"
        checkpoint.mkdir()
        for file, text in whole.files().items():
            (checkpoint / file).write_text(text)
        results[f"{name} 1"] += _steps(whole, script, range(2, 4))
        again, script = start(dist.group.WORLD)  # another layout than the one that saved
        again.restore(checkpoint)
        results[f"{name} resumed"] = _steps(again, script, range(2, 4))
        again.restore(Path(folder))  # a checkpoint without such a file: what there is stays
        again.refused()
        results[f"{name} refused"] = _steps(again, script, [4])
        again.clear()
        results[f"{name} cleared"] = _steps(again, script, [2], batches_ahead=5)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _two_ranks_and_one, str(tmp_path_factory.mktemp("paused")), timeout=60)


def _responses(step: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    return {sample_id: rollout.response for sample_id, rollout in sorted(step["rollouts"].items())}


def test_segments_are_learned_from_in_the_step_that_generates_them(results: list[dict[str, Any]]) -> None:
    first, second, third, _ = results[0]["segments 1"]
    assert _responses(first) == {0: (EOS,), 1: (100, 101), 2: (100, 101), 3: (100, EOS)}
    # Two have ended, so two begin; sample 5 with a prefix of one token.
    assert _responses(second) == {1: (EOS,), 2: (102, 103), 4: (EOS,), 5: (101, 102)}
    assert second["rollouts"][2].request.earlier == (100, 101) and second["rollouts"][5].request.prefix == (51,)
    # Sample 2 has used up its budget; 5 has its prefix and two tokens behind it, and ends within the budget.
    assert _responses(third) == {2: (104,), 5: (103, EOS), 6: (100, 101), 7: (100, 101)}
    assert third["rollouts"][5].request.prefix == (51,) and third["rollouts"][5].request.earlier == (101, 102)
    assert not third["rollouts"][2].finished and third["rollouts"][5].finished
    for step, found in enumerate((first, second, third)):
        for rollout in found["rollouts"].values():  # all by the weights of the step
            assert set(rollout.log_probs) <= {-float(step)} and not rollout.versions
            assert len(rollout.entropies) == len(rollout.response)
    wanted = {"new_samples": 4, "paused_samples": 2, "max_version_lag": 0, "rollout_age": 0, "epoch/x": 4 / 8}
    assert wanted | {"rollout_rounds": 1, "rollout_imbalance": 1} == first["metrics"]
    assert third["metrics"] == first["metrics"] | {"new_samples": 2, "max_version_lag": 2, "epoch/x": 1}


def test_whole_responses_remember_the_weights_of_every_token(results: list[dict[str, Any]]) -> None:
    first, second, third, fourth = results[0]["finished 1"]
    assert [step["asked"] for step in (first, second)] == [[[0, 1, 2, 3]], [[0, 2, 4, 5]]]
    assert _responses(first) == {1: (EOS,), 3: (100, EOS)}
    # 2, 4 and 5 have ended: the two oldest are learned from, 5 waits.
    assert _responses(second) == {2: (100, 101, EOS), 4: (EOS,)}
    assert second["rollouts"][2].versions == (0, 0, 1) and second["rollouts"][2].log_probs == (-0.0, -0.0, -1.0)
    assert second["metrics"]["rollout_age"] == (1 + 1 + 0 + 0) / 4 and second["metrics"]["max_version_lag"] == 1
    assert third["asked"] == [[0, 6, 7]] and _responses(third) == {0: (100, 101, 102, 103, 104), 5: (EOS,)}
    assert third["rollouts"][0].versions == (0, 0, 1, 1, 2) and not third["rollouts"][0].finished
    assert third["rollouts"][5].versions == (1,) and third["metrics"]["max_version_lag"] == 2
    # Nothing has ended after one piece or two: a step goes on until it has what it needs.
    assert fourth["asked"] == [[6, 7, 8, 9]] * 2 and list(_responses(fourth)) == [6, 7]
    assert fourth["rollouts"][6].versions == (2, 2, 3, 3, 3) and fourth["metrics"]["rollout_rounds"] == 2
    assert [step["metrics"]["rollout_rounds"] for step in results[0]["rounds 1"]] == [3] * 4


@pytest.mark.parametrize("mode", ["segments", "finished", "rounds"])
def test_ranks_share_the_samples_and_a_checkpoint_continues_in_another_layout(
    results: list[dict[str, Any]], mode: str
) -> None:
    for step in range(4):
        alone = results[0][f"{mode} 1"][step]
        assert alone == results[1][f"{mode} 1"][step]
        for name, index in (("2", step), ("resumed", step - 2)):
            if index < 0:
                continue
            shares = [result[f"{mode} {name}"][index] for result in results]
            assert len(shares[0]["rollouts"]) == len(shares[1]["rollouts"])
            assert shares[0]["rollouts"] | shares[1]["rollouts"] == alone["rollouts"]
            assert shares[0]["metrics"] == shares[1]["metrics"]
            imbalance = shares[0]["metrics"]["rollout_imbalance"]
            assert alone["metrics"] == shares[0]["metrics"] | {"rollout_imbalance": 1.0} and 1 <= imbalance < 2


def test_a_refused_step_continues_none_of_its_samples(results: list[dict[str, Any]]) -> None:
    # With segments 6 to 9 are paused, all of the refused step; with whole responses 8 and 9, which were not handed out.
    for result in results:
        (refused_step,), (cleared,) = result["segments refused"], result["segments cleared"]
        assert set(refused_step["rollouts"]) <= {10, 11, 12, 13} and set(cleared["rollouts"]) <= {14, 15, 16, 17}
        (kept,), (cleared,) = result["finished refused"], result["finished cleared"]
        assert set(kept["rollouts"]) <= {8, 9} and set(cleared["rollouts"]) <= {12, 13}  # 8 to 11 are gone


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    from megatron_tropd.integrity import CheckpointError
    from megatron_tropd.partial import FILE, Pace, PartialRollouts

    script: Any = Script([9])
    pace = Pace(**SEGMENTS, max_response_length=BUDGET)  # type: ignore[arg-type]
    source = PartialRollouts(script, SimpleNamespace(), pace, script)  # type: ignore[arg-type]
    sample = {"sample_id": 3, "prefix": [4], "response": [5, 6], "log_probs": [-1.0, -2.0], "entropies": []}
    sample |= {"versions": [[7, 1], [9, 1]], "finished": False}
    head = {"next_sample": 4}
    (tmp_path / FILE).write_text(f"{json.dumps(head)}\n{json.dumps(sample)}\n")
    source.restore(tmp_path)
    assert source.files() == {FILE: (tmp_path / FILE).read_text()}
    damages: list[list[Any]] = [
        [],
        [sample],
        [{"next_sample": -1}],
        [head, sample | {"sample_id": 4}],
        [head, sample | {"log_probs": [-1.0]}],
        [head, sample | {"versions": [[7, 10**15]]}],
        [head, sample | {"versions": [7]}],
        [head, sample | {"response": [5, "6"]}],
        [head, sample | {"prefix": None}],
        [head, sample | {"finished": 1}],
        [head, {}],
    ]
    for lines in damages:
        (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(CheckpointError, match=rf"{FILE} is damaged \(.+\); continue from another checkpoint"):
            source.restore(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"partial_tokens": 0}}, "partial_tokens must be at least 1, found 0"),
        ({"rollout": {"partial_learn_from": "finished"}}, "partial_learn_from=finished needs rollout.partial_tokens"),
        ({"rollout": {"over_sampling": 0.5}}, "over_sampling must be at least 1, found 0.5"),
        ({"rollout": {"over_sampling": float("nan")}}, "over_sampling must be a finite number, found nan"),
        (
            {"rollout": {"partial_tokens": 9}, "training": {"steps_per_rollout": 2}},
            "steps_per_rollout 2 generates in some alone: set it to 1",
        ),
        ({"rollout": {"partial_tokens": 9}, "objective": "seq-kd"}, "nothing to pause"),
        (
            {"rollout": {"over_sampling": 2.0}, "objective": "seq-kd"},
            "over_sampling is about the student's: set it to 1",
        ),
        (
            {"rollout": {"partial_tokens": 9}, "objective_options": {"task_reward": 1.0}},
            "task_reward compares the responses",
        ),
        ({"rollout": {"partial_tokens": 9, "over_sampling": 1.5}}, "partial_learn_from=segments would drop nothing"),
        (
            {"rollout": {"partial_tokens": 9, "over_sampling": 1.01, "partial_learn_from": "finished"}},
            "1.01 x training.global_batch_size 32 = 32.32 is no number of sequences: try 1.03125",
        ),
        (
            {"rollout": {"over_sampling": 1.1}},
            "= 35.2 must be a multiple of .* rollout.samples_per_prompt 4: try 1.125",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    import re

    assert re.search(message, refused(write(tmp_path, **changes)))


def test_over_sampling_asks_for_even_shares_of_the_copys_replicas(tmp_path: Path) -> None:
    stages = {
        "parallel": {"pipeline_model_parallel_size": 4},
        "training": {"global_batch_size": 2, "micro_batch_size": 1},
    }
    pairs = {"samples_per_prompt": 2, "over_sampling": 2.0, "tensor_model_parallel_size": 1}
    path = write(tmp_path, rollout=pairs, **stages)
    assert "each of the 4 replicas of the inference copy keeps as many" in refused(path, world_size=4)
    path = write(tmp_path, rollout=pairs | {"over_sampling": 1.125}, parallel=stages["parallel"])
    message = "= 36 must be a multiple of the 8 replicas that generate and of rollout.samples_per_prompt 2: try 1.25"
    assert message in refused(path, world_size=8)


def test_what_goes_together_is_taken(tmp_path: Path) -> None:
    from megatron_tropd.config_checks import validate
    from megatron_tropd.config_parser import load_config

    for rollout in (
        {"partial_tokens": 9},
        {"partial_tokens": 9, "partial_learn_from": "finished", "over_sampling": 1.03125},
        {"over_sampling": 1.25, "engine": "dynamic"},
        {"over_sampling": 1.25, "tensor_model_parallel_size": 1},
    ):
        validate(load_config(write(tmp_path, rollout=rollout)), 2, "train")
