"""What flows between the parts: rollouts and batches (``prompt`` has the prompts). Data only, no behaviour.

Shape suffixes: ``B`` sequences of a micro-batch, ``S`` positions (padded length of that micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch

from megatron_tropd.prompt import Prompt

OutputHeadMode = Literal["fused", "fused-recompute", "logits"]
"""How the last stage goes from hidden states to losses: in chunks of tokens (`vocab_parallel.fused_head_loss`, with
gradients taken in the forward or after computing the logits again), or through whole logits."""


class TokenRegion(IntEnum):
    """What a position contributes to the loss (METHOD: every response position is exactly one of the last two)."""

    NONE = 0
    """Prompt or padding: no loss."""
    GUIDANCE = 1
    """The token to predict was written by the teacher (a prefix token, or an answer under SFT)."""
    ON_POLICY = 2
    """The token to predict was sampled from the student."""


@dataclass(frozen=True)
class RolloutRequest:
    """What the engine is asked to continue: prompt, then a teacher-written prefix (may be empty).

    ``sample_id`` is unique over the whole run (it keys every random draw of this sample), so the same request gives
    the same response whatever batch it is generated in.
    """

    sample_id: int
    prompt: Prompt
    prefix: tuple[int, ...]
    earlier: tuple[int, ...] = ()
    """What the student has written after the prefix in earlier steps: read, and no longer learned from; nor is then the
    prefix, which counted when it was new."""


@dataclass(frozen=True)
class Rollout:
    """A trajectory: prompt + prefix + earlier tokens (from ``request``) + the student's own ``response``.

    ``response`` includes the end token where one was sampled; ``log_probs`` (nats, one per response token) are what
    the engine computed when it sampled; ``finished`` is False where a token budget cut the response off.

    Worked example: prompt ``12+7=``, teacher answer ``91<eos>`` (digits reversed), prefix of one token ``9``, student
    continues ``1<eos>``: prefix = ids("9"), response = ids("1<eos>"), two log-probs, finished = True.
    """

    request: RolloutRequest
    response: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool
    entropies: tuple[float, ...] = ()
    """Nats, one per response token: of the student's distribution at temperature 1 that the token was sampled from.
    Empty where nobody asked for them."""
    versions: tuple[int, ...] = ()
    """The weights that sampled each response token, as the number of the step that asked for it. Empty: all by one."""


@dataclass(frozen=True)
class MicroBatch:
    """Padded or packed sequences, already shifted: position t of ``tokens_BS`` predicts ``labels_BS`` at t.

    Worked example (prompt p0 p1, prefix g0, response r0 r1, padded to 6; * = no meaning):

    ====================  ====  ====  ====  ====  ====  ====
    tokens_BS             p0    p1    g0    r0    pad   pad
    labels_BS             p1    g0    r0    r1    0     0
    regions_BS            0     1     2     2     0     0
    uniforms_BS           *     u     u     u     *     *
    rollout_log_probs_BS  0     0     l0    l1    0     0
    ====================  ====  ====  ====  ====  ====  ====
    """

    tokens_BS: torch.Tensor
    """int64 ids the models read."""
    labels_BS: torch.Tensor
    """int64 ids the models predict; 0 where the region is NONE."""
    regions_BS: torch.Tensor
    """int64 ``TokenRegion`` of the label."""
    uniforms_BS: torch.Tensor
    """fp32 in [0, 1): the trust gate's draws, a function of (seed, step, sample id, position) alone."""
    rollout_log_probs_BS: torch.Tensor
    """fp32 nats: what the engine returned for on-policy labels, 0 elsewhere."""
    advantages_BS: torch.Tensor | None
    """fp32: the task's advantage at on-policy positions, its coefficient included; None where no task counts."""
    weights_BS: torch.Tensor
    """fp32 weight of each position's loss in the sum (1 under token normalisation); 0 where the region is NONE."""
    padding_BS: torch.Tensor
    """bool: whether a position is behind the end of its sequence. Neither model minds, being causal; the balance of a
    student's experts does."""
    loss_positions_N: torch.Tensor
    """int64: the positions that carry loss (region not NONE) in the flattened ``[B * S]``, ascending. Known when the
    batch is built, so that nothing later waits for the device to learn how many they are."""
    rows_N: torch.Tensor
    """int64: which of ``sample_ids`` each of ``loss_positions_N`` belongs to."""
    sample_ids: tuple[int, ...]
    """The sample of each row, or of each packed sequence; -1 for one that only pads the micro-batch."""
    num_tokens: int
    """Positions that are not padding."""
    num_loss_terms: int
    """This micro-batch's share of the global denominator (response positions, or sequences); 0 is allowed."""
    stale_BS: torch.Tensor | None = None
    """bool: on-policy labels that weights of an earlier step sampled; None where there are none."""
    packed_lengths: tuple[int, ...] | None = None
    """Positions of each sequence where they stand one behind the other in one row, ``[1, S]``, and do not see each
    other. None: a row for each."""
    teacher_tokens_BS: torch.Tensor | None = None
    """int64 ids that the teacher reads, ``[B, S']``: its own prompts, then the same prefixes and responses; None:
    ``tokens_BS``."""
    teacher_positions_N: torch.Tensor | None = None
    """int64: where the teacher predicts the labels at ``loss_positions_N``, in the flattened ``[B * S']``; None: at the
    same positions."""
    teacher_packed_lengths: tuple[int, ...] | None = None
    """``packed_lengths`` of ``teacher_tokens_BS``."""
    teacher: str = ""
    """Which of several teachers judges it; "" for the one there is, or that prompts without a name take."""
    source_names: tuple[str, ...] = ()
    """The sources of a mixture of prompt files, for metrics; () without one."""
    sources_N: torch.Tensor | None = None
    """int64: index in ``source_names`` for each of ``loss_positions_N``; None without a mixture."""


@dataclass(frozen=True)
class Batch:
    """One data-parallel rank's share of an optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    step: int
