"""The Triton kernels in Triton's interpreter: against their PyTorch twins, dense float64, and in the whole loss.

The interpreter must be asked for before Triton is imported, so everything runs in ranks of its own. It cuts fp32 off
where a GPU rounds it to bf16 (test_kernels_compiled looks at the instruction): bf16 gradients get twice the tolerance
here, and gradients from bf16 logits into an fp32 buffer the full accuracy.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``V`` columns.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import vocab_parallel_cases
from ranks import run_ranks
from vocab_parallel_cases import Case, NoHostWait, check_against_dense, make_case, relative_error, run_sharded

from megatron_tropd.kernels.backend import BACKEND_VARIABLE, chosen_backend
from megatron_tropd.objectives import ExactDivergence, preset
from megatron_tropd.vocab_parallel import OutputHead, divergences, fused_head_loss, gradient, measure, statistics
from megatron_tropd.vocab_parallel.divergences import Divergence
from megatron_tropd.vocab_parallel.gradient import RowIds, StudentTerms
from megatron_tropd.vocab_parallel.shards import TeacherColumns
from megatron_tropd.vocab_parallel.top_k import _best_keys, local_top_k

INTERPRETED_BF16 = 8e-3
FP32 = 3e-6
# Ids held: fewer than a vector, than a tile; exactly one tile (fp32: 2048 columns, bf16: 4096); several and a rest.
WIDTHS = (1, 103, 4096, 5003)
FIRST_ID = 1000
ROWS = torch.tensor([0, 2, 3])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both models' logits of four rows, of which `ROWS` take part; garbage beyond the ids held."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    ids_N: torch.Tensor
    held: range

    def columns(self) -> TeacherColumns:
        return TeacherColumns(self.teacher_TV, (0, 0, len(self.held)), (), len(self.held))

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that take part, in float64."""
        return tuple(logits[ROWS, : len(self.held)].double() for logits in (self.student_TV, self.teacher_TV))


def make_pair(width: int, dtype: torch.dtype, *, kind: str = "plain") -> Pair:
    """A view of a wider buffer (odd offset and row stride where ``kind`` is strided); ids inside, below and above."""
    generator = torch.Generator().manual_seed(width)
    left, total = (3, width + 11) if kind == "strided" else (0, width + 5)
    student, base = (3 * torch.randn(4, total, generator=generator) for _ in range(2))
    teacher = student + base / 2
    if kind == "huge":
        student, teacher = student * 1e17, teacher * 1e17
    if kind == "infinite":
        for logits in (student, teacher):
            logits[torch.rand(logits.shape, generator=generator) < 0.3] = -math.inf
    if kind == "no mass":
        student[0], teacher[2] = -math.inf, -math.inf
    student[:, left + width :], teacher[:, left + width :] = math.nan, math.inf
    ids = torch.tensor([FIRST_ID + width - 1, FIRST_ID - 1, FIRST_ID + width])
    student, teacher = student.to(dtype)[:, left:], teacher.to(dtype)[:, left:]
    return Pair(student, teacher, ids, range(FIRST_ID, FIRST_ID + width))


def pairs() -> Iterator[tuple[str, Pair]]:
    for dtype, width in itertools.product((torch.float32, torch.bfloat16, torch.float16), WIDTHS):
        yield f"{dtype} {width}", make_pair(width, dtype)
    for kind in ("strided", "huge", "infinite", "no mass"):
        yield kind, make_pair(5003, torch.float32, kind=kind)


def exact_statistics(pair: Pair) -> torch.Tensor:
    """The eight floats in float64, from the definitions; an event of probability 0 contributes 0."""
    student, teacher = pair.exact()
    log_p, log_q = (x - x.logsumexp(-1, keepdim=True).nan_to_num(neginf=0) for x in (student, teacher))

    def expect(log_weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(log_weights.exp() > 0, log_weights.exp() * values, 0.0).sum(-1)

    inside = torch.tensor([identity in pair.held for identity in pair.ids_N.tolist()])
    at = (pair.ids_N - FIRST_ID).where(inside, 0)[:, None]
    tokens = [x.gather(1, at)[:, 0].where(inside, -math.inf) for x in (student, teacher)]
    return torch.stack(
        [
            student.logsumexp(-1), tokens[0], teacher.logsumexp(-1), tokens[1], -expect(log_p, log_p),
            -expect(log_q, log_q), expect(log_p, log_p - log_q), expect(log_q, log_q - log_p),
        ],
        -1,
    )  # fmt: skip


def check_statistics(kernels: Any) -> dict[str, float]:
    """The kernel's error is the twin's but for rounding: both at most 3e-6 of the largest value of their column."""
    worst = {}
    for name, pair in pairs():
        wanted = exact_statistics(pair)
        found = kernels.pair_statistics(pair.student_TV, pair.columns(), ROWS, pair.ids_N, pair.held)
        singles = [
            kernels.shard_statistics(logits, ROWS, pair.ids_N, pair.held)
            for logits in (pair.student_TV, pair.teacher_TV)
        ]
        twin = statistics.pair_statistics(pair.student_TV, pair.columns(), ROWS, pair.ids_N, pair.held)
        for one in (found, twin, torch.cat([*singles, twin[:, 4:]], -1)):
            worst[name] = max(worst.get(name, 0.0), column_error(one, wanted))
    return worst


def column_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the column's largest finite value (at least 1); infinities must agree."""
    assert found.dtype == torch.float32
    finite = wanted.isfinite()
    assert torch.equal(found.double().where(~finite, 0), wanted.where(~finite, 0)), (found, wanted)
    scale = wanted.where(finite, 0).abs().amax(0).clamp(min=1)
    return float(((found - wanted).where(finite, 0) / scale).abs().max())


def check_pieces(kernels: Any) -> float:
    """A teacher in three pieces (two of them received) gives what the whole one gives, for every pass."""
    worst = 0.0
    for kind in ("plain", "infinite", "no mass"):
        pair = make_pair(3000, torch.float32, kind=kind)
        slivers = ((0, pair.teacher_TV[ROWS, :7].clone()), (2990, pair.teacher_TV[ROWS, 2990:3000].clone()))
        apart = TeacherColumns(pair.teacher_TV[:, 7:], (7, 0, 2983), slivers, 3000)
        found = kernels.pair_statistics(pair.student_TV, apart, ROWS, pair.ids_N, pair.held)
        worst = max(worst, column_error(found, exact_statistics(pair)))
    pair = make_pair(3000, torch.float32)
    apart = dataclasses.replace(apart, logits_TV=pair.teacher_TV[:, 7:], slivers=tuple(
        (to, pair.teacher_TV[ROWS, to : to + sliver.shape[1]].clone()) for to, sliver in slivers
    ))  # fmt: skip
    for kind in ("gated_kl", "skew_reverse_kl"):
        whole, cut = (make_terms(pair, teacher, kind) for teacher in (pair.columns(), apart))
        gradients = [run_gradient(kernels, pair, terms, False, torch.float32) for terms in (whole, cut)]
        assert torch.equal(*gradients), kind
    return worst


def check_best_keys(kernels: Any) -> float:
    """The top-k from peaks of blocks is that of whole rows, with ties, with a teacher in three pieces or one."""
    generator = torch.Generator().manual_seed(0)
    for width, top_k in ((3000, 7), (3000, 64), (103, 64), (50, 64)):
        logits = ((torch.randn(4, width, generator=generator) * 4).round() / 4).bfloat16()
        held, count = range(FIRST_ID, FIRST_ID + width), min(top_k, width)
        wanted = _best_keys(logits[ROWS].float(), FIRST_ID, count)
        slivers = ((0, logits[ROWS, :7].clone()), (width - 10, logits[ROWS, width - 10 :].clone()))
        for teacher in (
            TeacherColumns(logits, (0, 0, width), (), width),
            TeacherColumns(logits[:, 7:], (7, 0, width - 17), slivers, width),
        ):
            assert torch.equal(local_top_k(teacher, logits, ROWS, held, top_k)[:, :count], wanted), (width, top_k)
    return check_pieces(kernels)


def check_mixture(kernels: Any) -> float:
    worst = 0.0
    # Not "no mass", which no merged normaliser has, nor "huge", where their rounding would be all that is seen.
    chosen = ("torch.float32 103", "torch.float32 5003", "torch.bfloat16 5003", "strided", "infinite")
    for (name, pair), beta in zip(pairs(), itertools.cycle((0.1, 0.5)), strict=False):
        if name not in chosen:
            continue
        student, teacher = pair.exact()
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        divergences_N = [torch.where(x.exp() > 0, x.exp() * (x - log_m), 0.0).sum(-1) for x in (log_p, log_q)]
        overlap_N = torch.where(log_p.exp() > 0, (log_p + log_q - log_m).exp(), 0.0).sum(-1)
        wanted = torch.stack([*divergences_N, overlap_N], -1)
        normalizers = student.logsumexp(-1).float(), teacher.logsumexp(-1).float()
        for passes in (kernels, divergences):
            arguments = pair.student_TV, pair.columns(), ROWS, *normalizers, beta
            worst = max(worst, column_error(passes.jsd_statistics(*arguments), wanted[:, :2]))
            for kind, columns in (("skew_reverse_kl", wanted[:, 0::2]), ("skew_forward_kl", wanted[:, 1:])):
                worst = max(worst, column_error(passes.skew_statistics(*arguments, kind), columns))
    return worst


BETA = 0.3
GATE_WEIGHTS = torch.tensor([0.4, 0.0, 1.0]), torch.tensor([0.6, 1.0, 0.0])


def divergence_values(kind: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``[N]``, differentiable."""
    log_m = torch.logaddexp(log_q + math.log(BETA), log_p + math.log1p(-BETA))
    reverse, forward = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    student, teacher = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
    return {
        "reverse_kl": reverse, "forward_kl": forward, "gated_kl": GATE_WEIGHTS[0] * reverse + GATE_WEIGHTS[1] * forward,
        "jsd": BETA * teacher + (1 - BETA) * student, "skew_forward_kl": teacher, "skew_reverse_kl": student,
    }[kind]  # fmt: skip


def make_divergence(pair: Pair, teacher: TeacherColumns, kind: str) -> Divergence:
    student, other = pair.exact()
    log_p, log_q = student.log_softmax(-1), other.log_softmax(-1)
    log_m = torch.logaddexp(log_q + math.log(BETA), log_p + math.log1p(-BETA))
    reference = log_q if kind in ("reverse_kl", "gated_kl") else log_m
    return Divergence(
        kind,  # type: ignore[arg-type]
        BETA,
        teacher,
        other.logsumexp(-1).float(),
        (log_p.exp() * (log_p - reference)).sum(-1).float(),
        (log_p + log_q - log_m).exp().sum(-1).float() if kind.startswith("skew") else None,
        GATE_WEIGHTS if kind == "gated_kl" else None,
    )


def make_terms(pair: Pair, teacher: TeacherColumns, kind: str | None) -> StudentTerms:
    """Sampled tokens on all rows, eight ids on the last two: the token's own among them, and two of other shards."""
    divergence = None if kind is None else make_divergence(pair, teacher, kind)
    near = torch.arange(8) * 3 + FIRST_ID
    top_k = torch.stack((near, near.where(near != FIRST_ID + 3, FIRST_ID - 5)))
    top_k[:, -1] = FIRST_ID + 100_000
    tokens = torch.tensor([FIRST_ID + len(pair.held) - 1, FIRST_ID + 6, FIRST_ID + 9])
    read_ids = (RowIds(torch.arange(3), tokens[:, None]), RowIds(torch.tensor([1, 2]), top_k.int()))
    return StudentTerms(ROWS, pair.exact()[0].logsumexp(-1).float(), pair.held, read_ids, divergence)


TOKEN_GRADS = torch.tensor([[0.7], [-1.3], [0.0]])
TOP_K_GRADS = torch.linspace(-1, 1, 16).view(2, 8)
DIVERGENCE_GRADS = torch.tensor([0.0, 1.5, -0.4])


def run_gradient(passes: Any, pair: Pair, terms: StudentTerms, in_place: bool, dtype: torch.dtype) -> torch.Tensor:
    """``[T, V]``, the buffer full of nan before unless it is the student's own."""
    student = pair.student_TV.clone() if pair.student_TV.stride(0) % 2 == 0 else pair.student_TV
    buffer = student if in_place else torch.full(student.shape, math.nan, dtype=dtype)
    grads = TOKEN_GRADS, TOP_K_GRADS
    passes.student_gradient(student, terms, grads, DIVERGENCE_GRADS if terms.divergence else None, buffer)
    return buffer


def exact_gradient(pair: Pair, kind: str | None) -> torch.Tensor:
    """By autograd in float64."""
    student, teacher = pair.exact()
    student.requires_grad_()
    terms = make_terms(pair, pair.columns(), kind)
    total = torch.zeros((), dtype=torch.float64)
    for read, grads in zip(terms.read_ids, (TOKEN_GRADS, TOP_K_GRADS), strict=True):
        for row, ids, weights in zip(read.rows_R.tolist(), read.ids_RL.tolist(), grads.tolist(), strict=True):
            # An id of another shard still lowers every probability here.
            for identity, weight in zip(ids, weights, strict=True):
                inside = identity in pair.held
                own = student[row, identity - FIRST_ID] if inside else 0.0
                total = total + weight * (own - student[row].logsumexp(-1))
    if kind is not None:
        values = divergence_values(kind, student.log_softmax(-1), teacher.log_softmax(-1))
        total = total + (DIVERGENCE_GRADS * values).sum()
    return torch.autograd.grad(total, student)[0]


def check_gradient(kernels: Any) -> dict[str, float]:
    """Against float64 and the twin; everything that is not a row that takes part or an id held is exactly 0."""
    worst: dict[str, float] = {}
    inputs = {
        "fp32": make_pair(5003, torch.float32), "bf16": make_pair(5003, torch.bfloat16),
        "strided": make_pair(5003, torch.float32, kind="strided"), "narrow": make_pair(103, torch.bfloat16),
    }  # fmt: skip
    for (name, pair), kind in itertools.product(inputs.items(), [None, *get_args(ExactDivergence)]):
        if name == "strided" and kind not in (None, "gated_kl"):
            continue
        wanted, terms = exact_gradient(pair, kind), make_terms(pair, pair.columns(), kind)
        buffers = {torch.float32: [False], pair.student_TV.dtype: [False, True]}
        for dtype, in_place in ((dtype, place) for dtype, places in buffers.items() for place in places):
            copy = dataclasses.replace(pair, student_TV=pair.student_TV.clone()) if in_place else pair
            found = run_gradient(kernels, copy, terms, in_place, dtype)
            twin = run_gradient(gradient, pair, terms, False, dtype)
            assert (found[1] == 0).all() and (found[:, len(pair.held) :] == 0).all()
            error = relative_error(found[ROWS, : len(pair.held)], wanted)
            assert error < (FP32 if dtype == torch.float32 else INTERPRETED_BF16), (name, kind, dtype, error)
            if dtype == torch.float32:
                assert relative_error(found, twin.double()) < FP32, (name, kind)
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
    return worst


# (shared ids, student's padded vocabulary, teacher's), as in test_vocab_parallel_distributed.
BOUNDARIES_DIFFER, ALL_PADDING, SEVERAL_TILES = (103, 112, 128), (50, 80, 56), (8380, 8400, 8448)
OBJECTIVES = [
    preset("tropd", top_k=7), preset("tropd", gate="soft", renormalize="both", top_k=17), preset("rkl-exact"),
    preset("jsd-exact", beta=0.3, guidance_beta=0.3), preset("fkl", top_k=9), preset("tropd-exact"), preset("skew-rkl"),
    preset("sft"),
]  # fmt: skip


def check_loss() -> dict[str, float]:
    """`distillation_loss` with every pass in Triton at tp 1, 2 and 4, value, gradient and report against float64.

    The interpreter is slow: at tp 1 the four ranks, at tp 2 the two pairs share the objectives between them.
    """
    rank, pairs = dist.get_rank(), [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: dict[int, Any] = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}
    vocab_parallel_cases.TOLERANCE[torch.bfloat16] = INTERPRETED_BF16
    worst: dict[str, float] = {}
    for sizes, dtype, objectives in (
        (BOUNDARIES_DIFFER, torch.float32, OBJECTIVES),
        (BOUNDARIES_DIFFER, torch.bfloat16, OBJECTIVES[:4]),
        (ALL_PADDING, torch.float32, OBJECTIVES[:4]),
        (SEVERAL_TILES, torch.float32, OBJECTIVES[::2][:2]),
    ):
        case = make_case(*sizes, num_tokens=6, dtype=dtype)
        for tp, group in groups.items():
            for objective in objectives[rank // tp :: 4 // tp]:
                options = {"full_statistics": objective.needs_teacher and tp == 2, "inplace_backward": tp == 4}
                value, error = check_against_dense(case, objective, group, **options)
                for key, found in ((f"value {tp}", value), (f"gradient {dtype} {tp}", error)):
                    worst[key] = max(worst.get(key, 0.0), found)
    return worst


def check_edges() -> None:
    """-inf as a mask, equal models, zero incoming gradients, no token at all."""
    case = make_case(103, 110, 120, num_tokens=6)
    nothing = dataclasses.replace(case, regions_T=torch.zeros_like(case.regions_T))
    equal = dataclasses.replace(
        case, teacher_TV=case.student_TV, regions_T=case.regions_T.where(case.regions_T == 2, 0)
    )
    for objective, bound in ((preset("rkl-exact"), 0), (preset("fkl-exact"), 0), (preset("jsd-exact"), 1e-6)):
        loss, _, found = run_sharded(equal, objective, None)
        assert loss.abs().max() <= bound and found.abs().max() <= bound
        assert run_sharded(nothing, objective, None)[2].eq(0).all()
    case.teacher_TV[:, 3] = -math.inf
    silent = dataclasses.replace(case, grad_T=case.grad_T.where(case.regions_T == 1, 0))
    loss, _, found = run_sharded(silent, preset("rkl-exact"), None)
    assert (found[silent.grad_T == 0] == 0).all() and not loss.isnan().any()
    _check_excluded(case)


def _check_excluded(case: Case) -> None:
    case.student_TV[:, 5:9] = -math.inf
    case = dataclasses.replace(case, tokens_T=case.tokens_T.clamp(min=10))
    finite = dataclasses.replace(
        case, student_TV=case.student_TV.clamp(min=-1e4), teacher_TV=case.teacher_TV.clamp(min=-1e4)
    )
    for objective in (preset("tropd", top_k=7), preset("fkl", top_k=200), preset("jsd-exact")):
        _, _, wanted = run_sharded(finite, objective, None)
        _, _, found = run_sharded(case, objective, None)
        assert relative_error(found, wanted.double()) < FP32


def check_that_the_host_never_waits() -> None:
    """Both heads, loss and backward as on CUDA: no operation but the kernels' launches needs a value on the host."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = torch.randn(40, 8, generator=generator), torch.randn(70, 8, generator=generator)
    teacher = OutputHead(hidden_NH.clone(), weight_VH + 0.3 * torch.randn(70, 8, generator=generator))
    tokens_N, regions_N = torch.randint(0, 70, (40,)), torch.randint(1, 3, (40,))
    objectives = [preset("tropd", top_k=7), preset("fkl", top_k=7), preset("tropd-exact"), preset("jsd-exact")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_host_waits", lambda _tensor: True)
        for objective, recompute in itertools.product(objectives, (False, True)):
            student = OutputHead(hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_())
            with NoHostWait():
                loss_N, _ = fused_head_loss(
                    student, teacher, tokens_N, regions_N, objective, vocab_size=66, chunk_size=16,
                    full_statistics=True, uniforms_N=torch.rand(40), recompute=recompute, check=False,
                )  # fmt: skip
                loss_N.sum().backward()
            assert student.hidden_NH.grad is not None and student.hidden_NH.grad.any()


def run_all() -> dict[str, Any]:
    """Triton comes in here: `ranks` has set the environment by now."""
    from megatron_tropd.kernels import triton_kernels
    from megatron_tropd.vocab_parallel.kernel_passes import KernelPasses

    rank = dist.get_rank()
    if rank == 0:
        check_that_the_host_never_waits()
    single = [check_statistics, check_gradient, check_mixture, check_best_keys][rank](KernelPasses(triton_kernels))
    if rank == 3:
        check_edges()
    return {"single": single, "loss": check_loss()}


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv(BACKEND_VARIABLE, "triton")
        return run_ranks(4, run_all, timeout=300, fresh=True)


def test_statistics_match_their_twins_and_float64(on_ranks: list[dict[str, Any]]) -> None:
    assert max(on_ranks[0]["single"].values()) < FP32, on_ranks[0]["single"]
    assert on_ranks[2]["single"] < FP32 and on_ranks[3]["single"] < FP32


def test_gradients_match_their_twins_and_float64(on_ranks: list[dict[str, Any]]) -> None:
    assert on_ranks[1]["single"]["torch.float32"] < FP32
    assert on_ranks[1]["single"]["torch.bfloat16"] < INTERPRETED_BF16


def test_the_whole_loss_matches_dense(on_ranks: list[dict[str, Any]]) -> None:
    for rank in on_ranks:
        assert {f"value {tp}" for tp in (1, 2, 4)} <= set(rank["loss"])
        assert all(error < FP32 for key, error in rank["loss"].items() if "bfloat16" not in key), rank["loss"]


def test_the_kernels_know_every_term_of_the_gradient() -> None:
    """A term added to the definition alone would be missing on CUDA: extend `kernel_passes`, then this test."""
    assert {field.name for field in dataclasses.fields(StudentTerms)} == {
        "rows_N", "log_sum_exp_N", "held", "read_ids", "divergence",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(Divergence)} == {
        "kind", "beta", "teacher", "teacher_log_sum_exp_N", "student_kl_N", "overlap_N", "gate_weights_N",
    }  # fmt: skip


def test_the_backend_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 1)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert chosen_backend(logits) == "torch"
    for backend in ("torch", "compile"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        assert chosen_backend(logits) == backend
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(ValueError, match="logits are on cpu: Triton needs CUDA"):
        chosen_backend(logits)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen_backend(logits) == "triton"
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="auto, triton, torch, compile; found 'cuda'"):
        chosen_backend(logits)
