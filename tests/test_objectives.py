"""Per-token maths against numbers worked out by hand. All of them are multiples of L = ln 2 = 0.693147.

Unless said otherwise a token has pi_S(x) = 1/2, pi_T(x) = 1/16, so R = -3 L = -2.079442 and P_trust = 1/8; its teacher
top-2 is pi_T = (1/2, 1/4) where pi_S = (1/4, 1/2).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_tropd.objectives import (
    PRESETS,
    Objective,
    exact_kl_weights,
    k2,
    k3,
    preset,
    presets,
    token_losses,
    top_k_divergence,
    top_k_forward_kl,
    top_k_weights,
    trust_weights,
)

L, L3 = math.log(2), math.log(3)
# 1/2 ln((1/2)/(1/4)) + 1/4 ln((1/4)/(1/2)) = L/2 - L/4
TOP_2_FKL = L / 4
# Teacher scaled to (2/3, 1/3): 2/3 ln(8/3) + 1/3 ln(2/3) = 2/3 (3 L - L3) + 1/3 (L - L3)
TOP_2_FKL_SCALED = 7 / 3 * L - L3
REOPOLD_TAU = -1.7199611490370512  # ln(0.3) / 0.7


CLIP = {"clip_ratio_low": 1 / 4, "clip_ratio_high": 0.28}


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def loss_of(
    objective: Objective,
    region: int = 2,
    student: float = 1 / 2,
    teacher: float = 1 / 16,
    uniform: float = 0.5,
    divergence: float = 0.0,
    entropy: float = 0.0,
    advantage: float | None = None,
    engine: float = 1 / 2,
) -> tuple[float, float]:
    """Loss of one token and its derivative on log pi_S(x), the top-2 as in the module docstring."""
    log_prob = log(student).requires_grad_()
    reward = log(teacher) - log_prob.detach()
    regions = torch.tensor([region])
    trust, outlier = trust_weights(objective, reward, regions == 2, torch.tensor([uniform]))
    top_k = top_k_divergence(objective, log(1 / 4, 1 / 2)[None], log(1 / 2, 1 / 4)[None])
    loss = token_losses(
        objective, regions_N=regions, student_log_probs_N=log_prob, rewards_N=reward, trust_N=trust, outlier_N=outlier,
        teacher_entropy_N=torch.tensor([entropy]), top_k_divergence_N=top_k,
        divergence_N=torch.tensor([divergence], dtype=torch.float64).requires_grad_(),
        advantages_N=None if advantage is None else torch.tensor([advantage], dtype=torch.float64),
        engine_log_probs_N=log(engine),
    )  # fmt: skip
    (slope,) = torch.autograd.grad(loss.sum(), log_prob, materialize_grads=True)
    return float(loss.detach()), float(slope)


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
    ("skew-fkl", {}, {"divergence": 0.3}, 0.3, 0.0),
    ("skew-rkl", {}, {"divergence": 0.3}, 0.3, 0.0),
    # Weights of the gated divergence are in it (`exact_kl_weights`); guidance is the NLL, or beta times the divergence.
    ("tropd-exact", {}, {"divergence": 0.3}, 0.3, 0.0),
    ("tropd-exact", {}, {"region": 1, "divergence": 0.3}, 0.001 * L, -0.001),
    ("tropd-exact", {"guidance_loss": "forward_kl", "beta": 0.5}, {"region": 1, "divergence": 0.3}, 0.15, 0.0),
    ("tropd-exact", {}, {"region": 0, "divergence": 0.3}, 0.0, 0.0),
    ("seq-kd", {}, {"region": 1}, L, -1.0),
    ("seq-kd", {}, {}, 0.0, 0.0),
    # aopd: R = -3 L <= 0, R = 0 <= 0, R = L > 0 (as K1 above).
    ("aopd", {}, {}, TOP_2_FKL, 0.0),
    ("aopd", {}, {"teacher": 1 / 2}, TOP_2_FKL, 0.0),
    ("aopd", {}, {"teacher": 1.0}, L**2, -L),
    # tropd-aopd: trusted (u < 1/8) with R <= 0: the forward KL, as for outliers; trusted with R > 0: K1.
    ("tropd-aopd", {}, {"uniform": 0.124}, TOP_2_FKL, 0.0),
    ("tropd-aopd", {}, {"uniform": 0.126}, TOP_2_FKL, 0.0),
    ("tropd-aopd", {}, {"teacher": 1.0, "uniform": 0.999}, L**2, -L),
    ("tropd-aopd", {"outlier": "mask"}, {"uniform": 0.124}, TOP_2_FKL, 0.0),
    ("tropd-aopd", {"outlier": "mask"}, {"uniform": 0.126}, 0.0, 0.0),
    ("tropd-aopd", {"outlier": "clip"}, {"uniform": 0.126}, -1.72 * L, 1.72),
    ("tropd-aopd", {"outlier": "clip", "gate": "soft"}, {}, TOP_2_FKL / 8 - 7 / 8 * 1.72 * L, 7 / 8 * 1.72),
    # eopd: K1, and above the threshold (0.8 is not above 0.8) alpha times the forward KL of the scaled teacher.
    ("eopd", {}, {"entropy": 0.81}, -3 * L**2 + TOP_2_FKL_SCALED, 3 * L),
    ("eopd", {"alpha": 0.5}, {"entropy": 0.81}, -3 * L**2 + TOP_2_FKL_SCALED / 2, 3 * L),
    ("eopd", {"entropy_tau": 0.5}, {"entropy": 0.5}, -3 * L**2, 3 * L),
    ("eopd", {}, {"entropy": 0.81, "teacher": 1.0}, L**2 + TOP_2_FKL_SCALED, -L),
    # reward: alpha FKL ln pi_S(x) besides K1.
    (
        "eopd",
        {"fkl_as": "reward"},
        {"entropy": 0.81},
        -3 * L**2 - TOP_2_FKL_SCALED * L,
        3 * L + TOP_2_FKL_SCALED,
    ),
    # reopold: R = -3 L = -2.08 is raised to tau = -1.72: -tau ln pi_S = tau L; R = -2 L = -1.39 and R = L are not.
    ("reopold", {}, {}, REOPOLD_TAU * L, -REOPOLD_TAU),
    ("reopold", {}, {"teacher": 0.0}, REOPOLD_TAU * L, -REOPOLD_TAU),
    ("reopold", {}, {"teacher": 1 / 8}, -2 * L**2, 2 * L),
    ("reopold", {}, {"teacher": 1.0}, L**2, -L),
    # top-d: rho = 1/8, reward ln(0.2 / 8 + 0.8) = ln 0.825; at most ln 0.8 below; rho = 2 at alpha 1/2: ln(1 + 1/2).
    ("top-d", {}, {}, math.log(0.825) * L, -math.log(0.825)),
    ("top-d", {}, {"teacher": 0.0}, math.log(0.8) * L, -math.log(0.8)),
    ("top-d", {"alpha": 0.5}, {"teacher": 1.0}, math.log(1.5) * L, -math.log(1.5)),
    # mopd: 1/4 ln(1/2) - 1/4 + 1/2 + 1/2 ln 2 - 1/2 + 1/4 = L/4
    ("mopd", {}, {}, L / 4, 0.0),
    # jsd: m = 3/8 at both ids: 1/2 ln(4/3) + 1/4 ln(2/3) = 1/2 (2 L - L3) + 1/4 (L - L3) = 5/4 L - 3/4 L3, halved;
    # K1 on the reward ln(1/2 * 1/8 + 1/2) = ln(9/16), halved.
    ("jsd", {}, {}, (5 / 4 * L - 3 / 4 * L3) / 2 + math.log(9 / 16) * L / 2, -math.log(9 / 16) / 2),
    ("jsd", {}, {"region": 1}, 0.001 * L, -0.001),
    # gkd: the divergence on guidance tokens too, whatever the token's own log-prob.
    ("gkd", {}, {"divergence": 0.3}, 0.3, 0.0),
    ("gkd", {}, {"region": 1, "divergence": 0.3}, 0.3, 0.0),
    # The tokens of entropy-opd and of the second stage are chosen before: here K1, and the clipped reward.
    ("entropy-opd", {}, {}, -3 * L**2, 3 * L),
    ("reopold-two-stage", {}, {}, REOPOLD_TAU * L, -REOPOLD_TAU),
    # Task advantage 2 (its coefficient included): -2 ln(1/2) = 2 L more, derivative -2 more; not on guidance.
    ("opd", {"task_reward": 1}, {"advantage": 2.0}, -3 * L**2 + 2 * L, 3 * L - 2),
    ("tropd", {"task_reward": 1}, {"advantage": 2.0, "uniform": 0.126}, TOP_2_FKL + 2 * L, -2.0),
    ("tropd", {"task_reward": 1}, {"advantage": 2.0, "region": 1}, 0.001 * L, -0.001),
    ("rkl-exact", {"task_reward": 1}, {"advantage": 2.0, "divergence": 0.3}, 0.3 + 2 * L, -2.0),
    # The engine gave 5/8 where the trainer gives 1/2: weight 4/5; 1/8: 4, capped at 2. Guidance was not sampled.
    ("opd", {"importance_cap": 2}, {"engine": 5 / 8}, -12 / 5 * L**2, 12 / 5 * L),
    ("opd", {"importance_cap": 2}, {"engine": 1 / 8}, -6 * L**2, 6 * L),
    ("tropd", {"importance_cap": 2}, {"engine": 1 / 8, "uniform": 0.126}, 2 * TOP_2_FKL, 0.0),
    ("tropd", {"importance_cap": 2}, {"engine": 1 / 8, "region": 1}, 0.001 * L, -0.001),
    # PPO with bounds 3/4 and 1.28, ratios 4/5 and 4 as above, advantage R = -3 L: 4/5 is within, 4 beyond the bound
    # that only positive advantages have; 5/9 is below. For R = L > 0: 4 is above, 4/5 within.
    ("opd", {**CLIP}, {"engine": 5 / 8}, -12 / 5 * L**2, 12 / 5 * L),
    ("opd", {**CLIP}, {"engine": 1 / 8}, -12 * L**2, 12 * L),
    ("opd", {**CLIP, "importance_cap": 2}, {"engine": 1 / 8}, -6 * L**2, 6 * L),
    ("opd", {**CLIP}, {"engine": 9 / 10}, 0.0, 0.0),
    ("opd", {**CLIP}, {"engine": 5 / 8, "teacher": 1.0}, 4 / 5 * L**2, -4 / 5 * L),
    ("opd", {**CLIP}, {"engine": 1 / 8, "teacher": 1.0}, 0.0, 0.0),
    # The outlier's forward KL and guidance are no policy gradients: no ratio.
    ("tropd", {**CLIP}, {"engine": 9 / 10, "uniform": 0.126}, TOP_2_FKL, 0.0),
    ("tropd", {**CLIP}, {"engine": 9 / 10, "region": 1}, 0.001 * L, -0.001),
    # The sum decides: advantage -3 L + 4 > 0 is clipped above; -3 L + 2 < 0 is not.
    ("opd", {**CLIP, "task_reward": 1}, {"engine": 1 / 8, "advantage": 4.0}, 0.0, 0.0),
    ("opd", {**CLIP, "task_reward": 1}, {"engine": 1 / 8, "advantage": 2.0}, 4 * (2 - 3 * L) * L, 4 * (3 * L - 2)),
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


def test_hand_worked_top_k_divergences() -> None:
    # mopd, pi_S = (1/8, 1/2): 1/8 ln(1/4) - 1/8 + 1/2 + 1/2 ln 2 - 1/2 + 1/4 = L/4 + 1/8
    mopd = top_k_divergence(preset("mopd"), log(1 / 8, 1 / 2)[None], log(1 / 2, 1 / 4)[None])
    assert float(mopd) == pytest.approx(L / 4 + 1 / 8)
    # jsd, beta = 1/4: m = (5/16, 7/16): 1/2 ln(8/5) + 1/4 ln(4/7)
    jsd = top_k_divergence(preset("jsd", beta=0.25), log(1 / 4, 1 / 2)[None], log(1 / 2, 1 / 4)[None])
    assert float(jsd) == pytest.approx(math.log(8 / 5) / 2 + math.log(4 / 7) / 4)


@pytest.mark.parametrize("name", ["mopd", "jsd"])
def test_what_either_model_excludes_has_a_finite_gradient(name: str) -> None:
    """Neither has the first id, the student lacks the second; the third is (1/2, 1/4)."""
    student = log(0.0, 0.0, 1 / 2)[None].requires_grad_()
    found = top_k_divergence(preset(name), student, log(0.0, 3 / 4, 1 / 4)[None])
    found.sum().backward()
    assert student.grad is not None
    # mopd: 0 + 3/4 + (1/2 ln 2 - 1/2 + 1/4), slope p ln(p/q) = L/2.
    # jsd: 0 + 3/4 ln 2 + 1/4 ln(1/4 / (3/8)), slope -q (p/2) / m = -1/4 * 1/4 / (3/8).
    value, slope = {"mopd": (1 / 2 + L / 2, L / 2), "jsd": (3 / 4 * L + (L - L3) / 4, -1 / 6)}[name]
    assert float(found.detach()) == pytest.approx(value)
    assert student.grad.tolist() == [[0.0, 0.0, pytest.approx(slope)]]


def test_weights_of_the_exact_divergences() -> None:
    """No region, guidance, trusted, outlier."""
    regions, trust, outlier = torch.tensor([0, 1, 2, 2]), torch.tensor([0.0, 0, 1, 0]), torch.tensor([0.0, 0, 0, 1])
    for overrides, forward in [
        ({}, [0, 0, 0, 1]),
        ({"guidance_loss": "forward_kl"}, [0, 1, 0, 1]),
        ({"outlier": "mask"}, [0, 0, 0, 0]),
    ]:
        weights = exact_kl_weights(preset("tropd-exact", **overrides), regions, trust, outlier)
        assert [weight.tolist() for weight in weights] == [[0, 0, 1, 0], forward]


def test_tropd_aopd_takes_aopds_terms() -> None:
    """R > 0 is always trusted, so under outlier fkl the draw decides nothing; under mask it does."""
    rewards = 2 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(1))
    on_policy, regions = torch.full((200,), True), torch.full((200,), 2)

    def losses(objective: Objective) -> torch.Tensor:
        trust, outlier = trust_weights(objective, rewards, on_policy, uniforms)
        return token_losses(
            objective, regions_N=regions, student_log_probs_N=torch.full((200,), -0.7), rewards_N=rewards,
            trust_N=trust, outlier_N=outlier, top_k_divergence_N=torch.full((200,), 0.3),
        )  # fmt: skip

    assert torch.equal(losses(preset("tropd-aopd")), losses(preset("aopd")))
    assert not torch.equal(losses(preset("tropd-aopd", outlier="mask")), losses(preset("aopd")))


def test_estimators_of_the_reverse_kl() -> None:
    """rho = 1/8: K2 = (3 L)^2 / 2, K3 = 1/8 - 1 + 3 L. Over x ~ pi_S K3 is the KL; neither is ever negative."""
    assert float(k2(log(1 / 8))) == pytest.approx(4.5 * L**2)
    assert float(k3(log(1 / 8))) == pytest.approx(3 * L - 7 / 8)
    student = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    teacher = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    rewards = teacher - student
    assert float((student.exp() * k3(rewards)).sum()) == pytest.approx(-float((student.exp() * rewards).sum()))
    assert (k2(rewards) >= 0).all() and (k3(rewards) >= 0).all()


def test_every_preset_states_its_equation() -> None:
    described = presets.__doc__ or ""
    assert all(f"``{name}``" in described for name in PRESETS)


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
        preset("aopd"),
        preset("tropd-aopd", gate="soft", outlier="clip"),
        preset("eopd"),
        preset("reopold"),
        preset("top-d"),
        preset("mopd"),
        preset("jsd", beta=0.3),
        preset("tropd-exact", gate="soft", guidance_loss="forward_kl"),
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
    entropy = 1.6 * torch.rand(9, dtype=torch.float64, generator=generator)
    if objective.on_policy in ("entropy", "asymmetric"):
        assert top_k_weights(objective, rewards, trust, outlier, entropy)[regions == 2].unique().shape[0] > 1

    def losses(log_probs: torch.Tensor, top_k: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        top_k = top_k_divergence(objective, top_k, teacher_NK)
        return token_losses(
            objective, regions_N=regions, student_log_probs_N=log_probs, rewards_N=rewards, trust_N=trust,
            outlier_N=outlier, teacher_entropy_N=entropy, top_k_divergence_N=top_k, divergence_N=divergence,
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
        rewards_N=torch.zeros(5), trust_N=torch.zeros(5), outlier_N=torch.ones(5),
        top_k_divergence_N=torch.full((5,), 0.7),
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
        ("tropd-aodp", {}, "did you mean 'tropd-aopd'"),
        ("tropd-exact", {"outlier": "clip"}, "no reward to clip.*'mask'"),
        ("tropd-exact", {"guidance_loss": "fkl"}, "did you mean 'forward_kl'"),
        ("tropd", {"guidance_loss": "forward_kl"}, "preset 'tropd-exact'"),
        ("eopd", {"gate": "soft"}, "no trust gate"),
        ("eopd", {"tail": "bucket"}, "use renormalize='none'"),
        ("eopd", {"alpha": 0}, "entropy_alpha must be finite and > 0.*'opd'"),
        ("eopd", {"entropy_tau": -0.1}, "nats >= 0"),
        ("eopd", {"alpha": 1, "entropy_alpha": 1}, "give one of them"),
        ("top-d", {"alpha": 1.0}, "strictly between 0 and 1 .1 is the preset 'opd'"),
        ("top-d", {"gate": "static"}, "no trust gate"),
        ("tropd", {"alpha": 0.5}, "no alpha: leave it out; 'top-d' and 'eopd'"),
        ("skew-fkl", {"skew": 0.0}, "0 is the preset"),
        ("mopd", {"renormalize": "both"}, "which this objective does not take; leave it out"),
        ("mopd", {"fkl_as": "reward"}, "use preset 'fkl'"),
        ("jsd", {"student_log_prob_min": -10}, "leave it out"),
        ("jsd", {"beta": 0.0}, "strictly between 0 and 1"),
        ("seq-kd", {"gate": "soft"}, "no trust gate"),
        ("seq-kd", {"task_reward": 0.5}, "leave task_reward and importance_cap out"),
        ("opd", {"task_reward": -1}, "task_reward must be finite and >= 0"),
        ("opd", {"clip_ratio_low": 0.2}, "belong together"),
        ("opd", {"clip_ratio_low": 0.0, "clip_ratio_high": 0.2}, "clip_ratio_low must be None or strictly between"),
        ("mopd", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}, "no term on the sampled token"),
        ("fkl", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}, "no term on the sampled token"),
        ("opd", {"importance_cap": 0.5}, "importance_cap must be None or at least 1"),
        ("tropd", {"guidance_loss": "divergence"}, "use preset 'gkd'"),
        ("tropd-exact", {"guidance_loss": "divergence"}, "use preset 'gkd'"),
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
    assert preset("jsd", beta=0.25).jsd_beta == 0.25
    assert preset("top-d", alpha=0.25).proximal_alpha == 0.25
    assert preset("eopd", alpha=0.25, beta=3).entropy_alpha == 0.25
    assert preset("skew-rkl", skew=0.25).mixture_weight == 0.75


def test_defaults_are_the_methods() -> None:
    assert preset("aopd").tau == 0
    assert preset("reopold").tau == pytest.approx(REOPOLD_TAU)
    eopd = preset("eopd")
    assert (eopd.entropy_tau, eopd.entropy_alpha, eopd.top_k, eopd.renormalize) == (0.8, 1, 16, "teacher")
    assert (preset("top-d").mixture_weight, preset("skew-fkl").mixture_weight, preset("skew-rkl").mixture_weight) == (
        0.2,
        0.1,
        0.9,
    )
    assert (preset("mopd").top_k, preset("jsd").jsd_beta, preset("seq-kd").guidance_beta) == (64, 0.5, 1)
