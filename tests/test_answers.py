"""The store of teacher answers: what is read, what is refused, and what a killed writer leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.answers import AnswerHeader, AnswerStore, AnswerWriter, prompt_digest
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt

HEADER = AnswerHeader("f" * 64, {"load": "runs/teacher"}, {"temperature": 1.0, "max_response_length": 6, "seed": 3})
PROMPTS = [Prompt(name, f"{name}=", (10 + index, 13), "") for index, name in enumerate("abcd")]
ANSWERS: dict[str, list[tuple[int, ...]]] = {
    "a": [(5, 6, 7, 1)],
    "b": [(8, 1), (9, 9, 9, 9, 9, 9)],
    "c": [(2, 1)],
    "d": [(3, 3, 1)],
}


def write_store(path: Path, header: AnswerHeader = HEADER) -> None:
    with AnswerWriter(path, header) as writer:
        for prompt in PROMPTS:
            for tokens in ANSWERS[prompt.id]:
                writer.write(prompt, tokens, finished=tokens[-1] == 1)


def read_store(path: Path, **options: Any) -> AnswerStore:
    return AnswerStore.read(path, **{"tokenizer_fingerprint": "f" * 64, "vocab_size": 14, **options})


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    write_store(path)
    return path


def test_store_round_trip(store_path: Path) -> None:
    store = read_store(store_path)
    assert store.header == HEADER
    assert {name: [tuple(a.tokens) for a in answers] for name, answers in store.answers.items()} == ANSWERS
    # Prompt b has two answers: samples 0, 1, 2, 3 take 0, 1, 0, 1.
    taken = [tuple(store.answer(PROMPTS[1], sample).tokens) for sample in range(4)]
    assert taken == [ANSWERS["b"][0], ANSWERS["b"][1]] * 2
    assert store.answer(PROMPTS[1], 0).finished and not store.answer(PROMPTS[1], 1).finished


def test_a_prompt_the_store_does_not_answer_is_refused(store_path: Path) -> None:
    store = read_store(store_path)
    unknown = Prompt("e", "e=", (4,), "")
    with pytest.raises(DataError, match="answers.jsonl: no teacher answer for prompt 'e': run `generate`"):
        store.answer(unknown, 0)
    changed = Prompt("b", "B=", (4,), "")
    with pytest.raises(DataError, match="prompt 'b' is another text .* the prompt file has changed; delete"):
        store.answer(changed, 0)


def test_a_store_of_another_tokenizer_is_refused(store_path: Path) -> None:
    with pytest.raises(DataError, match=r"ids of another tokenizer \(ffffffffffff..., this run has eeeeeeeeeeee..."):
        read_store(store_path, tokenizer_fingerprint="e" * 64)
    # The largest stored id is 9.
    assert read_store(store_path, vocab_size=10)
    with pytest.raises(DataError, match=r"answers.jsonl:4: id 9 is not in \[0, 9\), the vocabulary"):
        read_store(store_path, vocab_size=9)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, '{"prompt": "1+1="}', "not a store of teacher answers"),
        (1, {"version": 2}, "store version 2, this program reads 1"),
        (1, {"tokenizer": None}, '"tokenizer" must be a string'),
        (1, {"teacher": "path"}, '"teacher" and "generation" objects'),
        (3, '{"id": "a", "prompt_digest": "0", "tok', "not valid JSON"),
        (3, {"id": 3}, 'needs "id" and "prompt_digest"'),
        (3, {"prompt_digest": None}, 'needs "id" and "prompt_digest"'),
        (3, {"finished": 1}, '"finished"'),
        (3, {"tokens": "123"}, '"tokens" must be a list of whole numbers'),
        (3, {"tokens": [1, 2.0]}, '"tokens" must be a list of whole numbers'),
        (3, {"tokens": [True]}, '"tokens" must be a list of whole numbers'),
        (3, {"tokens": [3, -1]}, r"id -1 is not in \[0, 14\)"),
        (3, {"tokens": [3, 14]}, r"id 14 is not in \[0, 14\)"),
    ],
)
def test_malformed_store_lines_are_named(store_path: Path, number: int, line: Any, message: str) -> None:
    lines = store_path.read_text().splitlines()
    lines[number - 1] = line if isinstance(line, str) else json.dumps(json.loads(lines[number - 1]) | line)
    store_path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"answers\.jsonl:{number}: .*{message}"):
        read_store(store_path)


def test_a_store_without_answers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="the file is empty; run `generate`"):
        read_store(path)
    with AnswerWriter(path, HEADER):
        pass
    with pytest.raises(DataError, match="nothing follows the header"):
        read_store(path)
    with pytest.raises(DataError, match="cannot read .*absent.jsonl"):
        read_store(tmp_path / "absent.jsonl")


def test_a_killed_writer_continues_to_the_same_file(store_path: Path, tmp_path: Path) -> None:
    whole = store_path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for size in {
        *range(0, len(whole), 23),
        *ends,
        *(end - 1 for end in ends),
        *(end + 1 for end in ends[:-1]),
    }:
        path = tmp_path / "partial.jsonl"
        path.write_bytes(whole[:size])
        with AnswerWriter(path, HEADER) as writer:
            for prompt in PROMPTS:
                for tokens in ANSWERS[prompt.id][writer.num_answers[prompt.id] :]:
                    writer.write(prompt, tokens, finished=tokens[-1] == 1)
        assert path.read_bytes() == whole, f"continued from {size} bytes"


def test_a_writer_knows_what_is_done(store_path: Path) -> None:
    with AnswerWriter(store_path, HEADER) as writer:
        assert writer.num_answers == {"a": 1, "b": 2, "c": 1, "d": 1}
        assert writer.num_answers["e"] == 0
        writer.write(PROMPTS[0], (4, 1), finished=True)
        assert writer.num_answers["a"] == 2
        # Readable at once: every line is handed over as it is written.
        assert len(read_store(store_path).answers["a"]) == 2


def test_a_writer_refuses_a_file_that_is_not_its_own(store_path: Path, tmp_path: Path) -> None:
    other = AnswerHeader("f" * 64, {"load": "runs/teacher"}, {"temperature": 0.5})
    before = store_path.read_bytes()
    with pytest.raises(DataError, match="answers.jsonl:1: the file exists with another header, .*write to another"):
        AnswerWriter(store_path, other)
    assert store_path.read_bytes() == before
    for content in (b"my notes\n", b"my notes", b"\xff\xfe"):
        notes = tmp_path / "notes"
        notes.write_bytes(content)
        with pytest.raises(DataError, match="exists with another header"):
            AnswerWriter(notes, HEADER)
        assert notes.read_bytes() == content
    store_path.write_bytes(before + b"broken\n")
    with pytest.raises(DataError, match="answers.jsonl:7: not valid JSON"):
        AnswerWriter(store_path, HEADER)


def test_headers_are_equal_when_their_values_are(tmp_path: Path) -> None:
    same = AnswerHeader(HEADER.tokenizer, HEADER.teacher, dict(sorted(HEADER.generation.items())))
    assert same.to_line() == HEADER.to_line()


def test_a_digest_is_that_of_the_ids() -> None:
    assert prompt_digest(PROMPTS[0]) == prompt_digest(Prompt("z", "other", PROMPTS[0].tokens, "x"))
    assert prompt_digest(PROMPTS[0]) != prompt_digest(PROMPTS[1])
    assert prompt_digest(Prompt("z", "", (1, 23), "")) != prompt_digest(Prompt("z", "", (12, 3), ""))
