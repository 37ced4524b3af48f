"""Tiktoken-style vocabularies, through Megatron-Core's own tokenizer class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.tokenizer import ChatOptions, Message, check_ids, fingerprint_of, refusing_messages


class TiktokenTokenizer:
    """A byte-pair vocabulary in JSON: ``[{"rank": int, "token_bytes": base64, "token_str": str}, ...]``.

    The special tokens (``<unk>``, ``<s>``, ``</s>``, ... and fillers) come first, the ranks after them. Special tokens
    written out in a text become their ids.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any], chat: ChatOptions | None = None):
        """``options`` are those of Megatron's ``TikTokenTokenizer``: ``num_special_tokens``, ``special_tokens``, ...

        ``vocab_size`` is by default that of the whole file. Raises ValueError where tiktoken or the file is missing, or
        the file is not such a vocabulary.
        """
        try:
            import tiktoken  # noqa: F401  Megatron hides that it is missing
        except ImportError as error:
            raise ValueError("tokenizer.kind=tiktoken needs a package: pip install megatron-tropd[data]") from error
        from megatron.core.tokenizers.text.libraries import TikTokenTokenizer

        try:
            content = Path(path).read_bytes()
            num_special_tokens = int(options.get("num_special_tokens", 1000))
            sizes = {"vocab_size": len(json.loads(content)) + num_special_tokens}
            self._tokenizer = TikTokenTokenizer(str(path), **{**sizes, **options})
        except OSError as error:
            raise ValueError(f"cannot read tokenizer.model {path}: {error.strerror}; check the path") from error
        except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
            raise ValueError(
                f"tokenizer.model {path} with tokenizer.megatron_options {dict(options)}: Megatron cannot read it as a "
                f"tiktoken vocabulary ({type(error).__name__}: {error})"
            ) from error
        self.vocab_size: int = self._tokenizer.vocab_size
        self.eos_id: int = self._tokenizer.eos_id
        self.pad_id: int = self._tokenizer.pad_id
        self.pattern = str(options.get("pattern", "v2"))
        """Megatron's name of the expression that splits text before it is merged."""
        settings = {**options, "vocab_size": self.vocab_size}
        self.fingerprint = fingerprint_of(b"tiktoken", json.dumps(settings, sort_keys=True).encode() + b"\0" + content)
        self._chat = chat or ChatOptions()
        self._template = self._chat.read_template()

    def token(self, index: int) -> str:
        """A special token's name, or a token's bytes as Python writes them: many are no text of their own."""
        specials: list[str] = self._tokenizer.special_tokens
        return specials[index] if index < len(specials) else repr(self._tokenizer.id2token[index])

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return list(self._tokenizer.text_to_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; padding and end of text are nothing."""
        check_ids(ids, self.vocab_size)
        return str(self._tokenizer.ids_to_text([index for index in ids if index not in (self.eos_id, self.pad_id)]))

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, with_answer: bool = False
    ) -> str:
        """The conversation under the template of ``tokenizer.chat_template``, as ``transformers`` renders it."""
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError as error:
            raise ValueError("chat templates need a package: pip install megatron-tropd[hf]") from error
        if self._template is None:
            raise ValueError(
                "this tokenizer has no chat template: set tokenizer.chat_template to a Jinja file, or give the text "
                'under "prompt"'
            )
        with refusing_messages():
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=list(tools) if tools else None,
                chat_template=self._template,
                add_generation_prompt=self._chat.add_generation_prompt and not with_answer,
                bos_token="<s>",
                eos_token="</s>",
                pad_token="<pad>",
                unk_token="<unk>",
                **self._chat.kwargs,
            )
        return str(rendered[0])
