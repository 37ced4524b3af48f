"""The sharded loss over 1, 2 and 4 gloo ranks: against dense float64, and what it communicates.

Four ranks start once. They run every check at tp 4 (all of them), tp 2 (two independent pairs) and tp 1.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from vocab_parallel_cases import VARIANTS, Case, CountCollectives, check_against_dense, make_case, run_sharded, shard

from megatron_tropd.objectives import Objective, preset
from megatron_tropd.vocab_parallel import distillation_loss

# (shared ids, student's padded vocabulary, teacher's). At tp 4:
LAYOUTS = {
    "aligned": (64, 64, 64),
    "aligned, padded": (103, 112, 112),
    "boundaries differ": (103, 112, 128),  # widths 28 and 32
    "a shard is all padding": (50, 80, 56),  # the student's rank 3 holds nothing
    "lopsided": (9, 64, 12),  # all of the student on rank 0, 3, 3, 3, 0 of the teacher
}
ONE_OF_EACH = [
    preset("tropd", top_k=7),
    preset("fkl"),
    preset("opd"),
    preset("rkl-exact"),
    preset("jsd-exact"),
    preset("tropd-exact"),
    preset("tropd-aopd", top_k=7),
    preset("eopd", entropy_tau=1.5),
    preset("top-d"),
    preset("mopd"),
    preset("jsd"),
    preset("skew-rkl"),
]


def make_groups() -> dict[int, dist.ProcessGroup | None]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: dict[int, Any] = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    return groups


def same_on_all_ranks(tensor: torch.Tensor) -> bool:
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.contiguous())
    return all(torch.equal(other.view(torch.int32), tensor.view(torch.int32)) for other in everywhere)


def compare_with_dense(groups: dict[int, dist.ProcessGroup | None]) -> dict[str, float]:
    """Largest relative errors. Every variant in two layouts, one of each kind in the others, both dtypes."""
    worst: dict[str, float] = {}
    for (layout, sizes), dtype, (tp, group) in itertools.product(
        LAYOUTS.items(), [torch.float32, torch.bfloat16], groups.items()
    ):
        every = layout in ("boundaries differ", "a shard is all padding") and dtype == torch.float32
        case = make_case(*sizes, dtype=dtype)
        for objective in VARIANTS if every else ONE_OF_EACH:
            full = objective.needs_teacher and tp == 2
            value, gradient = check_against_dense(case, objective, group, full_statistics=full)
            for kind, error in (("value", value), ("gradient", gradient)):
                key = f"{kind} {dtype}"
                worst[key] = max(worst.get(key, 0.0), error)
    return worst


def compare_ties(groups: dict[int, dist.ProcessGroup | None]) -> None:
    """A teacher of few distinct logits: the choice among ties decides value and gradient."""
    for layout, group in itertools.product(("aligned, padded", "boundaries differ"), groups.values()):
        case = make_case(*LAYOUTS[layout])
        coarse = (case.teacher_TV / 4).round()
        for objective in (preset("fkl", top_k=9), preset("fkl", top_k=40)):
            check_against_dense(dataclasses.replace(case, teacher_TV=coarse), objective, group)


def compare_ranks(groups: dict[int, dist.ProcessGroup | None]) -> dict[str, bool]:
    """Loss and report bit for bit on all ranks of a group, with uniforms and without (rank 0's draw is used)."""
    same: dict[str, bool] = {}
    for objective, drawn in itertools.product(ONE_OF_EACH, (True, False)):
        torch.manual_seed(dist.get_rank())
        options: dict[str, Any] = {"uniforms_T": None} if drawn else {}
        case = make_case(*LAYOUTS["boundaries differ"], num_tokens=400)
        loss, report, _ = run_sharded(case, objective, groups[4], full_statistics=True, **options)
        agree = [same_on_all_ranks(loss), *(same_on_all_ranks(value) for value in report.values())]
        same[f"{objective.name}, drawn inside: {drawn}"] = all(agree)
    return same


def compare_draws(groups: dict[int, dist.ProcessGroup | None]) -> tuple[bool, float]:
    """The draw inside follows rank 0's generator: the same gate at tp 1 and 4 (on rank 0); and some are outliers."""
    case = make_case(*LAYOUTS["boundaries differ"], num_tokens=400)
    trusts = []
    for tp in (1, 4):
        torch.manual_seed(7 if dist.get_rank() == 0 else 100 + dist.get_rank())
        trusts.append(run_sharded(case, preset("tropd"), groups[tp], uniforms_T=None)[1].trust)
    return torch.equal(*trusts), float(1 - trusts[1].sum() / (case.regions_T == 2).sum())


def compare_equal_models(groups: dict[int, dist.ProcessGroup | None]) -> float:
    case = make_case(*LAYOUTS["aligned, padded"])
    on_policy = dataclasses.replace(
        case, teacher_TV=case.student_TV.clone(), regions_T=torch.full_like(case.regions_T, 2),
        tokens_T=case.tokens_T.clamp(min=0),
    )  # fmt: skip
    gradients = [
        run_sharded(on_policy, objective, group)[2].abs().max()
        for objective, group in itertools.product(
            [preset(name) for name in ("tropd", "opd", "rkl-exact", "tropd-exact", "mopd")], groups.values()
        )
    ]
    return float(torch.stack(gradients).max())


def count_collectives(case: Case, objective: Objective, group: Any, **options: Any) -> tuple[list, list]:
    """(calls in the forward, calls in the backward), each (name, bytes sent)."""
    student = shard(case.student_TV, group).requires_grad_()
    teacher = shard(case.teacher_TV, group)
    with CountCollectives() as forward:
        loss, _ = distillation_loss(
            student,
            teacher,
            case.tokens_T,
            case.regions_T,
            objective,
            vocab_size=case.vocab_size,
            group=group,
            **options,
        )
    with CountCollectives() as backward:
        loss.backward(case.grad_T)
    return forward.calls, backward.calls


def all_counts(groups: dict[int, dist.ProcessGroup | None]) -> dict[str, tuple[list, list]]:
    found = {}
    for layout, objective, full in itertools.product(
        ("aligned, padded", "boundaries differ"), [*ONE_OF_EACH, preset("fkl-exact")], (False, True)
    ):
        case = make_case(*LAYOUTS[layout])
        key = f"{layout} / {objective.name}{' / full' if full else ''}"
        found[key] = count_collectives(case, objective, groups[4], full_statistics=full)
    nothing = dataclasses.replace(case, regions_T=torch.zeros_like(case.regions_T))
    found["no region"] = count_collectives(nothing, preset("tropd"), groups[4])
    return found


def refuse_missing_group() -> str:
    case = make_case(*LAYOUTS["aligned"])
    try:
        run_sharded(dataclasses.replace(case, student_TV=case.student_TV[:, :32]), preset("opd"), None)
    except ValueError as error:
        return str(error)
    return ""


def run_all() -> dict[str, Any]:
    groups = make_groups()
    compare_ties(groups)
    return {
        "errors": compare_with_dense(groups),
        "same": compare_ranks(groups),
        "draws": compare_draws(groups),
        "equal models": compare_equal_models(groups),
        "collectives": all_counts(groups),
        "missing group": refuse_missing_group(),
    }


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, Any]]:
    return run_ranks(4, run_all, timeout=150)


def test_value_and_gradient_match_dense(on_ranks: list[dict[str, Any]]) -> None:
    """The assertions ran on the ranks; here the worst of them, so that a report can quote them."""
    for rank in on_ranks:
        assert rank["errors"]["value torch.float32"] < 3e-6
        assert rank["errors"]["gradient torch.float32"] < 3e-6
        assert rank["errors"]["gradient torch.bfloat16"] < 4e-3


def test_all_ranks_hold_the_same_bits(on_ranks: list[dict[str, Any]]) -> None:
    assert all(all(rank["same"].values()) for rank in on_ranks), on_ranks[0]["same"]


def test_rank_0_draws_for_all(on_ranks: list[dict[str, Any]]) -> None:
    same_as_alone, outlier_share = on_ranks[0]["draws"]
    assert same_as_alone and 0.05 < outlier_share < 0.95


def test_equal_models_have_zero_gradient(on_ranks: list[dict[str, Any]]) -> None:
    assert all(rank["equal models"] == 0 for rank in on_ranks)


def test_a_shard_without_its_group_is_refused(on_ranks: list[dict[str, Any]]) -> None:
    assert all("give its group" in rank["missing group"] for rank in on_ranks)


@pytest.mark.parametrize(
    ("name", "aligned", "differ", "full", "differ_full"),
    [
        # One packed all-gather; a second with top-k or JSD; one exchange more where both models are needed at one id
        # and boundaries differ.
        ("opd", 1, 1, 1, 2),
        ("tropd", 2, 3, 2, 3),
        ("fkl", 2, 3, 2, 3),
        ("rkl-exact", 1, 2, 1, 2),
        ("fkl-exact", 1, 2, 1, 2),
        ("jsd-exact", 2, 3, 2, 3),
        ("tropd-exact", 1, 2, 1, 2),
        ("tropd-aopd", 2, 3, 2, 3),
        ("eopd", 2, 3, 2, 3),
        ("top-d", 1, 1, 1, 2),
        ("mopd", 2, 3, 2, 3),
        ("jsd", 2, 3, 2, 3),
        ("skew-rkl", 2, 3, 2, 3),
    ],
)
def test_collectives(
    on_ranks: list[dict[str, Any]], name: str, aligned: int, differ: int, full: int, differ_full: int
) -> None:
    for rank in on_ranks:
        calls = rank["collectives"]
        counts = {key: len(forward) for key, (forward, _) in calls.items()}
        assert counts[f"aligned, padded / {name}"] == aligned
        assert counts[f"boundaries differ / {name}"] == differ
        assert counts[f"aligned, padded / {name} / full"] == full
        assert counts[f"boundaries differ / {name} / full"] == differ_full
        assert all(backward == [] for _, backward in calls.values())


def test_bytes_sent(on_ranks: list[dict[str, Any]]) -> None:
    """At most 32 B per token, plus 12 B per top-k candidate; nothing without a region."""
    regions = make_case(*LAYOUTS["aligned, padded"]).regions_T
    num_tokens, num_on_policy = int((regions != 0).sum()), int((regions == 2).sum())
    for rank in on_ranks:
        calls = {key: forward for key, (forward, _) in rank["collectives"].items()}
        assert calls["no region"] == []
        assert calls["aligned, padded / opd"] == [("allgather_", 16 * num_tokens)]
        assert calls["aligned, padded / rkl-exact"] == [("allgather_", 32 * num_tokens)]
        # The draw of the gate rides along: one float more.
        assert calls["aligned, padded / tropd"][0] == ("allgather_", 20 * num_tokens)
        assert calls["aligned, padded / tropd"][1][1] <= 12 * 7 * num_on_policy
        assert calls["aligned, padded / jsd-exact"][1] == ("allgather_", 8 * num_tokens)
        assert calls["aligned, padded / tropd-exact"] == [("allgather_", 36 * num_tokens)]
        assert calls["aligned, padded / eopd"][0] == ("allgather_", 32 * num_tokens)
        assert calls["aligned, padded / eopd"][1][1] < 12 * 16 * num_on_policy
        assert calls["aligned, padded / skew-rkl"][1] == ("allgather_", 8 * num_tokens)
