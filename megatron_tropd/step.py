"""One optimizer step: a batch through Megatron's schedule, gradients checked, weights moved.

Who divides by what: every micro-batch returns the *sum* of its weighted token losses and its number of loss terms;
Megatron (``calculate_per_token_loss``) sums gradients and terms over micro-batches and data-parallel ranks and divides
once by the global count. So the gradient is the same for every data-parallel size, micro-batch split and padding.

Shape suffixes: ``B`` sequences, ``S`` positions, ``N`` positions that carry loss, ``V`` vocabulary shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_tropd.config_watch import GuardConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.experts import LoadBalance
from megatron_tropd.guard import ExplodingError, Guard, RefusedStepError
from megatron_tropd.lockstep import in_step
from megatron_tropd.loss_report import LossReport
from megatron_tropd.metrics import reduce_sums, source_metrics, step_metrics, token_sums
from megatron_tropd.objectives import Objective
from megatron_tropd.packing import context_parallel_part
from megatron_tropd.pair import StudentTeacherStage, build_communicator, output_weight
from megatron_tropd.phases import Phases
from megatron_tropd.replicas import ReplicaCheck
from megatron_tropd.sample_scores import SampleScores
from megatron_tropd.teacher_pass import Judged
from megatron_tropd.teachers import Judges
from megatron_tropd.token_log import TokenLog
from megatron_tropd.types import Batch, MicroBatch
from megatron_tropd.vocab_parallel import OutputHead, distillation_loss, fused_head_loss
from megatron_tropd.weight_gather import WeightGather

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

Normalization = Literal["tokens", "sequences", "kept"]


class NonFiniteError(RefusedStepError):
    """A loss or gradient is not finite."""


class LogProbGapError(RefusedStepError):
    """Engine and trainer disagree about the probabilities of the sampled tokens."""


@dataclass(frozen=True)
class Learner:
    """Everything that turns a batch into an optimizer step."""

    chunks: tuple[DistributedDataParallel, ...]
    """This rank's slice of the pair: its pipeline stage, or with interleaved stages several that take turns."""
    gather: WeightGather
    """Makes the weights whole that the optimizer has moved."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    layout: Layout
    objective: Objective
    normalization: Normalization
    vocab_size: int
    """Ids that student and teacher share."""
    fp32_logits: bool = False
    """Keep the fused heads' logits in fp32."""
    head_chunk_size: int | None = None
    """Tokens of a chunk of the fused heads; None: from the sizes."""
    max_log_prob_gap: float | None = None
    """Largest mean |trainer - engine| log-prob in nats that a step may have; None: any."""
    guard: Guard = field(default_factory=lambda: Guard(GuardConfig()))
    """Refuses a loss or gradient far above the recent steps'; by default none."""
    replicas: ReplicaCheck | None = None
    """Compares the weights of data-parallel replicas before the optimizer moves; None: never."""
    phases: Phases = field(default_factory=Phases)
    """The clock that `schedule` and `optimizer` are taken with."""
    ahead: Judges | None = None
    """The teachers, where they judge a batch before the student's schedule starts."""
    observe: TokenLog | None = None
    """Called on the last stage with every micro-batch and what the loss tells of its loss positions."""

    @property
    def sequence_multiple(self) -> int:
        """What the number of positions of a micro-batch must be a multiple of: two chunks for each context-parallel
        rank, each rank's part divisible over the tensor-parallel ranks where these cut it."""
        own, parts = self.layout.sequence_cut, self.layout.context_parallel_size
        return parts * math.lcm(2 if parts > 1 else 1, own, self.ahead.sequence_cut if self.ahead is not None else 1)

    @property
    def stages(self) -> list[StudentTeacherStage]:
        """What is under DDP."""
        return [chunk.module for chunk in self.chunks]

    @property
    def stage(self) -> StudentTeacherStage:
        """The last of them, which on the last pipeline rank has the output layers; mostly the only one."""
        return self.stages[-1]

    @property
    def students(self) -> list[GPTModel]:
        """The student's part of each."""
        return [stage.module for stage in self.stages]

    @property
    def pair(self) -> torch.nn.Module:
        """The stage, or the list of them: every parameter of both models that this rank holds."""
        return self.stage if len(self.chunks) == 1 else torch.nn.ModuleList(self.stages)


def train_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """Forward, backward and optimizer step on the global batch; returns the step's metrics, equal on every rank.

    Raises a RefusedStepError on every rank, before the optimizer moves: NonFiniteError where the loss or a gradient is
    not finite, ExplodingError where the guard finds it too large, LogProbGapError where engine and trainer disagree by
    more than the learner allows. Raises ReplicaMismatchError where replicas do not hold the same weights.
    """
    started = perf_counter()
    learner.phases.begin("schedule")
    sums, scores = forward_backward(learner, batch)
    teacher_seconds = sum(stage.pop_teacher_seconds() for stage in learner.stages)
    if learner.ahead is not None:
        teacher_seconds = learner.ahead.seconds
    scheduled = perf_counter()
    learner.phases.add("teacher", teacher_seconds)
    learner.phases.begin("optimizer")
    _refuse_non_finite(learner, batch, sums, scores)
    metrics = step_metrics(sums) | source_metrics(sums, batch.micro_batches[0].source_names)
    with _naming_worst_samples(scores, learner.guard.config.max_dumped_samples):
        _refuse_log_prob_gap(batch.step, metrics["log_prob_gap"], learner.max_log_prob_gap)
        if learner.replicas is not None:
            learner.replicas.before_update(batch.step, learner.pair)
        if learner.guard.is_active:
            learner.guard.check(batch.step, *_guarded_numbers(learner, metrics["loss"]))
    _, grad_norm, _ = learner.optimizer.step()
    learner.gather.updated()
    learning_rate = learner.optimizer.param_groups[0]["lr"]
    learner.scheduler.step(increment=1)
    if learner.replicas is not None:
        if learner.replicas.is_due(batch.step + 1):
            learner.gather.finish()
        learner.replicas.after_update(batch.step, learner.pair)
    return {
        **metrics,
        "grad_norm": float(grad_norm),
        "learning_rate": float(learning_rate),
        "seconds_teacher": teacher_seconds,
        "seconds_student": scheduled - started - teacher_seconds,
        "seconds_optimizer": perf_counter() - scheduled,
    }


def forward_backward(learner: Learner, batch: Batch) -> tuple[dict[str, float], SampleScores]:
    """Gradients of the global batch into Megatron's buffers, divided by the global number of loss terms.

    Returns the global metric sums (equal on every rank) and what is known of each sample.
    """
    for chunk, stage in zip(learner.chunks, learner.stages, strict=True):
        chunk.train()
        if stage.teacher is not None:
            stage.teacher.eval()
        chunk.zero_grad_buffer()
    learner.optimizer.zero_grad()
    layout, schedule_config = learner.layout, learner.students[0].config
    scores = SampleScores(context_rank=layout.context_parallel_rank)
    batch = in_step(batch, layout)
    balance = LoadBalance(learner.students, batch, layout) if schedule_config.moe_aux_loss_coeff else None
    judged = [None] * len(batch.micro_batches) if learner.ahead is None else learner.ahead.judge(batch)
    rank, size = layout.context_parallel_rank, layout.context_parallel_size
    micro_batches = [context_parallel_part(one, rank=rank, size=size) for one in batch.micro_batches]
    first = micro_batches[0]
    schedule = get_forward_backward_func(layout.pipeline_size, schedule_config.virtual_pipeline_model_parallel_size)
    with learner.gather.behind_forward():
        micro_batch_sums = schedule(
            forward_step_func=partial(_forward_step, learner, scores),
            data_iterator=[iter(zip(micro_batches, judged, strict=True)) for _ in learner.chunks],
            model=list(learner.chunks),
            num_microbatches=len(micro_batches),
            seq_length=first.tokens_BS.shape[1],
            micro_batch_size=first.tokens_BS.shape[0],
            forward_only=False,
            p2p_communicator=build_communicator(learner.stage, layout.groups.pp),
            pg_collection=layout.groups,
        )
    sums = reduce_sums(micro_batch_sums, layout, first.source_names)
    return sums | (balance.metrics() if balance is not None else {}), scores


def _forward_step(
    learner: Learner,
    scores: SampleScores,
    micro_batches: Iterator[tuple[MicroBatch, Judged | None]],
    model: DistributedDataParallel,
) -> tuple[torch.Tensor, partial]:
    batch, judged = next(micro_batches)
    student_output, teacher_output = model(batch)
    if learner.ahead is not None and judged is not None:
        teacher_output = judged.rows(learner.layout)
        if learner.stage.output_head == "logits":
            teacher_output = torch.nn.functional.linear(teacher_output, learner.ahead.head(batch))
    return student_output, partial(_micro_batch_loss, learner, scores, batch, teacher_output)


def _micro_batch_loss(
    learner: Learner,
    scores: SampleScores,
    batch: MicroBatch,
    teacher_output: torch.Tensor | None,
    student_output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of weighted losses, number of loss terms, metric sums) of one micro-batch, on the last stage.

    The outputs are those of `StudentTeacherStage.forward`. Without response positions N is 0 and the sum is a zero that
    still has a gradient (of zeros).
    """
    weighted_N, report = _weighted_losses(learner, batch, student_output, teacher_output)
    if learner.observe is not None:
        learner.observe(batch, report)
    scores.add(batch, weighted_N, report)
    loss_terms = _count_loss_terms(learner.normalization, batch, report["outlier"])
    return weighted_N.sum(), loss_terms, token_sums(batch, weighted_N, loss_terms, report)


def _weighted_losses(
    learner: Learner,
    batch: MicroBatch,
    student_output: torch.Tensor,
    teacher_output: torch.Tensor | None,
) -> tuple[torch.Tensor, LossReport]:
    tokens_N, regions_N, uniforms_N, engine_log_probs_N, weights_N = (
        values_BS.flatten()[batch.loss_positions_N]
        for values_BS in (
            batch.labels_BS, batch.regions_BS, batch.uniforms_BS, batch.rollout_log_probs_BS, batch.weights_BS
        )
    )  # fmt: skip
    advantages_N = None if batch.advantages_BS is None else batch.advantages_BS.flatten()[batch.loss_positions_N]
    sizes: dict[str, Any] = {"vocab_size": learner.vocab_size, "group": learner.layout.groups.tp}
    mode, full = learner.stage.output_head, teacher_output is not None
    if mode == "logits":
        loss_N, report = distillation_loss(
            student_output, teacher_output, tokens_N, regions_N, learner.objective,
            uniforms_T=uniforms_N, advantages_T=advantages_N, engine_log_probs_T=engine_log_probs_N,
            full_statistics=full, inplace_backward=True, **sizes,
        )  # fmt: skip
        return loss_N * weights_N, report
    teacher_head = None
    if teacher_output is not None:
        weight_VH = learner.stage.teacher_weight() if learner.ahead is None else learner.ahead.head(batch)
        teacher_head = OutputHead(teacher_output, weight_VH)
    student_head = OutputHead(student_output, output_weight(learner.stage.module))
    return fused_head_loss(
        student_head, teacher_head, tokens_N, regions_N, learner.objective,
        uniforms_N=uniforms_N, advantages_N=advantages_N, engine_log_probs_N=engine_log_probs_N,
        weights_N=weights_N, full_statistics=full,
        recompute=mode == "fused-recompute", fp32_logits=learner.fp32_logits, chunk_size=learner.head_chunk_size,
        check=False, **sizes,
    )  # fmt: skip


def _count_loss_terms(normalization: Normalization, batch: MicroBatch, outlier_N: torch.Tensor) -> torch.Tensor:
    """This micro-batch's share of the denominator, an int scalar: known before the forward, but for ``kept``."""
    if normalization == "kept":
        return (outlier_N.shape[0] - (outlier_N > 0).sum()).int()
    return torch.tensor(batch.num_loss_terms, dtype=torch.int, device=outlier_N.device)


def _refuse_non_finite(learner: Learner, batch: Batch, sums: dict[str, float], scores: SampleScores) -> None:
    buffers = [buffer for chunk in learner.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    bad_gradient = sum(~torch.isfinite(buffer.grad_data.norm()) for buffer in buffers)
    bad_loss = float(not torch.isfinite(torch.tensor(sums["loss"])))
    flags = torch.tensor([float(bad_gradient), bad_loss], device=learner.layout.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if not flags.any():
        return
    samples = scores.non_finite()
    what = "loss" if flags[1] else "gradient"
    where = f"samples {samples}" if samples else "no single sample"
    raise NonFiniteError(
        f"step {batch.step}: the {what} is not finite ({where}). "
        "The optimizer has not moved; the last checkpoint is intact. Plain K1 (opd, or gate=none) diverges where the "
        "teacher gives a sampled token no mass: use gate=bernoulli, or lower the learning rate.",
        samples,
    )


@contextmanager
def _naming_worst_samples(scores: SampleScores, count: int) -> Iterator[None]:
    """A refusal that does not know which samples are at fault gets the worst ``count``; 0: none, which means all."""
    try:
        yield
    except LogProbGapError as error:
        error.samples = tuple(scores.worst("log_prob_gap", count))
        raise
    except ExplodingError as error:
        error.samples = tuple(scores.worst("loss", count))
        raise


def _guarded_numbers(learner: Learner, loss: float) -> tuple[float, float]:
    """(|loss|, gradient norm before clipping) with the same bits on every rank."""
    learner.optimizer.prepare_grads()  # as optimizer.step() does again: nothing moves, nothing is scaled
    numbers = torch.tensor(
        [abs(loss), float(learner.optimizer.get_grad_norm())], dtype=torch.float64, device=learner.layout.device
    )
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    magnitude, grad_norm = numbers.tolist()
    return magnitude, grad_norm


def _refuse_log_prob_gap(step: int, gap: float, limit: float | None) -> None:
    """``gap``: mean |trainer - engine| log-prob of the sampled tokens, nats, equal on every rank."""
    if limit is not None and gap > limit:
        raise LogProbGapError(
            f"step {step}: the log-probs of the engine that generated and of the trainer differ by {gap:.3g} nats on "
            f"average, more than training.max_log_prob_gap {limit}. The two do not run the same model (weights not in "
            "step, another precision, attention or sampling option), so the loss would be of the wrong policy. The "
            "optimizer has not moved; correct that, or raise the limit."
        )
