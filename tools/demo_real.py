"""The real demo: SmolLM2-135M-Instruct is distilled into 12 of its 30 layers; Hugging Face folders in and out.

Every stage is a command of the package on a config of examples/smollm2, under torchrun with two tensor-parallel ranks;
this script runs them in order and then compares the folders they exported with the teacher, in transformers alone. A
stage that is done is not done again, one that was interrupted continues.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "smollm2"
FOLDER = Path("runs/demo-real")
NUM_RANKS = 2
NUM_NEW_TOKENS = 64
NUM_SAMPLES_SHOWN = 4

PromptAndResponse = tuple[list[int], list[int]]
"""Ids of a prompt and of the response to it, end token included."""


def main() -> None:
    """Run all stages, measure, and write ``summary.json``."""
    options = _parse_arguments()
    started = time.perf_counter()
    precision = options.precision or faster_precision()
    print(f"precision of training: {precision}", flush=True)
    _title("teacher, pruned student and prompts")
    prompts = [f"--num-prompts={options.num_prompts}"] if options.num_prompts else []
    _run(sys.executable, str(EXAMPLE / "prepare.py"), "--out", str(FOLDER), *prompts)
    common = [f"--training.precision={precision}"]
    _stage("teacher answers the training prompts", "generate", "heal.yaml", *common)
    heal = [f"--training.train_iters={options.heal_steps}"]
    _stage("pruned student learns from the answers (word-level distillation)", "train", "heal.yaml", *common, *heal)
    distil = [f"--training.train_iters={options.steps}"]
    _stage("healed student learns from its own answers (TrOPD)", "train", "distill.yaml", *common, *distil)
    _title("held-out prompts, in transformers")
    students = {
        "pruned": FOLDER / "pruned",
        "healed": FOLDER / "healed" / "hf" / f"step_{options.heal_steps}",
        "TrOPD": FOLDER / "tropd" / "hf" / f"step_{options.steps}",
    }
    summary = compare(FOLDER / "teacher", students, _held_out(options.held_out))
    summary |= {
        "precision": precision,
        "heal_steps": options.heal_steps,
        "tropd_steps": options.steps,
        "exported": str(students["TrOPD"]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_tables(summary)


def faster_precision() -> str:
    """bf16 where this CPU multiplies it clearly faster than fp32 (AMX), else fp32."""
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(20):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            times.append(time.perf_counter() - started)
        seconds[name] = min(times)
    return "bf16" if seconds["fp32"] > 1.5 * seconds["bf16"] else "fp32"


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass
class Ratio:
    """A mean over tokens with its standard error, which takes the tokens of one prompt as dependent."""

    sums: list[float]
    counts: list[int]

    @property
    def mean(self) -> float:
        """Sum over all tokens by their number."""
        return sum(self.sums) / sum(self.counts)

    @property
    def standard_error(self) -> float:
        """Of a ratio of sums over prompts."""
        residuals = [total - self.mean * count for total, count in zip(self.sums, self.counts, strict=True)]
        return math.sqrt(sum(residual**2 for residual in residuals)) / sum(self.counts)

    def to_json(self) -> dict[str, float]:
        """Both numbers."""
        return {"mean": self.mean, "standard_error": self.standard_error}


def compare(teacher_folder: Path, students: dict[str, Path], prompts: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Divergences of every student from the teacher on held-out prompts, and what they answer to the first few."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    teacher, tokenizer = _load(teacher_folder)
    texts = [prompt["prompt"] for prompt in prompts]
    shown = texts[:: max(1, len(texts) // NUM_SAMPLES_SHOWN)][:NUM_SAMPLES_SHOWN]
    of_teacher = respond(teacher, tokenizer, texts, sample=True, label="teacher")
    samples = [{"instruction": each["instruction"]} for each in prompts if each["prompt"] in shown]
    models: dict[str, Any] = {"teacher": {"num_layers": teacher.config.num_hidden_layers, **_size(teacher)}}
    _add_samples(samples, "teacher", teacher, tokenizer, shown)
    for name, folder in students.items():
        student, own_tokenizer = _load(folder)
        own = respond(student, own_tokenizer, texts, sample=True, label=name)
        on_teacher, on_own = divergences(student, teacher, of_teacher), divergences(student, teacher, own)
        models[name] = {
            "num_layers": student.config.num_hidden_layers,
            **_size(student),
            "forward_kl": on_teacher["forward_kl"].to_json(),
            "reverse_kl": on_own["reverse_kl"].to_json(),
            "greedy_agreement": on_teacher["greedy_agreement"].to_json(),
        }
        _add_samples(samples, name, student, own_tokenizer, shown)
    return {"num_prompts": len(texts), "num_teacher_tokens": sum(len(r) for _, r in of_teacher),
            "models": models, "samples": samples}  # fmt: skip


def respond(
    model: Any, tokenizer: Any, texts: Sequence[str], *, sample: bool, label: str, num_tokens: int = NUM_NEW_TOKENS
) -> list[PromptAndResponse]:
    """The model's answers: sampled at temperature 1 from a fixed seed, or greedy."""
    tokenizer.padding_side = "left"
    torch.manual_seed(1234)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    answers = []
    with tqdm(total=len(texts), desc=f"{label} {'samples' if sample else 'answers'}", unit="prompt") as bar:
        for some in batched(texts, 16):
            inputs = tokenizer(list(some), return_tensors="pt", padding=True, add_special_tokens=False)
            rows = model.generate(**inputs, **sampling, max_new_tokens=num_tokens)[:, inputs.input_ids.shape[1] :]
            for text, row in zip(some, rows.tolist(), strict=True):
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                answers.append((tokenizer.encode(text, add_special_tokens=False), row[:end]))
            bar.update(len(some))
    return answers


def divergences(student: Any, teacher: Any, answers: Sequence[PromptAndResponse]) -> dict[str, Ratio]:
    """Per response token, over the whole vocabulary, in nats: KL(T||S), KL(S||T); and how often both argmax agree."""
    found: dict[str, Ratio] = {}
    for student_log_probs, teacher_log_probs in zip(
        response_log_probs(student, answers), response_log_probs(teacher, answers), strict=True
    ):
        difference = teacher_log_probs - student_log_probs
        values = {
            "forward_kl": (teacher_log_probs.exp() * difference).sum(-1),
            "reverse_kl": -(student_log_probs.exp() * difference).sum(-1),
            "greedy_agreement": (student_log_probs.argmax(-1) == teacher_log_probs.argmax(-1)).float(),
        }
        for name, of_tokens in values.items():
            ratio = found.setdefault(name, Ratio([], []))
            ratio.sums.append(float(of_tokens.double().sum()))
            ratio.counts.append(len(of_tokens))
    return found


@torch.no_grad()
def response_log_probs(model: Any, answers: Sequence[PromptAndResponse]) -> Iterator[torch.Tensor]:
    """For each answer the log-probs ``[response tokens, vocabulary]`` at its positions, fp32."""
    for some in batched(answers, 8):
        longest = max(len(prompt) + len(response) for prompt, response in some)
        # Padding on the right is behind everything that a causal model looks at.
        rows = [prompt + response + [0] * (longest - len(prompt) - len(response)) for prompt, response in some]
        logits = model(torch.tensor(rows)).logits
        for row, (prompt, response) in zip(logits, some, strict=True):
            yield torch.log_softmax(row[len(prompt) - 1 : len(prompt) + len(response) - 1].float(), dim=-1)


def _load(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def _size(model: Any) -> dict[str, int]:
    return {"num_parameters": sum(parameter.numel() for parameter in model.parameters())}


def _add_samples(samples: list[dict[str, str]], name: str, model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    answers = respond(model, tokenizer, texts, sample=False, label=name)
    for line, (_, response) in zip(samples, answers, strict=True):
        line[name] = tokenizer.decode(response, skip_special_tokens=True).strip()


def _held_out(count: int) -> list[dict[str, str]]:
    """``count`` held-out prompts, spread over the categories."""
    text = (FOLDER / "data" / "validation.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [lines[index * len(lines) // count] for index in range(min(count, len(lines)))]


# -------------------------------------------------------------------------------------------- stages and tables


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heal-steps", type=int, default=84, help="steps that heal the pruned student (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of TrOPD (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=48, help="held-out prompts measured (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, help="training prompts (default: all 672)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of training; default: bf16 where it pays here")
    return parser.parse_args()


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _stage(title: str, command: str, config: str, *overrides: str) -> None:
    _title(title)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    _run(sys.executable, *launcher, "-m", "megatron_tropd", command, str(EXAMPLE / config), *overrides)


def _run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode:
        sys.exit(f"this stage failed (exit {finished.returncode}): {' '.join(command)}")


def _print_tables(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{summary['num_prompts']} held-out prompts, nats per token (± standard error)")
    table.add_column("model")
    for name in ("layers", "parameters", "KL(teacher || student)", "KL(student || teacher)", "same greedy token"):
        table.add_column(name, justify="right")
    for name, values in summary["models"].items():
        cells = [str(values["num_layers"]), f"{values['num_parameters'] / 1e6:.1f} M"]
        if "forward_kl" in values:
            cells += [f"{values[key]['mean']:.3f} ± {values[key]['standard_error']:.3f}"
                      for key in ("forward_kl", "reverse_kl")]  # fmt: skip
            cells.append(f"{values['greedy_agreement']['mean']:.1%}")
        table.add_row(name, *cells)
    console.print()
    console.print(table)
    shown = ("instruction", *[name for name in summary["models"] if name != "pruned"])
    samples = Table(title="greedy answers, their beginnings", show_lines=True)
    for name in shown:
        samples.add_column(name, ratio=1)
    for line in summary["samples"]:
        samples.add_row(*(shorten(line[name], 160, placeholder=" ...") for name in shown))
    console.print(samples)
    console.print(f"transformers has loaded {summary['exported']} and answered with it. Summary: {FOLDER}/summary.json")


if __name__ == "__main__":
    main()
