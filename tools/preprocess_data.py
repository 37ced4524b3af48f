"""Turn data sets into prompt files: validated, deduplicated, decontaminated, filtered by length and split.

    python tools/preprocess_data.py --input FILE... --out DIR [--tokenizer DIR] [options]

Inputs are JSON lines, Parquet files, folders of datasets' save_to_disk, or the .idx of a Megatron corpus. docs/data.md
describes records, options and what DIR holds. The first malformed record ends it, with file and line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from megatron_tropd.config import TokenizerConfig
from megatron_tropd.preprocessing.examples import TASK_KEYS, Field, Keys
from megatron_tropd.tokenizer import TokenizerKind

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes share the work

_KEYS = [field.name for field in fields(Keys) if field.name != "task"]


def main(arguments: list[str]) -> int:
    """Preprocess; returns the exit status (2 for what a user has to correct)."""
    from rich.console import Console
    from rich.table import Table

    from megatron_tropd.preprocessing.pipeline import preprocess

    try:
        options = _options(_parser().parse_args(arguments))
        statistics = preprocess(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    table = Table(title=options.out)
    table.add_column("records")
    table.add_column("number", justify="right")
    table.add_row("train", f"{statistics.num_train:,}")
    table.add_row("validation", f"{statistics.num_validation:,}")
    for reason, number in sorted(statistics.dropped.items()):
        table.add_row(f"dropped: {reason}", f"{number:,}")
    Console().print(table)
    return 0


def add_tokenizer_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The options that name a tokenizer, the same for every tool."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer", required=required, help="folder, .model or .json file, as tokenizer.model")
    kinds = get_args(TokenizerKind)
    group.add_argument(
        "--tokenizer-kind", choices=kinds, default="huggingface", help="characters: --tokenizer has them"
    )
    group.add_argument("--chat-template", help="path of a Jinja template; default: the tokenizer's own")
    group.add_argument("--chat-template-kwargs", type=json.loads, default={}, help='JSON: {"enable_thinking": false}')
    group.add_argument("--no-generation-prompt", action="store_true", help="do not open the assistant's message")


def tokenizer_config(options: argparse.Namespace) -> TokenizerConfig | None:
    """The config section of `add_tokenizer_arguments`, None without a tokenizer."""
    if options.tokenizer is None:
        return None
    named = {"alphabet" if options.tokenizer_kind == "characters" else "model": options.tokenizer}
    return TokenizerConfig(
        kind=options.tokenizer_kind,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        add_generation_prompt=not options.no_generation_prompt,
        **named,
    )


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where a record has what, the same for every tool."""
    records = parser.add_argument_group("records")
    records.add_argument("--field", choices=get_args(Field), default="auto")
    for name in _KEYS:
        records.add_argument(f"--{name}-key", default=name, help=f"where a record has its {name}")
    records.add_argument(
        "--task-keys",
        nargs="*",
        choices=TASK_KEYS,
        default=TASK_KEYS,
        help="what verifiers need, carried over; default: all",
    )


def record_keys(options: argparse.Namespace) -> Keys:
    """The keys of `add_record_arguments`."""
    return Keys(**{name: getattr(options, f"{name}_key") for name in _KEYS}, task=tuple(options.task_keys))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files and folders, read in this order")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--format", choices=("jsonl", "indexed"), default="jsonl", help="prompt files, or .bin/.idx")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_tokenizer_arguments(parser)
    add_record_arguments(parser)
    filters = parser.add_argument_group("filters")
    filters.add_argument(
        "--dedup", choices=("prompt", "example", "none"), default="prompt", help="of what no second is kept"
    )
    filters.add_argument("--min-prompt-length", type=int, default=1, help="tokens")
    filters.add_argument("--max-prompt-length", type=int, help="tokens")
    filters.add_argument("--max-answer-length", type=int, help="tokens, with the end token")
    filters.add_argument("--max-text-length", type=int, help="tokens; a text is cut after its last sentence that fits")
    filters.add_argument("--punkt", help="a language's folder of NLTK's punkt_tab; default: learnt from the inputs")
    filters.add_argument("--decontaminate", nargs="*", default=[], help="evaluation files, of any input format")
    filters.add_argument("--ngram", type=int, default=13, help="words in common that make a record contaminated")
    parser.add_argument("--validation", type=float, default=0.0, help="share held out, by a hash of the prompt")
    return parser


def _options(parsed: argparse.Namespace) -> Any:
    from megatron_tropd.preprocessing.pipeline import Options

    return Options(
        inputs=tuple(parsed.input),
        out=str(Path(parsed.out)),
        tokenizer=tokenizer_config(parsed),
        keys=record_keys(parsed),
        which=parsed.field,
        dedup=parsed.dedup,
        min_prompt_length=parsed.min_prompt_length,
        max_prompt_length=parsed.max_prompt_length,
        max_answer_length=parsed.max_answer_length,
        max_text_length=parsed.max_text_length,
        punkt=parsed.punkt,
        validation=parsed.validation,
        decontaminate=tuple(parsed.decontaminate),
        ngram=parsed.ngram,
        format=parsed.format,
        workers=parsed.workers,
        progress=not parsed.quiet,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
