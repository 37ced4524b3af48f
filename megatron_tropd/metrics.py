"""What a step reports: sums that add up over micro-batches and data-parallel ranks, and where they are written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_tropd.batch import num_tokens
from megatron_tropd.distributed import Layout
from megatron_tropd.objectives import k2, k3
from megatron_tropd.report import read_metrics
from megatron_tropd.trackers import Tracker
from megatron_tropd.types import Batch, MicroBatch, Rollout, TokenRegion

SUM_NAMES = (
    "loss",
    "loss_terms",
    "guidance_tokens",
    "on_policy_tokens",
    "outlier",
    "reward",
    "p_trust",
    "log_prob_gap",
    "stale_tokens",
    "stale_log_prob_gap",
    "teacher_top_k_tokens",
    "teacher_top_k_mass",
    "top_k_divergence",
    "reverse_kl_k2",
    "reverse_kl_k3",
    "student_entropy",
    "teacher_entropy",
    "clipped",
)
"""Summed over positions; ``loss_terms`` is the denominator of the loss."""
MAX_NAMES = ("negative_reward_max", "log_prob_gap_max")
"""Reduced by maximum (the minimum reward is minus the maximum of its negative)."""
SOURCE_NAMES = ("loss", "tokens", "on_policy_tokens", "outlier", "reward")
"""Summed over the positions of each source of a mixture; the key of a sum is ``name/source``."""


def token_sums(
    batch: MicroBatch, loss_N: torch.Tensor, loss_terms: torch.Tensor, report: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """One micro-batch's contribution, float64, detached: SUM_NAMES, then SOURCE_NAMES x sources, then MAX_NAMES.

    ``loss_N`` and the report's tensors hold one value for each position that carries loss, weighted as in the loss.
    """
    on_policy_N = batch.regions_BS.flatten()[batch.loss_positions_N] == TokenRegion.ON_POLICY
    gap_N = (report["student_log_prob"] - batch.rollout_log_probs_BS.flatten()[batch.loss_positions_N]).abs()
    stale_N = torch.zeros_like(on_policy_N)
    if batch.stale_BS is not None:
        stale_N = batch.stale_BS.flatten()[batch.loss_positions_N] & on_policy_N
    fresh_N = on_policy_N & ~stale_N

    # Masks, not selections: a selection's size would have to come back from the device.
    def total(name: str, mask_N: torch.Tensor) -> torch.Tensor:
        return _sum(report[name], mask_N) if name in report else loss_N.new_zeros((), dtype=torch.float64)

    def estimate(estimator: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        rewards_N = report["reward"] if "reward" in report else torch.zeros_like(loss_N)
        return _sum(estimator(rewards_N.double()), on_policy_N)

    has_top_k_N = report["teacher_top_k_mass"] > 0 if "teacher_top_k_mass" in report else torch.zeros_like(on_policy_N)
    everywhere_N = torch.ones_like(on_policy_N)
    sums = [
        loss_N.double().sum(),
        loss_terms.double(),
        (~on_policy_N).double().sum(),
        on_policy_N.double().sum(),
        total("outlier", on_policy_N),
        total("reward", on_policy_N),
        total("p_trust", on_policy_N),
        _sum(gap_N, fresh_N),
        stale_N.double().sum(),
        _sum(gap_N, stale_N),
        has_top_k_N.double().sum(),
        total("teacher_top_k_mass", has_top_k_N),
        total("top_k_divergence", on_policy_N),
        estimate(k2),
        estimate(k3),
        total("student_entropy", everywhere_N),
        total("teacher_entropy", everywhere_N),
        total("clipped", on_policy_N),
    ]
    nowhere_N = torch.zeros_like(on_policy_N)
    maxima = [
        _maximum(-report["reward"], on_policy_N) if "reward" in report else _maximum(loss_N, nowhere_N),
        _maximum(gap_N, fresh_N),
    ]
    return torch.cat(
        [torch.stack(sums), _source_sums(batch, loss_N, on_policy_N, report), torch.stack(maxima)]
    ).detach()


def _source_sums(
    batch: MicroBatch, loss_N: torch.Tensor, on_policy_N: torch.Tensor, report: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """float64 ``[len(SOURCE_NAMES) * sources]``; empty without a mixture."""
    sums = loss_N.new_zeros((len(SOURCE_NAMES), len(batch.source_names)), dtype=torch.float64)
    if batch.sources_N is None:
        return sums.flatten()
    nothing_N = torch.zeros_like(loss_N, dtype=torch.float64)
    outlier_N, reward_N = (report[n].double() if n in report else nothing_N for n in ("outlier", "reward"))
    values = [
        loss_N.detach().double(),
        torch.ones_like(nothing_N),
        on_policy_N.double(),
        outlier_N.where(on_policy_N, 0),
        reward_N.where(on_policy_N, 0),
    ]
    return sums.index_add(1, batch.sources_N, torch.stack(values).detach()).flatten()


def _sum(values_N: torch.Tensor, mask_N: torch.Tensor) -> torch.Tensor:
    return values_N.double().where(mask_N, 0).sum()


def _maximum(values_N: torch.Tensor, mask_N: torch.Tensor) -> torch.Tensor:
    nothing = values_N.new_full((1,), -torch.inf, dtype=torch.float64)
    return torch.cat((values_N.double().where(mask_N, -torch.inf), nothing)).max()


def reduce_sums(
    micro_batch_sums: list[torch.Tensor], layout: Layout, source_names: Sequence[str] = ()
) -> dict[str, float]:
    """Combine ``token_sums`` of all micro-batches and replicas; every rank of every stage returns the same numbers.

    ``micro_batch_sums`` is empty on stages before the last.
    """
    sum_names = (*SUM_NAMES, *(f"{name}/{source}" for name in SOURCE_NAMES for source in source_names))
    size = len(sum_names) + len(MAX_NAMES)
    sums = torch.zeros(len(sum_names), dtype=torch.float64, device=layout.device)
    maxima = torch.full((len(MAX_NAMES),), -torch.inf, dtype=torch.float64, device=layout.device)
    if micro_batch_sums:
        stacked = torch.stack(micro_batch_sums)
        assert stacked.shape[1] == size
        sums, maxima = stacked[:, : len(sum_names)].sum(0), stacked[:, len(sum_names) :].amax(0)
        dist.all_reduce(sums, group=layout.groups.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=layout.groups.dp_cp)
    packed = torch.cat([sums, maxima])
    if layout.pipeline_size > 1:
        last = dist.get_process_group_ranks(layout.groups.pp)[-1]
        dist.broadcast(packed, src=last, group=layout.groups.pp)
    return dict(zip(sum_names + MAX_NAMES, packed.tolist(), strict=True))


def step_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The logged values from the global sums: means over the positions each one is about.

    ``loss`` (nats per loss term), ``outlier_share`` and ``p_trust`` over on-policy tokens, ``reward`` = mean R in nats
    and ``reward_min``, ``reverse_kl_k2`` and ``reverse_kl_k3``, estimates of KL(S||T) in nats beside -``reward`` = K1,
    ``teacher_top_k_mass`` and ``top_k_divergence`` (nats) over the rows that needed a top-k, entropies
    in nats over response positions, ``on_policy_share`` of response positions, ``log_prob_gap``
    = mean |trainer - engine| in nats over tokens that weights of this step sampled, and its maximum,
    ``stale_token_share`` of on-policy tokens that earlier weights sampled and ``stale_log_prob_gap`` over them,
    ``clipped_ratio_share`` of on-policy tokens where PPO's clip acts, and ``load_balancing_loss``
    (``experts.LoadBalance``) where the student's routers have one.
    """
    on_policy = max(sums["on_policy_tokens"], 1.0)
    stale, fresh = max(sums["stale_tokens"], 1.0), sums["on_policy_tokens"] - sums["stale_tokens"]
    response = max(sums["on_policy_tokens"] + sums["guidance_tokens"], 1.0)
    any_on_policy = sums["on_policy_tokens"] > 0
    return {
        "loss": sums["loss"] / max(sums["loss_terms"], 1.0),
        "outlier_share": sums["outlier"] / on_policy,
        "reward": sums["reward"] / on_policy,
        "reward_min": -sums["negative_reward_max"] if any_on_policy else 0.0,
        "reverse_kl_k2": sums["reverse_kl_k2"] / on_policy,
        "reverse_kl_k3": sums["reverse_kl_k3"] / on_policy,
        "p_trust": sums["p_trust"] / on_policy,
        "teacher_top_k_mass": sums["teacher_top_k_mass"] / max(sums["teacher_top_k_tokens"], 1.0),
        "top_k_divergence": sums["top_k_divergence"] / max(sums["teacher_top_k_tokens"], 1.0),
        "student_entropy": sums["student_entropy"] / response,
        "teacher_entropy": sums["teacher_entropy"] / response,
        "on_policy_share": sums["on_policy_tokens"] / response,
        "response_tokens": response if any_on_policy or sums["guidance_tokens"] else 0.0,
        "log_prob_gap": sums["log_prob_gap"] / max(fresh, 1.0),
        "stale_token_share": sums["stale_tokens"] / on_policy,
        "stale_log_prob_gap": sums["stale_log_prob_gap"] / stale,
        "clipped_ratio_share": sums["clipped"] / on_policy,
        "log_prob_gap_max": sums["log_prob_gap_max"] if fresh else 0.0,
        **{name: sums[name] for name in ("load_balancing_loss",) if name in sums},
    }


def source_metrics(sums: Mapping[str, float], source_names: Sequence[str]) -> dict[str, float]:
    """The same for each source of a mixture, under ``name/source``, where the step has tokens of it.

    ``loss`` is per response token of the source, ``reward`` and ``outlier_share`` over its on-policy tokens;
    ``token_share`` is its part of the response tokens.
    """
    total = max(1.0, sum(sums[f"tokens/{source}"] for source in source_names))
    metrics: dict[str, float] = {}
    for source in source_names:
        loss, tokens, on_policy, outlier, reward = (sums[f"{name}/{source}"] for name in SOURCE_NAMES)
        metrics[f"token_share/{source}"] = tokens / total
        if tokens:
            metrics[f"loss/{source}"] = loss / tokens
        if on_policy:
            metrics[f"reward/{source}"] = reward / on_policy
            metrics[f"outlier_share/{source}"] = outlier / on_policy
    return metrics


def rollout_metrics(rollouts: Sequence[Rollout], layout: Layout) -> dict[str, float]:
    """Means over the global batch: tokens of teacher prefix and of response, and the share of finished sequences.

    Only what a step learns from: of a continued sample neither its prefix nor its earlier tokens.
    """
    sums = torch.tensor(
        [[0 if r.request.earlier else len(r.request.prefix), len(r.response), float(r.finished), 1.0] for r in rollouts]
        or [[0.0] * 4],
        dtype=torch.float64,
        device=layout.device,
    ).sum(0)
    dist.all_reduce(sums, group=layout.groups.dp)
    prefix, response, finished, count = sums.tolist()
    count = max(count, 1.0)
    return {"prefix_length": prefix / count, "response_length": response / count, "finished_share": finished / count}


def imbalance(count: int, layout: Layout) -> float:
    """The most that a data-parallel replica has of something over the mean of all; 1 where nobody has any."""
    total, most = (torch.tensor(count, dtype=torch.float64, device=layout.device) for _ in range(2))
    dist.all_reduce(total, group=layout.groups.dp)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=layout.groups.dp)
    return float(most) * layout.data_parallel_size / float(total) if total else 1.0


def share(part: int, whole: int, layout: Layout) -> float:
    """``part`` over ``whole``, both summed over data-parallel replicas; 0 of nothing."""
    sums = torch.tensor([part, whole], dtype=torch.float64, device=layout.device)
    dist.all_reduce(sums, group=layout.groups.dp)
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def padding_share(rollouts: Sequence[Rollout], batch: Batch, layout: Layout) -> float:
    """Share of the global batch's positions that are padding; ``batch`` was built from ``rollouts``."""
    needed = sum(num_tokens(rollout) - 1 for rollout in rollouts)
    run = sum(micro_batch.tokens_BS.numel() for micro_batch in batch.micro_batches)
    return 1.0 - share(needed, run, layout)


class MetricsLog:
    """``metrics.jsonl``, TensorBoard and trackers of a run; writes on rank 0, does nothing elsewhere."""

    def __init__(self, folder: Path, *, is_main: bool, first_step: int, trackers: Sequence[Tracker] = ()):
        """Open the log to continue at ``first_step``: lines of steps that will be run again are dropped.

        ``trackers`` get every value that TensorBoard gets; who opened them closes them.
        """
        self._trackers = trackers
        self._path = folder / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_lines_from(self._path, first_step)
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; ``values`` has a ``step``. A non-finite number becomes null, which JSON can express."""
        if self._writer is None:
            return
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.write_scalars(values["step"], values)

    def write_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """To TensorBoard and the trackers, not to ``metrics.jsonl``: what differs between equal runs, such as times."""
        numbers = {name: v for name, v in values.items() if name != "step" and isinstance(v, int | float)}
        if self._writer is None or not numbers:
            return
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.write(step, {name: float(value) for name, value in numbers.items() if math.isfinite(value)})

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()


def _drop_lines_from(path: Path, first_step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] < first_step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
