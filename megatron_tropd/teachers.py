"""Several teachers that judge ahead, each the micro-batches of the prompts that are routed to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch

from megatron_tropd.ahead import TeacherAhead
from megatron_tropd.distributed import Layout
from megatron_tropd.teacher_pass import Judged
from megatron_tropd.types import Batch, MicroBatch

# isort: split
from megatron.core.models.gpt import GPTModel


class Judges(Protocol):
    """Who has judged a batch when the student's schedule starts."""

    @property
    def seconds(self) -> float:
        """Time the student has waited for the last batch's judgement."""
        ...

    sequence_cut: int
    """What the number of positions of a micro-batch must be a multiple of for the teacher."""

    def judge(self, batch: Batch) -> list[Judged | None]:
        """What the teacher left of each micro-batch of this rank; None off the student's last stage. Every rank calls
        it."""
        ...

    def head(self, batch: MicroBatch) -> torch.Tensor:
        """The output weight ``[V, H]`` that goes with those of ``batch``; for the student's last stage."""
        ...


class TeachersAhead:
    """Teachers by name, in one layout; "" is the one of prompts that name none.

    With ``offload`` each has its layers on the device for its own pass alone: one at a time.
    """

    def __init__(self, teachers: Mapping[str, TeacherAhead]):
        """The order of ``teachers`` is that of the passes: the same on every rank."""
        self.teachers = dict(teachers)
        self.sequence_cut = next(iter(self.teachers.values())).layout.sequence_cut

    @property
    def seconds(self) -> float:
        """Time of all passes of the last batch."""
        return sum(teacher.seconds for teacher in self.teachers.values())

    def judge(self, batch: Batch) -> list[Judged | None]:
        """One pass of each teacher over its micro-batches, as `TeacherAhead.judge`. Every rank calls it."""
        judged: list[Judged | None] = [None] * len(batch.micro_batches)
        for name, teacher in self.teachers.items():
            mine = [index for index, one in enumerate(batch.micro_batches) if one.teacher == name]
            found = teacher.judge(Batch(tuple(batch.micro_batches[index] for index in mine), batch.step))
            for index, one in zip(mine, found, strict=True):
                judged[index] = one
        return judged

    def head(self, batch: MicroBatch) -> torch.Tensor:
        """The output weight ``[V, H]`` that goes with them; for the student's last stage."""
        weight_VH = self.teachers[batch.teacher].head_VH
        assert weight_VH is not None
        return weight_VH


def base_as_teacher(student: GPTModel, layout: Layout, *, hidden: Literal["device", "host"]) -> TeachersAhead:
    """``student``, this rank's slice in ``layout``, with its adapters off, as the one teacher."""
    size = student.vocab_size
    teacher = TeacherAhead(student, layout, layout, num_ids=size, padded_num_ids=size, hidden=hidden)
    return TeachersAhead({"": teacher})
