"""Static and dynamic batching side by side: the same model, the same requests, tokens per second.

    python tools/bench_rollout.py --model qwen3-0.6b --prompts 64 --samples 8 --response-length 1024
    python tools/bench_rollout.py --layers 4 --hidden 256 --vocab 8192 --prompts 16 --response-length 64  # a CPU

Weights are random, so that responses end at their budgets alone. The budgets are ragged: the prefix of every sample
takes a share of the longest response, drawn evenly from --ragged (0: all are of one length). Rates count sampled
tokens; the first generation of each engine, which starts kernels and libraries, is not timed.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from megatron_tropd.config import ModelConfig
from megatron_tropd.config_rollout import DynamicEngineConfig, RolloutConfig
from megatron_tropd.distributed import Layout, initialize
from megatron_tropd.models import build_model
from megatron_tropd.planner.shapes import SHAPES
from megatron_tropd.prompt import Prompt
from megatron_tropd.rollout import build_engine
from megatron_tropd.types import RolloutRequest

ENGINES = {
    "static": RolloutConfig(engine="static"),
    "dynamic": RolloutConfig(engine="dynamic"),
    "dynamic, no prefix caching": RolloutConfig(
        engine="dynamic", dynamic=DynamicEngineConfig(enable_prefix_caching=False)
    ),
    "dynamic, CUDA graphs": RolloutConfig(engine="dynamic", dynamic=DynamicEngineConfig(cuda_graphs=True)),
}


@dataclass(frozen=True)
class Row:
    """One engine's figures."""

    engine: str
    seconds: float
    num_tokens: int
    kv_gib: float | None
    """Peak memory beyond the weights, where there is a GPU to ask."""
    steps: int | None
    shared: float | None
    """Share of the prompt tokens that were not read again."""


def make_requests(arguments: argparse.Namespace, vocab_size: int) -> list[RolloutRequest]:
    """``samples`` of every prompt, with prefixes of ragged lengths."""
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocab_size) for _ in range(length))

    prompts = [Prompt(str(i), "", tokens(arguments.prompt_length), "") for i in range(arguments.prompts)]
    longest = int(arguments.ragged * (arguments.response_length - 1))
    return [
        RolloutRequest(sample, prompts[sample // arguments.samples], tokens(draw.randint(0, longest)))
        for sample in range(arguments.prompts * arguments.samples)
    ]


def measure(name: str, model: torch.nn.Module, layout: Layout, vocab: int, arguments: argparse.Namespace) -> Row:
    """Time ``repeats`` generations of one engine, the fastest counts."""
    dynamic = replace(
        ENGINES[name].dynamic, block_size_tokens=arguments.block_size, buffer_size_gb=arguments.buffer_size_gb
    )
    config = replace(ENGINES[name], max_batch_size=arguments.max_batch_size, dynamic=dynamic)
    engine = build_engine(model, layout, config, vocab_size=vocab, eos_id=vocab, seed=0)
    requests = make_requests(arguments, vocab)
    on_gpu, seconds, num_tokens = layout.device.type == "cuda", [], 0
    engine.generate(requests[: arguments.samples], max_response_length=arguments.response_length)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        rollouts = engine.generate(requests, max_response_length=arguments.response_length)
        seconds.append(time.perf_counter() - start)
        num_tokens = sum(len(rollout.response) for rollout in rollouts)
    report = getattr(engine, "report", None)
    shared = report and report.num_shared_tokens / (report.num_shared_tokens + report.num_prompt_tokens)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
    return Row(name, min(seconds), num_tokens, peak, report and report.num_steps, shared)


def print_table(rows: list[Row], title: str) -> None:
    """To the terminal, as Markdown too, for `benchmarks/`."""
    names = ("engine", "seconds", "tokens/s", "ratio", "steps", "prompt tokens shared", "extra GiB")
    table, lines = Table(*names, title=title), [f"### {title}", "", "| " + " | ".join(names) + " |", "|---" * 7 + "|"]
    for row in rows:
        cells = (
            row.engine,
            f"{row.seconds:.2f}",
            f"{row.num_tokens / row.seconds:.0f}",
            f"{rows[0].seconds / row.seconds:.2f}",
            "" if row.steps is None else str(row.steps),
            "" if row.shared is None else f"{row.shared:.0%}",
            "" if row.kv_gib is None else f"{row.kv_gib:.2f}",
        )
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    Console(width=140).print(table)
    print("\n".join(lines))


def main() -> None:
    """Build the model, run every engine, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, help="a shape by name; or give --layers, --hidden and --vocab")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=256, help="tokens of prefix and response")
    parser.add_argument("--ragged", type=float, default=0.9, help="largest share of the response that is prefix")
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--buffer-size-gb", type=float)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="all that can run here if not given")
    arguments = parser.parse_args()
    layout = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0, timeout_minutes=10)
    on_gpu = layout.device.type == "cuda"
    shape = SHAPES[arguments.model] if arguments.model else None
    shape = shape or ModelConfig(
        num_layers=arguments.layers, hidden_size=arguments.hidden, num_attention_heads=arguments.hidden // 64,
        ffn_hidden_size=3 * arguments.hidden, num_query_groups=max(arguments.hidden // 256, 1),
        vocab_size=arguments.vocab,
    )  # fmt: skip
    vocab = shape.vocab_size or arguments.vocab
    model = build_model(
        shape, layout, vocab_size=vocab, max_sequence_length=arguments.prompt_length + arguments.response_length,
        dtype=torch.bfloat16 if on_gpu else torch.float32, seed=0,
    )  # fmt: skip
    names = arguments.engines or [name for name, config in ENGINES.items() if on_gpu or not config.dynamic.cuda_graphs]
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    title = (
        f"{arguments.model or f'{shape.num_layers} layers of {shape.hidden_size}'}, {arguments.prompts} prompts of "
        f"{arguments.prompt_length} x {arguments.samples}, at most {arguments.response_length} tokens each, "
        f"{where}, torch {torch.__version__}"
    )
    print_table([measure(name, model, layout, vocab, arguments) for name in names], title)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
