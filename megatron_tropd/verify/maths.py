"""LaTeX maths, compared as mathematics by ``math-verify`` (optional extra ``eval``) in a process of its own."""

from __future__ import annotations

import importlib.util

from megatron_tropd.verify.worker import Worker


def require_math_verify() -> None:
    """Raise ValueError, with the command that helps, where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier math needs a package: pip install megatron-tropd[eval]")


class MathVerifier:
    """Compares mathematical expressions; what takes too long or too much memory is wrong."""

    def __init__(self, *, seconds: float = 5.0, memory_bytes: int = 2 * 2**30):
        """``seconds`` for one response; ``memory_bytes`` of address space for all."""
        self.worker = Worker("math_worker.py", seconds=seconds, memory_bytes=memory_bytes)

    def __call__(self, response: str | None, answer: str) -> tuple[bool, str]:
        """(Whether the response's last mathematical expression equals ``answer``, that expression).

        ``response`` None asks whether ``answer`` itself can be read.
        """
        result = self.worker.ask({"answer": answer, "response": response})
        return (False, "") if result is None else (result["correct"], result["extracted"])
