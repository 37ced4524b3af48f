"""Fuzz the readers of untrusted files, guided by the coverage of their code (atheris).

    make fuzz [SECONDS=120]        .venv/bin/python tools/fuzz.py --seconds=120 --readers jsonl config

The suite's hypothesis tests draw likely files; this draws whatever reaches new lines. Each reader of
``tests/fuzzed_readers.py`` runs in a process of its own for the given time. What is neither a value nor one of the
package's named errors, takes more than a minute, or writes beside its folder is a failure, and its bytes are kept.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
SECONDS_PER_CASE = 60
NAMES = ("jsonl", "config", "checkpoint")


def fuzz(name: str, seconds: int, findings: Path) -> tuple[int, str]:
    """Run one reader for ``seconds``; returns the number of cases and, where one failed, the fuzzer's last words."""
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, __file__, "--in-process", name, corpus, f"-max_total_time={seconds}"]
        command += [f"-timeout={SECONDS_PER_CASE}", "-max_len=4096", f"-artifact_prefix={findings}/", "-verbosity=1"]
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    counts = re.findall(r"^(?:#|Done )(\d+)", finished.stderr, flags=re.MULTILINE)
    failed = finished.returncode or not counts
    return int(counts[-1]) if counts else 0, (finished.stdout + finished.stderr)[-4000:] if failed else ""


def fuzz_in_process(name: str, corpus: Path, options: list[str]) -> None:
    """Never returns: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["megatron_tropd", "json", "yaml"]):
        from tests.fuzzed_readers import READERS, SEEDS

    for index, seed in enumerate(SEEDS[name]):
        (corpus / f"seed_{index}").write_bytes(seed)
    outside = tempfile.mkdtemp(prefix="fuzz_")
    inside = Path(outside, "run")
    inside.mkdir()

    def one(content: bytes) -> None:
        READERS[name](inside, content)
        assert [path.name for path in Path(outside).iterdir()] == ["run"], "written beside the folder"

    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the readers of the command line one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"), help="where failing inputs are kept")
    options = parser.parse_args()
    options.findings.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.readers:
        count, words = fuzz(name, options.seconds, options.findings)
        failed += bool(words)
        print(
            f"{name}: {count} cases, " + (f"FAILED (bytes in {options.findings})\n{words}" if words else "no failure")
        )
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-process"]:
        fuzz_in_process(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    sys.exit(main())
