"""Rollouts to micro-batches: the one shift, the regions, the weights, and who gets which sequence.

What a sample contributes (tokens, labels, regions, draws, weights) depends on the sample alone; the
data-parallel split and the micro-batch size decide only which rows stand beside each other and how far they
are padded.

Shape suffixes: ``B`` sequences of a micro-batch, ``S`` positions (padded length of that micro-batch).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.packing import pack
from megatron_tropd.prompt import Prompt
from megatron_tropd.types import Batch, MicroBatch, Rollout, RolloutRequest, TokenRegion

Normalization = Literal["tokens", "sequences", "kept"]

PADDING_SAMPLE = -1
"""``sample_ids`` entry of a row that only pads a micro-batch."""


def build_batch(
    rollouts: Sequence[Rollout],
    *,
    step: int,
    seed: int,
    micro_batch_size: int,
    num_micro_batches: int,
    pad_id: int,
    max_sequence_length: int,
    micro_batch_tokens: int | None = None,
    sequence_packing: bool = False,
    normalization: Normalization = "tokens",
    pad_to_multiple_of: int = 1,
    context_parallel_size: int = 1,
    selected: Mapping[int, np.ndarray] | None = None,
    advantages: Mapping[int, float] | None = None,
    source_names: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Batch:
    """One data-parallel rank's rollouts of a step as padded micro-batches, longest rows first.

    There are ``num_micro_batches`` micro-batches of ``micro_batch_size`` rows (schedules want the same number
    on every rank); places without a rollout are rows of padding with sample id -1. Rows of like length share
    a micro-batch, which is padded to its own longest row, rounded up to a multiple of ``pad_to_multiple_of``
    (the tensor-parallel size under sequence parallelism). Tensors are on ``device``. With ``source_names`` the metrics
    are told for each source of the prompts too.

    ``normalization`` says what one loss term is: with ``tokens`` and ``kept`` every response position (weight
    1; the training step itself counts the kept ones), with ``sequences`` every sequence with a response (the
    weights of its n positions are 1/n). Nothing is divided by the number of terms here. ``selected`` says by
    sample id which response tokens take part (one bool for each; None: all): the others are of no region, so
    they are neither learned from nor counted. ``advantages`` are the task's, by sample id.

    With ``micro_batch_tokens`` rows are packed by size instead: as many as fit that many positions, padding
    included; a longer row has a micro-batch to itself. Their number then differs from rank to rank.
    ``sequence_packing`` puts them behind one another in one row instead, in micro-batches of like size. Each is rounded
    up to two chunks for every context-parallel rank, and their sum by a sequence of padding, with sample id -1.

    Prompts of several teachers are in micro-batches of their own, whose number differs from rank to rank too.

    Raises ValueError where there are more rollouts than rows, or a sequence of more than
    ``max_sequence_length`` tokens (its last token, which predicts nothing, included), or one without a
    prompt.
    """
    num_rows = micro_batch_size * num_micro_batches
    if micro_batch_tokens is None and len(rollouts) > num_rows:
        raise ValueError(
            f"{len(rollouts)} rollouts do not fit {num_micro_batches} micro-batches of {micro_batch_size}: "
            "training.global_batch_size must be micro_batch_size x micro-batches x data-parallel size"
        )
    for rollout in rollouts:
        _refuse_unusable(rollout, max_sequence_length)
    longest_first = sorted(rollouts, key=lambda rollout: (-num_tokens(rollout), rollout.request.sample_id))
    chunks = 1 if context_parallel_size == 1 else 2 * context_parallel_size
    teachers = sorted({rollout.request.prompt.teacher for rollout in rollouts})
    groups = []
    for teacher in teachers or [""]:
        mine = [rollout for rollout in longest_first if rollout.request.prompt.teacher == teacher]
        if micro_batch_tokens is not None and sequence_packing:
            groups += _by_sum(mine, micro_batch_tokens, chunks) or [[None]]
        elif micro_batch_tokens is not None:
            groups += _by_positions(mine, micro_batch_tokens, pad_to_multiple_of) or [[None]]
        else:
            count = num_rows if len(teachers) <= 1 else len(mine) + -len(mine) % micro_batch_size
            rows = [*mine, *[None] * (count - len(mine))]
            groups += [rows[start : start + micro_batch_size] for start in range(0, count, micro_batch_size)]
    if sequence_packing:
        groups = [[*group, None] for group in groups]
    names = tuple(source_names)
    micro_batches = tuple(
        _micro_batch(group, step, seed, pad_id, normalization, pad_to_multiple_of, selected, advantages, names, device)
        for group in groups
    )
    if sequence_packing:
        micro_batches = tuple(
            _packed(one, group, pad_to_multiple_of, chunks) for one, group in zip(micro_batches, groups, strict=True)
        )
    return Batch(micro_batches, step)


def _by_positions(rows: Sequence[Rollout], most: int, multiple: int) -> list[list[Rollout | None]]:
    """Neighbours in length, longest first, in groups whose padded size stays within ``most`` positions."""
    groups: list[list[Rollout | None]] = []
    length = 0
    for row in rows:
        if not groups or (len(groups[-1]) + 1) * length > most:
            groups.append([])
            length = _num_positions([row], multiple)
        groups[-1].append(row)
    return groups


def _by_sum(rows: Sequence[Rollout], most: int, multiple: int) -> list[list[Rollout | None]]:
    """As few groups as will do of at most ``most`` positions in sum, alike in size: each row, the longest first, goes
    to the group with the fewest positions."""
    lengths = [_num_positions([row], multiple) for row in rows]
    count = -(-sum(lengths) // most)
    while True:
        groups: list[list[Rollout | None]] = [[] for _ in range(count)]
        sizes = [(0, index) for index in range(count)]
        for row, length in zip(rows, lengths, strict=True):
            size, index = sizes[0]
            if size and size + length > most:
                break
            groups[index].append(row)
            heapq.heapreplace(sizes, (size + length, index))
        else:
            return groups
        count += 1


def _packed(micro_batch: MicroBatch, rows: Sequence[Rollout | None], multiple: int, chunks: int) -> MicroBatch:
    """``micro_batch`` with its sequences behind one another, of the last row, which is padding, what rounds them up."""
    lengths = [_num_positions([row], chunks) for row in rows[:-1]]
    if micro_batch.teacher_tokens_BS is None:
        return pack(micro_batch, _filled(lengths, multiple), None)
    longer = [0 if row is None else _longer_for_teacher(row.request.prompt) for row in rows[:-1]]
    seen = [length + more for length, more in zip(lengths, longer, strict=True)]
    return pack(micro_batch, _filled(lengths, multiple), _filled(seen, multiple))


def _filled(lengths: Sequence[int], multiple: int) -> list[int]:
    return [*lengths, -sum(lengths) % multiple]


def _longer_for_teacher(prompt: Prompt) -> int:
    """Tokens that the teacher's prompt has more, or, below 0, fewer."""
    return len(prompt.teacher_tokens or prompt.tokens) - len(prompt.tokens)


def split_for_rank[Item](
    items: Sequence[Item], lengths: Sequence[int], *, rank: int, size: int, even: bool = True
) -> list[Item]:
    """Rank ``rank``'s share of ``items`` over ``size`` data-parallel ranks: equal counts, similar lengths.

    ``lengths`` are the expected costs of the items (tokens); every rank passes the same. The share keeps the order of
    ``items``. Raises ValueError where the items do not divide evenly; unless ``even``, some then have one fewer than
    others.
    """
    if even and len(items) % size:
        raise ValueError(
            f"{len(items)} sequences do not divide over {size} data-parallel ranks: "
            "choose a global_batch_size that does"
        )
    return [items[index] for index in balanced_shares(lengths, size)[rank]]


def balanced_shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of ``lengths`` dealt to ``size`` ranks, each share in their order.

    Longest first, each goes to the rank with the least so far that has less than an even share, rounded up.
    """
    # Stable, so that equal lengths are dealt in their order.
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    shares: list[list[int]] = [[] for _ in range(size)]
    ranks_by_load = [(0, candidate) for candidate in range(size)]
    for index in longest_first:
        load, chosen = heapq.heappop(ranks_by_load)
        shares[chosen].append(index)
        if len(shares[chosen]) < math.ceil(len(lengths) / size):
            heapq.heappush(ranks_by_load, (load + lengths[index], chosen))
    return [sorted(share) for share in shares]


def answers_as_rollouts(
    prompts: Sequence[Prompt], *, encode: Callable[[str], list[int]], eos_id: int, first_sample_id: int
) -> list[Rollout]:
    """Reference answers as trajectories that are all prefix, so that SFT is guidance alone.

    Each prefix is the encoded solution (else answer) and the end token, or ``answer_tokens`` where the prompt has them;
    the response is empty. Sample ids count from ``first_sample_id``. Raises ValueError for a prompt without a reference
    answer.
    """
    rollouts = []
    for index, prompt in enumerate(prompts):
        answer = prompt.solution or prompt.answer
        if not answer and not prompt.answer_tokens:
            raise ValueError(f"prompt {prompt.id!r} has no reference answer: SFT needs one for every prompt")
        tokens = prompt.answer_tokens or (*encode(answer), eos_id)
        request = RolloutRequest(first_sample_id + index, prompt, tokens)
        rollouts.append(Rollout(request, response=(), log_probs=(), finished=True))
    return rollouts


def num_tokens(rollout: Rollout) -> int:
    """Length of the whole trajectory."""
    request = rollout.request
    return len(request.prompt.tokens) + len(request.prefix) + len(request.earlier) + len(rollout.response)


def _refuse_unusable(rollout: Rollout, max_sequence_length: int) -> None:
    sample_id, length = rollout.request.sample_id, num_tokens(rollout)
    assert len(rollout.log_probs) == len(rollout.response), f"sample {sample_id}: one log-prob for each response token"
    if not rollout.request.prompt.tokens:
        raise ValueError(f"sample {sample_id}: its prompt has no tokens, so nothing predicts the first one")
    if length > max_sequence_length:
        raise ValueError(
            f"sample {sample_id}: {length} tokens, but the models are built for {max_sequence_length} "
            "(data.max_prompt_length + rollout.max_response_length): raise a budget or shorten the answer"
        )


def _num_positions(rows: Sequence[Rollout | None], multiple: int) -> int:
    # A position at least: a micro-batch of padding alone still runs through the models.
    longest = max(1, max(num_tokens(row) - 1 if row else 0 for row in rows))
    return longest + -longest % multiple


def _micro_batch(
    rows: Sequence[Rollout | None],
    step: int,
    seed: int,
    pad_id: int,
    normalization: Normalization,
    pad_to_multiple_of: int,
    selected: Mapping[int, np.ndarray] | None,
    advantages: Mapping[int, float] | None,
    source_names: tuple[str, ...],
    device: torch.device | str,
) -> MicroBatch:
    num_positions = _num_positions(rows, pad_to_multiple_of)
    shape = (len(rows), num_positions)
    tokens_BS = np.full(shape, pad_id, dtype=np.int64)
    labels_BS = np.zeros(shape, dtype=np.int64)
    regions_BS = np.full(shape, TokenRegion.NONE, dtype=np.int64)
    log_probs_BS = np.zeros(shape, dtype=np.float32)
    weights_BS = np.zeros(shape, dtype=np.float32)
    stale_BS = np.zeros(shape, dtype=bool)
    advantages_BS = np.zeros(shape, dtype=np.float32)
    padding_BS = np.ones(shape, dtype=bool)
    for row, rollout in enumerate(rows):
        if rollout is None:
            continue  # stays padding
        request = rollout.request
        trajectory = np.array(
            [*request.prompt.tokens, *request.prefix, *request.earlier, *rollout.response], dtype=np.int64
        )
        # The one shift: position t reads token t and predicts token t + 1.
        start, end = len(request.prompt.tokens) - 1, len(trajectory) - 1
        first = end - len(rollout.response)
        learned = first if request.earlier else start
        tokens_BS[row, :end] = trajectory[:-1]
        padding_BS[row, :end] = False
        labels_BS[row, learned:end] = trajectory[1:][learned:]
        regions_BS[row, learned:first] = TokenRegion.GUIDANCE
        regions_BS[row, first:end] = TokenRegion.ON_POLICY
        if selected is not None:
            regions_BS[row, first:end][~selected[request.sample_id]] = TokenRegion.NONE
        part_S = regions_BS[row] != TokenRegion.NONE
        log_probs_BS[row, first:end] = rollout.log_probs
        if rollout.versions:
            stale_BS[row, first:end] = np.array(rollout.versions) != step
        if advantages is not None:
            advantages_BS[row, regions_BS[row] == TokenRegion.ON_POLICY] = advantages[rollout.request.sample_id]
        weights_BS[row, part_S] = 1.0 / max(1, part_S.sum()) if normalization == "sequences" else 1.0
    sample_ids = tuple(PADDING_SAMPLE if row is None else row.request.sample_id for row in rows)
    terms_BS = regions_BS != TokenRegion.NONE
    loss_positions_N = terms_BS.ravel().nonzero()[0]
    sources_N = None
    if source_names:
        sources_B = np.array([0 if row is None else source_names.index(row.request.prompt.source) for row in rows])
        sources_N = torch.from_numpy(sources_B[loss_positions_N // num_positions]).to(device)
    teacher_tokens_BS, teacher_positions_N = _teacher_view(rows, loss_positions_N, num_positions, pad_to_multiple_of)
    return MicroBatch(
        teacher_tokens_BS=None if teacher_tokens_BS is None else torch.from_numpy(teacher_tokens_BS).to(device),
        teacher_positions_N=None if teacher_positions_N is None else torch.from_numpy(teacher_positions_N).to(device),
        tokens_BS=torch.from_numpy(tokens_BS).to(device),
        labels_BS=torch.from_numpy(labels_BS).to(device),
        regions_BS=torch.from_numpy(regions_BS).to(device),
        uniforms_BS=_gate_uniforms(seed, sample_ids, num_positions).to(device),
        rollout_log_probs_BS=torch.from_numpy(log_probs_BS).to(device),
        stale_BS=torch.from_numpy(stale_BS).to(device) if stale_BS.any() else None,
        advantages_BS=None if advantages is None else torch.from_numpy(advantages_BS).to(device),
        weights_BS=torch.from_numpy(weights_BS).to(device),
        padding_BS=torch.from_numpy(padding_BS).to(device),
        loss_positions_N=torch.from_numpy(loss_positions_N).to(device),
        rows_N=torch.from_numpy(loss_positions_N // num_positions).to(device),
        sample_ids=sample_ids,
        num_tokens=int((~padding_BS).sum()),
        teacher=next((row.request.prompt.teacher for row in rows if row is not None), ""),
        num_loss_terms=int(terms_BS.any(axis=1).sum() if normalization == "sequences" else terms_BS.sum()),
        source_names=source_names,
        sources_N=sources_N,
    )


def _teacher_view(
    rows: Sequence[Rollout | None], loss_positions_N: np.ndarray, num_positions: int, multiple: int
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Tokens and loss positions as the teacher has them, where it reads other prompts; padded with 0."""
    if not any(row is not None and row.request.prompt.teacher_tokens for row in rows):
        return None, None
    read: dict[int, list[int]] = {}
    offsets = np.zeros(len(rows), dtype=np.int64)
    for index, row in enumerate(rows):
        if row is not None:
            prompt = row.request.prompt
            seen = prompt.teacher_tokens or prompt.tokens
            offsets[index] = _longer_for_teacher(prompt)
            read[index] = [*seen, *row.request.prefix, *row.request.earlier, *row.response][:-1]
    longest = max(1, *map(len, read.values()))
    tokens_BS = np.zeros((len(rows), longest + -longest % multiple), dtype=np.int64)
    for index, tokens in read.items():
        tokens_BS[index, : len(tokens)] = tokens
    rows_N, positions_N = loss_positions_N // num_positions, loss_positions_N % num_positions
    return tokens_BS, rows_N * tokens_BS.shape[1] + positions_N + offsets[rows_N]


def _gate_uniforms(seed: int, sample_ids: Sequence[int], num_positions: int) -> torch.Tensor:
    """fp32 ``[B, S]``: the draw at t belongs to the token predicted there, the trajectory's token t + 1."""
    return uniforms(seed, Stream.GATE, torch.tensor(sample_ids).unsqueeze(1), torch.arange(1, num_positions + 1))
