"""What counts of a run of the suite beside passed and failed: how many trials its fault, fuzz and hostile tests made."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each test that has recorded ``trials``."""
    reports = [report for found in ("passed", "failed") for report in terminalreporter.getreports(found)]
    trials = [value for report in reports for name, value in report.user_properties if name == "trials"]
    if trials:
        terminalreporter.section("trials")
        for line in trials:
            terminalreporter.write_line(str(line))
