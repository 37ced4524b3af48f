"""Records under the names that data sets use to the two forms of a prompt file: a text, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from megatron_tropd.jsonl import DataError, kind_of
from megatron_tropd.prompt_lines import checked_choices, checked_messages, known_verifier, string, with_choices
from megatron_tropd.tokenizer import Tokenizer

TASK_KEYS = ("verifier", "choices", "tests", "solution")
"""What a verifier needs of a line beside its answer."""
Field = Literal["auto", "prompt", "messages", "text"]
_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT-style conversations; others keep their names."""


@dataclass(frozen=True)
class Keys:
    """Where a record has its parts."""

    prompt: str = "prompt"
    answer: str = "answer"
    messages: str = "messages"
    text: str = "text"
    id: str = "id"
    task: tuple[str, ...] = TASK_KEYS
    """Those of ``TASK_KEYS`` that are carried over where a record has them."""


@dataclass
class Example:
    """One line of a prompt file in the making."""

    prompt: str | None = None
    messages: list[Mapping[str, Any]] | None = None
    tools: list[Any] | None = None
    answer: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    """What the verifier needs, under ``TASK_KEYS``."""
    id: str | None = None
    is_document: bool = False
    """A record's whole ``text``, which may be cut at the end of a sentence."""
    tokens: list[int] = field(default_factory=list)
    """Ids of the prompt, once there is a tokenizer."""

    def to_line(self) -> bytes:
        """The line of the prompt file, with its newline."""
        content = {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}
        parts = {"id": self.id, **content, "tools": self.tools, "answer": self.answer, **self.task}
        kept = {key: value for key, value in parts.items() if value not in (None, "")}
        return json.dumps(kept, ensure_ascii=False).encode() + b"\n"

    @property
    def reference(self) -> str:
        """What SFT learns: the solution where there is one, else the answer."""
        return str(self.task.get("solution") or self.answer)

    def words(self) -> str:
        """All that a reader would see, for comparison with evaluation files."""
        said = [self.prompt or ""] if self.messages is None else [str(m.get("content", "")) for m in self.messages]
        return "\n".join([*said, *self.task.get("choices", ()), self.reference])

    def digest(self, *, with_answer: bool) -> bytes:
        """16 bytes that two examples share where their prompts (and answers) are the same."""
        content = [self.prompt, self.messages, self.tools, self.reference if with_answer else ""]
        content += [self.task["choices"]] if "choices" in self.task else []
        return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()

    def tokenize(self, tokenizer: Tokenizer, where: str) -> None:
        """Fill ``tokens``. Raises DataError where the tokenizer or its chat template refuses the text."""
        try:
            if self.messages is not None:
                text = tokenizer.render_chat(self.messages, self.tools)
            else:
                text = self.prompt or ""
                text = with_choices(text, self.task["choices"]) if "choices" in self.task else text
            self.tokens = tokenizer.encode(text)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if not self.tokens:
            raise DataError(f"{where}: the prompt {self.words()[:50]!r} has no tokens under this tokenizer: remove it")


def read_example(record: dict[str, Any], where: str, keys: Keys, which: Field, tokenizer: Tokenizer | None) -> Example:
    """The example of a record. A conversation's last message becomes the answer where it is the assistant's, or, beside
    an answer of the record's own, the solution.

    Raises DataError for a record with no prompt, with several where ``which`` is auto, or with anything malformed.
    """
    if "sequences" in record:
        return _from_ids(record["sequences"], where, tokenizer)
    names = {"messages": keys.messages, "prompt": keys.prompt, "text": keys.text}
    if keys.messages == "messages" and "messages" not in record and "conversations" in record:
        names["messages"] = "conversations"
    found = [kind for kind, name in names.items() if name in record] if which == "auto" else [which]
    if len(found) != 1:
        listed = " and ".join(f'"{names[kind]}"' for kind in found) or f"only {sorted(record)}"
        raise DataError(
            f'{where}: one of "messages", "prompt" and "text" is needed, found {listed}: choose with --field, or name '
            "the column with --prompt-key, --messages-key or --text-key"
        )
    example = Example(id=_identifier(record, keys.id, where), tools=record.get("tools"))
    if found == ["messages"]:
        _take_messages(example, record, names["messages"], where)
    else:
        name = names[found[0]]
        example.prompt, example.is_document = string(record, name, where, default=""), found == ["text"]
        if not example.prompt.strip():
            state = "is empty" if name in record else "is missing"
            raise DataError(f'{where}: "{name}" {state}: every record needs a text under that key')
    example.task = _task(record, where, keys)
    if keys.answer in record:
        if example.answer and "solution" in keys.task:
            example.task.setdefault("solution", example.answer)  # the conversation's last message
        value = record[keys.answer]
        is_number = type(value) is int and example.task.get("verifier") in ("number", "math")  # as AIME files have it
        example.answer = str(value) if is_number else string(record, keys.answer, where, default="")
    return example


def _task(record: dict[str, Any], where: str, keys: Keys) -> dict[str, Any]:
    named = {keys.prompt, keys.answer, keys.messages, keys.text, keys.id}
    found: dict[str, Any] = {}
    for key in keys.task:
        if key not in record or key in named:
            continue
        if key == "verifier":
            found[key] = known_verifier(record, where, "")
        elif key == "choices":
            found[key] = checked_choices(record[key], where)
        else:
            found[key] = string(record, key, where, default="")
    return found


def _take_messages(example: Example, record: dict[str, Any], name: str, where: str) -> None:
    value = record.get(name)
    if isinstance(value, list):
        value = [_standard(message) for message in value]
    messages = list(checked_messages(value, where))
    if messages[-1]["role"] == "assistant":
        last = messages.pop()
        example.answer = last.get("content") or ""
        if not messages:
            raise DataError(f'{where}: "{name}" has only an answer, no question: remove the record')
    example.messages = messages


def _standard(message: Any) -> Any:
    """{"from", "value"} as {"role", "content"}."""
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value"), **others}


def _identifier(record: dict[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise DataError(f'{where}: "{key}" must be a string or a whole number, found {kind_of(value)}')
    return None if value in (None, "") else str(value)


def _from_ids(sequences: list[list[int]], where: str, tokenizer: Tokenizer | None) -> Example:
    if tokenizer is None:
        raise DataError(f"{where}: a Megatron corpus holds ids: give the tokenizer that wrote it with --tokenizer")
    try:
        texts = [tokenizer.decode(sequence) for sequence in sequences]
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not texts[0].strip():
        raise DataError(f"{where}: the document is empty")
    return Example(prompt=texts[0], answer="".join(texts[1:]), is_document=len(texts) == 1)
