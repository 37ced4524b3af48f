"""Hostile programs in the sandbox: each is stopped, none leaves a trace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_tropd.sandbox import Limits, Outcome, SandboxError, has_namespaces, run_python

LIMITS = Limits(cpu_seconds=2, wall_seconds=4, memory_bytes=256 * 2**20, processes=12)
needs_namespaces = pytest.mark.skipif(not has_namespaces(), reason="this machine lets users make no namespaces")


@pytest.fixture(autouse=True)
def _count(record_property: Callable[[str, object], None]) -> None:
    record_property("trials", ("tests of programs in the sandbox, most of them hostile", 1))


def run(program: str) -> Outcome:
    return run_python(program, LIMITS, require_namespaces=False)


def test_an_honest_program_runs() -> None:
    assert run("import math\nprint(math.factorial(10))") == Outcome(0, "3628800\n", "")


def test_a_failing_program_is_an_outcome() -> None:
    outcome = run("raise SystemExit(3)")
    assert (outcome.status, outcome.stopped) == (3, "")
    assert "SyntaxError" in run("def").output
    assert run("print('\ud800')").status != 0


def test_an_endless_loop_ends() -> None:
    started = time.monotonic()
    assert run("while True: pass").status != 0
    assert time.monotonic() - started < LIMITS.wall_seconds + 3


def test_sleeping_ends_at_the_wall_time() -> None:
    assert run("import time; time.sleep(60)").stopped == "wall time"


def test_a_fork_bomb_is_stopped_and_nothing_of_it_stays() -> None:
    outcome = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert outcome.stopped in ("processes", "memory")
    time.sleep(0.5)
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if command.endswith("/program.py")]


def test_a_memory_bomb_is_stopped() -> None:
    outcome = run("blocks = []\nwhile True: blocks.append(bytearray(2**24))")
    assert outcome.status != 0 and ("MemoryError" in outcome.output or outcome.stopped == "memory")


def test_output_without_end_is_cut_off() -> None:
    outcome = run("while True: print('x' * 1000)")
    assert outcome.stopped == "output" and len(outcome.output) == LIMITS.output_bytes


def test_a_large_file_is_refused() -> None:
    assert run("open('big', 'wb').write(bytes(2**22))").status != 0


def test_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "hunter2")
    outcome = run("import os; print(dict(os.environ))")
    assert outcome.status == 0 and "hunter2" not in outcome.output and "SERVICE_TOKEN" not in outcome.output


@needs_namespaces
def test_nothing_outside_can_be_seen_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    targets = [str(tmp_path / "new"), "/usr/new", "/new", "/proc/sys/kernel/hostname", "/dev/shm/new"]
    program = (
        f"import os\nfor path in {targets!r}:\n"
        "    try: open(path, 'w').write('x'); print('WROTE', path)\n"
        "    except OSError: pass\n"
        f"print(os.path.exists({str(secret)!r}), os.listdir('/home'))"
    )
    outcome = run(program)
    assert outcome.output == "False ['program.py']\n"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"] and not Path("/usr/new").exists()


@needs_namespaces
def test_no_network_no_other_processes_no_way_back_to_root() -> None:
    program = f"""
import ctypes, os, socket
try: socket.create_connection(("127.0.0.1", 22), 1); print("connected")
except OSError as error: print(type(error).__name__)
print(len([name for name in os.listdir("/proc") if name.isdecimal()]) < 4)
libc = ctypes.CDLL(None)
print(libc.umount2(b"/home", 0), libc.mount(b"tmpfs", b"/home", b"tmpfs", 0, None))
try: os.kill({os.getpid()}, 9); print("killed")
except OSError as error: print(type(error).__name__)
"""
    output = run(program).output.splitlines()
    assert output[1:] == ["True", "-1 -1", "ProcessLookupError"] and output[0] in ("OSError", "ConnectionRefusedError")


def test_without_namespaces_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tropd.sandbox.has_namespaces", lambda: False)
    with pytest.raises(SandboxError, match="network and files"):
        run_python("print(1)")
    assert run("print(1)").output == "1\n"
