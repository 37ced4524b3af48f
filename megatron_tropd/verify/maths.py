"""LaTeX maths, compared as mathematics by ``math-verify`` (optional extra ``eval``) in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

_START_SECONDS = 60.0
"""Importing sympy on a busy machine."""


def require_math_verify() -> None:
    """Raise ValueError, with the command that helps, where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier math needs a package: pip install megatron-tropd[eval]")


@dataclass
class MathVerifier:
    """Asks one worker process; one that hangs or dies is replaced at the next question."""

    seconds: float = 5.0
    """Time for one response."""
    memory_bytes: int = 2 * 2**30
    """Address space of the worker."""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __call__(self, response: str | None, answer: str) -> tuple[bool, str]:
        """(Whether the response's last mathematical expression equals ``answer``, that expression).

        ``response`` None asks whether ``answer`` itself can be read. What takes too long is wrong.
        """
        task = json.dumps({"answer": answer, "response": response}).encode() + b"\n"
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(task)
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return False, ""
        result = self._read(process, self.seconds)
        if result is None:
            self.close()
            return False, ""
        return result["correct"], result["extracted"]

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        worker = Path(__file__).with_name("math_worker.py")
        # Its answers do not depend on what torchrun or the user set in the environment.
        environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(self.memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        if self._read(self._process, _START_SECONDS) is None:
            self.close()
            raise RuntimeError("math-verify does not start: try `python -c 'import math_verify'`")
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """The next line; None where the process ends or ``seconds`` pass first."""
        assert process.stdout is not None
        deadline = monotonic() + seconds
        collected = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not collected.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - monotonic())):
                    return None
                chunk = os.read(process.stdout.fileno(), 2**16)
                if not chunk:
                    return None
                collected += chunk
        return json.loads(collected)
