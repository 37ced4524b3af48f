"""Run a Python program that nobody has read, such as a model's answer, and see what it prints. Imports no torch.

The program runs as a process of its own: an empty environment, an empty temporary folder as home and working directory,
isolated mode (no user packages, no PYTHON* variables), limits on CPU time, memory, file size, open files, processes and
wall time, and at the end all its processes are killed. Where the kernel lets users make namespaces it also has no
network, its own process tree, and a file system with nothing but the system's libraries, Python (read-only) and a home
in memory. That keeps a model's mistakes from doing harm; against a deliberate attack on the kernel, add a virtual
machine.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic, sleep
from typing import IO

import psutil


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 5
    """CPU time of a process."""
    wall_seconds: float = 10
    """Time from start to end."""
    memory_bytes: int = 512 * 2**20
    """Address space of a process, and resident memory of all together."""
    file_bytes: int = 2**20
    """Size of a file it writes."""
    open_files: int = 32
    """File descriptors."""
    processes: int = 16
    """Processes at the same time, the two that make the sandbox included."""
    output_bytes: int = 64 * 2**10
    """Kept of what it prints; a program that prints more is stopped."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: int
    """Exit status; negative: the signal that ended it."""
    output: str
    """Standard output and error, cut off at the limit."""
    stopped: str
    """Which limit the sandbox enforced itself: wall time, output, processes, memory; "" for none."""


class SandboxError(RuntimeError):
    """The sandbox that was asked for cannot be made on this machine."""


def run_python(program: str, limits: Limits | None = None, *, require_namespaces: bool = True) -> Outcome:
    """Run ``program`` and return how it ended; whatever it does is an Outcome, never an exception.

    Raises SandboxError where the kernel allows no user namespaces, unless ``require_namespaces`` is off: then network
    and the rest of the file system are as open to the program as to this user.
    """
    limits = limits or Limits()
    if require_namespaces and not has_namespaces():
        raise SandboxError(
            "this machine lets users make no namespaces, so a program would have network and files: run in a container "
            "that allows `unshare --user`, or accept that with require_namespaces=False"
        )
    with tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        return _run(Path(folder), limits, isolated=has_namespaces())


@cache
def has_namespaces() -> bool:
    """Whether this user may make the namespaces that the sandbox wants."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    with tempfile.TemporaryDirectory(prefix="sandbox_") as folder:
        (Path(folder) / "program.py").write_text("print(42)")
        return _run(Path(folder), Limits(), isolated=True).output == "42\n"


def _run(folder: Path, limits: Limits, *, isolated: bool) -> Outcome:
    home = "/home" if isolated else str(folder)
    environment = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
    command = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    if isolated:
        namespaces = [f"--{name}" for name in ("map-root-user", "net", "pid", "ipc", "uts", "mount")]
        setup = ["sh", "-c", _NEW_ROOT, "sh", str(folder), sys.base_prefix]
        command = ["unshare", *namespaces, "--fork", "--kill-child", *setup, *command, "/home/program.py"]
    else:
        command.append(str(folder / "program.py"))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
        env=environment, start_new_session=True, preexec_fn=lambda: _limit(limits),
    )  # fmt: skip
    assert process.stdout is not None
    output = _Reader(process.stdout, limits.output_bytes)
    stopped = _watch(process, limits, output)
    _kill_all(process)
    # Somebody who left the group may hold the pipe open.
    output.join(1)
    stopped = "output" if output.is_full.is_set() else stopped
    # `unshare` reports a signal that ended the program as 128 + its number.
    status = 128 - process.returncode if isolated and process.returncode > 128 else process.returncode
    return Outcome(status, bytes(output.collected).decode("utf-8", errors="replace"), stopped)


class _Reader(threading.Thread):
    """Keeps the first bytes of a pipe."""

    def __init__(self, pipe: IO[bytes], limit: int):
        super().__init__(daemon=True)
        self.pipe, self.limit = pipe, limit
        self.collected = bytearray()
        self.is_full = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.is_full.is_set() and (chunk := os.read(self.pipe.fileno(), 2**16)):
            self.collected += chunk[: self.limit - len(self.collected)]
            if len(self.collected) >= self.limit:
                self.is_full.set()


def _watch(process: subprocess.Popen[bytes], limits: Limits, output: _Reader) -> str:
    """Wait for the end, or for the first limit that is passed; the kernel has no such limits for root."""
    deadline = monotonic() + limits.wall_seconds
    while process.poll() is None:
        if monotonic() > deadline:
            return "wall time"
        if output.is_full.is_set():
            return "output"
        family = _family(process.pid)
        if len(family) > limits.processes:
            return "processes"
        if sum(member.info["memory_info"].rss for member in family if member.info["memory_info"]) > limits.memory_bytes:
            return "memory"
        sleep(_POLL_SECONDS)
    return ""


_POLL_SECONDS = 0.02


def _family(pid: int) -> list[psutil.Process]:
    """The process and everything below it; in a process namespace nothing can leave it."""
    members, parents = [], {pid}
    for member in sorted(psutil.process_iter(["ppid", "memory_info"]), key=lambda member: member.pid):
        if member.pid == pid or member.info["ppid"] in parents:
            parents.add(member.pid)
            members.append(member)
    return members


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """End the process group and, through the first process of its namespace, all that has left the group."""
    for member in _family(process.pid)[::-1] if process.poll() is None else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _limit(limits: Limits) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


_NEW_ROOT = """
set -e
folder=$1; python=$2; shift 2
root=$folder/root; mkdir "$root"
mount -t tmpfs -o size=16m,mode=755 tmpfs "$root"
for path in /usr /bin /sbin /lib /lib64 "$python"; do
    if [ -L "$path" ]; then cp -P "$path" "$root$path"; continue; fi
    [ -d "$path" ] && [ ! -d "$root$path" ] || continue
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
mkdir "$root/proc" "$root/home" "$root/dev" "$root/old"
mount -t proc -o ro,nosuid,nodev,noexec proc "$root/proc"
for device in null zero urandom; do : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount -t tmpfs -o size=16m,mode=755 tmpfs "$root/home"
cp "$folder/program.py" "$root/home/"
cd "$root"
pivot_root . old
cd /home
umount -l /old
mount -o remount,ro /
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"
"""
"""Only the system's libraries and Python, all read-only, and an empty home in memory; then no capability is left."""
