"""Measure tools/preprocess_data.py on lines made here: time, and that memory does not grow with their number.

    python tools/bench_data.py [--lines 1000000] [--workers 2] [--folder DIR]
    python tools/bench_data.py --answers 100000   # the opening of a store of teacher answers instead

A line is a question of 10 to 60 words; one in fifty comes twice, one in a thousand holds an evaluation text. The
work is the whole of it: parse, tokenize (a byte-level BPE trained on the first lines), n-grams, deduplicate, split,
write. CPU seconds are those of all processes together: where other work runs beside it, they are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    """Print a row for a tenth of the lines, and one for all of them; or the table of a store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--answers", type=int, help="answers of 500 ids in a store that is opened")
    parser.add_argument("--folder", help="where the files go; default: a temporary folder")
    parser.add_argument("--measure", nargs=3, metavar=("INPUT", "OUT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        _measure(options)
        return
    if options.answers:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            _open_store(Path(name) / "answers.jsonl", options.answers)
        return
    print("| lines | input | workers | seconds | CPU seconds | lines per CPU second | peak, main | peak, worker |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for num_lines in (options.lines // 10, options.lines):
            path = folder / f"{num_lines}.jsonl"
            _write_lines(path, folder / "evaluation.jsonl", num_lines)
            if not (folder / "tokenizer").exists():
                _train_tokenizer(path, folder / "tokenizer")
            # A process of its own: the peak of one run says nothing about the next.
            places = [str(path), str(folder / f"out_{num_lines}"), str(folder)]
            command = [sys.executable, __file__, f"--workers={options.workers}", "--measure", *places]
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
            measured = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
            seconds, cpu, size = measured["seconds"], measured["cpu_seconds"], path.stat().st_size / 1e6
            cells = f"{num_lines:,} | {size:,.0f} MB | {options.workers} | {seconds:.0f} | {cpu:.0f}"
            cells += f" | {num_lines / cpu:,.0f}"
            print(f"| {cells} | {measured['main_mb']:.0f} MB | {measured['worker_mb']:.0f} MB |", flush=True)


def _write_lines(path: Path, evaluation: Path, num_lines: int) -> None:
    draw = random.Random(1)
    syllables = [a + b for a in "bcdfghjklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(30_000)]
    # Zipf's law, roughly: the word of rank r has the weight 1 / r.
    cumulative, total = [], 0.0
    for rank in range(1, len(words) + 1):
        cumulative.append(total := total + 1.0 / rank)

    def text(num_words: int) -> str:
        return " ".join(draw.choices(words, cum_weights=cumulative, k=num_words))

    held_out = [text(20) for _ in range(1000)]
    evaluation.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in held_out))
    with path.open("w") as file:
        for index in range(num_lines):
            prompt = f"{text(draw.randint(10, 60))} {index}?"
            if index % 1000 == 0:
                prompt += " " + held_out[index // 1000 % 1000]
            line = json.dumps({"prompt": prompt, "answer": text(3)}) + "\n"
            file.write(line * (2 if index % 50 == 0 else 1))


def _train_tokenizer(path: Path, folder: Path) -> None:
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with path.open() as file:
        backend.train_from_iterator((line for _, line in zip(range(20_000), file, strict=False)), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)


def _measure(options: argparse.Namespace) -> None:
    from megatron_tropd.config import TokenizerConfig
    from megatron_tropd.preprocessing.pipeline import Options, preprocess

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    path, out, folder = options.measure
    started = time.perf_counter()
    preprocess(
        Options(
            inputs=(path,),
            out=out,
            tokenizer=TokenizerConfig(kind="huggingface", model=f"{folder}/tokenizer"),
            max_prompt_length=512,
            max_answer_length=64,
            decontaminate=(f"{folder}/evaluation.jsonl",),
            validation=0.01,
            workers=options.workers,
            progress=False,
        )
    )
    seconds = time.perf_counter() - started
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, workers))
    peaks = {"main_mb": own.ru_maxrss / 1024, "worker_mb": workers.ru_maxrss / 1024}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, **peaks}))


def _open_store(path: Path, num_answers: int) -> None:
    """Open a store without an index, with that of a copy, and with its own, and look for every prompt's answer."""
    from megatron_tropd.answer_index import index_path
    from megatron_tropd.answers import AnswerHeader, AnswerStore, AnswerWriter
    from megatron_tropd.prompt import Prompt

    draw = random.Random(1)
    prompts = [Prompt(f"prompt-{index}", "", (index, 1), "") for index in range(num_answers)]
    with AnswerWriter(path, AnswerHeader("fingerprint", {}, {})) as writer:
        for prompt in prompts:
            writer.write(prompt, draw.choices(range(150_000), k=500), finished=True)
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    print("| store | opening | CPU seconds | and looking for every prompt |\n|---|---|---:|---:|", flush=True)
    for name in ("no index: every line parsed", "a copy's index: hashed once", "its index"):
        if name.startswith("no"):
            index_path(path).unlink()
        if name.startswith("a copy"):
            os.utime(path, (hour_ago - 1, hour_ago - 1))
        started = time.process_time()
        store = AnswerStore.read(path, "fingerprint", 150_000)
        opened = time.process_time()
        store.require(prompts)
        looked = time.process_time()
        size = f"{num_answers:,} answers, {path.stat().st_size / 1e6:,.0f} MB"
        print(f"| {size} | {name} | {opened - started:.2f} | {looked - opened:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
