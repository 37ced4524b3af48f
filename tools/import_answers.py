"""Make a store of teacher answers (guidance.answers) from conversations that a teacher has already written.

    python tools/import_answers.py --input FILE... --prompts train.jsonl --out answers.jsonl --tokenizer DIR [options]

Inputs are what tools/preprocess_data.py reads; each answers the prompt of the prompt file with the same ids. An import
that was cut off continues with the same command. docs/data.md describes the store.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from preprocess_data import add_record_arguments, add_tokenizer_arguments, record_keys, tokenizer_config


def main(arguments: list[str]) -> int:
    """Import; returns the exit status (2 for what a user has to correct)."""
    from rich.console import Console
    from rich.table import Table

    from megatron_tropd.preprocessing.answers_import import import_answers
    from megatron_tropd.tokenizer_builder import build_tokenizers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="conversations, read in this order")
    parser.add_argument("--prompts", nargs="+", required=True, help="the prompt files of data.train")
    parser.add_argument("--out", required=True, help="the store: a file, or with --num-shards a folder")
    parser.add_argument("--num-shards", type=int, default=0, help="0: one file")
    parser.add_argument("--answers-per-prompt", type=int, help="take no more than this many; default: all")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_tokenizer_arguments(parser, required=True)
    add_record_arguments(parser)
    options = parser.parse_args(arguments)
    config = tokenizer_config(options)
    assert config is not None  # --tokenizer is required
    try:
        tokenizer, _ = build_tokenizers(config)
        report = import_answers(
            options.input,
            options.prompts,
            options.out,
            tokenizer,
            keys=record_keys(options),
            which=options.field,
            num_shards=options.num_shards,
            answers_per_prompt=options.answers_per_prompt,
            chat={"template": config.chat_template, "kwargs": config.chat_template_kwargs},
            progress=not options.quiet,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    table = Table(title=options.out)
    table.add_column("answers and prompts")
    table.add_column("number", justify="right")
    for name, number in asdict(report).items():
        table.add_row(name.replace("_", " "), f"{number:,}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
