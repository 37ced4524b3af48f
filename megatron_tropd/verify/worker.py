"""A process that answers questions line by line, and is ended when it takes too long."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

_START_SECONDS = 60.0
"""Importing a large library on a busy machine."""


class Worker:
    """``script MEMORY_BYTES`` as a process: one JSON object out when it is ready, then one in and one out per task.

    A process that hangs or dies is replaced at the next question.
    """

    def __init__(self, script: str, *, seconds: float, memory_bytes: int):
        """``script`` is a file beside this one; ``seconds`` the time for one answer; ``memory_bytes`` of address
        space."""
        self._script = Path(__file__).with_name(script)
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to ``task``; None where there is none in time. Raises RuntimeError if it cannot be started."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
            result = self._read(process, self._seconds)
        except BrokenPipeError:
            result = None
        if result is None:
            self.close()
        return result

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # Its answers do not depend on what torchrun or the user set in the environment.
        environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self._script), str(self._memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        if self._read(self._process, _START_SECONDS) is None:
            self.close()
            raise RuntimeError(f"a verifier does not start: run `{sys.executable} {self._script} {2**31}` to see why")
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
