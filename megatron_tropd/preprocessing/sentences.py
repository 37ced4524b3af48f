"""Long documents cut where a sentence ends, with NLTK's Punkt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tropd.tokenizer import Tokenizer

TRAINING_CHARACTERS = 5_000_000
"""Of the user's corpus, what Punkt learns its abbreviations from: memory stays bounded."""


def load_punkt(folder: str | Path) -> Any:
    """Parameters from a folder of NLTK's ``punkt_tab`` (that of a language), which is not downloaded here.

    Raises ValueError where nltk is missing or the folder is none.
    """
    punkt = _punkt()
    from nltk import data

    resolved = str(Path(folder).resolve())
    if resolved not in data.path:
        data.path.append(resolved)  # nltk opens nothing outside its data folders
    try:
        return punkt.load_punkt_params(data.FileSystemPathPointer(resolved))
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(
            f"{folder} is not a language's folder of punkt_tab ({error}): give the one that holds abbrev_types.txt, or "
            "leave --punkt out to learn from the corpus"
        ) from error


def train_punkt(texts: Iterable[str], *, max_characters: int = TRAINING_CHARACTERS) -> Any:
    """Parameters learnt, unsupervised, from the first ``max_characters`` of the texts."""
    trainer, num_characters = _punkt().PunktTrainer(), 0
    for text in texts:
        trainer.train(text[: max_characters - num_characters], finalize=False)
        num_characters += len(text)
        if num_characters >= max_characters:
            break
    trainer.finalize_training()
    return trainer.get_params()


class SentenceTruncation:
    """Cuts a text to a number of tokens, after a whole sentence."""

    def __init__(self, parameters: Any, max_tokens: int):
        """``parameters`` are those of `load_punkt` or `train_punkt`."""
        self._splitter = _punkt().PunktSentenceTokenizer(parameters)
        self._max_tokens = max_tokens

    def __call__(self, text: str, tokenizer: Tokenizer) -> str:
        """The longest run of whole sentences from the start that fits; "" where the first does not."""
        if len(tokenizer.encode(text)) <= self._max_tokens:
            return text
        ends = [end for _, end in self._splitter.span_tokenize(text)]
        low, high = 0, len(ends) - 1  # sentences that fit, and the most that could
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(tokenizer.encode(text[: ends[middle - 1]])) <= self._max_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        return text[: ends[low - 1]] if low else ""


def _punkt() -> Any:
    try:
        from nltk.tokenize import punkt
    except ImportError as error:
        raise ValueError("cutting at sentences needs a package: pip install megatron-tropd[data]") from error
    return punkt
