"""Special tokens that student and teacher call otherwise, or have at other ids: which of the student's is which of the
teacher's.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_tropd.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer


class SpecialTokenError(ValueError):
    """A map of special tokens that says what cannot be meant; the message names the token."""


@dataclass(frozen=True)
class TokenMap:
    """Ids of the student's that are others in the teacher.

    Worked example: both have 0 ``<pad>``, 1 ``</s>``, 2 ``<|im_end|>``; the student ends with 1, the teacher with 2.
    ``{"</s>": "<|im_end|>"}`` gives ``named = {1: 2}``. A 1 of the student's is fed to the teacher as 2. The student's
    probability of 1 is judged by the teacher's of 2; and that of its 2 by what is left over, the teacher's of 1, so
    that the teacher's probabilities still sum to one: ``judged = {1: 2, 2: 1}``.
    """

    named: Mapping[int, int] = field(default_factory=dict)
    """Student's id to teacher's, as the user named them: what the teacher is fed. Other ids are fed as they are."""

    @property
    def judged(self) -> dict[int, int]:
        """Student's id to the teacher's whose probability judges it: ``named`` and what it displaces, a permutation."""
        origin = {theirs: ours for ours, theirs in self.named.items()}
        found = dict(self.named)
        for end in origin.keys() - self.named.keys():
            start = end
            while start in origin:
                start = origin[start]
            found[end] = start
        return {ours: theirs for ours, theirs in found.items() if ours != theirs}

    def feed(self, student_id: int) -> int:
        """What the teacher is fed for an id of the student's."""
        return self.named.get(student_id, student_id)


def map_special_tokens(student: Tokenizer, teacher: Tokenizer, names: Mapping[str, str]) -> TokenMap:
    """The ids of ``names`` (student's special token to teacher's).

    Raises SpecialTokenError for a token that one of them does not have, that is not special, or that two are mapped to;
    and for one of the student's ids that the teacher has no row for.
    """
    ours, theirs = (_special_ids(tokenizer) if names else {} for tokenizer in (student, teacher))
    named: dict[int, int] = {}
    for mine, other in names.items():
        for whose, token, ids in (("student", mine, ours), ("teacher", other, theirs)):
            if token not in ids:
                shown = ", ".join(map(repr, sorted(ids)[:20])) or "none"
                raise SpecialTokenError(
                    f"tokenizer.special_token_map: {token!r} is not a special token of the {whose}'s tokenizer, which "
                    f"has {shown}: only special tokens can be mapped"
                )
        if ours[mine] >= teacher.vocab_size:
            raise SpecialTokenError(
                f"tokenizer.special_token_map: {mine!r} is the student's id {ours[mine]}, the teacher has only "
                f"{teacher.vocab_size} ids: there is no place for it among those that both have"
            )
        if theirs[other] in named.values():
            raise SpecialTokenError(
                f"tokenizer.special_token_map: two tokens are mapped to {other!r}, whose probability would count twice"
            )
        named[ours[mine]] = theirs[other]
    return TokenMap(named)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by name."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        backend = tokenizer.backend
        added = {token.content: index for index, token in backend.added_tokens_decoder.items() if token.special}
        return added | {token: backend.convert_tokens_to_ids(token) for token in backend.all_special_tokens}
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.processor
        return {
            processor.id_to_piece(index): index
            for index in range(processor.vocab_size())
            if processor.is_control(index) or processor.is_unknown(index)
        }
    return {}
