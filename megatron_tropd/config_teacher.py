"""The config section about what the teacher alone reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherContextConfig:
    """What the teacher reads that the student does not (privileged context: a system prompt, the reference answer).
    Needs parallel.teacher_schedule=ahead. With the student's own weights as the teacher: self-distillation."""

    prompt_template: str | None = None
    """The teacher's prompt, with {prompt}, {answer} and {solution} of the line in their places: for a line with
    "prompt" what takes the place of data.prompt_template, for one with "messages" the last user message. None: the
    student's."""
    system_prompt: str | None = None
    """System message of the teacher's conversation, for lines with "messages"; the same places."""
    max_prompt_length: int | None = None
    """Budget of the teacher's prompt in tokens; None: data.max_prompt_length."""

    @property
    def is_set(self) -> bool:
        """Whether the teacher reads anything else than the student."""
        return self.prompt_template is not None or self.system_prompt is not None
