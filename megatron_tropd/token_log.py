"""Samples with what the loss made of every token: ``<run>/tokens/step_N.jsonl``, for ``tools/plot_run.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.loss_report import LossReport
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.types import MicroBatch, Rollout, TokenRegion


class TokenLog:
    """Records chosen samples of a step as the loss passes over them; ``Learner.observe``."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, interval: int, num_samples: int):
        """Every ``interval`` steps the first ``num_samples`` trajectories; files go to ``folder``."""
        self._folder = folder
        self._tokenizer = tokenizer
        self._interval = interval
        self._num_samples = num_samples
        self._waiting: dict[int, Rollout] = {}
        self._lines: dict[int, dict[str, Any]] = {}

    def choose(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Before the step: which of this replica's trajectories to record, if any."""
        chosen = rollouts[: self._num_samples] if step % self._interval == 0 else ()
        self._waiting = {rollout.request.sample_id: rollout for rollout in chosen}
        self._lines = {}

    def __call__(self, batch: MicroBatch, report: LossReport) -> None:
        """Take what is wanted from one micro-batch; ``report`` has a value for each of its loss positions."""
        for row, sample_id in enumerate(batch.sample_ids):
            if sample_id in self._waiting:
                self._lines[sample_id] = self._line(self._waiting[sample_id], row, batch, report)

    def _line(self, rollout: Rollout, row: int, batch: MicroBatch, report: LossReport) -> dict[str, Any]:
        mine_N = batch.rows_N == row
        positions = batch.loss_positions_N[mine_N]
        ids = batch.labels_BS.flatten()[positions].tolist()
        guided = batch.regions_BS.flatten()[positions] == TokenRegion.GUIDANCE
        return {
            "sample_id": rollout.request.sample_id,
            "prompt": rollout.request.prompt.text,
            "answer": rollout.request.prompt.answer,
            "finished": rollout.finished,
            "text": [self._tokenizer.decode([token]) or "<eos>" for token in ids],
            "region": ["guidance" if flag else "on-policy" for flag in guided.tolist()],
            **{
                name: [round(value, 4) for value in report[name][mine_N].double().tolist()]
                for name in ("reward", "p_trust", "outlier", "student_log_prob")
                if name in report
            },
        }

    def write(self, step: int) -> None:
        """After the step: the file of what was recorded, if anything."""
        if not self._lines:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(self._lines[sample], ensure_ascii=False) + "\n" for sample in sorted(self._lines)]
        (self._folder / f"step_{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")
