"""What the suite tells beside passed and failed: how many trials its fault, fuzz and hostile tests made."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The sums of what tests recorded as ``trials``: (of what, how many)."""
    total: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        total.update({what: count for name, (what, count) in report.user_properties if name == "trials"})
    if total:
        terminalreporter.section("trials")
        for what, count in total.items():
            terminalreporter.write_line(f"{count} {what}")
