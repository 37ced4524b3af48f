"""`python -m megatron_tropd COMMAND CONFIG.yaml [--section.field=value ...]`, alone or under torchrun."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from megatron_tropd import console
from megatron_tropd.config import Config, ConfigError
from megatron_tropd.config_parser import build_parser, load_config

COMMANDS = {
    "train": ("megatron_tropd.trainer", "train", "distil the teacher into the student"),
    "sft": ("megatron_tropd.trainer", "sft", "train the student on the reference answers of data.train"),
    "generate": ("megatron_tropd.generate", "generate", "let the teacher answer data.train, for guidance"),
    "evaluate": (
        "megatron_tropd.evaluate",
        "evaluate",
        "judge the student's responses to data.validation and evaluation.files",
    ),
}
"""Name to (module, function, one line of help). Modules are imported only when their command runs."""

USAGE = """usage: python -m megatron_tropd COMMAND CONFIG.yaml [--section.field=value ...]

Trust Region On-Policy Distillation on Megatron-Core. Commands:

{commands}

`python -m megatron_tropd COMMAND --help` lists every config field. Under torchrun:
torchrun --nproc-per-node 2 -m megatron_tropd train CONFIG.yaml --parallel.tensor_model_parallel_size=2

`--dry-run [--world-size=N]` after `train CONFIG.yaml` or `generate CONFIG.yaml` checks the config and every file for N
processes (default: WORLD_SIZE, or one model replica), prints the plan and starts nothing; exit status 1 with everything
that would stop the run.
"""


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status (2 for what a user has to correct)."""
    usage = USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, (_, _, text) in COMMANDS.items()))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n\n{usage}", file=sys.stderr)
        return 2
    if not rest or "-h" in rest or "--help" in rest:
        build_parser(command, COMMANDS[command][2]).print_help()
        return 0 if rest else 2
    if "--dry-run" in rest:
        return _dry_run(command, rest)
    try:
        overrides = ["--monitoring.profile=true" if option == "--profile" else option for option in rest[1:]]
        config = load_config(rest[0], overrides)
        _run(command, config)
    except ValueError as error:
        return _refuse(error)
    return 0


def _dry_run(command: str, arguments: list[str]) -> int:
    usage = "python -m megatron_tropd {train,generate} CONFIG.yaml --dry-run [--world-size=N]"
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    options, rest = parser.parse_known_args(arguments)
    if command not in ("train", "generate") or not rest or (options.world_size is not None and options.world_size < 1):
        parser.error("it needs `train` or `generate`, a config, and at least one process")
    console.set_up(0, verbose=False)
    try:
        config = load_config(rest[0], rest[1:])
    except ConfigError as error:
        print(f"this run cannot start, 1 problem:\n  - {error}")
        return 1
    return importlib.import_module("megatron_tropd.dry_run").dry_run(config, command, options.world_size)


def _run(command: str, config: Config) -> None:
    console.set_up(int(os.environ.get("RANK", "0")), verbose=config.monitoring.verbose)
    module, function, _ = COMMANDS[command]
    getattr(importlib.import_module(module), function)(config)


def _refuse(error: ValueError) -> int:
    """One message, no traceback, for what this package refuses; what a library raises is a defect, shown whole."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or not frame.tb_frame.f_globals["__name__"].startswith("megatron_tropd"):
        raise error
    if isinstance(error, ConfigError):
        console.tell_once(f"error: {error}")
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
