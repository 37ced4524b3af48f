"""What a user sees: this package's own lines from rank 0, errors from every rank, nothing of other libraries'.

Megatron and torch warn, on every rank and at import, about choices that this package has made. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

SECONDS_FOR_RANK_0 = 30.0
"""That another rank waits for rank 0 to say what both have found."""


def set_up(rank: int, *, verbose: bool = False) -> None:
    """Send messages to stderr. Call before anything of torch or Megatron is imported.

    Shown: this package's messages on rank 0, its errors on the others, and errors of other libraries. With ``verbose``
    everything is, warnings and the libraries' messages included, on every rank. Warning filters that the user has set
    (``python -W``, ``PYTHONWARNINGS``) are left alone.
    """
    handler = logging.StreamHandler()
    form = "%(message)s" if not verbose else f"[rank {rank}] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[handler])
    logging.getLogger("megatron_tropd").setLevel(logging.INFO)
    if verbose:
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    if rank != 0:
        handler.addFilter(lambda record: record.levelno >= logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")


def tell_once(message: str) -> None:
    """``message`` to stderr by rank 0, for what every rank has found.

    torchrun ends the others as soon as one rank leaves, and rank 0 need not be the first to find it: another rank waits
    for that end, and speaks only where it does not come.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print(message, file=sys.stderr, flush=True)
