"""Inputs, comparisons and measures that the single-process and the distributed tests of the sharded loss share.

Shape suffixes: ``T`` tokens, ``V`` a model's padded vocabulary (whole, before it is cut into shards).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from dense_reference import dense_loss
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tropd.objectives import Objective, preset
from megatron_tropd.vocab_parallel import distillation_loss

# Largest relative error against dense float64.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}

VARIANTS: list[Objective] = [
    *(
        preset("tropd", gate=gate, outlier=outlier, top_k=7)
        for gate, outlier in itertools.product(["bernoulli", "static", "soft", "none"], ["fkl", "mask", "clip"])
    ),
    preset("tropd", top_k=17, renormalize="teacher"),
    preset("tropd", top_k=17, gate="soft", renormalize="both"),
    preset("tropd", top_k=17, tail="bucket"),
    preset("tropd", top_k=17, student_log_prob_min=-4.0),
    preset("tropd", top_k=17, gate="static", tau=-0.5, fkl_as="reward"),
    preset("opd", beta=0.5),
    preset("fkl"),
    preset("fkl", top_k=1000),
    preset("rkl-exact"),
    preset("fkl-exact"),
    preset("jsd-exact"),
    preset("jsd-exact", beta=0.1, guidance_beta=0.3),
    preset("sft"),
    preset("aopd", top_k=7),
    preset("tropd-aopd", top_k=7),
    preset("tropd-aopd", top_k=7, gate="soft", outlier="mask"),
    preset("tropd-aopd", top_k=7, gate="soft", outlier="clip"),
    preset("tropd-exact"),
    preset("tropd-exact", gate="soft", guidance_loss="forward_kl", beta=0.7),
    preset("tropd-exact", gate="static", outlier="mask"),
    preset("top-d"),
    preset("mopd", top_k=7),
    preset("mopd"),
    preset("jsd", top_k=7),
    preset("jsd", beta=0.1),
    preset("skew-fkl"),
    preset("skew-rkl"),
    preset("skew-rkl", skew=0.6, guidance_beta=0.3),
    preset("eopd", entropy_tau=1.5),
    preset("eopd", entropy_tau=1.5, alpha=0.4, top_k=7, renormalize="none", fkl_as="reward"),
    preset("reopold"),
    preset("seq-kd"),
    preset("gkd"),
    preset("fkl-exact", guidance_loss="divergence", beta=0.3),
    preset("skew-rkl", guidance_loss="divergence", beta=0.3),
    preset("opd", task_reward=1.0),
    preset("rkl-exact", task_reward=1.0),
    preset("tropd", top_k=7, task_reward=1.0, importance_cap=1.5),
    preset("tropd", top_k=7, clip_ratio_low=0.2, clip_ratio_high=0.28),
    preset("tropd", top_k=7, outlier="clip", gate="soft", task_reward=1.0, clip_ratio_low=0.3, clip_ratio_high=0.1),
    preset("jsd", top_k=7, clip_ratio_low=0.2, clip_ratio_high=0.28, importance_cap=1.5),
    preset("rkl-exact", task_reward=1.0, clip_ratio_low=0.2, clip_ratio_high=0.28),
]


@dataclass(frozen=True)
class Case:
    """Whole inputs: both models' padded logits, and what belongs to each token."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    tokens_T: torch.Tensor
    regions_T: torch.Tensor
    uniforms_T: torch.Tensor
    grad_T: torch.Tensor
    """Incoming gradient of the loss."""
    vocab_size: int
    advantages_T: torch.Tensor
    """Read where the objective has a task."""
    engine_log_probs_T: torch.Tensor

    def sampled(self, objective: Objective) -> dict[str, torch.Tensor]:
        """What `distillation_loss` and `dense_loss` take of the rollout for this objective."""
        found = {}
        if objective.task_reward:
            found["advantages_T"] = self.advantages_T
        if objective.needs_engine_log_probs:
            found["engine_log_probs_T"] = self.engine_log_probs_T
        return found


def make_case(
    vocab_size: int,
    student_padded: int,
    teacher_padded: int,
    *,
    num_tokens: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Correlated models (both trust and outlier tokens occur), nan and inf in the padding, all three regions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student = 3 * normal(num_tokens, student_padded)
    teacher = torch.full((num_tokens, teacher_padded), float("inf"))
    teacher[:, :vocab_size] = student[:, :vocab_size] + 1.5 * normal(num_tokens, vocab_size)
    student[:, vocab_size:] = float("nan")
    regions = torch.randint(0, 3, (num_tokens,), generator=generator)
    tokens = torch.randint(0, vocab_size, (num_tokens,), generator=generator).where(regions != 0, -100)
    uniforms = torch.rand(num_tokens, generator=generator)
    grad, advantages, noise = normal(num_tokens), normal(num_tokens), normal(num_tokens)
    # Near the student's own log-probs: importance weights on both sides of 1.
    log_probs = student[:, :vocab_size].log_softmax(-1).gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return Case(
        student.to(dtype), teacher.to(dtype), tokens, regions, uniforms, grad, vocab_size, advantages,
        log_probs + 0.5 * noise,
    )  # fmt: skip


def shard(logits_TV: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's columns, contiguous."""
    if group is None:
        return logits_TV.clone()
    return logits_TV.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()


def unshard(local_TV: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All ranks' columns."""
    if group is None:
        return local_TV
    pieces = [torch.empty_like(local_TV) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, local_TV.contiguous(), group=group)
    return torch.cat(pieces, dim=1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((found.double() - wanted).norm() / wanted.norm())


def run_sharded(
    case: Case, objective: Objective, group: dist.ProcessGroup | None, **options: Any
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(loss, report, whole gradient) of the package's loss under the case's incoming gradient."""
    student = shard(case.student_TV, group).requires_grad_()
    teacher = shard(case.teacher_TV, group) if objective.needs_teacher else None
    options = {"uniforms_T": case.uniforms_T} | case.sampled(objective) | options
    student_before, teacher_before = student.detach().clone(), None if teacher is None else teacher.clone()
    loss, report = distillation_loss(
        student,
        teacher,
        case.tokens_T,
        case.regions_T,
        objective,
        vocab_size=case.vocab_size,
        group=group,
        **options,
    )
    loss.backward(case.grad_T)
    assert student.grad is not None
    assert student.grad.dtype == student.dtype and loss.dtype == torch.float32
    if not options.get("inplace_backward"):
        assert torch.equal(student.detach().view(torch.uint8), student_before.view(torch.uint8)), "student modified"
    if teacher is not None and teacher_before is not None:
        assert torch.equal(teacher.view(torch.uint8), teacher_before.view(torch.uint8)), "teacher modified"
    return loss.detach(), report, unshard(student.grad, group)


def check_against_dense(
    case: Case, objective: Objective, group: dist.ProcessGroup | None, **options: Any
) -> tuple[float, float]:
    """Assert value, gradient and report; returns the relative errors of value and gradient, by what each may have."""
    loss, report, gradient = run_sharded(case, objective, group, **options)
    student = case.student_TV.double().requires_grad_()
    teacher = case.teacher_TV if objective.needs_teacher else None
    wanted, facts = dense_loss(
        student, teacher, case.tokens_T, case.regions_T, objective,
        vocab_size=case.vocab_size, uniforms_T=case.uniforms_T, **case.sampled(objective),
    )  # fmt: skip
    wanted.backward(case.grad_T.double())
    assert student.grad is not None
    exact = student.grad[:, : case.vocab_size]
    value_error = relative_error(loss, wanted.detach())
    gradient_error = relative_error(gradient[:, : case.vocab_size], exact)
    # The value is fp32 whatever the logits' type: their rounding is the reference's too. A ratio that no cap holds
    # multiplies the error of the difference of two log-probs of size 10.
    slack = 5 if objective.clips_ratio and objective.importance_cap is None else 1
    assert value_error < slack * TOLERANCE[torch.float32], (objective, value_error)
    assert gradient_error < slack * TOLERANCE[case.student_TV.dtype], (objective, gradient_error)
    assert (gradient[:, case.vocab_size :] == 0).all(), "padding got gradient"
    assert (loss[case.regions_T == 0] == 0).all() and (gradient[case.regions_T == 0] == 0).all()
    check_report(report, facts, case, objective)
    return value_error / slack, gradient_error / slack


def check_report(report: Any, facts: dict[str, torch.Tensor], case: Case, objective: Objective) -> None:
    """Every reported quantity that the reference knows, at the tokens where it is defined."""
    some = case.regions_T != 0
    for name in set(report) & set(facts):
        error = (report[name] - facts[name])[some].abs().max() / facts[name][some].abs().max().clamp(min=1e-2)
        assert error < 5e-6, (name, error)
        assert not report[name].requires_grad and (report[name][~some] == 0).all()
    if objective.has_gate:
        on_policy = case.regions_T == 2
        torch.testing.assert_close(report.trust, facts["M"].where(on_policy, 0).float(), atol=2e-6, rtol=0)
        torch.testing.assert_close(report.trust + report.outlier, on_policy.float(), atol=0, rtol=0)
    if objective.needs_top_k:
        needed = (facts["top-k weight"] != 0) & (case.regions_T == 2)
        found, mass = facts["top-k divergence"].where(needed, 0).float(), facts["mass"].where(needed, 0).float()
        torch.testing.assert_close(report.top_k_divergence, found, atol=3e-6, rtol=3e-6)
        torch.testing.assert_close(report.teacher_top_k_mass, mass, atol=3e-6, rtol=3e-6)


class CountCollectives(TorchDispatchMode):
    """Lists the c10d operations in the block, with the bytes that this rank puts into each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            inputs = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
            self.calls.append((func._schema.name.removeprefix("c10d::"), num_bytes))
        return func(*args, **(kwargs or {}))


class NoHostWait(TorchDispatchMode):
    """Refuses every operation in the block whose result's size, or whose host value, depends on a tensor's values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.FORBIDDEN, name
        assert name != "repeat_interleave" or (kwargs or {}).get("output_size") is not None, name
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@dataclass
class MemoryUse:
    """Bytes, relative to the start of the block."""

    peak: int = 0
    kept: int = 0


@contextmanager
def measure_memory() -> Iterator[MemoryUse]:
    """Every allocation and release of torch's CPU allocator in the block, kernels' internal buffers included."""
    use = MemoryUse()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield use
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    for _, num_bytes in changes:
        use.kept += num_bytes
        use.peak = max(use.peak, use.kept)
