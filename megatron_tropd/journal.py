"""What one rank leaves for whoever looks at a run later: a line per event, a heartbeat, a report at the end.

In ``<run>/logs``: ``rank_N.jsonl``, one JSON object a line with ``time`` (UTC), ``rank``, ``event`` and what belongs to
it; ``rank_N.heartbeat.json``, replaced whenever a phase begins; ``rank_N.exit.json``, written however the run ends, a
kill excepted. No secret is written (see ``redaction``). Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import traceback
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, TextIO

from megatron_tropd.redaction import redact, redacted

logger = logging.getLogger(__name__)


class Journal:
    """Log, heartbeat and exit report of one rank; a context manager around the run."""

    def __init__(self, folder: Path, rank: int, command: str, *, train_iters: int = 0):
        """``folder`` is the run's; ``train_iters`` the steps of the whole run, 0 where the command has none."""
        self.rank, self.command, self.train_iters = rank, command, train_iters
        self.step: int | None = None
        """The step in hand."""
        self.phase = "start"
        self.steps_done = 0
        self.outcome = "finished"
        """How the run will have ended if nothing is raised; ``sigterm`` where it was asked to stop, ``hung`` where the
        watchdog ends it."""
        self._started = monotonic()
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._path("exit.json").unlink(missing_ok=True)
        self._file = _open_after_whole_lines(self._logs / f"rank_{rank}.jsonl")
        self._handler = _ToJournal(self)

    def __enter__(self) -> Journal:
        """Take in what the package logs from here on."""
        logging.getLogger("megatron_tropd").addHandler(self._handler)
        self.event("start", command=self.command, host=socket.gethostname(), pid=os.getpid())
        self.beat("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the exit report and say in one line where it is; what was raised goes on.

        A hang that has been reported stays: what is raised after it is of ranks that have ended for it.
        """
        report = self._report(error)
        if error is not None:
            text = "".join(traceback.format_exception(kind, error, trace))
            self.event("traceback", text=text)
        if self.outcome != "hung":
            self._leave(report)
        self.beat("exit")
        logging.getLogger("megatron_tropd").removeHandler(self._handler)
        self._say(report)
        self._file.close()

    def report_hang(self, message: str) -> None:
        """The exit report of a job that the watchdog ends: called from its thread, while the run hangs."""
        self.outcome = "hung"
        self._leave(self._report(None) | {"message": redact(message)})

    def _leave(self, report: dict[str, Any]) -> None:
        """The exit report, as a file and as an event."""
        self._replace("exit.json", {"time": _now(), "rank": self.rank} | report)
        if not self._file.closed:
            self.event("exit", **report)

    def event(self, name: str, **values: Any) -> None:
        """Append one line: ``time``, ``rank``, ``event``, then ``values``, which JSON has to be able to express."""
        line = {"time": _now(), "rank": self.rank, "event": name} | _finite(redacted(values))
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def beat(self, phase: str) -> None:
        """A phase of the step in hand begins now; whoever watches the file sees which, since when."""
        self.phase = phase
        values = {"time": _now(), "rank": self.rank, "step": self.step, "phase": phase, "pid": os.getpid()}
        self._replace("heartbeat.json", values)

    def _report(self, error: BaseException | None) -> dict[str, Any]:
        outcome = self.outcome
        if error is not None:
            outcome = getattr(error, "outcome", "error" if isinstance(error, Exception) else "interrupted")
        values = {
            "outcome": outcome,
            "error": type(error).__name__ if error is not None else None,
            "message": str(error) if error is not None else None,
            "command": self.command,
            "steps_done": self.steps_done,
            "train_iters": self.train_iters,
            "step": self.step,
            "phase": self.phase,
            "seconds": round(monotonic() - self._started, 3),
        }
        return redacted(values)

    def _say(self, report: dict[str, Any]) -> None:
        """One line on the console: from rank 0, and from a rank that fails by itself."""
        done = f"{report['steps_done']} of {report['train_iters']} steps" if self.train_iters else self.command
        where = f"{done} in {report['seconds']:.1f} s; report: {self._path('exit.json')}"
        if report["error"] is None:
            if self.rank == 0:
                logger.info("%s: %s", report["outcome"], where)
        elif self.rank == 0 or report["outcome"] == "error":
            at = f"{report['error']} on rank {self.rank} in phase {report['phase']} of step {report['step']}"
            logger.error("%s: %s; %s", report["outcome"], at, where)

    def _path(self, kind: str) -> Path:
        return self._logs / f"rank_{self.rank}.{kind}"

    def _replace(self, kind: str, values: dict[str, Any]) -> None:
        """The old file or the new one, never a part: readers come at any moment."""
        path = self._path(kind)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
        os.replace(temporary, path)


class _ToJournal(logging.Handler):
    """What the package says on the console, and what only rank 0 may say there, as events."""

    def __init__(self, journal: Journal):
        super().__init__(logging.INFO)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.event("log", level=record.levelname.lower(), message=redact(record.getMessage()))


def _open_after_whole_lines(path: Path) -> TextIO:
    """``path``, to append to; a line that a kill cut off is ended first."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def _finite(value: Any) -> Any:
    """NaN and infinity as null, which JSON can express."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
