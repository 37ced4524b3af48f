"""The loss benchmark runs, and its rows say what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "case", "implementation", "ours", "tp", "time_ratio", "peak_bytes_per_element", "collectives", "gradient_error",
}  # fmt: skip


def test_every_implementation_is_a_row_and_ours_is_right(tmp_path: Path) -> None:
    results, document = tmp_path / "loss.jsonl", tmp_path / "loss.md"
    # Compiling is not what is tested here: the same functions run as they stand.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "tools/bench_loss.py", "--tokens=32", "--vocab=1024", "--repeats=1"]
    command += ["--cases", "K1", "FKL", "TrOPD mix", "fused head", f"--json={results}", f"--markdown={document}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert all(set(row) >= KEYS for row in rows)
    ours = [row for row in rows if row["ours"]]
    assert {row["case"] for row in ours} == {"K1", "FKL", "TrOPD mix", "fused head"}
    for row in ours:
        assert row["collectives"] == 0 and row["time_ratio"] > 0
        assert row["gradient_error"] < (4e-3 if row["case"] != "fused head" else 0.2), row
    assert [row["time_ratio"] for row in rows if row["implementation"] == "ours"] == [1.0] * 4
    fp32 = [row for row in rows if row["implementation"] == "ours, fp32 logits"]
    assert len(fp32) == 1 and fp32[0]["gradient_error"] < 8e-3
    missing = [row for row in rows if row["time_ratio"] is None]
    assert all(row["note"] for row in missing) and any("needs CUDA" in row["note"] for row in missing)
    assert any(row["implementation"] == "Megatron cross-entropy, twice" and row["time_ratio"] for row in rows)
    assert "| K1 | ours |" in document.read_text() and "not measured" in document.read_text()
