"""What the loss costs beside other ways to compute it, on the same tensors in the same process.

    python tools/bench_loss.py --quick
    torchrun --nproc-per-node 2 tools/bench_loss.py --json loss.jsonl --markdown benchmarks/loss.md

The peers (NVIDIA ModelOpt, Liger, TRL) are measured where they are installed: pip install '.[bench]' -c constraints.txt
Timed steps of all implementations take turns, so that whatever else the machine does falls on all alike. Absolute times
depend on the machine; the ratios are what to quote. On CUDA, --vocab 18992 is one rank's share of 151936 ids at tp 8.

Columns: median time of forward and backward, and its ratio to `ours` and to `ours, compiled`; extra peak memory, what
stays from forward to backward, and traffic of PyTorch operations (not counted inside compiled code or Triton), all in
bytes per element of one logits shard; collectives; and the gradient's relative error against dense float64. On CUDA
also the time that the GPU works, without waiting for the host to launch: what matters where the host runs ahead, as it
does in training, and what GPU bars are judged by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from loss_bench import costs
from loss_bench.cases import CASES, ERROR_TOKENS, HEAD, HEAD_SIZES, gradient_error, make_inputs
from loss_bench.implementations import PRODUCTS, Implementation, implementations

from megatron_tropd.kernels import compiled

FLOOR_BYTES = {"K1": 8, "top-k FKL": 8, "TrOPD mix": 8, "FKL": 10, "RKL": 10, "JSD": 14}
"""Least bytes per element that forward and backward must read and write of bf16 logits."""


@dataclass(frozen=True)
class Row:
    """One line of the table; None where ``note`` says why there is no figure, or where it cannot be counted."""

    case: str
    implementation: str
    ours: bool
    tp: int
    time_ms: float | None = None
    time_ratio: float | None = None
    """To `ours`: eager PyTorch on a CPU, Triton on CUDA."""
    time_ratio_compiled: float | None = None
    """To `ours, compiled`."""
    peak_bytes_per_element: float | None = None
    kept_bytes_per_element: float | None = None
    bytes_moved_per_element: float | None = None
    collectives: int | None = None
    gradient_error: float | None = None
    device_ms: float | None = None
    """CUDA: time that the GPU works, without what the host takes to launch it."""
    device_ratio: float | None = None
    """Of these, to `ours`."""
    bandwidth_share: float | None = None
    """CUDA: of the copy bandwidth, over the floor's bytes and the GPU's time."""
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A ratio of times that ours has to reach."""

    what: str
    case: str
    peer: str
    compiled: bool
    at_least: float
    on_cuda: bool = False
    """Of the GPU's time."""


BARS = [
    Bar("K1, eager, beside Megatron's cross-entropy", "K1", "Megatron cross-entropy, twice", False, 1.8),
    Bar("K1, compiled, beside Megatron's cross-entropy", "K1", "Megatron cross-entropy, twice", True, 2.7),
    Bar("forward KL, eager, beside ModelOpt", "FKL", "ModelOpt LogitsKLLoss", False, 1.5),
    Bar("forward KL, compiled, beside ModelOpt", "FKL", "ModelOpt LogitsKLLoss", True, 3.3),
    Bar("TrOPD, eager, beside parts of Megatron and ModelOpt", "TrOPD mix", "Megatron + ModelOpt parts", False, 2.0),
    Bar("TrOPD, compiled, beside parts of Megatron and ModelOpt", "TrOPD mix", "Megatron + ModelOpt parts", True, 5.0),
    *(
        Bar(f"{case}, compiled, beside dense code compiled", case, "dense, compiled", True, 1.3)
        for case in CASES
        if case != HEAD
    ),
    Bar("K1 beside Liger's cross-entropy", "K1", "Liger cross-entropy, twice", False, 2.5, on_cuda=True),
    Bar(
        "K1 beside Megatron's fused cross-entropy",
        "K1",
        "Megatron fused cross-entropy, twice",
        False,
        6.0,
        on_cuda=True,
    ),
    # At most 1.2 times the products' time.
    Bar("fused head beside its matrix products", HEAD, PRODUCTS, False, 1 / 1.2, on_cuda=True),
]
BANDWIDTH_SHARE = 0.75
"""On CUDA, the least share of the copy bandwidth over the floor's bytes."""


@dataclass(frozen=True)
class Limit:
    """A figure that no row of ours may pass."""

    what: str
    column: str
    at_most: float
    min_tokens: int = 0
    """Judged from here on: what is allocated per row or per call weighs more where tokens are few."""
    head: bool = False
    """Of the fused heads, with logits in bf16, instead of the losses from logits. What the weight's fp32 gradient takes
    is not theirs and taken off: Megatron has a buffer for it."""

    def values(self, rows: list[Row], num_tokens: int, device: torch.device) -> list[float]:
        """What the rows that it is about have."""
        about = [row for row in rows if row.ours and (row.case == HEAD) == self.head]
        if self.head:
            about = [row for row in about if row.implementation.split(", ")[-1] in ("ours", "compiled", "recomputing")]
        taken_off = 4 * HEAD_SIZES[device.type][0] / num_tokens if self.head else 0.0
        return [getattr(row, self.column) - taken_off for row in about]


LIMITS = [
    Limit("largest in-place peak, B/elem", "peak_bytes_per_element", 0.25, min_tokens=1024),
    Limit("most kept from forward to backward, B/elem", "kept_bytes_per_element", 0.02, min_tokens=1024),
    Limit("most collectives", "collectives", 2),
    Limit("largest gradient error (bf16)", "gradient_error", 4e-3),
    # 0.6 of one bf16 logits matrix.
    Limit("largest peak of the fused heads, B/elem", "peak_bytes_per_element", 1.2, min_tokens=4096, head=True),
]


def measure_case(case: str, arguments: argparse.Namespace, device: torch.device, progress: tqdm) -> list[Row]:
    """Every implementation's row; their timed steps take turns."""
    inputs = make_inputs(case, arguments.tokens, arguments.vocab, device)
    tp, rows, able = dist.get_world_size(), [], []
    compiled.reset()  # each objective is another function to the compiler, which gives up after eight
    for implementation in chosen(arguments, device, case):
        obstacle = implementation.obstacle(device, tp)
        if obstacle is None:
            able.append(implementation)
        rows.append(Row(case, implementation.name, implementation.ours, tp, note=obstacle or ""))
    times: dict[str, list[float]] = {implementation.name: [] for implementation in able}
    for repeat in range(arguments.repeats + 1):
        for implementation in able:
            progress.set_description(f"{case}: {implementation.name}")
            with implementation.environment():
                taken = costs.seconds(implementation, inputs, implementation.objective(case))
            if repeat:  # the first warms up
                times[implementation.name].append(taken)
            progress.update()
    medians = {name: statistics.median(found) for name, found in times.items()}
    busy: dict[str, float] = {}
    if device.type == "cuda":
        for implementation in able:
            with implementation.environment():
                busy[implementation.name] = costs.device_seconds(implementation, inputs, implementation.objective(case))
    measured = {one.name: _row(one, case, inputs, medians, busy) for one in able}
    return [measured.get(row.implementation, row) for row in rows]


def chosen(arguments: argparse.Namespace, device: torch.device, case: str) -> list[Implementation]:
    """Who is asked for in this case."""
    known = (one for one in implementations(device) if case in one.cases)
    return [one for one in known if not (one.compiled and arguments.without_compiled)]


def _row(
    implementation: Implementation, case: str, inputs: costs.Inputs, medians: dict[str, float], busy: dict[str, float]
) -> Row:
    objective, elements = implementation.objective(case), inputs.num_logits
    few = costs.fresh(inputs.head(ERROR_TOKENS))
    with implementation.environment():
        peak = costs.peak_bytes(implementation, inputs, objective)
        kept = costs.kept_bytes(implementation, inputs, objective)
        collectives, moved = costs.count(implementation, inputs, objective)
        error = None
        if implementation.is_loss:
            exact = inputs.head(ERROR_TOKENS)
            error = gradient_error(exact, costs.step(implementation, few, objective), objective)
    counted = not (implementation.opaque or implementation.backend in ("compile", "triton"))
    own, on_device = medians[implementation.name], busy.get(implementation.name)
    share = None
    if on_device and case in FLOOR_BYTES:
        share = FLOOR_BYTES[case] * elements / on_device / costs.copy_bandwidth(inputs.leaf.device)
    return Row(
        case=case,
        implementation=implementation.name,
        ours=implementation.ours,
        tp=dist.get_world_size(),
        time_ms=1e3 * own,
        time_ratio=own / medians["ours"],
        time_ratio_compiled=own / medians["ours, compiled"] if "ours, compiled" in medians else None,
        peak_bytes_per_element=peak / elements,
        kept_bytes_per_element=kept / elements,
        bytes_moved_per_element=moved / elements if counted else None,
        collectives=collectives,
        gradient_error=error,
        device_ms=1e3 * on_device if on_device else None,
        device_ratio=on_device / busy["ours"] if on_device else None,
        bandwidth_share=share,
    )


COLUMNS = {
    "ms": ("time_ms", ".1f"),
    "time / ours": ("time_ratio", ".2f"),
    "time / compiled": ("time_ratio_compiled", ".2f"),
    "peak B/elem": ("peak_bytes_per_element", ".2f"),
    "kept B/elem": ("kept_bytes_per_element", ".3f"),
    "moved B/elem": ("bytes_moved_per_element", ".0f"),
    "collectives": ("collectives", "d"),
    "gradient error": ("gradient_error", ".1e"),
    "GPU ms": ("device_ms", ".2f"),
    "GPU time / ours": ("device_ratio", ".2f"),
    "of copy bandwidth": ("bandwidth_share", ".0%"),
}


def columns(rows: list[Row]) -> list[str]:
    """Those with a figure."""
    return [title for title, (name, _) in COLUMNS.items() if any(getattr(row, name) is not None for row in rows)]


def cells(row: Row, shown: list[str]) -> list[str]:
    """What a table shows of a row."""
    values = [(getattr(row, COLUMNS[title][0]), COLUMNS[title][1]) for title in shown]
    name = f"{row.implementation}: {row.note}" if row.note else row.implementation
    return [row.case, name, *("-" if value is None else format(value, spec) for value, spec in values)]


def judge(rows: list[Row], num_tokens: int, device: torch.device) -> list[list[str]]:
    """Every bar of the cases in ``rows`` with what was found: ``[what, bar, found, verdict]``."""
    known = {(row.case, row.implementation): row for row in rows}
    cases = list(dict.fromkeys(row.case for row in rows))
    lines = []
    for limit in LIMITS:
        values = limit.values(rows, num_tokens, device)
        if not values:
            continue
        judged = num_tokens >= limit.min_tokens
        verdict = "not measured" if not judged else "holds" if max(values) <= limit.at_most else "missed"
        lines.append([limit.what, f"at most {limit.at_most:g}", f"{max(values):.2g}" if judged else "-", verdict])
    for case in cases:
        share = known[case, "ours"].bandwidth_share
        if share is not None:
            verdict = "holds" if share >= BANDWIDTH_SHARE else "missed"
            lines.append([f"{case}, of the copy bandwidth", f"at least {BANDWIDTH_SHARE:.0%}", f"{share:.0%}", verdict])
    for bar in BARS:
        if bar.case not in cases or bar.on_cuda != (device.type == "cuda"):
            continue
        row = known.get((bar.case, bar.peer))
        column = "device_ratio" if bar.on_cuda else "time_ratio_compiled" if bar.compiled else "time_ratio"
        ratio = None if row is None else getattr(row, column)
        verdict = "not measured" if ratio is None else "holds" if ratio >= bar.at_least else "missed"
        lines.append([bar.what, f"at least {bar.at_least:g}x", "-" if ratio is None else f"{ratio:.2f}x", verdict])
    return lines


def title(arguments: argparse.Namespace, device: torch.device) -> str:
    """Sizes, machine and versions."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu()}, {torch.get_num_threads()} thread(s)"
    sizes = f"T {arguments.tokens}, V {arguments.vocab}, tp {dist.get_world_size()}, bf16"
    return f"{sizes}; {where}, torch {torch.__version__}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} ({len(models)} cores)" if models else "CPU"


def print_tables(rows: list[Row], heading: str, num_tokens: int, device: torch.device) -> None:
    """To the terminal."""
    table = Table(title=heading)
    shown = columns(rows)
    for name in ("case", "implementation", *shown):
        table.add_column(name, justify="left" if name in ("case", "implementation") else "right")
    for row in rows:
        table.add_row(*cells(row, shown))
    bars = Table("bar", "", "found", "verdict", title="Bars")
    for line in judge(rows, num_tokens, device):
        bars.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table)
    if bars.row_count:
        console.print(bars)


def markdown(rows: list[Row], heading: str, num_tokens: int, device: torch.device) -> str:
    """The same as a section of a document."""

    def lines(header: list[str], body: list[list[str]]) -> list[str]:
        return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]

    shown = columns(rows)
    parts = [f"## {heading}", "", *lines(["case", "implementation", *shown], [cells(row, shown) for row in rows])]
    bars = judge(rows, num_tokens, device)
    if bars and any(row.tp == 1 for row in rows):
        parts += ["", *lines(["bar", "", "found", "verdict"], bars)]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Parse the command line, run every case on every rank, report on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="T (default 1024)")
    parser.add_argument("--vocab", type=int, default=151936, help="ids; must divide by the number of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--without-compiled", action="store_true", help="leave out what torch.compile takes minutes for"
    )
    parser.add_argument("--quick", action="store_true", help="128 tokens: under five minutes on two cores")
    parser.add_argument("--json", type=Path, help="also write one JSON object per row and line to this file")
    parser.add_argument("--markdown", type=Path, help="also append the tables to this document")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (128 if arguments.quick else 1024)
    device = start()
    if arguments.vocab % dist.get_world_size():
        parser.error(f"--vocab {arguments.vocab} does not divide by {dist.get_world_size()} ranks")
    main_rank = dist.get_rank() == 0
    known = [one for case in arguments.cases for one in chosen(arguments, device, case)]
    steps = [one for one in known if one.obstacle(device, dist.get_world_size()) is None]
    rows = []
    with tqdm(total=len(steps) * (arguments.repeats + 1), disable=not main_rank, unit="step") as progress:
        for case in arguments.cases:
            rows += measure_case(case, arguments, device, progress)
    if main_rank:
        print_tables(rows, title(arguments, device), arguments.tokens, device)
        if arguments.json is not None:
            arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        if arguments.markdown is not None:
            with arguments.markdown.open("a", encoding="utf-8") as document:
                document.write("\n" + markdown(rows, title(arguments, device), arguments.tokens, device))
    dist.destroy_process_group()


def start() -> torch.device:
    """One process group, also for a single process started without torchrun."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if on_cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


if __name__ == "__main__":
    main()
