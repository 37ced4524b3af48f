"""Small real tokenizers, trained on sentences written here."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

SENTENCES = [
    "The river runs past the old mill, and the miller counts his sacks.",
    "Two and two are four; twelve and seven are nineteen.",
    "Nobody asked the teacher, who would have known at once.",
    "A student writes an answer, and the teacher reads every word of it.",
    "Where the path divides, keep to the left until the bridge.",
    "It was raining. We stayed inside, read to each other and drank tea.",
]
CHAT_TEMPLATE = (
    "{% if messages[0].role == 'reject' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def save_byte_level_bpe(
    folder: Path, *, extra: tuple[str, ...] = (), eos: str = "<|im_end|>", vocab_size: int = 400, **settings: Any
) -> Path:
    """A byte-level BPE with a chat template; ``extra`` special tokens follow at the end."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = settings.pop("normalizer", tokenizers.normalizers.NFC())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(settings.pop("special", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(settings.pop("sentences", SENTENCES), trainer)
    backend.add_special_tokens(list(extra))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=settings.pop("pad", "<|endoftext|>")
    )
    tokenizer.chat_template = settings.pop("chat_template", CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


def save_sentencepiece(path: Path, *, sentences: list[str] = SENTENCES, **settings: Any) -> Path:
    """A SentencePiece unigram model with byte fallback."""
    import sentencepiece

    model = io.BytesIO()
    options = {"vocab_size": 340, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return path


def save_tiktoken(path: Path, *, words: tuple[str, ...] = ("th", "the", " t", " the", "er")) -> Path:
    """A vocabulary in the JSON that Megatron's tiktoken class reads: the bytes, then ``words``."""
    pieces = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
        for rank, piece in enumerate(pieces)
    ]
    path.write_text(json.dumps(rows))
    return path
