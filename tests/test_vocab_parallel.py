"""The sharded loss in one process (the shard is the whole vocabulary), and what it costs in memory."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from vocab_parallel_cases import (
    VARIANTS,
    Case,
    check_against_dense,
    make_case,
    measure_memory,
    relative_error,
    run_sharded,
)

from megatron_tropd.objectives import Objective, preset
from megatron_tropd.vocab_parallel import distillation_loss

L = math.log(2)


def test_hand_worked_gradients() -> None:
    """V = 4, pi_S = (1/2, 1/4, 1/8, 1/8), pi_T = (1/8, 1/8, 1/4, 1/2), x = 0, one token of each treatment.

    R = ln((1/8)/(1/2)) = -2 L, P_trust = 1/4. Teacher top-2 = ids (3, 2), mass 3/4.
    """
    student = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log().repeat(4, 1).requires_grad_()
    teacher = torch.tensor([[1 / 8, 1 / 8, 1 / 4, 1 / 2]]).log().repeat(4, 1) + 5
    regions = torch.tensor([0, 1, 2, 2])
    uniforms = torch.tensor([0.0, 0.0, 0.24, 0.25])
    objective = preset("tropd", top_k=2, beta=0.5)
    loss, report = distillation_loss(
        student,
        teacher,
        torch.zeros(4, dtype=torch.long),
        regions,
        objective,
        vocab_size=4,
        uniforms_T=uniforms,
    )
    loss.sum().backward()
    # none; -1/2 ln(1/2); -R ln pi_S = -(-2 L)(-L); 1/2 ln((1/2)/(1/8)) + 1/4 ln((1/4)/(1/8)) = L + L/4
    torch.testing.assert_close(loss.detach(), torch.tensor([0, L / 2, -2 * L**2, 1.25 * L]), atol=1e-6, rtol=0)
    expected = [
        [0, 0, 0, 0],
        # beta (pi_S - 1[x])
        [0.5 * (1 / 2 - 1), 0.5 / 4, 0.5 / 8, 0.5 / 8],
        # R (pi_S - 1[x])
        [-2 * L * (1 / 2 - 1), -2 * L / 4, -2 * L / 8, -2 * L / 8],
        # 3/4 pi_S - pi_T 1[top-2]
        [3 / 8, 3 / 16, 3 / 32 - 1 / 4, 3 / 32 - 1 / 2],
    ]
    torch.testing.assert_close(student.grad, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(report.reward, torch.tensor([0, -2 * L, -2 * L, -2 * L]), atol=1e-6, rtol=0)
    torch.testing.assert_close(report["p_trust"], torch.tensor([0, 0.25, 0.25, 0.25]), atol=1e-6, rtol=0)
    assert report.trust.tolist() == [0, 0, 1, 0] and report.outlier.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(report.teacher_top_k_mass, torch.tensor([0, 0, 0, 0.75]), atol=1e-6, rtol=0)
    torch.testing.assert_close(report.top_k_divergence, torch.tensor([0, 0, 0, 1.25 * L]), atol=1e-6, rtol=0)


# The models of the test above: the teacher's entropy is 7/4 L = 1.213, KL(S||T) = KL(T||S) = 7/8 L, and the mixture of
# equal shares is m = (5, 3, 3, 5) / 16, so that q/m = (2/5, 2/3, 4/3, 8/5) and sum p q / m = 11/15.
K = math.log(2 / 5) / 8 + math.log(2 / 3) / 8 + math.log(4 / 3) / 4 + math.log(8 / 5) / 2
"""KL(T||m), and KL(S||m) by symmetry."""
G = -math.log(5 / 8)
"""Minus the mixture's reward ln(rho / 2 + 1 / 2) at rho = 1/4."""


@pytest.mark.parametrize(
    ("objective", "token", "value", "gradient"),
    [
        # Trusted: p (log p/q - 7/8 L). Rejected: p - q. Guidance: beta (p - q).
        (preset("tropd-exact"), (2, 0.24), 7 / 8 * L, [9 / 16 * L, L / 32, -15 / 64 * L, -23 / 64 * L]),
        (preset("tropd-exact"), (2, 0.25), 7 / 8 * L, [3 / 8, 1 / 8, -1 / 8, -3 / 8]),
        (
            preset("tropd-exact", guidance_loss="forward_kl", beta=2),
            (1, 0.0),
            7 / 4 * L,
            [3 / 4, 1 / 4, -1 / 4, -3 / 4],
        ),
        # R = -2 L <= 0: the forward KL of the test above, trusted or not.
        (preset("tropd-aopd", top_k=2), (2, 0.24), 1.25 * L, [3 / 8, 3 / 16, 3 / 32 - 1 / 4, 3 / 32 - 1 / 2]),
        (preset("aopd", top_k=2), (2, 0.24), 1.25 * L, [3 / 8, 3 / 16, 3 / 32 - 1 / 4, 3 / 32 - 1 / 2]),
        # -2 L is below -1.72 neither: K1; raised to -1 it is K1 with R = -1: R (p - 1[x]).
        (preset("reopold"), (2, 0.0), -2 * L**2, [L, -L / 2, -L / 4, -L / 4]),
        (preset("reopold", tau=-1.0), (2, 0.0), -L, [1 / 2, -1 / 4, -1 / 8, -1 / 8]),
        # K1 + 2/3 ln(16/3) + 1/3 ln(8/3); slopes 2 L at x, -1/3 and -2/3 at ids 2 and 3, less their sum times p.
        (
            preset("eopd", top_k=2),
            (2, 0.0),
            -2 * L**2 + 11 / 3 * L - math.log(3),
            [L + 1 / 2, -(2 * L - 1) / 4, -1 / 3 - (2 * L - 1) / 8, -2 / 3 - (2 * L - 1) / 8],
        ),
        # Above the teacher's entropy: K1 alone.
        (preset("eopd", top_k=2, entropy_tau=1.22), (2, 0.0), -2 * L**2, [L, -L / 2, -L / 4, -L / 4]),
        # -G in R's place.
        (preset("top-d", alpha=0.5), (2, 0.0), -G * L, [G / 2, -G / 4, -G / 8, -G / 8]),
        # p ln(p/q) - p + q at ids 3, 2: -L/4 + 3/8, -L/8 + 1/8; slopes -L/4, -L/8.
        (preset("mopd", top_k=2), (2, 0.0), 1 / 2 - 3 / 8 * L, [3 / 16 * L, 3 / 32 * L, -5 / 64 * L, -13 / 64 * L]),
        # Halves of K1 with -G, and of q ln(q/m) at ids 3, 2, whose slopes are -q (p/2) / m = -1/10, -1/12.
        (
            preset("jsd", top_k=2),
            (2, 0.0),
            -G * L / 2 + math.log(8 / 5) / 4 + math.log(4 / 3) / 8,
            [
                G / 2 - (G / 2 - 11 / 120) / 2,
                -(G / 2 - 11 / 120) / 4,
                -1 / 24 - (G / 2 - 11 / 120) / 8,
                -1 / 20 - (G / 2 - 11 / 120) / 8,
            ],
        ),
        # -p/2 (q/m - 11/15)
        (preset("skew-fkl", skew=0.5), (2, 0.0), K, [1 / 12, 1 / 120, -3 / 80, -13 / 240]),
        # p (log p/m - K + (q/m - 11/15) / 2), p/m = (8/5, 4/3, 2/3, 2/5)
        (
            preset("skew-rkl", skew=0.5),
            (2, 0.0),
            K,
            [
                (math.log(8 / 5) - K - 1 / 6) / 2,
                (math.log(4 / 3) - K - 1 / 30) / 4,
                (math.log(2 / 3) - K + 3 / 10) / 8,
                (math.log(2 / 5) - K + 13 / 30) / 8,
            ],
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Objective) else "",
)
def test_hand_worked_gradients_of_the_other_objectives(
    objective: Objective, token: tuple[int, float], value: float, gradient: list[float]
) -> None:
    student = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log().requires_grad_()
    teacher = torch.tensor([[1 / 8, 1 / 8, 1 / 4, 1 / 2]]).log() + 5
    region, uniform = token
    loss, _ = distillation_loss(
        student, teacher, torch.tensor([0]), torch.tensor([region]), objective, vocab_size=4,
        uniforms_T=torch.tensor([uniform]),
    )  # fmt: skip
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.tensor([gradient]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", VARIANTS, ids=lambda objective: objective.name)
def test_matches_dense(objective: Objective, dtype: torch.dtype) -> None:
    case = make_case(103, 110, 120, dtype=dtype)
    check_against_dense(case, objective, None)
    check_against_dense(case, objective, None, inplace_backward=True, full_statistics=objective.needs_teacher)


def test_report_is_a_mapping_of_what_is_there() -> None:
    case = make_case(30, 32, 32)
    _, report, _ = run_sharded(case, preset("sft"), None)
    assert set(report) == {"student_log_prob", "trust", "outlier"} and len(report) == 3
    assert report.reward is None and "reward" not in report
    _, report, _ = run_sharded(case, preset("opd"), None, full_statistics=True)
    assert {"student_entropy", "teacher_entropy", "forward_kl", "reverse_kl"} <= set(report)
    assert all(value.shape == case.tokens_T.shape for value in report.values())


def test_inplace_backward_reuses_the_buffer() -> None:
    case = make_case(103, 110, 120)
    _, _, wanted = run_sharded(case, preset("tropd"), None)
    logits = case.student_TV.clone()
    student = logits.requires_grad_()
    loss, _ = distillation_loss(
        student, case.teacher_TV, case.tokens_T, case.regions_T, preset("tropd"), vocab_size=103,
        uniforms_T=case.uniforms_T, inplace_backward=True,
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss, student, case.grad_T, retain_graph=True)
    assert found.data_ptr() == logits.data_ptr() and torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student, case.grad_T)


STATIONARY = ["tropd", "opd", "rkl-exact", "fkl-exact", "jsd-exact"]
STATIONARY += ["tropd-exact", "reopold", "top-d", "mopd", "skew-fkl", "skew-rkl"]


@pytest.mark.parametrize("name", STATIONARY)
def test_equal_models_have_zero_gradient(name: str) -> None:
    case = make_case(103, 110, 110)
    case = dataclasses.replace(
        case, teacher_TV=case.student_TV.clone(), regions_T=case.regions_T.where(case.regions_T != 1, 0)
    )
    loss, report, gradient = run_sharded(case, preset(name), None, uniforms_T=torch.full((24,), 0.9999999))
    # The mixture's logarithm is rounded; everything else cancels exactly.
    limit = 1e-6 if name in ("jsd-exact", "top-d", "skew-fkl", "skew-rkl") else 0.0
    assert gradient.abs().max() <= limit and loss.abs().max() <= limit
    assert report.outlier.sum() == 0


@pytest.mark.parametrize("name", ["fkl", "aopd", "tropd-aopd", "eopd", "jsd"])
def test_equal_models_are_stationary_where_the_top_k_is_everything(name: str) -> None:
    """A truncated forward KL pulls towards its ids even there; over the whole vocabulary only rounding is left."""
    case = make_case(103, 110, 110)
    case = dataclasses.replace(
        case, teacher_TV=case.student_TV.clone(), regions_T=case.regions_T.where(case.regions_T != 1, 0)
    )
    gradients = [run_sharded(case, preset(name, top_k=top_k), None)[2].abs().max() for top_k in (7, 103)]
    assert gradients[0] > 1e-3 and gradients[1] < 1e-5


@pytest.mark.parametrize("objective", [preset("tropd", top_k=5), preset("fkl", top_k=5, renormalize="teacher")])
def test_ties_at_the_last_place_take_the_lowest_ids(objective: Objective) -> None:
    """Three distinct teacher logits, both zeros among them: nearly every boundary is a tie."""
    case = make_case(103, 110, 120)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(-1, 2, case.teacher_TV.shape, generator=generator).float()
    coarse = torch.where((coarse == 0) & (torch.rand(coarse.shape, generator=generator) < 0.5), -0.0, coarse)
    check_against_dense(dataclasses.replace(case, teacher_TV=coarse), objective, None)
    constant = torch.zeros_like(coarse)
    check_against_dense(dataclasses.replace(case, teacher_TV=constant), objective, None)


def with_infinities(case: Case) -> Case:
    """-inf at scattered ids of either model, never at the student's sampled token; the teacher's often."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = case.student_TV.clone(), case.teacher_TV.clone()
    student[torch.rand(student.shape, generator=generator) < 0.2] = -math.inf
    teacher[torch.rand(teacher.shape, generator=generator) < 0.2] = -math.inf
    rows = torch.arange(len(case.tokens_T))
    tokens = case.tokens_T.clamp(min=0)
    student[rows, tokens] = case.student_TV[rows, tokens]
    teacher[rows[::2], tokens[::2]] = -math.inf
    return dataclasses.replace(case, student_TV=student, teacher_TV=teacher)


@pytest.mark.parametrize(
    "objective",
    [
        preset("tropd", top_k=7),
        preset("tropd", top_k=1000),
        preset("tropd", top_k=7, gate="soft"),
        preset("tropd", gate="static", outlier="clip"),
        preset("tropd", outlier="mask"),
        preset("fkl-exact"),
        preset("jsd-exact"),
        preset("sft"),
        preset("tropd-aopd", top_k=1000, gate="soft"),
        preset("tropd-exact", gate="reject"),
        preset("top-d"),
        preset("mopd", top_k=7),
        preset("jsd", top_k=1000),
        preset("skew-fkl"),
        preset("skew-rkl"),
    ],
    ids=lambda objective: f"{objective.name}-{objective.gate}-{objective.outlier}",
)
def test_minus_infinity_is_no_mass(objective: Objective) -> None:
    """The gradient equals the reference's with -1e4 in place of -inf (a mass of exactly 0 in float64 too)."""
    case = with_infinities(make_case(103, 110, 120))
    finite = dataclasses.replace(
        case,
        student_TV=case.student_TV.clamp(min=-1e4),
        teacher_TV=case.teacher_TV.clamp(min=-1e4),
    )
    _, _, wanted = run_sharded(finite, objective, None)
    check_against_dense(finite, objective, None)
    loss, _, found = run_sharded(case, objective, None)
    assert found.isfinite().all() and not loss.isnan().any()
    assert relative_error(found, wanted.double()) < 3e-6


@pytest.mark.parametrize("scale", [1e4, 1e17])
def test_huge_logits(scale: float) -> None:
    """K1's value is a product of two log-probs: 1e17 keeps it in fp32's range."""
    case = make_case(103, 103, 103)
    case = dataclasses.replace(case, student_TV=case.student_TV * scale, teacher_TV=case.teacher_TV * scale)
    for objective in (
        preset("tropd"),
        preset("opd"),
        preset("fkl"),
        preset("rkl-exact"),
        preset("fkl-exact"),
        preset("tropd-exact"),
        preset("mopd"),
    ):
        check_against_dense(case, objective, None)
    for name in ("jsd-exact", "skew-fkl", "skew-rkl", "jsd", "top-d", "eopd"):
        loss, _, gradient = run_sharded(case, preset(name), None, full_statistics=True)
        assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    "objective",
    [
        *(
            preset("tropd", gate=gate, outlier=outlier)
            for gate in ("bernoulli", "static", "soft")
            for outlier in ("fkl", "mask", "clip")
        ),
        *(preset(name) for name in ("tropd-exact", "tropd-aopd", "aopd", "reopold", "eopd", "top-d", "mopd", "jsd")),
        *(preset(name) for name in ("skew-fkl", "skew-rkl")),
    ],
    ids=lambda objective: f"{objective.name}-{objective.gate}-{objective.outlier}",
)
def test_a_broken_model_is_not_hidden(objective: Objective) -> None:
    case = make_case(30, 32, 32)
    on_policy = torch.full_like(case.regions_T, 2)
    case = dataclasses.replace(case, regions_T=on_policy, tokens_T=case.tokens_T.clamp(min=0))
    case.student_TV[3, 5] = math.nan
    case.teacher_TV[4, 6] = math.nan
    loss, _, _ = run_sharded(case, objective, None)
    assert loss.isnan().nonzero()[:, 0].tolist() == [3, 4]


def test_double_precision_draws_are_not_rounded() -> None:
    """1 - 1e-12 is a draw below 1; rounded to fp32 it would reject tokens that are trusted for certain."""
    case = make_case(30, 32, 32)
    case = dataclasses.replace(case, teacher_TV=case.student_TV)
    uniforms = torch.full((24,), 1 - 1e-12, dtype=torch.float64)
    _, report, _ = run_sharded(case, preset("tropd"), None, uniforms_T=uniforms)
    assert report.outlier.sum() == 0


def test_zero_incoming_gradient_is_exactly_zero() -> None:
    """Even at a token whose loss is infinite: rkl-exact where the teacher excludes what the student does not."""
    case = make_case(30, 32, 32)
    case.teacher_TV[:, 3] = -math.inf
    case = dataclasses.replace(case, grad_T=case.grad_T.where(case.regions_T == 1, 0))
    for name in ("rkl-exact", "tropd", "tropd-exact"):
        loss, _, gradient = run_sharded(case, preset(name), None)
        assert gradient.isfinite().all() and (gradient[case.grad_T == 0] == 0).all()
        assert not loss.isnan().any()


def test_without_any_region_the_loss_is_a_differentiable_zero() -> None:
    case = make_case(30, 32, 32)
    case = dataclasses.replace(case, regions_T=torch.zeros_like(case.regions_T))
    for name in ("tropd", "jsd-exact", "rkl-exact", "sft", "tropd-exact", "eopd", "skew-rkl", "jsd"):
        objective = preset(name)
        loss, report, gradient = run_sharded(case, objective, None)
        assert (loss == 0).all() and (gradient == 0).all()
        assert all((value == 0).all() for value in report.values())


def test_outlier_share_is_the_total_variation() -> None:
    """x ~ pi_S, M ~ Bernoulli(P_trust): the expected number of outliers is sum_t TV_t, its variance TV_t (1 - TV_t)."""
    generator = torch.Generator().manual_seed(11)
    student = 2 * torch.randn(5000, 40, generator=generator)
    teacher = student + torch.randn(5000, 40, generator=generator)
    tokens = torch.multinomial(student.softmax(-1), 1, generator=generator)[:, 0]
    torch.manual_seed(5)
    _, report = distillation_loss(student, teacher, tokens, torch.full((5000,), 2), preset("tropd"), vocab_size=40)
    variations = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    sigma = float((variations * (1 - variations)).sum().sqrt())
    assert 0.1 < float(variations.mean()) < 0.9
    assert abs(float(report.outlier.sum() - variations.sum())) < 3 * sigma


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens_T": torch.full((24,), 30)}, r"\[0, vocab_size = 30\)"),
        ({"tokens_T": torch.zeros(24)}, "tokens_T must be integers"),
        ({"tokens_T": torch.zeros(23, dtype=torch.long)}, r"tokens_T must be \[T\]"),
        ({"regions_T": torch.full((24,), 3)}, "1 .guidance. or 2 .on-policy."),
        ({"regions_T": torch.zeros(24, dtype=torch.bool)}, "regions_T must be integers"),
        ({"uniforms_T": torch.ones(24)}, r"uniforms_T must be in \[0, 1\)"),
        ({"uniforms_T": torch.ones(3)}, "uniforms_T must be floating"),
        ({"vocab_size": 33}, "give its group"),
        ({"vocab_size": 0}, "between 1 and"),
        ({"teacher_logits_TV": None}, "needs teacher_logits_TV"),
        ({"teacher_logits_TV": torch.zeros(24, 31, dtype=torch.long)}, "teacher_logits_TV must be floating"),
        ({"student_logits_TV": torch.zeros(24)}, "2-dimensional"),
        ({"objective": "tropd"}, "preset"),
        (
            {"objective": preset("sft"), "teacher_logits_TV": None, "full_statistics": True},
            "compares the two models",
        ),
    ],
)
def test_refused(change: dict[str, Any], said: str) -> None:
    case = make_case(30, 32, 32)
    arguments: dict[str, Any] = {
        "student_logits_TV": case.student_TV,
        "teacher_logits_TV": case.teacher_TV,
        "tokens_T": case.tokens_T,
        "regions_T": torch.full((24,), 2),
        "objective": preset("tropd"),
        "vocab_size": 30,
    } | change
    if "tokens_T" not in change:
        arguments["tokens_T"] = case.tokens_T.clamp(min=0)
    with pytest.raises(ValueError, match=said):
        distillation_loss(**arguments)


# Bytes per element of one logits shard, at T >= 1024: the peak beyond the inputs, and what waits for the backward.
MAX_PEAK, MAX_KEPT = 0.25, 0.02


@pytest.fixture(scope="module")
def large_case() -> Case:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(1024, 16384, generator=generator)
    teacher = (student + 0.5 * torch.randn(1024, 16384, generator=generator)).bfloat16()
    tokens = torch.multinomial(student[:, :16380].softmax(-1), 1, generator=generator)[:, 0]
    on_policy, uniforms = torch.full((1024,), 2), torch.rand(1024, generator=generator)
    return Case(student.bfloat16(), teacher, tokens, on_policy, uniforms, torch.ones(1024), 16380, uniforms, uniforms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["opd", "tropd", "rkl-exact", "jsd-exact", "tropd-exact", "eopd", "skew-fkl", "skew-rkl"]
)
def test_memory_in_place(large_case: Case, name: str, dtype: torch.dtype) -> None:
    student = large_case.student_TV.to(dtype).clone().requires_grad_()
    teacher = large_case.teacher_TV.to(dtype)
    with measure_memory() as forward:
        loss = distillation_loss(
            student, teacher, large_case.tokens_T, large_case.regions_T, preset(name), vocab_size=16380,
            uniforms_T=large_case.uniforms_T, inplace_backward=True,
        )[0]  # fmt: skip
    with measure_memory() as backward:
        loss.backward(large_case.grad_T)
    assert max(forward.peak, forward.kept + backward.peak) <= MAX_PEAK * student.numel()
    assert 0 < forward.kept <= MAX_KEPT * student.numel()


@pytest.mark.parametrize(("name", "needed"), [("tropd", False), ("fkl", False), ("eopd", False), ("rkl-exact", True)])
def test_the_teachers_logits_can_be_freed_after_the_forward(name: str, needed: bool) -> None:
    """Only an exact divergence reads them again in the backward."""
    case = make_case(103, 110, 120)
    teacher = case.teacher_TV.clone()
    storage = weakref.ref(teacher.untyped_storage())
    loss, _ = distillation_loss(
        case.student_TV.clone().requires_grad_(),
        teacher,
        case.tokens_T,
        case.regions_T,
        preset(name),
        vocab_size=103,
    )
    del teacher
    gc.collect()
    assert (storage() is not None) == needed and loss.requires_grad


def test_the_measure_of_memory_can_fail(large_case: Case) -> None:
    student = large_case.student_TV.clone().requires_grad_()
    with measure_memory() as naive:
        log_probs = student.float().log_softmax(-1)
    assert naive.peak >= 8 * student.numel() and naive.kept >= 4 * student.numel()
    assert log_probs.requires_grad


@pytest.mark.parametrize("num_rows", [1, 2])
def test_candidates_of_two_ranks_merge_for_a_single_row_too(num_rows: int) -> None:
    from megatron_tropd.vocab_parallel.top_k import _merge

    top_k = 5  # 15 words a row: an odd stride
    keys = torch.randperm(2 * num_rows * top_k).view(2, num_rows, top_k)
    candidates = torch.cat((keys.view(torch.int32), keys.float().view(torch.int32)), -1)
    merged, logits = _merge(candidates, top_k)
    expected = keys.movedim(0, 1).flatten(1).sort(-1, descending=True).values[:, :top_k]
    assert torch.equal(merged, expected) and torch.equal(logits, expected.float())


@pytest.mark.parametrize(("width", "top_k"), [(5, 5), (70, 64), (130, 3), (1000, 7), (4099, 64)])
def test_the_best_keys_of_a_row_are_those_of_its_best_blocks(width: int, top_k: int) -> None:
    """Against sorting the whole row, with few distinct values, so that ties decide, and infinities."""
    from megatron_tropd.vocab_parallel.top_k import _best_keys, _ids

    generator = torch.Generator().manual_seed(width)
    for num_values in (1, 2, 5, 1000):
        logits = torch.randint(-num_values, num_values, (50, width), generator=generator).float()
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = -math.inf
        found = _ids(_best_keys(logits, 1000, top_k)) - 1000
        wanted = [sorted(range(width), key=lambda i, row=row: (-row[i], i))[:top_k] for row in logits.tolist()]
        assert found.tolist() == wanted


@pytest.mark.parametrize("noise", [0.2, 1.5])
def test_the_host_need_not_know_which_tokens_need_a_top_k(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """The path for GPUs: room for a quarter of the tokens (enough with little noise, else once more for all)."""
    from megatron_tropd.vocab_parallel import measure

    case = make_case(103, 112, 112, num_tokens=400)
    student_TV = case.student_TV.nan_to_num(0.0)
    teacher_TV = (student_TV + noise * (case.teacher_TV - student_TV)).nan_to_num(posinf=0.0)
    case = dataclasses.replace(case, teacher_TV=teacher_TV)
    for objective in (objective for objective in VARIANTS if objective.needs_top_k):
        wanted_loss, wanted_report, wanted_gradient = run_sharded(case, objective, None)
        monkeypatch.setattr(measure, "_host_waits", lambda _tensor: True)
        loss, report, gradient = run_sharded(case, objective, None)
        monkeypatch.undo()
        assert torch.equal(loss, wanted_loss) and torch.equal(gradient, wanted_gradient)
        for name, value in wanted_report.items():
            torch.testing.assert_close(report[name], value, atol=1e-6, rtol=1e-6, msg=f"{objective.name}: {name}")
        if objective.few_need_top_k and objective.gate == "bernoulli":
            outliers = int(report.outlier.count_nonzero())
            capacity = measure.top_k_capacity(objective, int((case.regions_T != 0).sum()))
            assert 0 < outliers <= capacity if noise == 0.2 else outliers > capacity
