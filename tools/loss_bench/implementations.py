"""Who computes the losses: ours in every form, the peers that are installed, and dense code.

Every function takes `Inputs` and an objective and returns the loss of each token ``[T]``, whose sum is differentiated.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

from loss_bench.cases import CASES, HEAD, Inputs
from megatron_tropd.kernels.backend import BACKEND_VARIABLE
from megatron_tropd.objectives import Objective, preset
from megatron_tropd.vocab_parallel import OutputHead, distillation_loss, fused_head_loss

LossFunction = Callable[[Inputs, Objective], torch.Tensor]
MODELOPT, LIGER, TRL = "modelopt.torch.distill.plugins.megatron", "liger_kernel.ops", "trl.kernels.chunked_divergence"
PRODUCTS = "the heads' matrix products alone"
EVERY_LOGITS_CASE = tuple(case for case in CASES if case != HEAD)


@dataclass(frozen=True)
class Implementation:
    """One row per case."""

    name: str
    cases: tuple[str, ...]
    loss: LossFunction
    ours: bool = False
    module: str | None = None
    """What it is imported from."""
    on_cpu: bool = True
    sharded: bool = True
    """Whether it can run on vocabulary shards of several ranks."""
    backend: str | None = None
    """Of our passes."""
    opaque: bool = False
    """Compiled: what its loops move cannot be counted from outside."""
    compiled: bool = False
    """Under torch.compile, in part or whole."""
    is_loss: bool = True
    """False: only part of the work, for comparison; there is no gradient to judge."""
    objectives: dict[str, Objective] = field(default_factory=dict)
    """Where its definition is another variant of the case's objective: its gradient is held to that one."""

    def objective(self, case: str) -> Objective:
        """What it computes in this case."""
        return self.objectives.get(case, CASES[case])

    def obstacle(self, device: torch.device, tp: int) -> str | None:
        """Why it cannot run here."""
        if device.type == "cpu" and not self.on_cpu:
            return "its kernels are Triton alone: needs CUDA"
        if not self.sharded and tp > 1:
            return "needs the whole vocabulary on one rank"
        return None if self.module is None else _import_failure(self.module)

    def environment(self) -> AbstractContextManager[Any]:
        """What must hold while it runs."""
        return patch.dict(os.environ, {BACKEND_VARIABLE: self.backend}) if self.backend else nullcontext()


@cache
def _import_failure(module: str) -> str | None:
    try:
        import_module(module)
    except ImportError as error:
        return f"not installed: {error}; pip install '.[bench]'"
    return None


def ours(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """As the trainer calls it with whole logits: the gradient takes the logits' place."""
    loss_T, _ = distillation_loss(
        inputs.student_TV, inputs.teacher_TV, inputs.tokens_T, inputs.regions_T, objective,
        vocab_size=inputs.vocab_size, group=inputs.group, uniforms_T=inputs.uniforms_T,
        full_statistics=objective.name == "tropd", inplace_backward=True,
    )  # fmt: skip
    return loss_T


def ours_fused(
    inputs: Inputs, objective: Objective, *, recompute: bool = False, fp32_logits: bool = False
) -> torch.Tensor:
    """From the hidden states."""
    loss_T, _ = fused_head_loss(
        OutputHead(inputs.student_TH, inputs.student_VH), OutputHead(inputs.teacher_TH, inputs.teacher_VH),
        inputs.tokens_T, inputs.regions_T, objective, vocab_size=inputs.vocab_size, group=inputs.group,
        uniforms_N=inputs.uniforms_T, recompute=recompute, fp32_logits=fp32_logits,
    )  # fmt: skip
    return loss_T


def from_whole_logits(loss: LossFunction, inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Both output layers, then a loss on their logits."""
    student_TV = inputs.student_TH @ inputs.student_VH.T
    with torch.no_grad():
        teacher_TV = inputs.teacher_TH @ inputs.teacher_VH.T
    return loss(SimpleNamespace(**{**vars(inputs), "student_TV": student_TV, "teacher_TV": teacher_TV}), objective)  # type: ignore[arg-type]


def cross_entropy_twice(inputs: Inputs, objective: Objective, *, cross_entropy: Callable[..., Any]) -> torch.Tensor:
    """K1 from the log-probs of two cross-entropies."""

    def log_probs(logits_TV: torch.Tensor) -> torch.Tensor:
        return -cross_entropy(logits_TV[:, None], inputs.tokens_T[:, None], inputs.group)[:, 0]

    with torch.no_grad():
        teacher_T = log_probs(inputs.teacher_TV)
    student_T = log_probs(inputs.student_TV)
    return -(teacher_T - student_T.detach()) * student_T


def _megatron(logits: torch.Tensor, tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return vocab_parallel_cross_entropy(logits, tokens, tp_group=group)


def _liger(logits: torch.Tensor, tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    from liger_kernel.ops import LigerVocabParallelCEFunction

    return LigerVocabParallelCEFunction.apply(logits, tokens, group, -100, 0.0, "megatron", "global")


def modelopt(inputs: Inputs, objective: Objective, *, reverse: bool = False) -> torch.Tensor:
    """NVIDIA ModelOpt's losses for Megatron; over the top-k where the objective has one."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    size = dist.get_world_size(inputs.group)
    if size > 1 and not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = SimpleNamespace(tensor_model_parallel_size=size)
    loss = LogitsKLLoss(config, reverse=reverse)
    if objective.needs_top_k:
        loss = TopKLogitsKLLoss(config, top_k=objective.top_k)
    loss_BS, *_ = loss(inputs.student_TV[:, None], inputs.teacher_TV[:, None])
    return loss_BS[0]


def parts_of_tropd(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """TrOPD put together from Megatron's cross-entropies and ModelOpt's top-k loss, without its metrics.

    ModelOpt renormalises both models over the top-k, so this is the variant with ``renormalize="both"``.
    """
    k1_T = cross_entropy_twice(inputs, objective, cross_entropy=_megatron)
    with torch.no_grad():
        teacher_T = -_megatron(inputs.teacher_TV[:, None], inputs.tokens_T[:, None], inputs.group)[:, 0]
    student_T = -_megatron(inputs.student_TV[:, None], inputs.tokens_T[:, None], inputs.group)[:, 0]
    trusted_T = inputs.uniforms_T < (teacher_T - student_T.detach()).exp()
    on_policy_T = torch.where(trusted_T, k1_T, modelopt(inputs, objective))
    return torch.where(inputs.regions_T == 1, -objective.guidance_beta * student_T, on_policy_T)


def trl(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """TRL's chunked divergence from hidden states: forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence_T, _ = ChunkedDivergenceFunction.apply(
        inputs.student_TH, inputs.student_VH, None, inputs.teacher_TH, inputs.teacher_VH, None,
        0.0, 1.0, 1.0, None, 1.0, None,
    )  # fmt: skip
    return divergence_T


def liger_fused_linear(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Liger's fused linear JSD at beta 0, the forward KL; it returns a mean over the tokens."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    loss = LigerFusedLinearJSDFunction.apply(
        inputs.student_TH, inputs.student_VH, inputs.teacher_TH, inputs.teacher_VH, None, 0.0, -100, 1.0
    )
    return loss[None] * inputs.tokens_T.shape[0]


def naive(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Whole log-softmaxes in fp32, plain autograd."""
    log_p, log_q = inputs.student_TV.float().log_softmax(-1), inputs.teacher_TV.float().log_softmax(-1)
    at = inputs.tokens_T[:, None]
    log_p_x, log_q_x = log_p.gather(1, at)[:, 0], log_q.gather(1, at)[:, 0]
    reward = (log_q_x - log_p_x).detach()
    if objective.name == "opd":
        return -reward * log_p_x
    if objective.name == "fkl-exact":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if objective.name == "rkl-exact":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if objective.name == "jsd-exact":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        return 0.5 * ((log_q.exp() * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1))
    top_q, ids = log_q.topk(objective.top_k)
    forward_kl = (top_q.exp() * (top_q - log_p.gather(1, ids))).sum(-1)
    if objective.name == "fkl":
        return forward_kl
    on_policy = torch.where(inputs.uniforms_T < reward.exp(), -reward * log_p_x, forward_kl)
    loss = torch.where(inputs.regions_T == 1, -objective.guidance_beta * log_p_x, on_policy)
    # What our mix reports for every token, so that both compute the same.
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        metrics = torch.stack([(p * log_p).sum(-1), (q * log_q).sum(-1), (p * (log_p - log_q)).sum(-1)])
        metrics = torch.cat((metrics, (q * (log_q - log_p)).sum(-1)[None]))
    return loss + 0 * metrics.sum(0)


class _Products(torch.autograd.Function):
    """The student's logits stand for their own gradient, which has their shape and dtype."""

    @staticmethod
    def forward(ctx: Any, student_TH: torch.Tensor, student_VH: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        student_TV = student_TH @ student_VH.T
        torch.mm(inputs.teacher_TH, inputs.teacher_VH.T)
        ctx.save_for_backward(student_TH, student_VH, student_TV)
        return student_TH.new_zeros(student_TH.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        student_TH, student_VH, student_TV = ctx.saved_tensors
        return student_TV @ student_VH, student_TV.T @ student_TH, None


def products(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """The four matrix products that both output layers cannot do without, each as a whole, and no loss."""
    return _Products.apply(inputs.student_TH, inputs.student_VH, inputs)


def implementations(device: torch.device) -> list[Implementation]:
    """Ours first, in the form that other times are relative to."""
    renormalized = {"top-k FKL": preset("fkl", renormalize="both")}
    forms = [("ours", "triton" if device.type == "cuda" else "torch"), ("ours, compiled", "compile")]
    found = []
    for name, backend in forms:
        made: dict[str, Any] = {"ours": True, "backend": backend, "compiled": backend == "compile"}
        found += [
            Implementation(name, EVERY_LOGITS_CASE, ours, **made),
            Implementation(name, (HEAD,), ours_fused, **made),
            Implementation(f"{name}, recomputing", (HEAD,), partial(ours_fused, recompute=True), **made),
            Implementation(f"{name}, fp32 logits", (HEAD,), partial(ours_fused, fp32_logits=True), **made),
        ]
    whole_ours = partial(from_whole_logits, ours)
    compiled = torch.compile(naive, dynamic=False)
    compiled_head = torch.compile(partial(from_whole_logits, naive), dynamic=False)
    twice = "cross-entropy, twice"
    mix = {"TrOPD mix": preset("tropd", renormalize="both")}
    return [
        *found,
        Implementation("ours, whole logits", (HEAD,), whole_ours, ours=True, backend=forms[0][1]),
        Implementation(f"Megatron {twice}", ("K1",), partial(cross_entropy_twice, cross_entropy=_megatron)),
        Implementation(
            f"Megatron fused {twice}", ("K1",),
            partial(cross_entropy_twice, cross_entropy=fused_vocab_parallel_cross_entropy), opaque=True,
        ),
        Implementation(
            f"Liger {twice}", ("K1",), partial(cross_entropy_twice, cross_entropy=_liger), module=LIGER,
            on_cpu=False, opaque=True,
        ),
        Implementation(
            "ModelOpt TopKLogitsKLLoss", ("top-k FKL",), modelopt, module=MODELOPT, objectives=renormalized,
        ),
        Implementation("ModelOpt LogitsKLLoss", ("FKL",), modelopt, module=MODELOPT),
        Implementation("ModelOpt LogitsKLLoss, reverse", ("RKL",), partial(modelopt, reverse=True), module=MODELOPT),
        Implementation("Megatron + ModelOpt parts", ("TrOPD mix",), parts_of_tropd, module=MODELOPT, objectives=mix),
        Implementation("TRL chunked divergence", (HEAD,), trl, module=TRL, sharded=False),
        Implementation(
            "Liger fused linear JSD", (HEAD,), liger_fused_linear, module=LIGER, on_cpu=False, sharded=False,
            opaque=True,
        ),
        Implementation("dense", EVERY_LOGITS_CASE, naive, sharded=False),
        Implementation("dense", (HEAD,), partial(from_whole_logits, naive), sharded=False),
        Implementation("dense, compiled", EVERY_LOGITS_CASE, compiled, sharded=False, opaque=True, compiled=True),
        Implementation("dense, compiled", (HEAD,), compiled_head, sharded=False, opaque=True, compiled=True),
        Implementation(PRODUCTS, (HEAD,), products, is_loss=False),
    ]  # fmt: skip
