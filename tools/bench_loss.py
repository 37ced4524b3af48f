"""What the loss costs beside other ways to compute it, on the same tensors in the same process.

    python tools/bench_loss.py --quick
    torchrun --nproc-per-node 2 tools/bench_loss.py --json loss.jsonl

Rows: `distillation_loss` as it is (PyTorch on a CPU, Triton on CUDA), Megatron's `vocab_parallel_cross_entropy` twice
(K1 only, bf16 logits: it overwrites fp32 ones), and a dense version with plain autograd (whole vocabulary on one rank,
eager and compiled). Columns: median time of forward and backward (and its ratio to ours), extra peak memory in bytes
per element of one logits shard, collectives, and the gradient's relative error against dense float64 on a few tokens.
Absolute times depend on the machine and on who else uses it; ratios are what to quote.

Shape suffixes: ``T`` tokens, ``V`` vocabulary (of this rank unless said otherwise).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tropd.objectives import Objective, preset
from megatron_tropd.vocab_parallel import distillation_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from dense_reference import dense_loss  # type: ignore[import-not-found]
from vocab_parallel_cases import measure_memory, relative_error, unshard  # type: ignore[import-not-found]

CASES = {
    "K1": preset("opd"),
    "top-k FKL": preset("fkl"),
    "FKL": preset("fkl-exact"),
    "RKL": preset("rkl-exact"),
    "JSD": preset("jsd-exact"),
    "TrOPD mix": preset("tropd"),
}
"""The mix: one token in five is guidance, and about 8 % of the others are outliers; all metrics."""
ERROR_TOKENS = 16

LossFunction = Callable[["Inputs", Objective], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """This rank's shards; the vocabulary divides evenly."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    tokens_T: torch.Tensor
    regions_T: torch.Tensor
    uniforms_T: torch.Tensor
    group: dist.ProcessGroup
    vocab_size: int

    def head(self, count: int) -> Inputs:
        """The first tokens, in tensors of their own."""
        names = ("student_TV", "teacher_TV", "tokens_T", "regions_T", "uniforms_T")
        return replace(self, **{name: getattr(self, name)[:count].clone() for name in names})


@dataclass(frozen=True)
class Row:
    """One line of the table; None where ``note`` says why there is no figure."""

    case: str
    implementation: str
    ours: bool
    tp: int
    time_ms: float | None = None
    time_ratio: float | None = None
    peak_bytes_per_element: float | None = None
    collectives: int | None = None
    gradient_error: float | None = None
    note: str = ""


def ours(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """As the trainer calls it: the gradient takes the logits' place."""
    loss_T, _ = distillation_loss(
        inputs.student_TV,
        inputs.teacher_TV,
        inputs.tokens_T,
        inputs.regions_T,
        objective,
        vocab_size=inputs.vocab_size,
        group=inputs.group,
        uniforms_T=inputs.uniforms_T,
        full_statistics=objective.name == "tropd",
        inplace_backward=True,
    )
    return loss_T


def megatron(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """K1 from two cross-entropies."""

    def log_probs(logits_TV: torch.Tensor) -> torch.Tensor:
        losses = vocab_parallel_cross_entropy(logits_TV[:, None], inputs.tokens_T[:, None], tp_group=inputs.group)
        return -losses[:, 0]

    with torch.no_grad():
        teacher_T = log_probs(inputs.teacher_TV)
    student_T = log_probs(inputs.student_TV)
    return -(teacher_T - student_T.detach()) * student_T


def naive(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Whole log-softmaxes in fp32."""
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
    return torch.where(inputs.regions_T == 1, -objective.guidance_beta * log_p_x, on_policy)


def make_inputs(num_tokens: int, vocab_size: int, device: torch.device, *, mixed: bool) -> Inputs:
    """Two similar models: sampled tokens are rejected about 8 % of the time. The same numbers at every tp."""
    generator = torch.Generator().manual_seed(0)
    student_TV = 2 * torch.randn(num_tokens, vocab_size, generator=generator)
    teacher_TV = student_TV + 0.2 * torch.randn(num_tokens, vocab_size, generator=generator)
    tokens_T = torch.multinomial(student_TV.softmax(-1), 1, generator=generator)[:, 0]
    regions_T = torch.full((num_tokens,), 2)
    if mixed:
        regions_T[::5] = 1
    size, rank = dist.get_world_size(), dist.get_rank()
    student_TV, teacher_TV = (
        logits.chunk(size, dim=1)[rank].bfloat16().to(device).contiguous() for logits in (student_TV, teacher_TV)
    )
    uniforms_T = torch.rand(num_tokens, generator=generator)
    assert dist.group.WORLD is not None
    return Inputs(
        student_TV,
        teacher_TV,
        tokens_T.to(device),
        regions_T.to(device),
        uniforms_T.to(device),
        dist.group.WORLD,
        vocab_size,
    )


def step(loss: LossFunction, inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Forward and backward; returns the gradient."""
    student_TV = inputs.student_TV.detach().requires_grad_()
    loss(replace(inputs, student_TV=student_TV), objective).sum().backward()
    assert student_TV.grad is not None
    return student_TV.grad


def fresh(inputs: Inputs) -> Inputs:
    """A copy of what a step may overwrite."""
    return replace(inputs, student_TV=inputs.student_TV.clone())


def seconds(loss: LossFunction, inputs: Inputs, objective: Objective, repeats: int) -> float:
    """Median, after one step to warm up."""
    times = []
    for _ in range(repeats + 1):
        copy = fresh(inputs)
        _synchronize(inputs)
        start = time.perf_counter()
        step(loss, copy, objective)
        _synchronize(inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _synchronize(inputs: Inputs) -> None:
    if inputs.student_TV.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()


def peak_bytes(loss: LossFunction, inputs: Inputs, objective: Objective) -> int:
    """Beyond the two models' logits; a gradient of its own counts."""
    copy = fresh(inputs)
    if copy.student_TV.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, copy, objective)
        return torch.cuda.max_memory_allocated() - before
    with measure_memory() as use:
        step(loss, copy, objective)
    return use.peak


def gradient_error(loss: LossFunction, inputs: Inputs, objective: Objective) -> float:
    """Against dense float64 on the first tokens."""
    few = inputs.head(ERROR_TOKENS)
    student_TV, teacher_TV = (unshard(logits, few.group).cpu() for logits in (few.student_TV, few.teacher_TV))
    exact_TV = student_TV.double().requires_grad_()
    wanted_T, _ = dense_loss(
        exact_TV, teacher_TV, few.tokens_T.cpu(), few.regions_T.cpu(), objective, vocab_size=few.vocab_size,
        uniforms_T=few.uniforms_T.cpu(),
    )  # fmt: skip
    wanted_T.sum().backward()
    assert exact_TV.grad is not None
    return relative_error(unshard(step(loss, few, objective), few.group).cpu(), exact_TV.grad)


class CollectiveCounter(TorchDispatchMode):
    """Counts the communication in the block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def count_collectives(loss: LossFunction, inputs: Inputs, objective: Objective) -> int:
    """Forward and backward together."""
    copy = fresh(inputs)
    with CollectiveCounter() as counter:
        step(loss, copy, objective)
    return counter.count


def measure(case: str, name: str, loss: LossFunction, inputs: Inputs, repeats: int) -> Row:
    """Everything but the ratio."""
    objective = CASES[case]
    return Row(
        case=case,
        implementation=name,
        ours=name == "ours",
        tp=dist.get_world_size(),
        time_ms=1e3 * seconds(loss, inputs, objective, repeats),
        peak_bytes_per_element=peak_bytes(loss, inputs, objective) / inputs.student_TV.numel(),
        collectives=count_collectives(loss, inputs, objective),
        gradient_error=gradient_error(loss, inputs, objective),
    )


def run_case(case: str, num_tokens: int, vocab_size: int, device: torch.device, repeats: int) -> list[Row]:
    """Ours first; the others' times are relative to it."""
    inputs = make_inputs(num_tokens, vocab_size, device, mixed=case == "TrOPD mix")
    implementations: list[tuple[str, LossFunction]] = [("ours", ours)]
    if case == "K1":
        implementations.append(("Megatron cross-entropy, twice", megatron))
    whole = dist.get_world_size() == 1
    if whole:
        # Each objective is a function of its own to the compiler, which gives up after eight of one name.
        torch.compiler.reset()
        compiled: LossFunction = torch.compile(naive, dynamic=False)
        implementations += [("dense", naive), ("dense, compiled", compiled)]
    rows = [measure(case, name, loss, inputs, repeats) for name, loss in implementations]
    own = rows[0].time_ms
    assert own is not None
    rows = [replace(row, time_ratio=row.time_ms / own) for row in rows if row.time_ms is not None]
    if not whole:
        note = "needs the whole vocabulary on one rank"
        rows.append(Row(case, "dense", ours=False, tp=dist.get_world_size(), note=note))
    return rows


def print_table(rows: list[Row], title: str) -> None:
    """To the terminal."""
    table = Table(title=title)
    for heading in ("case", "implementation", "ms", "time / ours", "peak B/elem", "collectives", "gradient error"):
        table.add_column(heading, justify="left" if heading in ("case", "implementation") else "right")
    for row in rows:
        figures = [(row.time_ms, ".1f"), (row.time_ratio, ".2f"), (row.peak_bytes_per_element, ".2f")]
        figures += [(row.collectives, "d"), (row.gradient_error, ".1e")]
        cells = ["-" if value is None else format(value, spec) for value, spec in figures]
        table.add_row(row.case, f"{row.implementation}: {row.note}" if row.note else row.implementation, *cells)
    Console(width=130).print(table)


def main() -> None:
    """Parse the command line, run every case on every rank, report on rank 0."""
    parser = argparse.ArgumentParser(description="Time, memory, collectives and accuracy of the loss beside others.")
    parser.add_argument("--tokens", type=int, default=1024, help="T (default 1024)")
    parser.add_argument("--vocab", type=int, default=151936, help="ids; must divide by the number of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="128 tokens: a few minutes on two cores")
    parser.add_argument("--json", type=Path, help="also write one JSON object per row and line to this file")
    arguments = parser.parse_args()
    num_tokens = 128 if arguments.quick else arguments.tokens
    device = start()
    if arguments.vocab % dist.get_world_size():
        parser.error(f"--vocab {arguments.vocab} does not divide by {dist.get_world_size()} ranks")
    rows = []
    for case in arguments.cases:
        rows += run_case(case, num_tokens, arguments.vocab, device, arguments.repeats)
    if dist.get_rank() == 0:
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        title = (
            f"T {num_tokens}, V {arguments.vocab}, tp {dist.get_world_size()}, bf16, {where}, torch {torch.__version__}"
        )
        print_table(rows, title)
        if arguments.json is not None:
            arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    dist.destroy_process_group()


def start() -> torch.device:
    """One process group, also for a single process started without torchrun."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


if __name__ == "__main__":
    main()
