"""The loss fused with the output layers: equal to the loss on whole logits, value and every gradient, at tp 1, 2, 4."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense_reference import dense_loss
from ranks import run_ranks
from vocab_parallel_cases import VARIANTS, CountCollectives, measure_memory, relative_error

from megatron_tropd.objectives import Objective, preset
from megatron_tropd.vocab_parallel import OutputHead, distillation_loss, fused_head_loss, recommended_chunk_size

NUM_TOKENS = 23
CHUNKS = (5, 23, 1000)
"""The first does not divide the tokens, the last is more than all of them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Whole inputs of both heads; the two models' padded vocabularies and widths differ."""

    student_NH: torch.Tensor
    student_VH: torch.Tensor
    teacher_NH: torch.Tensor
    teacher_VH: torch.Tensor
    tokens_N: torch.Tensor
    regions_N: torch.Tensor
    uniforms_N: torch.Tensor
    weights_N: torch.Tensor
    advantages_N: torch.Tensor
    engine_log_probs_N: torch.Tensor
    vocab_size: int = 50


def make_case(dtype: torch.dtype = torch.float32, num_tokens: int = NUM_TOKENS) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student_NH, student_VH = normal(num_tokens, 16), normal(56, 16)
    # A wider teacher that mostly agrees: both trusted tokens and outliers occur.
    teacher_NH = torch.cat((student_NH, 0.5 * normal(num_tokens, 8)), -1)
    teacher_VH = torch.cat((student_VH[:50], normal(50, 8)), -1)
    teacher_VH = torch.cat((teacher_VH, normal(14, 24)))
    return Case(
        student_NH=student_NH.to(dtype),
        student_VH=student_VH.to(dtype),
        teacher_NH=teacher_NH.to(dtype),
        teacher_VH=teacher_VH.to(dtype),
        tokens_N=torch.randint(0, 50, (num_tokens,), generator=generator),
        regions_N=torch.randint(1, 3, (num_tokens,), generator=generator),
        uniforms_N=torch.rand(num_tokens, generator=generator),
        weights_N=torch.rand(num_tokens, generator=generator),
        advantages_N=normal(num_tokens),
        engine_log_probs_N=-3 + normal(num_tokens),
    )


def rows_of(weight_VH: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return weight_VH.clone()
    return weight_VH.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def whole(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def run_head(
    case: Case, objective: Objective, group: Any, *, fused: bool = True, scale: float = 1.0, **options: Any
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """(weighted loss, report, whole gradient of the hidden states, whole gradient of the weight)."""
    hidden_NH = case.student_NH.clone().requires_grad_()
    weight_VH = rows_of(case.student_VH, group).requires_grad_()
    student = OutputHead(hidden_NH, weight_VH)
    teacher = OutputHead(case.teacher_NH, rows_of(case.teacher_VH, group)) if objective.needs_teacher else None
    full = teacher is not None
    advantages_N = case.advantages_N if objective.task_reward else None
    if fused:
        weighted_N, report = fused_head_loss(
            student, teacher, case.tokens_N, case.regions_N, objective, vocab_size=case.vocab_size, group=group,
            uniforms_N=case.uniforms_N, weights_N=case.weights_N, full_statistics=full, advantages_N=advantages_N,
            engine_log_probs_N=case.engine_log_probs_N, **options,
        )  # fmt: skip
    else:
        # In the fused loss's chunks: products of other shapes round otherwise.
        chunk_size = options.get("chunk_size", hidden_NH.shape[0])
        student_NV = torch.cat([rows_CH @ weight_VH.T for rows_CH in hidden_NH.split(chunk_size)])
        teacher_NV = None
        if teacher is not None:
            rows = teacher.hidden_NH.split(chunk_size)
            teacher_NV = torch.cat([rows_CH @ teacher.weight_VH.T for rows_CH in rows])
        loss_N, report = distillation_loss(
            student_NV, teacher_NV, case.tokens_N, case.regions_N, objective,
            vocab_size=case.vocab_size, group=group, uniforms_T=case.uniforms_N, full_statistics=full,
            advantages_T=advantages_N, engine_log_probs_T=case.engine_log_probs_N,
        )  # fmt: skip
        weighted_N = loss_N * case.weights_N
    (scale * weighted_N.sum()).backward()
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    if group is not None:
        dist.all_reduce(hidden_NH.grad, group=group)
    return weighted_N.detach(), report, hidden_NH.grad, whole(weight_VH.grad, group)


def compare_with_unfused(groups: dict[int, Any]) -> None:
    case = make_case()
    for objective, (tp, group) in itertools.product(VARIANTS, groups.items()):
        for chunk_size, recompute in itertools.product(CHUNKS if tp < 4 else CHUNKS[:1], (False, True)):
            wanted = run_head(case, objective, group, fused=False, scale=0.25, chunk_size=chunk_size)
            found = run_head(case, objective, group, scale=0.25, chunk_size=chunk_size, recompute=recompute)
            where = f"{objective.name} tp {tp} chunk {chunk_size} recompute {recompute}"
            torch.testing.assert_close(found[0], wanted[0], atol=3e-6, rtol=3e-6, msg=where)
            for a, b in zip(found[2:], wanted[2:], strict=True):
                assert relative_error(a, b.double()) < 3e-6, where
            assert set(found[1]) == set(wanted[1]), where
            for name, value in found[1].items():
                torch.testing.assert_close(value, wanted[1][name], atol=5e-6, rtol=5e-6, msg=f"{where}: {name}")


def compare_with_dense(groups: dict[int, Any]) -> dict[str, float]:
    """Whole logits, loss and gradients in float64."""
    worst: dict[str, float] = {}
    for dtype, objective, group, recompute in itertools.product(
        (torch.float32, torch.bfloat16), VARIANTS[::4], groups.values(), (False, True)
    ):
        case = make_case(dtype)
        loss_N, _, *gradients = run_head(case, objective, group, chunk_size=5, recompute=recompute)
        hidden_NH = case.student_NH.double().requires_grad_()
        weight_VH = case.student_VH.double().requires_grad_()
        # What a head hands over are logits of its dtype; the reference starts from the same rounding.
        logits_NV = hidden_NH @ weight_VH.T
        rounded_NV = (case.student_NH @ case.student_VH.T).double()
        logits_NV = logits_NV + (rounded_NV - logits_NV).detach()
        teacher_NV = (case.teacher_NH @ case.teacher_VH.T).double() if objective.needs_teacher else None
        dense_N, _ = dense_loss(
            logits_NV, teacher_NV, case.tokens_N, case.regions_N, objective,
            vocab_size=case.vocab_size, uniforms_T=case.uniforms_N,
            advantages_T=case.advantages_N if objective.task_reward else None,
            engine_log_probs_T=case.engine_log_probs_N if objective.needs_engine_log_probs else None,
        )  # fmt: skip
        weighted_N = dense_N * case.weights_N
        weighted_N.sum().backward()
        pairs = [("value", loss_N, weighted_N.detach())]
        pairs += [("hidden", gradients[0], hidden_NH.grad), ("weight", gradients[1], weight_VH.grad)]
        for what, found, wanted in pairs:
            assert wanted is not None
            key = f"{what} {dtype}"
            worst[key] = max(worst.get(key, 0.0), relative_error(found, wanted))
    return worst


def count(groups: dict[int, Any]) -> dict[str, tuple[int, int]]:
    """Collectives of three chunks, forward and backward."""
    case, found = make_case(), {}
    for name, recompute in itertools.product(("opd", "fkl", "rkl-exact"), (False, True)):
        student = OutputHead(case.student_NH.clone().requires_grad_(), rows_of(case.student_VH[:48], groups[4]))
        teacher = OutputHead(case.teacher_NH, rows_of(case.teacher_VH[:48], groups[4]))
        with CountCollectives() as forward:
            loss_N, _ = fused_head_loss(
                student, teacher, case.tokens_N.clamp(max=47), case.regions_N, preset(name), vocab_size=48,
                group=groups[4], uniforms_N=case.uniforms_N, chunk_size=8, recompute=recompute,
            )  # fmt: skip
        with CountCollectives() as backward:
            loss_N.sum().backward()
        found[f"{name} {recompute}"] = len(forward.calls), len(backward.calls)
    return found


def run_all() -> dict[str, Any]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: dict[int, Any] = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    compare_with_unfused(groups)
    return {"errors": compare_with_dense(groups), "collectives": count(groups)}


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, Any]]:
    return run_ranks(4, run_all, timeout=300)


def test_equal_to_the_loss_on_whole_logits_and_to_dense_float64(on_ranks: list[dict[str, Any]]) -> None:
    """The comparison with the unfused loss ran on the ranks."""
    for rank in on_ranks:
        for key, error in rank["errors"].items():
            # bf16: the gradients of logits, hidden states and weight are each rounded once.
            assert error < (3e-6 if "float32" in key else 3e-6 if "value" in key else 8e-3), (key, error)


def test_one_all_gather_per_chunk_and_none_in_the_backward(on_ranks: list[dict[str, Any]]) -> None:
    for rank in on_ranks:
        for recompute in (False, True):
            assert rank["collectives"][f"opd {recompute}"] == (3, 0)
            assert rank["collectives"][f"rkl-exact {recompute}"] == (3, 0)
            assert rank["collectives"][f"fkl {recompute}"] == (6, 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_without_tokens(recompute: bool) -> None:
    case = make_case(num_tokens=0)
    loss_N, report, hidden_grad, weight_grad = run_head(case, preset("tropd"), None, recompute=recompute)
    assert loss_N.shape == (0,) and report.reward.shape == (0,)
    assert hidden_grad.shape == (0, 16) and not weight_grad.any()


def test_any_gradient_needs_recompute() -> None:
    """Gradients taken in the forward are those of the sum; what weighs tokens by all their values recomputes."""
    case = make_case()

    def gradient(recompute: bool) -> torch.Tensor:
        hidden_NH = case.student_NH.clone().requires_grad_()
        student = OutputHead(hidden_NH, case.student_VH)
        loss_N, report = fused_head_loss(
            student, OutputHead(case.teacher_NH, case.teacher_VH), case.tokens_N, case.regions_N, preset("fkl-exact"),
            vocab_size=50, full_statistics=True, chunk_size=5, recompute=recompute,
        )  # fmt: skip
        most_uncertain = report.teacher_entropy > report.teacher_entropy.quantile(0.8)
        loss_N[most_uncertain].sum().backward()
        assert hidden_NH.grad is not None
        assert hidden_NH.grad[most_uncertain].any() and not hidden_NH.grad[~most_uncertain].any()
        return hidden_NH.grad

    gradient(recompute=True)
    with pytest.raises(RuntimeError, match="only a multiple of the result's sum"):
        gradient(recompute=False)


def test_a_frozen_weight_and_frozen_hidden_states_get_no_gradient() -> None:
    case = make_case()
    for recompute, frozen in itertools.product((False, True), ("hidden", "weight")):
        hidden_NH = case.student_NH.clone().requires_grad_(frozen != "hidden")
        weight_VH = case.student_VH.clone().requires_grad_(frozen != "weight")
        loss_N, _ = fused_head_loss(
            OutputHead(hidden_NH, weight_VH), OutputHead(case.teacher_NH, case.teacher_VH), case.tokens_N,
            case.regions_N, preset("opd"), vocab_size=50, recompute=recompute, chunk_size=5,
        )  # fmt: skip
        loss_N.sum().backward()
        assert (hidden_NH.grad is None) == (frozen == "hidden") and (weight_VH.grad is None) == (frozen == "weight")
    with torch.no_grad():
        loss_N, _ = fused_head_loss(
            OutputHead(hidden_NH, weight_VH), OutputHead(case.teacher_NH, case.teacher_VH), case.tokens_N,
            case.regions_N, preset("opd"), vocab_size=50,
        )  # fmt: skip
    assert not loss_N.requires_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_weights_gradient_goes_into_megatrons_main_gradient(recompute: bool, tied: bool) -> None:
    """And autograd gets what DistributedDataParallel's hook expects: zeros to add to where the weight is tied."""
    case = make_case(torch.bfloat16)
    wanted = run_head(case, preset("tropd"), None, recompute=recompute)[3]
    weight = torch.nn.Parameter(case.student_VH.clone())
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, tied
    loss_N, _ = fused_head_loss(
        OutputHead(case.student_NH, weight), OutputHead(case.teacher_NH, case.teacher_VH), case.tokens_N,
        case.regions_N, preset("tropd"), vocab_size=50, uniforms_N=case.uniforms_N, weights_N=case.weights_N,
        recompute=recompute, chunk_size=5,
    )  # fmt: skip
    loss_N.sum().backward()
    assert weight.grad_added_to_main_grad
    assert relative_error(weight.main_grad - 1, wanted.double()) < 4e-3
    assert weight.grad is not None and (not tied or not weight.grad.any())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["tropd", "fkl-exact"])
def test_fp32_logits_show_models_that_nearly_agree_apart(name: str, recompute: bool) -> None:
    """Large logits, a small difference: rounded to bf16 the gradient is noise, kept in fp32 it is exact."""
    case = make_case(torch.bfloat16)
    hidden_NH, weight_VH = 3 * case.student_NH, case.student_VH[:50]
    noise_NH = 0.02 * torch.randn(NUM_TOKENS, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    teacher_NH, teacher_VH = torch.cat((hidden_NH, noise_NH), -1), case.teacher_VH[:50]
    exact_NH = hidden_NH.double().requires_grad_()
    dense_N, _ = dense_loss(
        exact_NH @ weight_VH.double().T, teacher_NH.double() @ teacher_VH.double().T, case.tokens_N, case.regions_N,
        preset(name, guidance_beta=0.0), vocab_size=50, uniforms_T=torch.zeros(NUM_TOKENS),
    )  # fmt: skip
    dense_N.sum().backward()
    errors = []
    for fp32_logits in (False, True):
        leaf_NH = hidden_NH.clone().requires_grad_()
        loss_N, _ = fused_head_loss(
            OutputHead(leaf_NH, weight_VH), OutputHead(teacher_NH, teacher_VH), case.tokens_N, case.regions_N,
            preset(name, guidance_beta=0.0), vocab_size=50, uniforms_N=torch.zeros(NUM_TOKENS), chunk_size=5,
            recompute=recompute, fp32_logits=fp32_logits,
        )  # fmt: skip
        loss_N.sum().backward()
        assert leaf_NH.grad is not None and exact_NH.grad is not None and leaf_NH.grad.dtype == torch.bfloat16
        errors.append(relative_error(leaf_NH.grad, exact_NH.grad))
    assert errors[1] < 8e-3 and errors[0] > 20 * errors[1], errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions_N": torch.zeros(NUM_TOKENS, dtype=torch.long)}, "must be of a region"),
        ({"student_VH": torch.zeros(56, 17)}, "must share H and dtype"),
        ({"teacher_NH": torch.zeros(NUM_TOKENS, 24, dtype=torch.bfloat16)}, "teacher: hidden_NH"),
        ({"weights_N": torch.ones(3)}, "weights_N must be floating"),
        ({"tokens_N": torch.full((NUM_TOKENS,), 55)}, "tokens_T must be in"),
        ({"vocab_size": 60}, "vocab_size must be between"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_head(dataclasses.replace(make_case(), **change), preset("tropd"), None)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        run_head(make_case(), preset("tropd"), None, chunk_size=0)


def test_recommended_chunk_size() -> None:
    # A quarter of few tokens; for many, what hides launches and 8 B per weight behind the products.
    assert recommended_chunk_size(100, 151936, 1024, 2048) == 256
    assert recommended_chunk_size(4096, 151936, 1024, 2048) == 1024
    assert recommended_chunk_size(32768, 151936, 1024, 2048) == 2048
    assert recommended_chunk_size(32768, 151936, 2048) == 1536
    assert recommended_chunk_size(32768, 18992, 4096, 8192) == 3840  # a narrow shard: products of 3e12 FLOP
    assert recommended_chunk_size(32768, 151936, 1024, 8192) == 768
    assert recommended_chunk_size(4096, 151936, 1024, 2048, fp32_logits=True) == 512
    assert recommended_chunk_size(32768, 1000, 64, 64) == 4096


@pytest.mark.parametrize("recompute", [False, True])
def test_whole_logits_never_exist(recompute: bool) -> None:
    """Peak beside the inputs and the fp32 weight gradient: 0.6 of one bf16 logits matrix at T = 4096, and less where a
    chunk is a smaller share of the tokens, as it is of many."""
    assert recommended_chunk_size(4096, 12000, 16, 32) == 1024 and recommended_chunk_size(32768, 12000, 16, 32) == 4096
    shares = []
    for num_tokens, chunk_size in ((4096, None), (8192, 1024)):
        vocab_size, width = 12000, 16
        student = OutputHead(
            torch.randn(num_tokens, width).bfloat16().requires_grad_(),
            torch.randn(vocab_size, width).bfloat16().requires_grad_(),
        )
        student_NH, student_VH = student.hidden_NH.detach(), student.weight_VH.detach()
        teacher = OutputHead(torch.cat((student_NH, student_NH), -1), 0.5 * torch.cat((student_VH, student_VH), -1))
        tokens = torch.randint(0, vocab_size, (num_tokens,))
        with measure_memory() as use:
            loss_N, _ = fused_head_loss(
                student, teacher, tokens, torch.full_like(tokens, 2), preset("tropd", top_k=8), vocab_size=vocab_size,
                full_statistics=True, recompute=recompute, chunk_size=chunk_size,
            )  # fmt: skip
            loss_N.sum().backward()
        shares.append(use.peak / (2 * num_tokens * vocab_size))
    assert shares[0] < 0.6 and shares[1] < 0.7 * shares[0], shares
