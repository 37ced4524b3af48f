"""Text to ids and back, and conversations to text.

Ids are the text's alone: no beginning-of-text and no end-of-text token is added by ``encode``. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

PAD_ID = 0
EOS_ID = 1
FIRST_CHARACTER_ID = 2

TokenizerKind = Literal["characters", "sentencepiece", "huggingface", "tiktoken"]

type Message = Mapping[str, Any]
"""{"role": str, "content": str}, and what else the template reads (tool_calls, reasoning_content, ...)."""


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become text."""

    template: str | None = None
    """Path of a Jinja template; None: the tokenizer's own."""
    add_generation_prompt: bool = True
    """Open the assistant's message at the end of a prompt."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What else the template reads, such as ``enable_thinking``."""

    def read_template(self) -> str | None:
        """The template's text. Raises ValueError for a file that cannot be read."""
        if self.template is None:
            return None
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read tokenizer.chat_template {self.template}: {error}; check the path") from error


@contextmanager
def refusing_messages() -> Iterator[None]:
    """What a chat template raises, as a ValueError that says so."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses these messages ({error}): correct them or the template") from error


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

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, with_answer: bool = False
    ) -> str:
        """The text of a conversation under the chat template; its ids are those of ``encode``.

        Without ``with_answer`` the text ends where the assistant's next message begins (``add_generation_prompt``);
        with it the last message is the assistant's, and nothing is opened after it. Raises ValueError where there is no
        template, or it refuses the messages.
        """


class _WithoutChat:
    """A tokenizer that has no ids for the control tokens of a chat template."""

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, with_answer: bool = False
    ) -> str:
        """Always a ValueError."""
        raise ValueError(
            '"messages" need a tokenizer with a chat template: set tokenizer.kind=huggingface, or give the text under '
            '"prompt"'
        )


class CharacterTokenizer(_WithoutChat):
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
        self.fingerprint = fingerprint_of(b"characters", json.dumps([PAD_ID, EOS_ID, alphabet]).encode())
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
        check_ids(ids, self.vocab_size)
        return "".join(self.alphabet[index - FIRST_CHARACTER_ID] for index in ids if index >= FIRST_CHARACTER_ID)


class SentencePieceTokenizer(_WithoutChat):
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
        self.fingerprint = fingerprint_of(b"sentencepiece", model)

    @property
    def processor(self) -> Any:
        """The ``SentencePieceProcessor`` itself."""
        return self._processor

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return list(self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing."""
        check_ids(ids, self.vocab_size)
        return str(self._processor.decode([index for index in ids if index not in (self.eos_id, self.pad_id)]))


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder. Special tokens written out in a text become their ids.

    One without a padding token is padded with its end-of-text id: padding carries no loss. No code of the folder runs.
    """

    def __init__(self, folder: str | Path, chat: ChatOptions | None = None):
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
        self._folder = folder
        self._chat = chat or ChatOptions()
        self._template = self._chat.read_template()

    @property
    def backend(self) -> Any:
        """The ``transformers`` tokenizer itself."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing."""
        check_ids(ids, self.vocab_size)
        kept = [index for index in ids if index not in (self.eos_id, self.pad_id)]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, with_answer: bool = False
    ) -> str:
        """The text of ``transformers``' ``apply_chat_template`` for one conversation."""
        if self._template is None and not self._tokenizer.chat_template:
            raise ValueError(
                f"tokenizer.model {self._folder} has no chat template: set tokenizer.chat_template to a Jinja file, or "
                'give the text under "prompt"'
            )
        with refusing_messages():
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=list(tools) if tools else None,
                    chat_template=self._template,
                    add_generation_prompt=self._chat.add_generation_prompt and not with_answer,
                    tokenize=False,
                    **self._chat.kwargs,
                )
            )


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
        return fingerprint_of(b"huggingface", json.dumps(deciding, sort_keys=True).encode())
    files = [Path(folder) / name for name in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")]
    found = [file.name.encode() + b"\0" + file.read_bytes() for file in files if file.is_file()]
    return fingerprint_of(b"huggingface files", b"\0".join(found)) if found else None


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError for an id outside [0, vocab_size)."""
    wrong = next((index for index in ids if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"id {wrong} is not in [0, {vocab_size}), the tokenizer's ids: was it another tokenizer's?")


def fingerprint_of(kind: bytes, content: bytes) -> str:
    """SHA-256 (hex) of a kind of tokenizer and the content that decides its ids."""
    return hashlib.sha256(kind + b"\0" + content).hexdigest()
