"""What every rank has found is told once, whichever rank finds it first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd import console

PROGRAM = """
import os, sys, time
from megatron_tropd.console import tell_once

if os.environ["RANK"] == "0":
    time.sleep(2)
tell_once("error: here")
sys.exit(2)
"""


def test_rank_0_speaks_though_another_is_first(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*torchrun, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=100, check=False
    )
    assert finished.returncode == 1 and finished.stderr.count("error: here") == 1


def test_another_rank_speaks_where_rank_0_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(console, "SECONDS_FOR_RANK_0", 0.01)
    console.tell_once("error: here")
    assert capsys.readouterr().err == "error: here\n"
