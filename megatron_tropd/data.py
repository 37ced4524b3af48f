"""Text to ids and back; prompt files; the order in which prompts come.

Ids are the text's alone: no beginning-of-text and no end-of-text token is added by ``encode``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.jsonl import DataError, kind_of, read_objects
from megatron_tropd.procedural import ProceduralTask
from megatron_tropd.types import Prompt
from megatron_tropd.verify import VERIFIERS

PAD_ID = 0
EOS_ID = 1
FIRST_CHARACTER_ID = 2


class Tokenizer(Protocol):
    """What the package asks of a tokenizer. Ids are in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    def eos_id(self) -> int:
        """The id that ends a response."""

    @property
    def pad_id(self) -> int:
        """The id that fills padding; it carries no loss."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything that decides ids: equal fingerprints, equal ids for every text."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``. Raises ValueError where the tokenizer cannot express it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing. Raises ValueError for an id out of range."""


class CharacterTokenizer:
    """One id per character: 0 is padding, 1 end of text, the alphabet's characters follow from 2 in order."""

    eos_id = EOS_ID
    pad_id = PAD_ID

    def __init__(self, alphabet: str):
        """Raises ValueError for an alphabet that is empty or has a character twice."""
        repeated = sorted({character for character in alphabet if alphabet.count(character) > 1})
        if not alphabet or repeated:
            found = f"{repeated} more than once" if repeated else "none"
            raise ValueError(f"tokenizer.alphabet must list different characters, found {found}: correct it")
        self.alphabet = alphabet
        self.vocab_size = FIRST_CHARACTER_ID + len(alphabet)
        self.fingerprint = _fingerprint(b"characters", json.dumps([PAD_ID, EOS_ID, alphabet]).encode())
        self._ids = {character: index for index, character in enumerate(alphabet, start=FIRST_CHARACTER_ID)}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; ValueError names a character that the alphabet lacks."""
        unknown = next((character for character in text if character not in self._ids), None)
        if unknown is not None:
            raise ValueError(
                f"character {unknown!r} (U+{ord(unknown):04X}) is not in the tokenizer's alphabet "
                f"{self.alphabet!r}: add it to tokenizer.alphabet or take it out of the text"
            )
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing."""
        _check_ids(ids, self.vocab_size)
        return "".join(self.alphabet[index - FIRST_CHARACTER_ID] for index in ids if index >= FIRST_CHARACTER_ID)


class SentencePieceTokenizer:
    """A SentencePiece model file. A text it cannot express becomes its unknown id, as SentencePiece does.

    A model without a padding id is padded with its end-of-text id: padding carries no loss.
    """

    def __init__(self, model_path: str | Path):
        """Raises ValueError where sentencepiece or the file is missing, or the model has no end token."""
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(
                "tokenizer.kind=sentencepiece needs a package: pip install megatron-tropd[data]"
            ) from error
        try:
            model = Path(model_path).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except OSError as error:
            raise ValueError(f"cannot read tokenizer.model {model_path}: {error.strerror}; check the path") from error
        except RuntimeError as error:
            raise ValueError(f"tokenizer.model {model_path} is not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"tokenizer.model {model_path} has no end-of-text id: train it with eos_id set")
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.fingerprint = _fingerprint(b"sentencepiece", model)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return list(self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing."""
        _check_ids(ids, self.vocab_size)
        return str(self._processor.decode([index for index in ids if index not in (self.eos_id, self.pad_id)]))


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder. Special tokens written out in a text become their ids.

    One without a padding token is padded with its end-of-text id: padding carries no loss. No code of the folder runs.
    """

    def __init__(self, folder: str | Path):
        """Raises ValueError where transformers or the files are missing, or there is no end token."""
        try:
            import transformers
        except ImportError as error:
            raise ValueError("tokenizer.kind=huggingface needs a package: pip install megatron-tropd[hf]") from error
        fingerprint = huggingface_fingerprint(folder)
        if fingerprint is None:
            raise ValueError(
                f"tokenizer.model {folder} is not a folder with tokenizer.json, tokenizer.model or vocab.json in it: "
                "give the folder of a Hugging Face tokenizer"
            )
        self.fingerprint = fingerprint
        # Of tokenizer.json the generic class takes everything; AutoTokenizer would rebuild some families' normalisation
        # and splitting from its own idea of them.
        is_complete = (Path(folder) / "tokenizer.json").is_file()
        cls = transformers.PreTrainedTokenizerFast if is_complete else transformers.AutoTokenizer
        try:
            self._tokenizer = cls.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"tokenizer.model {folder}: transformers cannot read its tokenizer ({error})") from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer.model {folder} has no end token: set eos_token in tokenizer_config.json")
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.eos_id = int(self._tokenizer.eos_token_id)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad_id is None else int(pad_id)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing."""
        _check_ids(ids, self.vocab_size)
        kept = [index for index in ids if index not in (self.eos_id, self.pad_id)]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def huggingface_fingerprint(folder: str | Path) -> str | None:
    """Fingerprint of a Hugging Face folder's tokenizer, from its files alone.

    Of tokenizer.json what decides ids counts (not templates, truncation or which token ends a text), so a base model
    and its chat model compare equal; without that file, the bytes of the vocabulary files. None for a folder that has
    no tokenizer.
    """
    path = Path(folder) / "tokenizer.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            deciding = [content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): download it again") from error
        return _fingerprint(b"huggingface", json.dumps(deciding, sort_keys=True).encode())
    files = [Path(folder) / name for name in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")]
    found = [file.name.encode() + b"\0" + file.read_bytes() for file in files if file.is_file()]
    return _fingerprint(b"huggingface files", b"\0".join(found)) if found else None


def build_tokenizer(
    kind: Literal["characters", "sentencepiece", "huggingface"], alphabet: str, model: str | None
) -> Tokenizer:
    """The tokenizer of a config: ``alphabet`` for characters, ``model`` (a path) for the other kinds."""
    if kind == "characters":
        return CharacterTokenizer(alphabet)
    if kind not in ("sentencepiece", "huggingface"):
        raise ValueError(f"tokenizer.kind {kind!r} is unknown: characters or sentencepiece or huggingface")
    if model is None:
        what = "the path of a .model file" if kind == "sentencepiece" else "a folder with a Hugging Face tokenizer"
        raise ValueError(f"tokenizer.kind={kind} needs tokenizer.model, {what}")
    return SentencePieceTokenizer(model) if kind == "sentencepiece" else HuggingFaceTokenizer(model)


@dataclass(frozen=True)
class LineFormat:
    """How a line of a prompt file becomes a prompt: the fields of the same name in the config's data section."""

    verifier: str = "exact"
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    prompt_template: str = "{prompt}"


def read_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    max_prompt_length: int,
    long_prompts: Literal["refuse", "skip"],
    *,
    max_answer_length: int | None = None,
    line_format: LineFormat | None = None,
) -> tuple[list[Prompt], int]:
    """Prompts of a JSONL file, in its order, and how many were skipped for their length.

    A line is ``{"prompt": str, "answer": str (optional), "id": str (optional: the line number)}``, with ``verifier``,
    ``choices`` (a list), ``tests`` and ``solution`` where a task has them; other keys are ignored. ``line_format`` says
    how a line is read. Lengths are in tokens. ``long_prompts`` says whether a line over budget is refused or skipped
    and counted. With ``max_answer_length`` (what SFT trains on) every line needs an answer or solution, of at most that
    many tokens with its end token. Raises DataError with file and line for anything else, and for a file with
    no prompt to use.
    """

    def prompts() -> Iterator[tuple[str, Prompt]]:
        lines_of_ids: dict[str, int] = {}
        for number, line in read_objects(path):
            where = f"{path}:{number}"
            prompt = _parse_prompt(line, where, number, tokenizer, line_format or LineFormat())
            if prompt.id in lines_of_ids:
                taken = lines_of_ids[prompt.id]
                raise DataError(f"{where}: id {prompt.id!r} is taken by line {taken}: ids must differ")
            lines_of_ids[prompt.id] = number
            yield where, prompt

    return _within_budget(str(path), prompts(), tokenizer, max_prompt_length, max_answer_length, long_prompts)


def procedural_prompts(
    tasks: Sequence[ProceduralTask],
    tokenizer: Tokenizer,
    max_prompt_length: int,
    long_prompts: Literal["refuse", "skip"],
    *,
    source: Mapping[str, Any],
    max_answer_length: int | None = None,
    prompt_template: str = "{prompt}",
) -> tuple[list[Prompt], int]:
    """Tasks as prompts, and how many were skipped for their length; as ``read_prompts`` does with lines.

    ``source`` holds ``kinds``, ``seed`` and ``level``, with which the verifier finds a task again.
    """

    def prompts() -> Iterator[tuple[str, Prompt]]:
        line_format = LineFormat(verifier="reasoning-gym", prompt_template=prompt_template)
        for number, task in enumerate(tasks):
            line = {"id": f"{task.name}-{task.index}", "prompt": task.question}
            line |= {"answer": task.answer, "solution": task.solution}
            where = f"reasoning-gym, {task.name} {task.index}"
            details = {"task": task.name, "options": dict(source["kinds"][task.name]), "index": task.index}
            details |= {"seed": source["seed"], "level": source["level"]}
            yield where, replace(_parse_prompt(line, where, number, tokenizer, line_format), details=details)

    return _within_budget("reasoning-gym", prompts(), tokenizer, max_prompt_length, max_answer_length, long_prompts)


def _within_budget(
    source: str,
    prompts: Iterator[tuple[str, Prompt]],
    tokenizer: Tokenizer,
    max_prompt_length: int,
    max_answer_length: int | None,
    long_prompts: Literal["refuse", "skip"],
) -> tuple[list[Prompt], int]:
    """What fits of (where it stands, prompt), and how many do not."""
    kept: list[Prompt] = []
    num_skipped = 0
    for where, prompt in prompts:
        excess = _over_budget(prompt, where, tokenizer, max_prompt_length, max_answer_length)
        if excess and long_prompts == "refuse":
            raise DataError(f"{where}: {excess}; shorten it, raise the budget, or set data.long_prompts=skip")
        if excess:
            num_skipped += 1
        else:
            kept.append(prompt)
    if not kept:
        found = f"all {num_skipped} prompts are over the length budget" if num_skipped else "the file is empty"
        raise DataError(f"{source}: no prompt to use: {found}")
    return kept, num_skipped


@dataclass(frozen=True)
class PromptOrder:
    """Endless shuffled epochs over ``num_prompts`` prompts: a resumed run needs only its position.

    Epoch e (positions e * num_prompts to (e + 1) * num_prompts - 1) is a permutation that depends on (seed,
    e) alone.
    """

    num_prompts: int
    seed: int

    def indices(self, start: int, count: int) -> list[int]:
        """Prompt indices at the positions [start, start + count)."""
        pairs = (divmod(position, self.num_prompts) for position in range(start, start + count))
        return [_epoch_permutation(self.seed, epoch, self.num_prompts)[offset] for epoch, offset in pairs]


@lru_cache(maxsize=2)
def _epoch_permutation(seed: int, epoch: int, num_prompts: int) -> list[int]:
    keys = uniforms(seed, Stream.PROMPT_ORDER, epoch, torch.arange(num_prompts))
    return torch.argsort(keys, stable=True).tolist()


def _parse_prompt(
    line: dict[str, Any], where: str, number: int, tokenizer: Tokenizer, line_format: LineFormat
) -> Prompt:
    text = _string(line, line_format.prompt_key, where, default="")
    if not text.strip():
        state = "is empty" if line_format.prompt_key in line else "is missing"
        raise DataError(f'{where}: "{line_format.prompt_key}" {state}: every line needs a text under that key')
    identifier = _string(line, "id", where, default=str(number))
    if not identifier:
        raise DataError(f'{where}: "id" is empty: leave it out (the line number is taken) or give one')
    verifier = _string(line, "verifier", where, default=line_format.verifier)
    if verifier not in VERIFIERS:
        raise DataError(f"{where}: verifier {verifier!r} is unknown: {', '.join(VERIFIERS)}")
    answer = line.get(line_format.answer_key)
    if verifier in ("number", "math") and type(answer) is int:
        line = {**line, line_format.answer_key: str(answer)}  # as AIME files have it
    answer = _string(line, line_format.answer_key, where, default="")
    solution = _string(line, "solution", where, default="")
    details: dict[str, Any] = {}
    if "choices" in line:
        choices = _choices(line["choices"], where)
        text = "\n".join([text, "", *(f"{chr(ord('A') + index)}) {choice}" for index, choice in enumerate(choices))])
        details["num_choices"] = len(choices)
    if "tests" in line:
        details["tests"] = _string(line, "tests", where, default="")
    text = line_format.prompt_template.replace("{prompt}", text)
    try:
        tokens = tokenizer.encode(text)
        # A reference answer that the tokenizer cannot express can be neither learned nor met.
        tokenizer.encode(solution or answer)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not tokens:
        raise DataError(f'{where}: "prompt" {text!r} has no tokens under this tokenizer: remove the line')
    return Prompt(identifier, text, tuple(tokens), answer, verifier, solution, details)


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise DataError(f'{where}: "choices" must be a list of 2 to 26 strings, found {kind_of(value)}')
    return [_string({"choices": choice}, "choices", where, default="") for choice in value]


def _string(line: dict[str, Any], key: str, where: str, *, default: str) -> str:
    value = line.get(key, default)
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" must be a string, found {kind_of(value)}: put it in quotes or leave it out')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f'{where}: "{key}" has half of a surrogate pair, which is not text: repair the escape \\uD8..')
    return value


def _over_budget(
    prompt: Prompt, where: str, tokenizer: Tokenizer, max_prompt_length: int, max_answer_length: int | None
) -> str:
    """What is longer than its budget, "" if nothing is."""
    num_tokens = len(prompt.tokens)
    if num_tokens > max_prompt_length:
        return f"the prompt has {num_tokens} tokens, the budget (data.max_prompt_length) is {max_prompt_length}"
    if max_answer_length is None:
        return ""
    if not (prompt.solution or prompt.answer):
        raise DataError(f'{where}: "answer" is missing or empty: training on reference answers needs one on every line')
    answer_length = len(tokenizer.encode(prompt.solution or prompt.answer)) + 1
    if answer_length > max_answer_length:
        return f"the answer has {answer_length} tokens with its end token, the budget is {max_answer_length}"
    return ""


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((index for index in ids if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"id {wrong} is not in [0, {vocab_size}), the tokenizer's ids: was it another tokenizer's?")


def _fingerprint(kind: bytes, content: bytes) -> str:
    return hashlib.sha256(kind + b"\0" + content).hexdigest()
