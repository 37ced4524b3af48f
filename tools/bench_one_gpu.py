"""One GPU, a whole distillation: where the time and the memory of a step go, beside what the planner predicts.

    python tools/bench_one_gpu.py --out runs/one-gpu
    python tools/bench_one_gpu.py --out runs/one-gpu --markdown benchmarks/one_gpu.md -- --rollout.engine=dynamic

Both models have random weights (time and memory do not depend on what they hold), so responses fill their budget. It
writes a tokenizer, prompts and a config into ``--out``, starts ``python -m megatron_tropd train`` as a user would, and
reads the run's own log. What follows ``--`` goes to ``train`` as it is. The first steps, which compile and warm up, are
left out of the medians.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

warnings.simplefilter("ignore")  # Megatron's, about what is not installed

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.config_parser import load_config
from megatron_tropd.layer_spec import use_transformer_engine
from megatron_tropd.planner import model_parameters, rank_memory
from megatron_tropd.planner.hardware import GPUS, LOCAL_LAYER_OVERHEAD, Assumptions, Gpu
from megatron_tropd.planner.shapes import find_model
from megatron_tropd.planner.timing import step_time

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Line:
    """What was measured beside what was predicted; None where there is no prediction."""

    what: str
    measured: float
    predicted: float | None
    unit: str

    def cells(self) -> list[str]:
        """For a table."""
        known = self.predicted is not None
        ratio = f"{self.measured / self.predicted:.2f}" if known and self.predicted else "-"
        predicted = f"{self.predicted:.3g}" if known else "-"
        return [self.what, f"{self.measured:.3g} {self.unit}", f"{predicted} {self.unit}" if known else "-", ratio]


def make_inputs(folder: Path, model: ModelConfig, arguments: argparse.Namespace) -> None:
    """A tokenizer with as many ids as the model, and prompts of exactly so many tokens."""
    import tokenizers
    import transformers

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert model.vocab_size is not None
    words = {"<eos>": 0, "<pad>": 1} | {f"w{index}": index for index in range(2, model.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder / "tokenizer")
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(arguments.prompts * arguments.steps):
            text = " ".join(f"w{draw.randrange(2, model.vocab_size)}" for _ in range(arguments.prompt_length))
            file.write(json.dumps({"prompt": text}) + "\n")


def write_config(folder: Path, arguments: argparse.Namespace) -> Path:
    """The run, in the format of the examples."""
    num_sequences = arguments.prompts * arguments.samples
    models = {}
    for name in ("student", "teacher"):
        fields = asdict(find_model(getattr(arguments, name)))
        models[name] = {key: value for key, value in fields.items() if value is not None}
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        **models,
        "guidance": {"schedule": "none"},
        "tokenizer": {"kind": "huggingface", "model": str(folder / "tokenizer")},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_length": arguments.prompt_length},
        "rollout": {
            "samples_per_prompt": arguments.samples,
            "max_response_length": arguments.response_length,
            "max_batch_size": num_sequences,
        },
        "training": {
            "train_iters": arguments.steps,
            "global_batch_size": num_sequences,
            "micro_batch_size": arguments.micro_batch_size,
            "precision": "bf16",
            "save_interval": 0,
            "log_rollouts": 0,
        },
        "monitoring": {"log_interval": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def run(path: Path, folder: Path, overrides: list[str]) -> None:
    """The program itself; its output stays on the terminal."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "megatron_tropd", "train", str(path), *overrides], check=True)


def compare(config: Config, gpu: Gpu, folder: Path) -> list[Line]:
    """The medians of the run's log, and the planner's figures for one GPU of this type."""
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "seconds_rollout" in line][WARM_UP_STEPS:]
    events = [json.loads(line) for line in (folder / "run" / "logs" / "rank_0.jsonl").read_text().splitlines()]
    logged = [event for event in events if event["event"] == "step"][WARM_UP_STEPS:]

    def median(name: str) -> float:
        return statistics.median(line[name] for line in steps)

    def peak(name: str) -> float:
        return max(event["peak_gb"][name] for event in logged)

    is_fused = use_transformer_engine()
    # Every prompt and every response fills its budget.
    assumed = Assumptions(mean_length=1.0, training_layer_overhead=0.0 if is_fused else LOCAL_LAYER_OVERHEAD)
    time = step_time(config, 1, gpu, assumed)
    (memory,) = rank_memory(config, 1, layer_spec="transformer-engine" if is_fused else "local").values()
    tokens = statistics.median(line["response_tokens"] for line in steps)
    return [
        Line("rollout", median("seconds_rollout"), time.rollout, "s"),
        Line("teacher", median("seconds_teacher"), time.teacher, "s"),
        Line("student, forward and backward", median("seconds_student"), time.student, "s"),
        Line("optimizer", median("seconds_optimizer"), time.optimizer, "s"),
        Line("rollout", tokens / median("seconds_rollout"), tokens / time.rollout, "tokens/s"),
        Line("step", median("tokens_per_second"), tokens / time.total, "response tokens/s"),
        Line("memory, generation", peak("rollout"), (memory.resident + memory.rollout) / 1e9, "GB"),
        Line("memory, training", peak("schedule"), (memory.resident + memory.training) / 1e9, "GB"),
        Line("memory, resident", peak("batch"), memory.resident / 1e9, "GB"),
    ]


def main() -> None:
    """Make the inputs, run, compare, report."""
    own, overrides = sys.argv[1:], []
    if "--" in own:
        own, overrides = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="qwen3-0.6b", help="a built-in shape, Hugging Face folder or YAML file")
    parser.add_argument("--teacher", default="qwen3-1.7b", help="the same")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps; the first {WARM_UP_STEPS} do not count")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=4, help="rollouts of each prompt")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens")
    parser.add_argument("--response-length", type=int, default=512, help="tokens")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences of a forward")
    parser.add_argument("--out", type=Path, required=True, help="folder for inputs and run; what is there is replaced")
    parser.add_argument("--markdown", type=Path, help="also append the table to this document")
    arguments = parser.parse_args(own)
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none that PyTorch sees")
    if arguments.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be above {WARM_UP_STEPS}, the steps that do not count")
    name = torch.cuda.get_device_name()
    gpu = next((gpu for key, gpu in GPUS.items() if key in name), None)
    if gpu is None:
        sys.exit(f"the planner knows no {name}: add it to megatron_tropd/planner/hardware.py")
    make_inputs(arguments.out, find_model(arguments.student), arguments)
    path = write_config(arguments.out, arguments)
    run(path, arguments.out, overrides)
    config = load_config(path, overrides)
    report(compare(config, gpu, arguments.out), heading(arguments, overrides, name, config), arguments.markdown)


def heading(arguments: argparse.Namespace, overrides: list[str], name: str, config: Config) -> str:
    """Sizes, machine, versions."""
    assert config.teacher is not None
    student, teacher = (f"{model_parameters(model) / 1e9:.2f}B" for model in (config.student, config.teacher))
    layers = "Transformer Engine" if use_transformer_engine() else "local"
    parts = [
        f"{arguments.student} ({student}) from {arguments.teacher} ({teacher})",
        f"{arguments.prompts} x {arguments.samples} sequences of {arguments.prompt_length} + "
        f"{arguments.response_length} tokens in micro-batches of {arguments.micro_batch_size}",
        *(f"`{override}`" for override in overrides),
        f"{name}, bf16, {layers} layer spec, torch {torch.__version__}",
    ]
    return ", ".join(parts)


def report(lines: list[Line], title: str, document: Path | None) -> None:
    """To the terminal, and to a document."""
    header = ["", "measured", "predicted", "measured / predicted"]
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line.cells())
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if document is not None:
        rows = [header, ["---"] * len(header), *(line.cells() for line in lines)]
        text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        with document.open("a", encoding="utf-8") as file:
            file.write(f"\n## {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
