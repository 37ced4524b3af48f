"""Whether two tokenizers are one: every id the same token, every text the same ids, the same end of text.

The loss compares student and teacher id by id, so this is decided before anything runs. One of the two may have more
ids, at the end: only the shared ids take part. Special tokens that the user has mapped may differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.special_tokens import SpecialTokenError, TokenMap, map_special_tokens
from megatron_tropd.tiktoken_tokenizer import TiktokenTokenizer
from megatron_tropd.tokenizer import CharacterTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

_SHOWN = 5
_PROBES = (
    "Hello  world\n\n\tdef f(x):\r\n    return x**2 + 10_000",
    "don't DON'T ﬁne Ａ １２３ é e\u0301 ß 東京 \U0001f600 \u200b\u00a0.",
    " leading, trailing  ",
    "3.14159 1234567 x1y2",
)
"""Texts on which normalisers and splitting rules differ: spaces, case, compatibility characters, digits."""


class TokenizerMismatchError(ValueError):
    """Student and teacher do not share their tokenizer; the message shows where they first differ."""


@dataclass(frozen=True)
class _Contents:
    tokens: Mapping[int, str]
    end: str
    rules: Mapping[str, Any] = field(default_factory=dict)
    """What else decides ids, by name; compared by value."""


def shared_vocab_size(
    student: Tokenizer, teacher: Tokenizer, special_token_map: Mapping[str, str] | None = None
) -> int:
    """The number of ids that both have, [0, n): all of the smaller one's.

    ``special_token_map`` names special tokens of the student's and what the teacher has for each
    (``special_tokens.map_special_tokens``). Raises TokenizerMismatchError where one of them is not what it should be,
    another id is two different tokens, a text has different ids, or responses end with different tokens.
    """
    if type(student) is not type(teacher):
        raise TokenizerMismatchError(
            f"the student's tokenizer is a {type(student).__name__}, the teacher's a {type(teacher).__name__}: convert "
            "one of them, so that both are of one kind"
        )
    size = min(student.vocab_size, teacher.vocab_size)
    ours, theirs = _contents(student, size), _contents(teacher, size)
    names = dict(special_token_map or {})
    try:
        mapped = map_special_tokens(student, teacher, names)
    except SpecialTokenError as error:
        raise TokenizerMismatchError(str(error)) from error
    unnamed = (index for index in range(size) if index not in mapped.named)
    differing = [index for index in unnamed if ours.tokens.get(index) != theirs.tokens.get(index)]
    if differing:
        rows = (f"{i}: {ours.tokens.get(i)!r} and {theirs.tokens.get(i)!r}" for i in differing[:_SHOWN])
        raise TokenizerMismatchError(
            f"{len(differing)} of the {size} ids that student and teacher share are different tokens (student's and "
            f"teacher's): {'; '.join(rows)}. Distillation compares id by id: use models of one vocabulary"
        )
    for name in ours.rules.keys() | theirs.rules.keys():
        _compare_rule(name, *(_without(contents.rules.get(name), names) for contents in (ours, theirs)))
    _compare_texts(student, teacher, size, mapped)
    if mapped.feed(student.eos_id) != teacher.eos_id:
        raise TokenizerMismatchError(
            f"the student ends a response with id {student.eos_id} ({ours.end!r}), the teacher with {teacher.eos_id} "
            f"({theirs.end!r}): every end would count as an outlier, as the teacher expects another token there. Give "
            "both the same eos_token (set tokenizer.model to the teacher's tokenizer, whose ids agree), or say which "
            "is which: tokenizer.special_token_map={student's end token: teacher's}"
        )
    return size


def _contents(tokenizer: Tokenizer, size: int) -> _Contents:
    if isinstance(tokenizer, CharacterTokenizer):
        return _Contents(dict(enumerate(tokenizer.alphabet, start=2)), "end of text")
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.processor
        pieces = {index: processor.id_to_piece(index) for index in range(processor.vocab_size())}
        # Of several ways to cut a word the one with the highest sum wins.
        scores = {pieces[index]: processor.get_score(index) for index in range(size)}
        return _Contents(pieces, pieces[tokenizer.eos_id], {"scores": scores})
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _huggingface_contents(tokenizer, size)
    assert isinstance(tokenizer, TiktokenTokenizer)
    tokens = {index: tokenizer.token(index) for index in range(tokenizer.vocab_size)}
    return _Contents(tokens, tokens[tokenizer.eos_id], {"pattern": tokenizer.pattern})


def _huggingface_contents(tokenizer: HuggingFaceTokenizer, size: int) -> _Contents:
    tokens = {index: token for token, index in tokenizer.backend.get_vocab().items()}
    end = tokens[tokenizer.eos_id]
    serialise = getattr(getattr(tokenizer.backend, "backend_tokenizer", None), "to_str", None)
    if serialise is None:
        return _Contents(tokens, end)
    content = json.loads(serialise())
    model = {name: value for name, value in content["model"].items() if name != "vocab"}
    added = {token["content"]: token for token in content["added_tokens"] if token["id"] < size}
    rules = {"normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"], "added tokens": added}
    return _Contents(tokens, end, rules | {f"model {name}": value for name, value in model.items()})


def _without(rule: Any, names: Mapping[str, str]) -> Any:
    """A rule less what it says of mapped tokens, under either name."""
    mapped = {*names, *names.values()}
    if isinstance(rule, dict):
        return {key: value for key, value in rule.items() if key not in mapped}
    return None if isinstance(rule, str) and rule in mapped else rule


def _compare_rule(name: str, ours: Any, theirs: Any) -> None:
    if ours == theirs:
        return
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = zip(ours, theirs, strict=False)
        index = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
        name = f"{name} (from number {index} of {len(ours)} and {len(theirs)})"
        ours, theirs = ours[index : index + 1], theirs[index : index + 1]
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        key = min(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        name, ours, theirs = f"{name}, {key!r}", ours.get(key), theirs.get(key)
    raise TokenizerMismatchError(
        f"student's and teacher's tokenizers have the same tokens but cut text differently: {name} is "
        f"{json.dumps(ours)[:300]} and {json.dumps(theirs)[:300]}. The teacher would judge text cut in a way it has "
        "never seen: use models of one tokenizer"
    )


def _compare_texts(student: Tokenizer, teacher: Tokenizer, size: int, mapped: TokenMap) -> None:
    """The ids of a few awkward texts; whatever the rules' files say, these have to agree."""
    for text in _PROBES:
        try:
            ours, theirs = [mapped.feed(index) for index in student.encode(text)], teacher.encode(text)
        except ValueError:  # an alphabet that cannot express it
            continue
        if ours != theirs and max([*ours, *theirs]) < size:
            raise TokenizerMismatchError(
                f"student's and teacher's tokenizers have the same tokens but cut text differently: {text!r} is "
                f"{ours[:20]} and {theirs[:20]}: use models of one tokenizer"
            )
