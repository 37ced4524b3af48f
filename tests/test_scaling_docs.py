"""docs/scaling.md says what the planner predicts now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_tropd.planner.hardware import GPUS, Assumptions
from megatron_tropd.planner.layouts import plans
from tools import scaling_sweep

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"


def _rows() -> dict[int, list[str]]:
    """Number of GPUs to the cells of its row."""
    text = DOCUMENT.read_text(encoding="utf-8").split(scaling_sweep.BEGIN)[1].split(scaling_sweep.END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {int(cells[0]): cells for cells in lines if cells[0].isdigit()}


def test_help_and_unknown_options_start_no_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    before = DOCUMENT.stat().st_mtime_ns
    for arguments, status in ((["--help"], 0), (["--gpu=H200"], 2)):
        with pytest.raises(SystemExit) as ended:
            scaling_sweep.main(arguments)
        assert ended.value.code == status
    assert "Predicted step times" in capsys.readouterr().out and DOCUMENT.stat().st_mtime_ns == before


def test_the_table_is_the_planners() -> None:
    rows = _rows()
    assert tuple(rows) == scaling_sweep.NUM_GPUS
    for num_gpus in (64, 1024):
        found = plans(scaling_sweep.run(), num_gpus, GPUS["H100"], Assumptions(), most=1)
        assert rows[num_gpus][2] == f"{found[0].time.total:.1f}", "run `python tools/scaling_sweep.py`"


def test_what_the_text_concludes_follows_from_the_table() -> None:
    steps = {num_gpus: float(cells[2]) for num_gpus, cells in _rows().items()}
    separate = {num_gpus: float(cells[7]) for num_gpus, cells in _rows().items() if num_gpus > 8}
    floor = scaling_sweep.latency_floor(Assumptions())
    assert _rows()[8][7] == "–"
    assert min(num_gpus for num_gpus in separate if separate[num_gpus] < steps[num_gpus]) == 64
    assert max(1 - separate[num_gpus] / steps[num_gpus] for num_gpus in separate) == pytest.approx(0.03, abs=0.005)
    assert separate[16] / steps[16] == pytest.approx(1.2, abs=0.05)
    assert all(separate[num_gpus] > steps[num_gpus] - 0.2 for num_gpus in separate if num_gpus >= 256)
    assert min(num_gpus for num_gpus in steps if floor > steps[num_gpus] / 2) == 32
    pieces = {num_gpus: float(cells[11]) for num_gpus, cells in _rows().items()}
    assert min(num_gpus for num_gpus in pieces if pieces[num_gpus] < steps[num_gpus]) == 128
    text = DOCUMENT.read_text(encoding="utf-8")
    said = [int(value) for value in re.findall(r"(\d+) % of the step at 64, (\d+) % at 1024", text)[0]]
    assert said == [round(100 * floor / steps[64]), round(100 * floor / steps[1024])]


@pytest.mark.slow
def test_every_row_is_the_sweeps() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for num_gpus in scaling_sweep.NUM_GPUS:
        assert scaling_sweep.table_line(scaling_sweep.row(num_gpus)) in text, "run `python tools/scaling_sweep.py`"
