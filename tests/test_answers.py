"""The store of teacher answers: what is read, what is refused, and what a killed writer leaves."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd import answer_index, answers
from megatron_tropd.answer_index import index_path
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
    for prompt in PROMPTS:
        expected = ANSWERS[prompt.id]
        assert [tuple(store.answer(prompt, sample).tokens) for sample in range(len(expected))] == expected
    # Prompt b has two answers: samples 0, 1, 2, 3 take 0, 1, 0, 1.
    taken = [tuple(store.answer(PROMPTS[1], sample).tokens) for sample in range(4)]
    assert taken == [ANSWERS["b"][0], ANSWERS["b"][1]] * 2
    assert store.answer(PROMPTS[1], 0).finished and not store.answer(PROMPTS[1], 1).finished


def test_a_prompt_the_store_does_not_answer_is_refused(store_path: Path) -> None:
    store = read_store(store_path)
    unknown = Prompt("e", "e=", (4,), "")
    changed = Prompt("b", "B=", (4,), "")
    for asked in (lambda prompt: store.answer(prompt, 0), lambda prompt: store.require([*PROMPTS, prompt])):
        with pytest.raises(DataError, match="answers.jsonl: no teacher answer for prompt 'e': run `generate`"):
            asked(unknown)
        with pytest.raises(DataError, match="prompt 'b' is another text .* the prompt file has changed; delete"):
            asked(changed)


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


def _outdate(path: Path) -> None:
    """As if the file had been written an hour ago, long before its index."""
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    with AnswerWriter(path, HEADER):
        pass


def test_a_store_is_opened_without_parsing_its_answers(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the index that its writer leaves, where nothing but the time of change is looked at; a copy is hashed once."""
    _outdate(store_path)
    copy = Path(shutil.copy(store_path, store_path.with_name("copy.jsonl")))
    shutil.copy(index_path(store_path), index_path(copy))
    hashed: list[Path] = []
    sha256 = answer_index._sha256
    monkeypatch.setattr(answer_index, "_sha256", lambda path: [hashed.append(path), sha256(path)][1])
    monkeypatch.setattr(answers, "_parse_answer", None)
    for path, times in ((store_path, 0), (copy, 1)):
        read_store(path).require(PROMPTS)
        assert hashed == [path] * times
    hour_ahead = time.time() + 3600
    os.utime(index_path(copy), (hour_ahead, hour_ahead))
    read_store(copy).require(PROMPTS)
    assert hashed == [copy], "its index has been brought up to date"


def test_an_index_of_another_file_is_made_anew(store_path: Path, tmp_path: Path) -> None:
    good = index_path(store_path).read_bytes()
    before = {prompt.id: tuple(read_store(store_path).answer(prompt, 0).tokens) for prompt in PROMPTS}
    damages = [b"", b"{}\n", b"[" * 50, good[:-1], good + b" ", good.replace(b'"version": 1', b'"version": 2'), None]
    for damage in damages:
        if damage is None:
            index_path(store_path).unlink()
        else:
            index_path(store_path).write_bytes(damage)
        store = read_store(store_path)
        assert {prompt.id: tuple(store.answer(prompt, 0).tokens) for prompt in PROMPTS} == before
        assert index_path(store_path).read_bytes()[64:] == good[64:]
    # As long as before and of the same time of change.
    stat = store_path.stat()
    content = store_path.read_bytes()
    store_path.write_bytes(content.replace(b"[5, 6, 7, 1]", b"[5, 6, 8, 1]"))
    os.utime(store_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert tuple(read_store(store_path).answer(PROMPTS[0], 0).tokens) == (5, 6, 8, 1)
    store_path.write_bytes(content.replace(b"[5, 6, 7, 1]", b"[5, 6, x, 1]"))
    os.utime(store_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"answers\.jsonl:2: not valid JSON"):
        read_store(store_path)


def test_a_line_that_is_not_what_the_index_says_is_refused(store_path: Path) -> None:
    """An index can be believed though the file has changed, where somebody sets times: what is read is checked."""
    _outdate(store_path)
    stat = store_path.stat()
    store_path.write_bytes(store_path.read_bytes().replace(b'"id": "a"', b'"id": "x"'))
    os.utime(store_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="an answer to 'x', the index says to 'a': delete .*answers.jsonl.index"):
        read_store(store_path).answer(PROMPTS[0], 0)


def test_a_store_whose_index_cannot_be_kept_is_read(store_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index_path(store_path).unlink()
    index_path(store_path).mkdir()
    assert tuple(read_store(store_path).answer(PROMPTS[0], 0).tokens) == ANSWERS["a"][0]
    assert "every start reads all of answers.jsonl" in caplog.text
    assert sorted(path.name for path in store_path.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.index"]


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
        assert tuple(read_store(store_path).answer(PROMPTS[0], 1).tokens) == (4, 1)


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
