"""Kill a rank of a small run at a random moment, start again, and compare with a run that nobody disturbed.

    make faults [TRIALS=50]        .venv/bin/python tools/faults.py --trials=50 --seed=0

Real processes on gloo: two ranks, tensor- and data-parallel in turn. Each trial draws rank, step, phase (rollout,
teacher, backward, optimizer, save) and delay from its seed, sends SIGKILL from inside the rank, starts again with the
same command, and compares every tensor of the last checkpoint (weights, optimizer state), the metrics but for timings,
and the samples of every step, bit for bit. Exits with 1 where any trial differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "teacher", "backward", "optimizer", "save")
LAYOUTS = ("tensor", "data")
TRAIN_ITERS, SAVE_INTERVAL = 6, 2
START_SECONDS = 240
MAX_DELAY = {"rollout": 0.15, "teacher": 0.01, "backward": 0.02, "optimizer": 0.02, "save": 0.15}
"""Seconds after the beginning of a phase within which the kill falls; about as long as the phase takes here."""
MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}


@dataclass(frozen=True)
class Fault:
    """One kill: which rank, in which step (from 0) and phase, and how long after the phase began."""

    layout: str
    rank: int
    step: int
    phase: str
    delay: float


def draw_fault(seed: int, trial: int) -> Fault:
    """The fault of a trial; phases and layouts alternate, so that a few trials cover them all."""
    draw = random.Random(f"{seed}/{trial}")
    phase = PHASES[trial % len(PHASES)]
    steps = range(SAVE_INTERVAL - 1, TRAIN_ITERS, SAVE_INTERVAL) if phase == "save" else range(TRAIN_ITERS)
    delay = draw.uniform(0, MAX_DELAY[phase])
    return Fault(LAYOUTS[trial % len(LAYOUTS)], draw.randrange(2), draw.choice(steps), phase, delay)


def write_inputs(folder: Path) -> None:
    """Prompts of two-digit sums."""
    make_data = REPOSITORY / "examples" / "addition" / "make_data.py"
    options = ["--digits=2", "--num-train=64", "--num-validation=16", f"--out={folder}"]
    subprocess.run([sys.executable, make_data, *options], check=True, capture_output=True)


def write_config(folder: Path, inputs: Path, layout: str, **training: Any) -> Path:
    """The config of one run writing to ``folder/run``; ``training`` updates that section."""
    sections = {
        "output_dir": str(folder / "run"),
        "student": {**MODEL, "make_vocab_size_divisible_by": 8},
        "teacher": {**MODEL, "hidden_size": 48, "init_method_std": 0.2, "make_vocab_size_divisible_by": 8},
        "objective_options": {"top_k": 4},
        "guidance": {"schedule": "none"},
        "tokenizer": {"alphabet": "0123456789+="},
        "data": {"train": str(inputs / "train.jsonl"), "max_prompt_length": 6},
        "rollout": {"samples_per_prompt": 2, "max_response_length": 5},
        "parallel": {"tensor_model_parallel_size": 2 if layout == "tensor" else 1},
        "optimizer": {"lr": 0.01},
        "training": {
            "train_iters": TRAIN_ITERS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "save_interval": SAVE_INTERVAL,
            "log_rollouts": 8,
            **training,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def start_ranks(target: Callable[..., None], *arguments: Any, timeout: float = START_SECONDS) -> list[int | None]:
    """Run ``target`` on two ranks; the first that ends badly ends the other, as torchrun does.

    Returns exit codes: None for a rank that this function had to end.

    Ranks are forked from a server that has imported Megatron once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_tropd.trainer"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(2):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        ranks.append(context.Process(target=_rank_main, args=(environment, target, arguments)))
        ranks[-1].start()
    try:
        waiting = {rank.sentinel: rank for rank in ranks}
        while waiting:
            ended = multiprocessing.connection.wait(list(waiting), timeout)
            if not ended or any(waiting.pop(sentinel).exitcode for sentinel in ended if isinstance(sentinel, int)):
                break
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return codes


def _rank_main(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import warnings

    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if os.environ.get("FAULTS_VERBOSE") is None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    target(*arguments)
    os._exit(0)


def train(config: str, fault: Fault | None) -> None:
    """One rank of the run, which dies of ``fault``."""
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.trainer import train

    armed = fault is not None and fault.rank == int(os.environ["RANK"])
    timers = _arm(fault) if fault is not None and armed else []
    train(load_config(config))
    for timer in timers:  # a run that was faster than the delay of its last save: the rank dies all the same
        timer.join()


def _arm(fault: Fault) -> list[threading.Timer]:
    """Start the timer where the fault's phase begins for the (step + 1)-th time; it is the one in the returned list."""
    from megatron_tropd import pair, rollout_source, run, step

    owner, name = {
        "rollout": (rollout_source, "split_for_rank"),  # just before the engine generates
        "teacher": (pair.StudentTeacherStage, "forward"),
        "backward": (step, "token_sums"),  # the last of a micro-batch's forward
        "optimizer": (step, "_refuse_non_finite"),
        "save": (run, "save_checkpoint"),
    }[fault.phase]
    original = getattr(owner, name)
    counted = {"save": (fault.step + 1) // SAVE_INTERVAL - 1, "rollout": fault.step, "optimizer": fault.step}
    calls_before = counted.get(fault.phase, fault.step * (8 // 2 // (1 if fault.layout == "tensor" else 2)))
    calls = 0
    timers: list[threading.Timer] = []

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == calls_before:
            timers.append(threading.Timer(fault.delay, os.kill, (os.getpid(), signal.SIGKILL)))
            timers[0].start()
        calls += 1
        return original(*args, **kwargs)

    setattr(owner, name, watched)
    return timers


def read_outcome(folder: Path) -> dict[str, Any]:
    """What has to be equal: tensors of the last checkpoint, metrics without timings, samples of every step."""
    import torch
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    name = (folder / "checkpoints" / "latest").read_text().strip()
    reader = checkpoint.FileSystemReader(folder / "checkpoints" / name)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    outcome: dict[str, Any] = {"checkpoint": name}
    outcome |= {key: tensor.contiguous().view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items()}
    timings = ("seconds_", "tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    outcome["metrics"] = [{k: v for k, v in line.items() if not k.startswith(timings)} for line in lines]
    outcome["samples"] = {path.name: path.read_bytes() for path in sorted((folder / "rollouts").iterdir())}
    return outcome


def run_trials(trials: int, seed: int, folder: Path, timeout: float = START_SECONDS) -> int:
    """Print one line a trial; returns how many were killed and ended identical to the undisturbed run of their layout.

    ``timeout``: seconds that one start of the ranks may take.
    """
    inputs = folder / "inputs"
    write_inputs(inputs)
    expected = {}
    for layout in LAYOUTS[: min(trials, len(LAYOUTS))]:
        codes = start_ranks(train, str(write_config(folder / layout, inputs, layout)), None, timeout=timeout)
        if codes != [0, 0]:
            raise SystemExit(
                f"the undisturbed {layout}-parallel run failed (exit codes {codes}): FAULTS_VERBOSE=1 shows why"
            )
        expected[layout] = read_outcome(folder / layout / "run")
    identical = 0
    for trial in range(trials):
        fault = draw_fault(seed, trial)
        config = write_config(folder / f"trial_{trial}", inputs, fault.layout)
        first = start_ranks(train, str(config), fault, timeout=timeout)
        second = start_ranks(train, str(config), None, timeout=timeout)
        verdict = _verdict(first[fault.rank], second, expected[fault.layout], config.parent / "run")
        identical += verdict == "killed: identical"
        print(f"{trial}: {fault.layout} rank {fault.rank} step {fault.step} {fault.phase} {verdict}", flush=True)
    return identical


def _verdict(first: int | None, second: list[int | None], expected: dict[str, Any], run: Path) -> str:
    """``first`` is the exit code of the rank to be killed, ``second`` those of the restart."""
    killed = "killed" if first == -signal.SIGKILL else f"NOT KILLED (exit code {first})"
    if second != [0, 0]:
        return f"{killed}: THE RESTART FAILED (exit codes {second})"
    found = read_outcome(run)
    differing = [key for key in expected | found if expected.get(key) != found.get(key)]
    return f"{killed}: " + (f"DIFFERS in {differing[:3]}" if differing else "identical")


def main() -> int:
    """Run the trials of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timeout", type=float, default=START_SECONDS, help="seconds that one start of the ranks may take"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        identical = run_trials(options.trials, options.seed, Path(folder), options.timeout)
    print(f"{options.trials} trials, {identical} identical")
    return int(identical != options.trials)


if __name__ == "__main__":
    sys.exit(main())
