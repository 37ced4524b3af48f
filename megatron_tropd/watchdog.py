"""Ends the whole job where a rank hangs, and names it: a thread on every rank that reports through the store.

Each rank tells how many operations it has begun in each process group, and how many messages to and from each other
rank. A group in which some ranks have begun one that others have not, with no change for the whole timeout, is waiting
for those others, and so is one end of a message for the other; of them, the ones that are not ahead of anyone elsewhere
wait for nobody and are at fault. So is a rank whose thread itself has fallen silent (a process that is stopped or
swapped out). Counting operations works where they run on the device and no stack shows who waits.

Of a job with two sides each counts its own operations, for one may wait for the other for as long as that works. The
only rank of a side has none to count: it is at fault where its main thread has had no time of the processor, and does
not wait for the other side.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tropd.distributed import Layout
from megatron_tropd.messages import MessageCounts

EXIT_CODE = 75
"""Of a job that was ended because a rank hung: EX_TEMPFAIL, try again."""
_VERDICT = "megatron_tropd/watchdog/verdict"
_REPORT_SECONDS = 5.0
_REPORT = "megatron_tropd/watchdog/rank/"
_ENDING = "megatron_tropd/watchdog/ending/"

Counts = Mapping[str, int]
"""Operations begun by one rank, by name of the process group, and messages, by ``source>destination``."""


def find_hung(counts: Sequence[Counts], stuck: frozenset[str]) -> list[int]:
    """Ranks that the waiting ones wait for: behind in a ``stuck`` group, and ahead of nobody in any of those.

    Where each one behind is ahead elsewhere, all those behind.
    """
    behind, ahead = set(), set()
    for name in stuck:
        members = {rank: count[name] for rank, count in enumerate(counts) if name in count}
        behind |= {rank for rank, number in members.items() if number < max(members.values())}
        ahead |= {rank for rank, number in members.items() if number > min(members.values())}
    return sorted(behind - ahead or behind)


def counts_of(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """What each rank has begun, from its report; a rank that has begun none of a pair's messages has begun 0."""
    pairs = {pair for report in reports for pair in report["messages"]}
    found = []
    for rank, report in enumerate(reports):
        mine = [] if report["done"] else [pair for pair in pairs if str(rank) in pair.split(">")]
        found.append(report["counts"] | {pair: report["messages"].get(pair, 0) for pair in mine})
    return found


class Watchdog:
    """``start()`` once the process groups stand, ``stop()`` at the end; ends this process where the job hangs."""

    def __init__(self, layout: Layout, *, timeout_seconds: float, on_end: Callable[[str], None] = lambda message: None):
        """``on_end`` is called with the message before the process ends; where it hangs too, that is not waited for."""
        self._link = link = layout.link
        self._rank = layout.rank if link is None else link.rank
        self._worlds = {"": range(layout.world_size)} if link is None else link.side.ranks
        """The ranks of the job that count operations together, by the name of their side."""
        self._ranks = range(sum(map(len, self._worlds.values())))
        self._is_alone = link is not None and layout.world_size == 1
        self._on_end = on_end
        self._timeout = timeout_seconds
        self._interval = min(timeout_seconds / 10, 5.0)
        store = dist.distributed_c10d._get_default_store() if link is None else link.store
        # A connection of its own: the main thread may hold the other one's lock while it waits.
        self._store = store.clone()
        self._messages = MessageCounts()
        self._main_thread = threading.main_thread().ident
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._since: dict[str, tuple[Any, float]] = {}

    def start(self) -> None:
        """Begin to count, to report and to listen; rank 0 and the last rank also judge."""
        self._messages.install()
        self._report()  # at once: a rank that falls silent before its first report would never be missed
        self._thread.start()

    def stop(self) -> None:
        """This rank is done and no longer expected to make progress."""
        self._stopping.set()
        self._thread.join()
        self._messages.remove()
        with contextlib.suppress(dist.DistError):  # the process with the store may have left first
            self._report(done=True)

    def _watch(self) -> None:
        # Without the store there is nobody to tell, and the process groups fail on their own.
        with contextlib.suppress(dist.DistError):
            self._report_and_judge()

    def _report_and_judge(self) -> None:
        is_judge = self._rank in (0, self._ranks[-1])
        while not self._stopping.wait(self._interval):
            self._report()
            if self._store.check([_VERDICT]):
                self._end(json.loads(self._store.get(_VERDICT)))
            if is_judge and (verdict := self._judge()):
                self._store.set(_VERDICT, json.dumps(verdict))
                self._end(verdict)

    def _report(self, *, done: bool = False) -> None:
        self._store.set(f"{_REPORT}{self._rank}", json.dumps(self.report(done=done)))

    def report(self, *, done: bool = False) -> dict[str, Any]:
        """What this rank has begun, and where it is."""
        report: dict[str, Any] = {"time": time.time(), "counts": {}, "messages": {}, "where": "", "done": done}
        if not done:
            messages = dict(self._messages.within)
            report["counts"] = {
                name: group._get_sequence_number_for_group() - messages.get(name, 0)  # type: ignore[attr-defined]
                for group, name in list(dist.distributed_c10d._world.pg_names.items())
            }
            report |= {"messages": dict(self._messages.begun), "where": self._where()}
            if self._is_alone:
                report["progress"] = self._progress()
        return report

    def _progress(self) -> float:
        """Seconds of the processor that the main thread has had, in tenths; what changes while it waits for the other
        side."""
        assert self._link is not None and self._main_thread is not None
        if self._link.waits:
            return time.time()
        return round(time.clock_gettime(time.pthread_getcpuclockid(self._main_thread)), 1)

    def _where(self) -> str:
        """The main thread's line in this package, and its innermost one."""
        frame = sys._current_frames().get(self._main_thread or 0)
        lines = []
        while frame is not None:
            lines.append((frame.f_globals.get("__name__", ""), frame.f_code, frame.f_lineno))
            frame = frame.f_back
        own = next((line for line in lines if line[0].startswith("megatron_tropd.")), None)
        shown = dict.fromkeys(line for line in (own, lines[0] if lines else None) if line is not None)
        return " > ".join(f"{code.co_name} ({Path(code.co_filename).name}:{number})" for _, code, number in shown)

    def _judge(self) -> dict[str, Any] | None:
        keys = [f"{_REPORT}{rank}" for rank in self._ranks]
        if not self._store.check(keys):
            return None  # somebody has not started yet: that is the process groups' timeout
        reports = [json.loads(self._store.get(key)) for key in keys]
        found = {
            "sent no sign of life": self._unchanged(reports, "time"),
            "did not join what others wait in": [
                rank for world in self._worlds.values() for rank in self._behind(world, reports)
            ],
            "did nothing and waited for no other rank": self._unchanged(reports, "progress"),
        }
        for what, hung in found.items():
            if hung:
                return {"ranks": hung, "what": what, "where": [reports[rank]["where"] for rank in hung]}
        return None

    def _unchanged(self, reports: Sequence[Mapping[str, Any]], name: str) -> list[int]:
        """The ranks that are not done and have told the same under ``name`` for the whole timeout."""
        told = {rank: report[name] for rank, report in enumerate(reports) if not report["done"] and name in report}
        return [rank for rank, value in told.items() if self._is_stuck(f"{name} of {rank}", value)]

    def _behind(self, world: range, reports: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ranks of ``world`` that others of it wait for, and have for the whole timeout."""
        counts = counts_of([reports[rank] for rank in world])
        names = {name for count in counts for name in count}
        numbers = {name: [count.get(name) for count in counts] for name in names}
        unequal = [name for name in names if len({number for number in numbers[name] if number is not None}) > 1]
        for name in names - set(unequal):
            self._since.pop(f"{name} from {world.start}", None)
        stuck = frozenset(name for name in unequal if self._is_stuck(f"{name} from {world.start}", numbers[name]))
        return [world[rank] for rank in find_hung(counts, stuck)]

    def _is_stuck(self, name: str, value: Any) -> bool:
        """Whether ``value`` has been seen unchanged for the whole timeout."""
        known, since = self._since.get(name, (None, 0.0))
        if known != value:
            self._since[name] = (value, time.monotonic())
            return False
        return time.monotonic() - since >= self._timeout

    def _wait_for_others(self) -> None:
        """Until every rank has said how it ends, for a while: the first to go breaks the connections of the others,
        whose runs would then fail of that before they know of the hang."""
        keys = [f"{_ENDING}{rank}" for rank in self._ranks]
        deadline = time.monotonic() + 2 * self._interval + 1
        with contextlib.suppress(dist.DistError):
            self._store.set(keys[self._rank], "")
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _name(self, rank: int) -> str:
        """As its log files are numbered."""
        name, world = next((name, world) for name, world in self._worlds.items() if rank in world)
        return f"{name} rank {world.index(rank)}".lstrip()

    def _end(self, verdict: dict[str, Any]) -> None:
        if self._stopping.is_set():
            return
        hung = self._rank in verdict["ranks"]
        places = "; ".join(
            f"{self._name(rank)}{f' in {where}' if where else ''}"
            for rank, where in zip(verdict["ranks"], verdict["where"], strict=True)
        )
        message = (
            f"hung: {places} {verdict['what']} for {self._timeout:g} s (parallel.distributed_timeout_minutes). Every "
            "rank ends; the last checkpoint is intact, start again with the same command (torchrun --max-restarts does)"
        )
        if hung or self._rank == min(set(self._ranks) - set(verdict["ranks"]), default=0):
            print(f"error: {message}", file=sys.stderr, flush=True)
        report = threading.Thread(target=self._on_end, args=(message,), daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        self._wait_for_others()
        if hung:
            faulthandler.dump_traceback(all_threads=True)
        for child in multiprocessing.active_children():  # Megatron's writers would stay behind
            child.kill()
        os._exit(EXIT_CODE)
