"""One line of a prompt file, checked: a text or a conversation, perhaps with a reference answer. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.jsonl import DataError, kind_of
from megatron_tropd.prompt import Prompt
from megatron_tropd.tokenizer import Message, Tokenizer
from megatron_tropd.verify import VERIFIERS

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class LineFormat:
    """How a line of a prompt file becomes a prompt: the fields of the same name in the config's data section."""

    verifier: str = "exact"
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    prompt_template: str = "{prompt}"
    teacher_prompt_template: str | None = None
    """What the teacher reads, with {prompt}, {answer} and {solution}; None: what the student reads."""
    teacher_system_prompt: str | None = None
    """The teacher's system message in conversations; None: the student's."""
    teachers: tuple[str, ...] = ()
    """Names that "teacher" may have in a line; (): it is not read."""

    @property
    def has_teacher_context(self) -> bool:
        """Whether the teacher's prompt is another than the student's."""
        return self.teacher_prompt_template is not None or self.teacher_system_prompt is not None


def parse_line(
    line: dict[str, Any], where: str, default_id: str, tokenizer: Tokenizer, line_format: LineFormat | None = None
) -> Prompt:
    """A line of a prompt file: ``{"prompt": str}`` or ``{"messages": [...]}``, with "answer" and "id" at will, and what
    a verifier needs; ``line_format`` gives other names and defaults. Template and choices are for plain prompts alone.

    ``where`` (file:line) begins the message of every DataError.
    """
    identifier = string(line, "id", where, default=default_id)
    if not identifier:
        raise DataError(f'{where}: "id" is empty: leave it out (the line number is taken) or give one')
    line_format = line_format or LineFormat()
    verifier = known_verifier(line, where, line_format.verifier)
    if verifier in ("number", "math") and type(line.get(line_format.answer_key)) is int:
        line = {**line, line_format.answer_key: str(line[line_format.answer_key])}  # as AIME files have it
    answer = string(line, line_format.answer_key, where, default="")
    solution = string(line, "solution", where, default="")
    teacher = string(line, "teacher", where, default="") if line_format.teachers else ""
    if teacher not in ("", *line_format.teachers):
        raise DataError(f"{where}: teacher {teacher!r} is unknown; teachers has {', '.join(line_format.teachers)}")
    details: dict[str, Any] = {}
    if "choices" in line:
        details["num_choices"] = len(checked_choices(line["choices"], where))
    if "tests" in line:
        details["tests"] = string(line, "tests", where, default="")
    try:
        text = _text(line, where, tokenizer, line_format)
        tokens = tokenizer.encode(text)
        teacher_tokens: tuple[int, ...] = ()
        if line_format.has_teacher_context:
            known = {"answer": answer, "solution": solution or answer}
            teacher_tokens = tuple(tokenizer.encode(_teacher_text(line, where, tokenizer, line_format, known)))
        # A reference answer that the tokenizer cannot express can be neither learned nor met.
        tokenizer.encode(solution or answer)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not tokens:
        raise DataError(f'{where}: "prompt" {text!r} has no tokens under this tokenizer: remove the line')
    return Prompt(
        identifier,
        text,
        tuple(tokens),
        answer,
        verifier,
        solution,
        details,
        teacher=teacher,
        teacher_tokens=teacher_tokens,
    )


def _text(line: dict[str, Any], where: str, tokenizer: Tokenizer, line_format: LineFormat) -> str:
    if "messages" in line:
        if line_format.prompt_key in line:
            raise DataError(f'{where}: both "{line_format.prompt_key}" and "messages": keep one of them')
        messages = checked_messages(line["messages"], where)
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f'{where}: "messages" end with the assistant\'s: put its text under "answer", so that the student '
                "writes its own (tools/preprocess_data.py does that)"
            )
        return tokenizer.render_chat(messages, line.get("tools"))
    text = string(line, line_format.prompt_key, where, default="")
    if not text.strip():
        state = "is empty" if line_format.prompt_key in line else "is missing"
        raise DataError(
            f'{where}: "{line_format.prompt_key}" {state}: every line needs a text under that key, or "messages"'
        )
    if "choices" in line:
        text = with_choices(text, checked_choices(line["choices"], where))
    return line_format.prompt_template.replace("{prompt}", text)


def _teacher_text(
    line: dict[str, Any], where: str, tokenizer: Tokenizer, line_format: LineFormat, known: dict[str, str]
) -> str:
    """The teacher's prompt: the student's line under the teacher's templates. ``known`` has answer and solution."""
    template = line_format.teacher_prompt_template
    if "messages" not in line:
        if template is None:
            raise DataError(
                f"{where}: teacher_context.system_prompt is for conversations, and this line has a plain "
                f'"{line_format.prompt_key}": use teacher_context.prompt_template'
            )
        text = _text(line, where, tokenizer, replace(line_format, prompt_template="{prompt}"))
        return _filled(template, where, known | {"prompt": text})
    messages = [dict(message) for message in checked_messages(line["messages"], where)]
    if line_format.teacher_system_prompt is not None:
        system = {"role": "system", "content": _filled(line_format.teacher_system_prompt, where, known)}
        messages = [system, *(message for message in messages if message["role"] != "system")]
    if template is not None:
        asked = [message for message in messages if message["role"] == "user"]
        if not asked:
            raise DataError(f"{where}: teacher_context.prompt_template needs a message of the user to act on")
        asked[-1]["content"] = _filled(template, where, known | {"prompt": asked[-1]["content"]})
    return tokenizer.render_chat(messages, line.get("tools"))


def _filled(template: str, where: str, known: dict[str, str]) -> str:
    """``template`` with {prompt}, {answer} and {solution} in their places, in one pass: braces in data stay."""

    def value(found: re.Match[str]) -> str:
        text = known.get(found[1], "")
        if not text:
            raise DataError(f"{where}: the teacher's context has {{{found[1]}}}, and this line has none")
        return text

    return re.sub(r"\{(prompt|answer|solution)\}", value, template)


def with_choices(text: str, choices: Sequence[str]) -> str:
    """A question with the answers to choose from listed below it as ``A) ...``."""
    return "\n".join([text, "", *(f"{chr(ord('A') + index)}) {choice}" for index, choice in enumerate(choices))])


def known_verifier(line: dict[str, Any], where: str, default: str) -> str:
    """The line's verifier. Raises DataError for one that there is not."""
    verifier = string(line, "verifier", where, default=default)
    if verifier not in VERIFIERS:
        raise DataError(f"{where}: verifier {verifier!r} is unknown: {', '.join(VERIFIERS)}")
    return verifier


def checked_choices(value: Any, where: str) -> list[str]:
    """``value`` where it is a list of answers to choose from."""
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise DataError(f'{where}: "choices" must be a list of 2 to 26 strings, found {kind_of(value)}')
    return [string({"choices": choice}, "choices", where, default="") for choice in value]


def checked_messages(value: Any, where: str) -> Sequence[Message]:
    """``value`` where it is a conversation: a list of objects with a role and a content that is text."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise DataError(f'{where}: "messages" must be a list of {{"role", "content"}} objects, found {found}')
    for index, message in enumerate(value):
        at = f"{where}: message {index}"
        if not isinstance(message, dict):
            raise DataError(f'{at} must be an object with "role" and "content", found {kind_of(message)}')
        if not string(message, "role", at, default=""):
            raise DataError(f'{at} has no "role": system, user, assistant or tool')
        # Templates take a call of a tool without a text beside it.
        if message.get("content") is not None or not message.get("tool_calls"):
            if "content" not in message:
                raise DataError(f'{at} has no "content": give its text')
            string(message, "content", at, default="")
    return value


def string(line: dict[str, Any], key: str, where: str, *, default: str) -> str:
    """The text under ``key``. Raises DataError for another type, or for halves of surrogate pairs."""
    value = line.get(key, default)
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" must be a string, found {kind_of(value)}: put it in quotes or leave it out')
    if _SURROGATE.search(value):
        raise DataError(f'{where}: "{key}" has half of a surrogate pair, which is not text: repair the escape \\uD8..')
    return value
