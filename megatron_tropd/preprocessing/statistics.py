"""What was read, kept and dropped, in bounded memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Lengths:
    """Lengths in tokens, as a histogram over powers of two."""

    count: int = 0
    total: int = 0
    longest: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    """By the number of bits: bin b holds lengths in [2^(b-1), 2^b)."""

    def add(self, length: int) -> None:
        """Count one."""
        self.count += 1
        self.total += length
        self.longest = max(self.longest, length)
        self.histogram[length.bit_length()] += 1

    def as_dict(self) -> dict[str, Any]:
        """JSON values; the histogram under each bin's upper bound."""
        mean = round(self.total / self.count, 2) if self.count else 0.0
        bins = {f"<{2**bits}": self.histogram[bits] for bits in sorted(self.histogram)}
        return {"count": self.count, "tokens": self.total, "mean": mean, "max": self.longest, "histogram": bins}


@dataclass
class Statistics:
    """Of one preprocessing run."""

    tokenizer: str | None = None
    """Fingerprint of the tokenizer, where there is one."""
    num_train: int = 0
    num_validation: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    prompts: Lengths = field(default_factory=Lengths)
    answers: Lengths = field(default_factory=Lengths)

    @property
    def num_kept(self) -> int:
        """Records written."""
        return self.num_train + self.num_validation

    def keep(self, validation: bool, prompt_length: int, answer_length: int) -> None:
        """Count a record that is written; a length of 0 is not known."""
        self.num_validation += validation
        self.num_train += not validation
        if prompt_length:
            self.prompts.add(prompt_length)
        if answer_length:
            self.answers.add(answer_length)

    def drop(self, reasons: Counter[str]) -> None:
        """Count records that are left out."""
        self.dropped += reasons

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "tokenizer": self.tokenizer,
            "read": self.num_kept + self.dropped.total(),
            "train": self.num_train,
            "validation": self.num_validation,
            "dropped": dict(self.dropped),
            "prompt_tokens": self.prompts.as_dict(),
            "answer_tokens": self.answers.as_dict(),
        }

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
