"""The process in which reasoning-gym scores answers: JSON lines in, JSON lines out. Started by ``verify.worker``."""

from __future__ import annotations

import json
import logging
import random
import resource
import sys


def main(memory_bytes: int) -> None:
    """Answer ``{"task", "options", "seed", "level", "index", "answer"}`` per line with ``{"score": float}``."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    # What a library prints must not get between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    from megatron_tropd.procedural import cached_dataset

    print("{}", file=out, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            dataset = cached_dataset(task["task"], tuple(task["options"].items()), task["seed"], task["level"])
            random.seed(0)
            score = float(dataset.score_answer(task["answer"], dataset[task["index"]]))
        except (Exception, RecursionError, MemoryError):  # whatever a scorer makes of it, it is no right answer
            score = 0.0
        print(json.dumps({"score": min(1.0, max(0.0, score))}), file=out, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
