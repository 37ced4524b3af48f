"""The process in which math-verify runs: JSON lines in, JSON lines out. Started by ``verify.worker``.

sympy can take any time and memory for what a model writes (towers of powers, factorials), and some of it cannot be
interrupted from within; so it runs where it can be ended.
"""

from __future__ import annotations

import json
import logging
import resource
import sys


def main(memory_bytes: int) -> None:
    """Answer ``{"answer": str, "response": str | null}`` per line with ``{"correct": bool, "extracted": str}``.

    Without a response it says in ``correct`` whether the reference answer itself can be read.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    # What a library prints must not get between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    from math_verify import parse, verify

    print("{}", file=out, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            # No timeouts of its own: whoever waits for this process has one for both.
            gold = parse(_delimited(task["answer"]), parsing_timeout=None)
            found = [] if task["response"] is None else parse(task["response"], parsing_timeout=None)
            correct = bool(gold) if task["response"] is None else verify(gold, found, timeout_seconds=None)
            result = {"correct": bool(correct), "extracted": str(found[0]) if found else ""}
        except (Exception, RecursionError, MemoryError):  # whatever sympy makes of it, it is no right answer
            result = {"correct": False, "extracted": ""}
        print(json.dumps(result), file=out, flush=True)


def _delimited(answer: str) -> str:
    """A reference answer as math-verify reads one: LaTeX between dollars."""
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


if __name__ == "__main__":
    main(int(sys.argv[1]))
