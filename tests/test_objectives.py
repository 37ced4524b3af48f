"""Per-token maths against numbers worked out by hand. All of them are multiples of L = ln 2 = 0.693147.

Unless said otherwise a token has pi_S(x) = 1/2, pi_T(x) = 1/16, so R = -3 L = -2.079442 and P_trust = 1/8; its teacher
top-2 is pi_T = (1/2, 1/4) where pi_S = (1/4, 1/2).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_tropd.objectives import Objective, preset, token_losses, top_k_forward_kl, trust_weights

L = math.log(2)
# 1/2 ln((1/2)/(1/4)) + 1/4 ln((1/4)/(1/2)) = L/2 - L/4
TOP_2_FKL = L / 4


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def loss_of(
    objective: Objective,
    region: int = 2,
    student: float = 1 / 2,
    teacher: float = 1 / 16,
    uniform: float = 0.5,
    divergence: float = 0.0,
) -> tuple[float, float]:
    """Loss of one token and its derivative on log pi_S(x), the top-2 as in the module docstring."""
    log_prob = log(student).requires_grad_()
    reward = log(teacher) - log_prob.detach()
    regions = torch.tensor([region])
    trust, outlier = trust_weights(objective, reward, regions == 2, torch.tensor([uniform]))
    kl = top_k_forward_kl(objective, log(1 / 4, 1 / 2)[None], log(1 / 2, 1 / 4)[None])
    loss = token_losses(
        objective, regions_N=regions, student_log_probs_N=log_prob, rewards_N=reward, trust_N=trust, outlier_N=outlier,
        forward_kl_N=kl, divergence_N=torch.tensor([divergence], dtype=torch.float64),
    )  # fmt: skip
    loss.sum().backward()
    assert log_prob.grad is not None
    return float(loss.detach()), float(log_prob.grad)


HAND: list[tuple[str, dict[str, Any], dict[str, Any], float, float]] = [
    # (preset, overrides, token, loss, d loss / d log pi_S(x))
    # No region: nothing.
    ("tropd", {}, {"region": 0}, 0.0, 0.0),
    # Guidance: -beta ln(1/2) = beta L; derivative -beta. The gate plays no part.
    ("tropd", {}, {"region": 1}, 0.001 * L, -0.001),
    ("tropd", {"beta": 0.5}, {"region": 1}, 0.5 * L, -0.5),
    ("opd", {"guidance_beta": 2}, {"region": 1}, 2 * L, -2.0),
    ("jsd-exact", {}, {"region": 1, "divergence": 7.0}, 0.001 * L, -0.001),
    ("sft", {}, {"region": 1}, L, -1.0),
    # sft has no teacher: on-policy tokens carry nothing.
    ("sft", {}, {}, 0.0, 0.0),
    # Bernoulli, u < 1/8: K1 = -R ln pi_S = -(-3 L)(-L) = -3 L^2; derivative -R = 3 L.
    ("tropd", {}, {"uniform": 0.124}, -3 * L**2, 3 * L),
    # u > 1/8: outlier, the truncated forward KL; no dependence on log pi_S(x).
    ("tropd", {}, {"uniform": 0.126}, TOP_2_FKL, 0.0),
    ("tropd", {"outlier": "mask"}, {"uniform": 0.126}, 0.0, 0.0),
    # clip: R -> max(-3 L, -1.72) = -1.72; loss -(-1.72)(-L) = -1.72 L.
    ("tropd", {"outlier": "clip"}, {"uniform": 0.126}, -1.72 * L, 1.72),
    # clip leaves R above the floor alone: R = ln((1/4)/(1/2)) = -L, loss -(-L)(-L) = -L^2.
    ("tropd", {"outlier": "clip"}, {"teacher": 1 / 4, "uniform": 0.9}, -(L**2), L),
    # The teacher likes x better: P_trust = 1 for every draw. R = ln 2 = L; loss -L (-L) = L^2... with pi_T = 1.
    ("tropd", {}, {"teacher": 1.0, "uniform": 0.999}, L**2, -L),
    # static at tau = -1.72: R = -3 L = -2.08 is an outlier, R = -2 L = -1.39 is not: -(-2 L)(-L) = -2 L^2.
    ("tropd", {"gate": "static"}, {"uniform": 0.0}, TOP_2_FKL, 0.0),
    ("tropd", {"gate": "static"}, {"teacher": 1 / 8}, -2 * L**2, 2 * L),
    # R <= tau is an outlier, equality included: R = 0 at tau = 0.
    ("tropd", {"gate": "static", "tau": 0.0, "outlier": "mask"}, {"teacher": 1 / 2}, 0.0, 0.0),
    ("tropd", {"gate": "static", "tau": -3.0, "outlier": "clip"}, {}, -3 * L**2, 3 * L),
    # soft: 1/8 (-3 L^2) + 7/8 (outlier).
    ("tropd", {"gate": "soft"}, {}, -3 / 8 * L**2 + 7 / 8 * TOP_2_FKL, 3 / 8 * L),
    ("tropd", {"gate": "soft", "outlier": "mask"}, {}, -3 / 8 * L**2, 3 / 8 * L),
    (
        "tropd",
        {"gate": "soft", "outlier": "clip"},
        {},
        -3 / 8 * L**2 - 7 / 8 * 1.72 * L,
        3 / 8 * L + 7 / 8 * 1.72,
    ),
    ("tropd", {"gate": "none"}, {}, -3 * L**2, 3 * L),
    ("opd", {}, {}, -3 * L**2, 3 * L),
    # fkl: the truncated forward KL on every on-policy token, however much the teacher likes it.
    ("fkl", {}, {"teacher": 1.0}, TOP_2_FKL, 0.0),
    # reward: advantage -FKL, loss FKL * ln pi_S(x) = L/4 * (-L); derivative FKL.
    ("fkl", {"fkl_as": "reward"}, {}, -TOP_2_FKL * L, TOP_2_FKL),
    ("rkl-exact", {}, {"divergence": 0.3}, 0.3, 0.0),
    ("fkl-exact", {}, {"divergence": 0.3}, 0.3, 0.0),
    ("jsd-exact", {}, {"divergence": 0.3}, 0.3, 0.0),
]


@pytest.mark.parametrize(("name", "overrides", "token", "loss", "slope"), HAND)
def test_hand_worked_losses(
    name: str, overrides: dict[str, Any], token: dict[str, Any], loss: float, slope: float
) -> None:
    assert loss_of(preset(name, **overrides), **token) == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "student", "expected"),
    [
        ({}, (1 / 4, 1 / 2), L / 4),
        # Un-renormalised truncation may go below zero and stays there: 1/2 ln(1/2) + 1/4 ln 1 with pi_S = (1, 1/4).
        ({}, (1.0, 1 / 4), -L / 2),
        # teacher (2/3, 1/3): 2/3 ln(8/3) + 1/3 ln(2/3) = 2/3 * 0.980829 - 1/3 * 0.405465
        ({"renormalize": "teacher"}, (1 / 4, 1 / 2), 0.518731),
        # both: (2/3, 1/3) against (1/3, 2/3): 2/3 L - 1/3 L
        ({"renormalize": "both"}, (1 / 4, 1 / 2), L / 3),
        # tails 1/4 and 1/4 add 0; tails 1/4 (teacher) and 1/2 (student, (1/4, 1/4)) add 1/4 ln(1/2).
        ({"tail": "bucket"}, (1 / 4, 1 / 2), L / 4),
        ({"tail": "bucket"}, (1 / 4, 1 / 4), L / 2 - L / 4),
        # floor -1: ln(1/4) = -2 L becomes -1: 1/2 (-L + 1) + 1/4 (-2 L + L) = 1/2 - 3/4 L
        ({"student_log_prob_min": -1.0}, (1 / 4, 1 / 2), 0.5 - 0.75 * L),
    ],
)
def test_hand_worked_truncated_forward_kl(
    overrides: dict[str, Any], student: tuple[float, float], expected: float
) -> None:
    objective = preset("tropd", **overrides)
    kl = top_k_forward_kl(objective, log(*student)[None], log(1 / 2, 1 / 4)[None])
    assert float(kl) == pytest.approx(expected, abs=1e-6)


def test_floor_stops_the_gradient_below_it() -> None:
    student = log(1 / 4, 1 / 2)[None].requires_grad_()
    top_k_forward_kl(preset("tropd", student_log_prob_min=-1.0), student, log(1 / 2, 1 / 4)[None]).sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, pytest.approx(-0.25)]]


@pytest.mark.parametrize("renormalize_or_tail", [{}, {"renormalize": "teacher"}, {"tail": "bucket"}])
def test_excluded_ids_give_the_right_limit_and_a_finite_gradient(renormalize_or_tail: dict[str, Any]) -> None:
    objective = preset("tropd", **renormalize_or_tail)
    # The teacher excludes the second id: it contributes 0 although the student excludes it as well.
    student = log(1 / 4, 0.0)[None].requires_grad_()
    kl = top_k_forward_kl(objective, student, log(1.0, 0.0)[None])
    kl.sum().backward()
    assert student.grad is not None
    assert float(kl.detach()) == pytest.approx(2 * L)
    assert student.grad.tolist() == [[-1.0, 0.0]]
    # The student alone excludes an id: infinite, honestly, with a finite gradient.
    student = log(1 / 4, 0.0)[None].requires_grad_()
    kl = top_k_forward_kl(objective, student, log(1 / 2, 1 / 4)[None])
    kl.sum().backward()
    assert student.grad is not None
    assert float(kl.detach()) == math.inf and student.grad.isfinite().all()


@pytest.mark.parametrize("gate", ["bernoulli", "static", "soft"])
@pytest.mark.parametrize("outlier", ["fkl", "mask", "clip"])
def test_what_the_teacher_excludes_is_rejected_without_nan(gate: str, outlier: str) -> None:
    """pi_T(x) = 0: R = -inf, P_trust = 0. 0 * inf must not reach loss or gradient."""
    loss, slope = loss_of(preset("tropd", gate=gate, outlier=outlier), teacher=0.0, uniform=0.0)
    # fkl and mask as above; clip: R -> -1.72
    assert (loss, slope) == pytest.approx(
        {"fkl": (TOP_2_FKL, 0), "mask": (0, 0), "clip": (-1.72 * L, 1.72)}[outlier], abs=1e-12
    )


def test_opd_shows_the_infinite_reward() -> None:
    assert loss_of(preset("opd"), teacher=0.0)[0] == -math.inf


def test_equal_models_are_trusted_and_stationary() -> None:
    for uniform in (0.0, 0.5, 0.9999999):
        assert loss_of(preset("tropd"), teacher=1 / 2, uniform=uniform) == (0.0, 0.0)


@pytest.mark.parametrize(
    "objective",
    [
        preset("tropd", gate="static"),
        preset("tropd", gate="soft", renormalize="teacher"),
        preset("tropd", gate="soft", renormalize="both"),
        preset("tropd", gate="soft", tail="bucket"),
        preset("tropd", gate="soft", student_log_prob_min=-3.0),
        preset("tropd", gate="soft", outlier="clip"),
        preset("opd"),
        preset("fkl"),
        preset("jsd-exact"),
        preset("sft"),
    ],
    ids=lambda objective: f"{objective.name}-{objective.gate}-{objective.outlier}",
)
def test_gradcheck(objective: Objective) -> None:
    """Rewards and weights are constants of the maths; everything else is differentiated."""
    generator = torch.Generator().manual_seed(3)
    student_NK = torch.randn(9, 6, dtype=torch.float64, generator=generator).log_softmax(-1)[:, :4]
    teacher_NK = torch.randn(9, 6, dtype=torch.float64, generator=generator).log_softmax(-1)[:, :4]
    regions = torch.arange(9) % 3
    rewards = 2 * torch.randn(9, dtype=torch.float64, generator=generator)
    trust, outlier = trust_weights(objective, rewards, regions == 2, None)

    def losses(log_probs: torch.Tensor, top_k: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        kl = top_k_forward_kl(objective, top_k, teacher_NK)
        return token_losses(
            objective, regions_N=regions, student_log_probs_N=log_probs, rewards_N=rewards, trust_N=trust,
            outlier_N=outlier, forward_kl_N=kl, divergence_N=divergence,
        )  # fmt: skip

    inputs = (
        student_NK[:, 0].clone(),
        student_NK.clone(),
        torch.rand(9, dtype=torch.float64, generator=generator),
    )
    assert torch.autograd.gradcheck(losses, tuple(tensor.requires_grad_() for tensor in inputs))


def test_no_gradient_through_reward_or_gate() -> None:
    """d/d log pi_S(x) of K1 is -sg(R): were R differentiated, the derivative would be log pi_S(x) - R instead."""
    objective = preset("tropd", gate="soft", outlier="mask")
    log_prob = log(1 / 2).requires_grad_()
    reward = log(1 / 16) - log_prob
    trust, outlier = trust_weights(objective, reward, torch.tensor([True]), None)
    loss = token_losses(
        objective, regions_N=torch.tensor([2]), student_log_probs_N=log_prob, rewards_N=reward, trust_N=trust,
        outlier_N=outlier,
    )  # fmt: skip
    loss.sum().backward()
    assert log_prob.grad is not None
    assert float(log_prob.grad) == pytest.approx(3 * L / 8)


def test_reward_form_has_no_expected_gradient() -> None:
    """A detached advantage that does not depend on x: sum_x pi_S(x) * A * d log pi_S(x) = 0 (METHOD 1, `as`)."""
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_probs = logits.log_softmax(-1)
    losses = token_losses(
        preset("fkl", fkl_as="reward"), regions_N=torch.full((5,), 2), student_log_probs_N=log_probs,
        rewards_N=torch.zeros(5), trust_N=torch.zeros(5), outlier_N=torch.ones(5), forward_kl_N=torch.full((5,), 0.7),
    )  # fmt: skip
    (losses * log_probs.detach().exp()).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("trpod", {}, "did you mean 'tropd'"),
        ("tropd", {"topk": 3}, "did you mean 'top_k'"),
        ("tropd", {"on_policy": "jsd"}, "unknown option"),
        ("tropd", {"gate": "bernouli"}, "did you mean 'bernoulli'"),
        ("tropd", {"outlier": "masked"}, "did you mean 'mask'"),
        ("tropd", {"top_k": 0}, "integer >= 1"),
        ("tropd", {"top_k": 1.5}, "integer >= 1"),
        ("tropd", {"top_k": True}, "integer >= 1"),
        ("tropd", {"tau": math.inf}, "finite"),
        ("tropd", {"beta": -1}, "guidance_beta must be finite and >= 0"),
        ("tropd", {"beta": 1, "guidance_beta": 1}, "give one of them"),
        ("tropd", {"student_log_prob_min": 0.5}, "negative"),
        ("tropd", {"tail": "bucket", "renormalize": "both"}, "use renormalize='none'"),
        ("jsd-exact", {"beta": 1.0}, "'rkl-exact' and 'fkl-exact'"),
        ("jsd-exact", {"gate": "soft"}, "no trust gate"),
        ("sft", {"outlier": "mask"}, "no trust gate"),
        ("opd", {"outlier": "clip"}, "give gate='static' too"),
        ("fkl", {"outlier": "mask"}, "leaves no loss"),
    ],
)
def test_refused(name: str, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preset(name, **overrides)


def test_beta_is_the_rows_own() -> None:
    assert preset("tropd", beta=0.25).guidance_beta == 0.25
    jsd = preset("jsd-exact", beta=0.25, guidance_beta=3)
    assert (jsd.jsd_beta, jsd.guidance_beta) == (0.25, 3)
    assert preset("sft").guidance_beta == 1
