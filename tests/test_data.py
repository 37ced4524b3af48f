"""Tokenizers, prompt files, the order of prompts, and the demo's task."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.data import PromptOrder, read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_lines import LineFormat
from megatron_tropd.tokenizer import CharacterTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_tropd.tokenizer_builder import build_tokenizer

DIGITS = CharacterTokenizer("0123456789+=")
MAKE_DATA = Path(__file__).parent.parent / "examples" / "addition" / "make_data.py"


@pytest.fixture
def prompt_file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentences = ["the cat sat on the mat", "one and one is two", "two cats sat", "the mat is on the cat"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


def test_characters_follow_padding_and_end_of_text() -> None:
    assert DIGITS.vocab_size == 14 and DIGITS.pad_id == 0 and DIGITS.eos_id == 1
    # 0 padding, 1 end of text, "0" is 2, ..., "9" is 11, "+" is 12, "=" is 13.
    assert DIGITS.encode("12+7=") == [3, 4, 12, 9, 13]
    assert DIGITS.decode([3, 4, 12, 9, 13]) == "12+7="
    assert DIGITS.decode((11, 3, 1, 0, 0)) == "91"
    assert DIGITS.encode("") == [] and DIGITS.decode([]) == ""


def test_character_tokenizer_refusals() -> None:
    with pytest.raises(ValueError, match=r"character 'x' \(U\+0078\) is not in the tokenizer's alphabet"):
        DIGITS.encode("1+x=")
    with pytest.raises(ValueError, match=r"id 14 is not in \[0, 14\)"):
        DIGITS.decode([3, 14])
    with pytest.raises(ValueError, match=r"id -1 is not in \[0, 14\)"):
        DIGITS.decode([-1])
    with pytest.raises(ValueError, match="found none"):
        CharacterTokenizer("")
    with pytest.raises(ValueError, match=r"found \['a', 'c'\] more than once"):
        CharacterTokenizer("abcca")


def test_fingerprint_tells_what_decides_ids() -> None:
    assert DIGITS.fingerprint == CharacterTokenizer("0123456789+=").fingerprint
    assert len(DIGITS.fingerprint) == 64
    others = {CharacterTokenizer(alphabet).fingerprint for alphabet in ("0123456789=+", "0123456789+", "é", "e")}
    assert len(others | {DIGITS.fingerprint}) == 5


def test_sentencepiece(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("sentencepiece", "", str(sentencepiece_model))
    ids = tokenizer.encode("the cat is one")
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.decode(ids) == "the cat is one"
    assert tokenizer.eos_id not in ids
    # SentencePiece's default: 0 unknown, 1 beginning, 2 end of text, no padding: padded with the end token.
    assert tokenizer.eos_id == 2 and tokenizer.pad_id == 2
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "the cat is one"
    copy = tmp_path / "copy.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    assert SentencePieceTokenizer(copy).fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="was it another tokenizer's"):
        tokenizer.decode([tokenizer.vocab_size])


def test_sentencepiece_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs tokenizer.model"):
        build_tokenizer("sentencepiece", "", None)
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    if "sentencepiece" in sys.modules:
        with pytest.raises(ValueError, match="cannot read tokenizer.model .*absent.model: No such file"):
            SentencePieceTokenizer(tmp_path / "absent.model")
        with pytest.raises(ValueError, match="broken.model is not a SentencePiece model"):
            SentencePieceTokenizer(broken)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install megatron-tropd\[data\]"):
        SentencePieceTokenizer(broken)


def test_build_tokenizer() -> None:
    tokenizer: Tokenizer = build_tokenizer("characters", "ab", None)
    assert tokenizer.encode("ba") == [3, 2]
    with pytest.raises(ValueError, match="'words' is unknown: characters or sentencepiece"):
        build_tokenizer("words", "ab", None)  # type: ignore[arg-type]


def test_prompts_are_read_in_order(prompt_file: Callable[[str], Path]) -> None:
    path = prompt_file(
        '{"prompt": "1+1=", "answer": "2", "id": "first", "source": "ignored"}\n{"prompt": "2+2="}\n{"prompt":"3+3="}'
    )
    prompts, num_skipped = read_prompts(path, DIGITS, 4, "refuse")
    assert num_skipped == 0
    assert prompts == [
        Prompt("first", "1+1=", (3, 12, 3, 13), "2"),
        Prompt("2", "2+2=", (4, 12, 4, 13), ""),
        Prompt("3", "3+3=", (5, 12, 5, 13), ""),
    ]


def test_long_prompts_are_skipped_and_counted_or_refused(prompt_file: Callable[[str], Path]) -> None:
    path = prompt_file('{"prompt": "1+1="}\n{"prompt": "12+1="}\n{"prompt": "123+1="}\n')
    prompts, num_skipped = read_prompts(path, DIGITS, 4, "skip")
    assert [prompt.text for prompt in prompts] == ["1+1="] and num_skipped == 2
    message = r"prompts.jsonl:2: the prompt has 5 tokens, the budget \(data.max_prompt_length\) is 4; shorten it"
    with pytest.raises(DataError, match=message):
        read_prompts(path, DIGITS, 4, "refuse")
    with pytest.raises(DataError, match="no prompt to use: all 3 prompts are over the length budget"):
        read_prompts(path, DIGITS, 3, "skip")


def test_answers_for_training(prompt_file: Callable[[str], Path]) -> None:
    # "10" and the end token are three tokens.
    path = prompt_file('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "5+5=", "answer": "10"}\n')
    assert len(read_prompts(path, DIGITS, 4, "refuse", max_answer_length=3)[0]) == 2
    prompts, num_skipped = read_prompts(path, DIGITS, 4, "skip", max_answer_length=2)
    assert [prompt.answer for prompt in prompts] == ["2"] and num_skipped == 1
    with pytest.raises(DataError, match="prompts.jsonl:2: the answer has 3 tokens with its end token, the budget is 2"):
        read_prompts(path, DIGITS, 4, "refuse", max_answer_length=2)
    path = prompt_file('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "5+5="}\n')
    with pytest.raises(DataError, match='prompts.jsonl:2: "answer" is missing or empty'):
        read_prompts(path, DIGITS, 4, "skip", max_answer_length=9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"prompt", "not valid JSON"),
        (b'{"prompt": "1+1="', "not valid JSON"),
        (b'{"prompt": "1+1="} {"prompt": "1+1="}', "not valid JSON"),
        (b'{"prompt": "1+1=", "weight": NaN}', "NaN is not JSON"),
        (b'{"prompt": "1+1=", "weight": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "1+1=", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"", "empty line: delete it"),
        (b"   ", "empty line: delete it"),
        (b'["1+1="]', "a JSON object is needed, found a list"),
        (b'"1+1="', "a JSON object is needed, found a string"),
        (b"3", "a JSON object is needed, found a number"),
        (b"true", "a JSON object is needed, found a boolean"),
        (b"{}", '"prompt" is missing'),
        (b'{"question": "1+1="}', '"prompt" is missing'),
        (b'{"prompt": ""}', '"prompt" is empty'),
        (b'{"prompt": " "}', '"prompt" is empty'),
        (b'{"prompt": null}', '"prompt" must be a string, found null'),
        (b'{"prompt": 3}', '"prompt" must be a string, found a number'),
        (b'{"prompt": ["1+1="]}', '"prompt" must be a string, found a list'),
        (b'{"prompt": "1+1=", "answer": 2}', '"answer" must be a string, found a number: put it in quotes'),
        (b'{"prompt": "1+1=", "answer": true}', '"answer" must be a string, found a boolean'),
        (b'{"prompt": "1+1=", "id": 7}', '"id" must be a string, found a number'),
        (b'{"prompt": "1+1=", "id": ""}', '"id" is empty'),
        (b'{"prompt": "1+1=", "id": "1"}', "id '1' is taken by line 1"),
        (b'{"prompt": "1-1="}', "character '-' .* is not in the tokenizer's alphabet"),
        (b'{"prompt": "1+1=", "answer": "two"}', "character 't' .* is not in the tokenizer's alphabet"),
        (b'{"prompt": "1+\xff="}', r"not UTF-8 \(byte 14 of the line\)"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_malformed_lines_are_named(prompt_file: Callable[[bytes], Path], line: bytes, message: str) -> None:
    path = prompt_file(b'{"prompt": "0+0="}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2: .*{message}"):
        read_prompts(path, DIGITS, 100, "skip")


def test_files_that_cannot_be_used(prompt_file: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt to use: the file is empty"):
        read_prompts(prompt_file(""), DIGITS, 4, "skip")
    with pytest.raises(DataError, match="cannot read .*absent.jsonl: No such file"):
        read_prompts(tmp_path / "absent.jsonl", DIGITS, 4, "skip")
    with pytest.raises(DataError, match="cannot read .*: Is a directory"):
        read_prompts(tmp_path, DIGITS, 4, "skip")


def test_a_prompt_without_tokens_is_refused(prompt_file: Callable[[str], Path], sentencepiece_model: Path) -> None:
    # SentencePiece drops a zero-width space; Python does not strip it.
    path = prompt_file('{"prompt": "\\u200b"}\n')
    with pytest.raises(DataError, match="prompts.jsonl:1: .*has no tokens under this tokenizer"):
        read_prompts(path, SentencePieceTokenizer(sentencepiece_model), 4, "skip")


def test_every_epoch_is_another_permutation() -> None:
    order = PromptOrder(num_prompts=50, seed=3)
    epochs = [order.indices(50 * epoch, 50) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != PromptOrder(50, seed=4).indices(0, 50)
    assert epochs[0] != list(range(50))


def test_order_needs_only_the_position() -> None:
    whole = PromptOrder(7, seed=1).indices(0, 100)
    assert PromptOrder(7, seed=1).indices(60, 40) == whole[60:]
    assert PromptOrder(7, seed=1).indices(5, 4) == whole[5:9]  # across the end of an epoch
    assert PromptOrder(7, seed=1).indices(3, 0) == []
    assert PromptOrder(1, seed=1).indices(0, 5) == [0] * 5


def test_lines_of_benchmarks(prompt_file: Any) -> None:
    line_format = LineFormat("number", "problem", "Answer", "Q: {prompt}\nA:")
    tokenizer = CharacterTokenizer("QA:) \n+?=0123456789BC$")
    path = prompt_file(
        '{"problem": "1+1=?", "Answer": 2}\n'
        '{"problem": "0?", "verifier": "choice", "choices": ["10", "0"], "Answer": "B"}\n'
        '{"problem": "1?", "verifier": "python", "tests": "assert True", "solution": "1:1"}\n'
    )
    number, choice, program = read_prompts(path, tokenizer, 40, "refuse", line_format=line_format)[0]
    assert (number.text, number.answer, number.verifier) == ("Q: 1+1=?\nA:", "2", "number")
    assert choice.text == "Q: 0?\n\nA) 10\nB) 0\nA:" and choice.details == {"num_choices": 2}
    assert program.details == {"tests": "assert True"} and program.solution == "1:1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1", "verifier": "maths"}', "prompts.jsonl:1: verifier 'maths' is unknown: exact, number, math"),
        ('{"prompt": "1", "choices": ["1"]}', '"choices" must be a list of 2 to 26 strings'),
        ('{"prompt": "1", "choices": ["1", 2]}', '"choices" must be a string, found a number'),
        ('{"prompt": "1", "tests": 3}', '"tests" must be a string, found a number'),
    ],
)
def test_lines_of_benchmarks_that_are_wrong(prompt_file: Any, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(prompt_file(line + "\n"), DIGITS, 40, "refuse")


def run_make_data(out: Path, *arguments: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    main = runpy.run_path(str(MAKE_DATA))["main"]
    main(["--out", str(out), *arguments])
    train, validation = (
        [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    )
    return train, validation


def test_sums_are_right_and_held_out(tmp_path: Path) -> None:
    train, validation = run_make_data(tmp_path, "--digits", "2", "--num-train", "400", "--num-validation", "100")
    assert len(train) == 400 and len(validation) == 100
    pairs = []
    for line in train + validation:
        a, b = line["prompt"].removesuffix("=").split("+")
        assert len(a) == len(b) == 2 and len(line["answer"]) == 3
        assert int(line["answer"][::-1]) == int(a) + int(b)
        pairs.append(tuple(sorted((a, b))))
    assert len(set(pairs)) == 500
    prompts, _ = read_prompts(tmp_path / "train.jsonl", DIGITS, 6, "refuse", max_answer_length=4)
    assert len(prompts) == 400


def test_sums_depend_on_the_seed_and_held_out_ones_on_nothing_else(tmp_path: Path) -> None:
    small = run_make_data(tmp_path, "--num-train", "10", "--num-validation", "5")
    assert run_make_data(tmp_path, "--num-train", "10", "--num-validation", "5") == small
    assert run_make_data(tmp_path, "--num-train", "90", "--num-validation", "5")[1] == small[1]
    assert run_make_data(tmp_path, "--num-train", "10", "--num-validation", "5", "--seed", "2") != small


def test_make_data_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One digit: 10 * 11 / 2 = 55 unordered pairs.
    assert len(run_make_data(tmp_path, "--digits", "1", "--num-train", "50", "--num-validation", "5")[0]) == 50
    with pytest.raises(SystemExit):
        run_make_data(tmp_path, "--digits", "1", "--num-train", "51", "--num-validation", "5")
    assert "56 sums asked for, but 1 digits give only 55" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_make_data(tmp_path, "--num-train", "0")
    assert "must be at least 1" in capsys.readouterr().err
