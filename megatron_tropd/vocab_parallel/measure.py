"""Everything the objective reads about each token, found with the fewest collectives and without autograd.

Shape suffixes: ``T`` tokens, ``N`` tokens of a region (not NONE), ``O`` tokens of N whose top-k is needed, ``K`` top-k,
``V`` vocabulary shard, ``P`` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tropd.objectives import ExactDivergence, Objective, exact_kl_weights, top_k_weights, trust_weights
from megatron_tropd.types import TokenRegion
from megatron_tropd.vocab_parallel.divergences import Divergence
from megatron_tropd.vocab_parallel.gradient import RowIds, StudentTerms
from megatron_tropd.vocab_parallel.passes import jsd_statistics, pair_statistics, shard_statistics, skew_statistics
from megatron_tropd.vocab_parallel.shards import TeacherColumns, align_teacher, gather, group_rank, shard_ids
from megatron_tropd.vocab_parallel.statistics import ModelStatistics, PairStatistics, merge_model, merge_pair
from megatron_tropd.vocab_parallel.top_k import global_top_k

_MIN_CAPACITY = 64


@dataclass(frozen=True)
class Tokens:
    """The tokens that take part; the same on every rank."""

    rows_N: torch.Tensor
    """Their rows of T, ascending."""
    ids_N: torch.Tensor
    regions_N: torch.Tensor
    uniforms_N: torch.Tensor | None
    advantages_N: torch.Tensor | None = None
    """The task's, at on-policy tokens."""
    engine_log_probs_N: torch.Tensor | None = None
    """Of the sampled tokens, where the objective weights by importance."""

    def span(self, span: slice) -> Tokens:
        """These tokens of N, as rows of a chunk that holds them alone."""
        uniforms_N, advantages_N, engine_log_probs_N = (
            None if values_N is None else values_N[span]
            for values_N in (self.uniforms_N, self.advantages_N, self.engine_log_probs_N)
        )
        rows_N = self.rows_N[: span.stop - span.start]
        return Tokens(rows_N, self.ids_N[span], self.regions_N[span], uniforms_N, advantages_N, engine_log_probs_N)


@dataclass(frozen=True)
class Shards:
    """Both models on this rank; what every step of a measurement reads."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor | None
    vocab_size: int
    group: dist.ProcessGroup | None

    def student_ids(self) -> range:
        """Ids of this rank's student shard."""
        return shard_ids(group_rank(self.group), self.student_TV.shape[1], self.vocab_size)

    def teacher_ids(self) -> range:
        """Ids of this rank's teacher shard."""
        assert self.teacher_TV is not None
        return shard_ids(group_rank(self.group), self.teacher_TV.shape[1], self.vocab_size)

    def aligned_teacher(self, rows: torch.Tensor) -> TeacherColumns:
        """The teacher at the student's ids, for these rows of T."""
        assert self.teacher_TV is not None
        return align_teacher(self.teacher_TV, self.student_TV.shape[1], rows, self.vocab_size, self.group)


@dataclass(frozen=True)
class Statistics:
    """The merged statistics; None: not asked for."""

    student: ModelStatistics
    teacher: ModelStatistics | None
    pair: PairStatistics | None
    uniforms_N: torch.Tensor | None

    def rewards(self) -> torch.Tensor | None:
        """R = log pi_T(x) - log pi_S(x)."""
        return None if self.teacher is None else self.teacher.log_probs_N - self.student.log_probs_N


@dataclass(frozen=True)
class TopKLogProbs:
    """Log-probs at the teacher's top-k ids of the tokens that need them."""

    rows_O: torch.Tensor
    """Positions in N, ascending."""
    needed_O: torch.Tensor
    """bool: the others are only there to fill a fixed number of rows."""
    ids_OK: torch.Tensor
    student_OK: torch.Tensor
    teacher_OK: torch.Tensor


@dataclass(frozen=True)
class Measurements:
    """What the ranks know together, fp32, nats; the same bits on every rank. None: not needed by this objective."""

    statistics: Statistics
    trust_N: torch.Tensor
    outlier_N: torch.Tensor
    rewards_N: torch.Tensor | None
    top_k: TopKLogProbs | None
    divergence_N: torch.Tensor | None
    """The objective's exact divergence."""
    terms: StudentTerms
    """How the student's log-probs and the divergence depend on its logits."""

    @property
    def values(self) -> tuple[torch.Tensor | None, ...]:
        """What the loss differentiates: the student's log-probs ``[N]``, at the top-k ``[O, K]``, the divergence."""
        top_k_OK = None if self.top_k is None else self.top_k.student_OK
        return self.statistics.student.log_probs_N, top_k_OK, self.divergence_N


def measure(shards: Shards, tokens: Tokens, objective: Objective, full_statistics: bool) -> Measurements:
    """Local statistics, the one packed collective, the gate, then what only some tokens or objectives need."""
    exact = objective.exact_divergence
    want_pair = full_statistics or objective.needs_pair
    teacher = shards.aligned_teacher(tokens.rows_N) if want_pair or exact is not None else None
    statistics = gather_statistics(shards, tokens, objective, teacher if want_pair else None)
    rewards_N = statistics.rewards()
    trust_N, outlier_N = _trust(objective, tokens, statistics, rewards_N)
    top_k = None
    if objective.needs_top_k and rewards_N is not None:
        entropy_N = None if statistics.pair is None else statistics.pair.teacher_entropy_N
        weights_N = top_k_weights(objective, rewards_N, trust_N, outlier_N, entropy_N)
        top_k = _top_k(shards, tokens, objective, statistics, weights_N, teacher)
    divergence_N, divergence = None, None
    if exact == "gated_kl" and teacher is not None:
        weights = exact_kl_weights(objective, tokens.regions_N, trust_N, outlier_N)
        divergence_N, divergence = _gated_kl(statistics, teacher, weights)
    elif exact is not None and teacher is not None:
        divergence_N, divergence = _exact_divergence(shards, tokens, exact, objective, statistics, teacher)
    terms = StudentTerms(
        rows_N=tokens.rows_N,
        log_sum_exp_N=statistics.student.log_sum_exp_N,
        held=shards.student_ids(),
        read_ids=_read_ids(tokens, top_k),
        divergence=divergence,
    )
    return Measurements(statistics, trust_N, outlier_N, rewards_N, top_k, divergence_N, terms)


def gather_statistics(
    shards: Shards, tokens: Tokens, objective: Objective, teacher: TeacherColumns | None
) -> Statistics:
    """One pass over each shard and the one packed all-gather.

    ``teacher``, aligned to the student, asks for the 8-float form; without it each model is reduced over its own
    layout, wherever its boundaries lie. Where the gate's draw is not given, every rank draws and rank 0's is used: its
    column travels with the rest.
    """
    rows_N, ids_N = tokens.rows_N, tokens.ids_N
    if teacher is not None:
        columns = [pair_statistics(shards.student_TV, teacher, rows_N, ids_N, shards.student_ids())]
    else:
        columns = [shard_statistics(shards.student_TV, rows_N, ids_N, shards.student_ids())]
        if shards.teacher_TV is not None:
            columns.append(shard_statistics(shards.teacher_TV, rows_N, ids_N, shards.teacher_ids()))
    uniforms_N, draw = tokens.uniforms_N, objective.needs_uniforms and tokens.uniforms_N is None
    if draw:
        columns.append(torch.rand(rows_N.shape[0], 1, device=rows_N.device))
    gathered_PN = gather(torch.cat(columns, -1), shards.group)
    return Statistics(
        student=merge_model(gathered_PN[..., :2]),
        teacher=None if shards.teacher_TV is None else merge_model(gathered_PN[..., 2:4]),
        pair=None if teacher is None else merge_pair(gathered_PN[..., :8]),
        uniforms_N=gathered_PN[0, :, -1].clone() if draw else uniforms_N,
    )


def _trust(
    objective: Objective, tokens: Tokens, statistics: Statistics, rewards_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if rewards_N is None or not objective.needs_teacher:
        nothing_N = torch.zeros_like(statistics.student.log_probs_N)
        return nothing_N, nothing_N
    on_policy_N = tokens.regions_N == TokenRegion.ON_POLICY
    return trust_weights(objective, rewards_N, on_policy_N, statistics.uniforms_N)


def _top_k(
    shards: Shards,
    tokens: Tokens,
    objective: Objective,
    statistics: Statistics,
    weights_N: torch.Tensor,
    teacher: TeacherColumns | None,
) -> TopKLogProbs | None:
    """The top-k of the tokens with a weight. All ranks see the same weights, so all take part or none does.

    On a GPU the host does not wait to learn which tokens these are: it enqueues the work for a fixed number of them
    (the tokens with a weight first, then others, which change nothing) and looks only then whether they were too few,
    while the GPU is busy with that work. Too few: once more for every token.
    """
    needed_N = weights_N != 0
    if not _host_waits(weights_N):
        return _top_k_of(needed_N.nonzero()[:, 0], needed_N, shards, tokens, objective, statistics, teacher)
    capacity = top_k_capacity(objective, weights_N.shape[0])
    rows_O = needed_N.int().argsort(descending=True, stable=True)[:capacity].sort().values
    too_few = _ReadLater(needed_N.sum() > capacity)
    top_k = _top_k_of(rows_O, needed_N, shards, tokens, objective, statistics, teacher)
    if capacity < weights_N.shape[0] and too_few.read():
        every_N = torch.arange(weights_N.shape[0], device=weights_N.device)
        top_k = _top_k_of(every_N, needed_N, shards, tokens, objective, statistics, teacher)
    return top_k


def top_k_capacity(objective: Objective, num_tokens: int) -> int:
    """Rows to enqueue before their number is known: a quarter where only outliers need a top-k (8 % of the tokens are
    typical), else all."""
    return max(_MIN_CAPACITY, num_tokens // 4) if objective.few_need_top_k else num_tokens


def _host_waits(tensor: torch.Tensor) -> bool:
    """Whether reading a value of this tensor stalls the host until the device gets there."""
    return tensor.is_cuda


class _ReadLater:
    """A flag on the device, on its way to the host."""

    def __init__(self, flag: torch.Tensor):
        self._flag, self._event = flag, None
        if flag.is_cuda:
            self._flag = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """Waits for what was enqueued before the flag, not for what came after it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


def _top_k_of(
    rows_O: torch.Tensor,
    needed_N: torch.Tensor,
    shards: Shards,
    tokens: Tokens,
    objective: Objective,
    statistics: Statistics,
    teacher: TeacherColumns | None,
) -> TopKLogProbs | None:
    """The top-k of these positions in N."""
    if not rows_O.numel() or statistics.teacher is None:
        return None
    rows = tokens.rows_N[rows_O]
    columns = shards.aligned_teacher(rows) if teacher is None else teacher.select(rows_O)
    count = min(objective.top_k, shards.vocab_size)
    top_k = global_top_k(shards.student_TV, columns, rows, shards.student_ids(), count, shards.group)
    return TopKLogProbs(
        rows_O=rows_O,
        needed_O=needed_N[rows_O],
        ids_OK=top_k.ids_OK,
        student_OK=top_k.student_logits_OK - statistics.student.log_sum_exp_N[rows_O, None],
        teacher_OK=top_k.teacher_logits_OK - statistics.teacher.log_sum_exp_N[rows_O, None],
    )


def _exact_divergence(
    shards: Shards,
    tokens: Tokens,
    kind: ExactDivergence,
    objective: Objective,
    statistics: Statistics,
    teacher: TeacherColumns,
) -> tuple[torch.Tensor, Divergence]:
    """The divergence of each token, and what its gradient needs. One collective with a mixture, none for the KLs."""
    beta = objective.mixture_weight
    assert statistics.teacher is not None
    normalizers = statistics.student.log_sum_exp_N, statistics.teacher.log_sum_exp_N
    if kind == "forward_kl" or kind == "reverse_kl":
        assert statistics.pair is not None
        student_kl_N = statistics.pair.reverse_kl_N
        value_N = statistics.pair.forward_kl_N if kind == "forward_kl" else student_kl_N
        return value_N, Divergence(kind, beta, teacher, normalizers[1], student_kl_N)
    if kind == "jsd":
        shares_N2 = jsd_statistics(shards.student_TV, teacher, tokens.rows_N, *normalizers, beta)
        student_kl_N, teacher_kl_N = gather(shares_N2, shards.group).double().sum(0).float().unbind(-1)
        value_N = beta * teacher_kl_N + (1 - beta) * student_kl_N
        return value_N, Divergence(kind, beta, teacher, normalizers[1], student_kl_N)
    shares_N2 = skew_statistics(shards.student_TV, teacher, tokens.rows_N, *normalizers, beta, kind)
    kl_N, overlap_N = gather(shares_N2, shards.group).double().sum(0).float().unbind(-1)
    return kl_N, Divergence(kind, beta, teacher, normalizers[1], kl_N, overlap_N)


def _gated_kl(
    statistics: Statistics, teacher: TeacherColumns, weights: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, Divergence]:
    """w KL(S||T) + v KL(T||S) from the packed statistics: no collective. What has weight 0 may be infinite."""
    assert statistics.teacher is not None and statistics.pair is not None
    reverse_kl_N, forward_kl_N = statistics.pair.reverse_kl_N, statistics.pair.forward_kl_N
    reverse_N, forward_N = weights
    value_N = reverse_N * reverse_kl_N.where(reverse_N != 0, 0) + forward_N * forward_kl_N.where(forward_N != 0, 0)
    return value_N, Divergence(
        kind="gated_kl",
        beta=1.0,
        teacher=teacher,
        teacher_log_sum_exp_N=statistics.teacher.log_sum_exp_N,
        student_kl_N=reverse_kl_N,
        gate_weights_N=weights,
    )


def _read_ids(tokens: Tokens, top_k: TopKLogProbs | None) -> tuple[RowIds, ...]:
    every_N = torch.arange(tokens.rows_N.shape[0], device=tokens.rows_N.device)
    token_ids = RowIds(every_N, tokens.ids_N[:, None])
    return (token_ids,) if top_k is None else (token_ids, RowIds(top_k.rows_O, top_k.ids_OK))
