"""From a vocabulary shard to a few floats per token, and from the shards' floats to the whole vocabulary's.

The passes (`shard_statistics`, `pair_statistics`) are local, without autograd, in fp32 whatever the logits' type, and
read each logit once. They return *conditional* quantities (of the softmax over the shard's own ids), which the chain
rule of relative entropy merges without cancellation (`merge`). Every rank merges the same gathered floats in rank
order, so all ranks hold the same bits and take the same data-dependent decisions.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``C`` rows of one chunk, ``V`` vocabulary shard, ``P``
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.vocab_parallel.shards import TeacherColumns, chunks, columns_of, read

_NO_MASS = float("-inf")


def shard_statistics(logits_TV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, held: range) -> torch.Tensor:
    """One model, ``[N, 2]``: log-sum-exp over the ids this shard holds, and the logit of ``ids_N`` (-inf elsewhere).

    A shard that holds no id (all padding) reports -inf for both: no mass.
    """
    log_sum_exp_N = logits_TV.new_full(rows_N.shape, _NO_MASS, dtype=torch.float32)
    if held:
        for chunk in chunks(rows_N, logits_TV, bytes_per_element=8):
            log_sum_exp_N[chunk.span] = _log_sum_exp(read(logits_TV, chunk, len(held)))
    return torch.stack((log_sum_exp_N, _token_logits(logits_TV, rows_N, ids_N, held)), -1)


def _log_sum_exp(logits_CV: torch.Tensor) -> torch.Tensor:
    """Row-wise, overwriting its argument; a row of -inf gives -inf."""
    peak_C = _finite_peak(logits_CV)
    return logits_CV.sub_(peak_C[:, None]).exp_().sum(-1).log() + peak_C


def _finite_peak(logits_CV: torch.Tensor) -> torch.Tensor:
    peak_C = logits_CV.amax(-1)
    return peak_C.masked_fill(peak_C == _NO_MASS, 0)


def _token_logits(logits_TV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, held: range) -> torch.Tensor:
    columns_N, owned_N = columns_of(ids_N, held)
    return logits_TV[rows_N, columns_N].float().where(owned_N, _NO_MASS)


def pair_statistics(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_N: torch.Tensor,
    ids_N: torch.Tensor,
    held: range,
) -> torch.Tensor:
    """Both models in the student's layout, ``[N, 8]``.

    Student log-sum-exp and token logit, the teacher's, then over the shard's own ids: entropy of the student, entropy
    of the teacher, KL(student || teacher), KL(teacher || student), in nats. The teacher's token logit is read from the
    aligned columns, so that all four floats of a rank speak of the same ids.
    """
    statistics_N8 = student_logits_TV.new_zeros(rows_N.shape[0], 8, dtype=torch.float32)
    statistics_N8[:, :4] = _NO_MASS
    if not held:
        return statistics_N8
    columns_N, owned_N = columns_of(ids_N, held)
    for chunk in chunks(rows_N, student_logits_TV, bytes_per_element=24):
        student_CV, teacher_CV = read(student_logits_TV, chunk, len(held)), teacher.read(chunk)
        at_C1 = columns_N[chunk.span, None]
        tokens_C2 = torch.cat((student_CV.gather(1, at_C1), teacher_CV.gather(1, at_C1)), -1)
        statistics_N8[chunk.span, 1:4:2] = tokens_C2.where(owned_N[chunk.span, None], _NO_MASS)
        statistics_N8[chunk.span, 0], statistics_N8[chunk.span, 2], *divergences = _pair(student_CV, teacher_CV)
        statistics_N8[chunk.span, 4:] = torch.stack(divergences, -1)
    return statistics_N8


def _pair(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both log-sum-exps, both entropies, KL(student || teacher), KL(teacher || student), ``[C]``; overwrites both.

    With e = exp(x) for the logits x below their row's peak and Z their sum: H = log Z - sum e x / Z, and KL(p || q) =
    sum e (x - y) / Z - log Z + log Z_q. Measured from the peaks, nothing large cancels. A model without mass here
    expects nothing.
    """
    peak_s, weights_s, total_s = _weights(student_CV)
    peak_t, weights_t, total_t = _weights(teacher_CV)
    log_s, log_t = expectation(weights_s, student_CV), expectation(weights_t, teacher_CV)
    log_ratio_CV = student_CV.sub_(teacher_CV)
    ratio_s, ratio_t = expectation(weights_s, log_ratio_CV), expectation(weights_t, log_ratio_CV)
    empty_s, empty_t = total_s == 0, total_t == 0
    mass_s, mass_t = total_s.masked_fill(empty_s, 1), total_t.masked_fill(empty_t, 1)
    log_masses = mass_s.log() - mass_t.log()
    return (
        total_s.log() + peak_s,
        total_t.log() + peak_t,
        (mass_s.log() - log_s / mass_s).masked_fill(empty_s, 0),
        (mass_t.log() - log_t / mass_t).masked_fill(empty_t, 0),
        (ratio_s / mass_s - log_masses).masked_fill(empty_s, 0),
        (log_masses - ratio_t / mass_t).masked_fill(empty_t, 0),
    )


def _weights(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves the logits below their row's peak, in place; returns the peak ``[C]``, their exp and its sum ``[C]``."""
    peak_C = _finite_peak(logits_CV)
    weights_CV = logits_CV.sub_(peak_C[:, None]).exp()
    return peak_C, weights_CV, weights_CV.sum(-1)


def expectation(probs_CV: torch.Tensor, values_CV: torch.Tensor) -> torch.Tensor:
    """sum over V of prob * value, where an event of probability 0 contributes 0 even if its value is infinite."""
    total_C = (probs_CV * values_CV).sum(-1)
    # 0 * inf = nan is rare: look for it once per row instead of masking every element.
    if total_C.isnan().any():
        total_C = (probs_CV * values_CV).masked_fill_(probs_CV == 0, 0).sum(-1)
    return total_C


@dataclass(frozen=True)
class ModelStatistics:
    """One model over the whole shared vocabulary, fp32 ``[N]``."""

    log_sum_exp_N: torch.Tensor
    """Normaliser of the softmax."""
    log_probs_N: torch.Tensor
    """log pi(x), nats."""


@dataclass(frozen=True)
class PairStatistics:
    """Full-vocabulary entropies and divergences, fp32 ``[N]``, nats."""

    student_entropy_N: torch.Tensor
    teacher_entropy_N: torch.Tensor
    reverse_kl_N: torch.Tensor
    forward_kl_N: torch.Tensor


def merge_model(shards_PN2: torch.Tensor) -> ModelStatistics:
    """The ranks' `shard_statistics` to the whole vocabulary's. Computed in fp64: R is a difference of differences."""
    log_sum_exp_PN, token_logits_PN = shards_PN2.double().unbind(-1)
    log_sum_exp_N = log_sum_exp_PN.logsumexp(0)
    log_probs_N = token_logits_PN.amax(0) - log_sum_exp_N
    return ModelStatistics(log_sum_exp_N.float(), log_probs_N.float())


def merge_pair(shards_PN8: torch.Tensor) -> PairStatistics:
    """The ranks' `pair_statistics` to the whole vocabulary's, by the chain rule of entropy and relative entropy.

    With w_r and v_r the masses of shard r under student and teacher: H = sum_r w_r (H_r - log w_r) and
    KL(T||S) = sum_r v_r (KL_r + log v_r - log w_r); KL(S||T) is the same with the models swapped.
    """
    shards_PN8 = shards_PN8.double()
    log_w_PN = _log_masses(shards_PN8[..., 0])
    log_v_PN = _log_masses(shards_PN8[..., 2])
    w_PN, v_PN = log_w_PN.exp(), log_v_PN.exp()
    student_entropy_PN, teacher_entropy_PN, reverse_kl_PN, forward_kl_PN = shards_PN8[..., 4:].unbind(-1)
    return PairStatistics(
        student_entropy_N=_chain(w_PN, student_entropy_PN - log_w_PN),
        teacher_entropy_N=_chain(v_PN, teacher_entropy_PN - log_v_PN),
        reverse_kl_N=_chain(w_PN, reverse_kl_PN + log_w_PN - log_v_PN),
        forward_kl_N=_chain(v_PN, forward_kl_PN + log_v_PN - log_w_PN),
    )


def _log_masses(log_sum_exp_PN: torch.Tensor) -> torch.Tensor:
    return log_sum_exp_PN - log_sum_exp_PN.logsumexp(0)


def _chain(masses_PN: torch.Tensor, values_PN: torch.Tensor) -> torch.Tensor:
    return (masses_PN * values_PN).masked_fill(masses_PN == 0, 0).sum(0).float()
