"""What a step reports, worked out by hand, and the log that a resumed run continues."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.types import MicroBatch
from tests.ranks import run_ranks


def _sums_of_a_small_batch() -> list[dict[str, float]]:
    from megatron_tropd.metrics import reduce_sums, step_metrics, token_sums
    from tests import tiny

    layout = tiny.start(tp=1, pp=2)
    # One sequence: prompt, a guidance token, then three on-policy tokens, of which the second is an outlier.
    batch = MicroBatch(
        tokens_BS=torch.zeros(1, 5, dtype=torch.int64),
        labels_BS=torch.zeros(1, 5, dtype=torch.int64),
        regions_BS=torch.tensor([[0, 1, 2, 2, 2]]),
        uniforms_BS=torch.zeros(1, 5),
        rollout_log_probs_BS=torch.tensor([[0.0, 0.0, -1.0, -2.0, -3.0]]),
        advantages_BS=None,
        weights_BS=torch.ones(1, 5),
        padding_BS=torch.zeros(1, 5, dtype=torch.bool),
        loss_positions_N=torch.arange(1, 5),
        rows_N=torch.zeros(4, dtype=torch.int64),
        sample_ids=(0,),
        num_tokens=5,
        num_loss_terms=4,
    )
    report = {
        "student_log_prob": torch.tensor([-9.0, -1.5, -2.0, -3.25]),
        "outlier": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        "clipped": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "reward": torch.tensor([5.0, 0.5, -4.0, 0.25]),
        "p_trust": torch.tensor([1.0, 1.0, 0.25, 1.0]),
        "teacher_top_k_mass": torch.tensor([0.0, 0.0, 0.75, 0.0]),
        "top_k_divergence": torch.tensor([0.0, 0.0, 2.0, 0.0]),
        "student_entropy": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "teacher_entropy": torch.tensor([1.0, 1.0, 1.0, 3.0]),
    }
    losses = torch.tensor([0.5, 1.0, 2.0, 0.5])
    # The second time the first on-policy token is of earlier weights.
    stale = replace(batch, stale_BS=torch.tensor([[False, True, True, False, False]]))
    found = []
    for one in (batch, stale):
        sums = [token_sums(one, losses, torch.tensor(4), report)] * 2 if layout.is_last_stage else []
        found.append(step_metrics(reduce_sums(sums, layout)))
    return found


def test_a_steps_metrics_are_means_over_the_tokens_they_are_about() -> None:
    (found, with_stale), other = run_ranks(2, _sums_of_a_small_batch)
    assert [found, with_stale] == other  # the first stage has no logits, and the same metrics
    expected = {
        "loss": 4.0 / 4,
        "outlier_share": 1 / 3,
        "reward": (0.5 - 4.0 + 0.25) / 3,
        "reward_min": -4.0,
        "p_trust": 2.25 / 3,
        "reverse_kl_k2": (0.125 + 8.0 + 0.03125) / 3,
        # e^0.5 - 1.5, e^-4 + 3, e^0.25 - 1.25
        "reverse_kl_k3": (0.148721271 + 3.018315639 + 0.034025417) / 3,
        "teacher_top_k_mass": 0.75,
        "top_k_divergence": 2.0,
        "student_entropy": 10.0 / 4,
        "teacher_entropy": 6.0 / 4,
        "on_policy_share": 3 / 4,
        "response_tokens": 8.0,  # two micro-batches
        "log_prob_gap": (0.5 + 0.0 + 0.25) / 3,
        "log_prob_gap_max": 0.5,
        "stale_token_share": 0.0,
        "stale_log_prob_gap": 0.0,
        "clipped_ratio_share": 1 / 3,
    }
    assert found == pytest.approx(expected)
    expected |= {"log_prob_gap": 0.25 / 2, "log_prob_gap_max": 0.25}
    assert with_stale == pytest.approx(expected | {"stale_token_share": 1 / 3, "stale_log_prob_gap": 0.5})


def test_the_log_drops_steps_that_run_again_and_a_torn_last_line(tmp_path: Path) -> None:
    from megatron_tropd.metrics import MetricsLog
    from megatron_tropd.report import read_metrics

    log = MetricsLog(tmp_path, is_main=True, first_step=0)
    for step in range(4):
        log.write({"step": step, "loss": 0.1 * step, "reward_min": -math.inf})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 0, "loss": 0.0, "reward_min": None}
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]
    MetricsLog(tmp_path, is_main=True, first_step=2).close()
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    MetricsLog(tmp_path / "elsewhere", is_main=False, first_step=0).write({"step": 0})
    assert not (tmp_path / "elsewhere").exists()


def test_a_plot_is_drawn_from_the_log_alone(tmp_path: Path) -> None:
    from megatron_tropd.report import plot_runs

    lines = [{"step": step, "grad_norm": 0.5 + step, "reward": None, "accuracy": 0.5} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_runs({"one": tmp_path, "two": tmp_path}, tmp_path / "report" / "plot.png")
    assert (tmp_path / "report" / "plot.png").read_bytes().startswith(b"\x89PNG")
