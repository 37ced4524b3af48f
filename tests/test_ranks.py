"""The helper that starts ranks: results in order, failures with their traceback, hangs killed."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def add_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total) * 10 + int(os.environ["RANK"])


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the reason")
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def test_results_come_in_rank_order() -> None:
    assert run_ranks(2, add_ranks, 3) == [70, 71]


def test_a_failing_rank_ends_all_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*fail_on_rank_1.*the reason"):
        run_ranks(2, fail_on_rank_1, timeout=60)


def test_a_hang_is_killed_and_reported() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"no answer within 6 s.*\[0\]"):
        run_ranks(1, hang, timeout=6)
    assert time.monotonic() - started < 30
