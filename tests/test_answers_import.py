"""Answers imported from conversations: aligned token by token, sharded, resumed, memory-mapped."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.answer_index import index_path
from megatron_tropd.answers import AnswerHeader, AnswerStore, AnswerWriter
from megatron_tropd.data import read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.tokenizer import ChatOptions, HuggingFaceTokenizer
from tests import tokenizers_made as made
from tools import import_answers, preprocess_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save_byte_level_bpe(tmp_path_factory.mktemp("tokenizer") / "base")


def conversations(path: Path, *, count: int = 12, times: int = 1) -> Path:
    lines = [
        {
            "system": "ignored",
            "messages": [
                {"role": "user", "content": f"Count to {number}."},
                {"role": "assistant", "content": f"<think>{'x ' * number}</think> done {number}, {time}"},
            ],
        }
        for time in range(times)
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Conversations, and the prompt file made of them."""
    source = conversations(tmp_path / "conversations.jsonl", times=2)
    arguments = ["--input", str(source), "--out", str(tmp_path / "data"), "--workers=1", "--quiet"]
    assert preprocess_data.main(arguments) == 0
    return source, tmp_path / "data" / "train.jsonl"


def run(source: Path, prompts: Path, out: Path, folder: Path, *options: str) -> int:
    arguments = ["--input", source, "--prompts", prompts, "--out", out, "--tokenizer", folder, "--quiet", *options]
    return import_answers.main(list(map(str, arguments)))


def read_store(path: Path, folder: Path) -> AnswerStore:
    tokenizer = HuggingFaceTokenizer(folder)
    return AnswerStore.read(path, tokenizer.fingerprint, tokenizer.vocab_size)


def test_prompt_and_answer_are_the_rendered_conversation(
    tmp_path: Path, folder: Path, inputs: tuple[Path, Path]
) -> None:
    import transformers

    assert run(*inputs, tmp_path / "answers.jsonl", folder) == 0
    store, tokenizer = read_store(tmp_path / "answers.jsonl", folder), HuggingFaceTokenizer(folder)
    prompts, _ = read_prompts(inputs[1], tokenizer, 99, "refuse")
    lines = [json.loads(line) for line in inputs[0].read_text().splitlines()]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(prompts) == 12 and store.header.teacher == {"imported": [str(inputs[0])]}
    for number, prompt in enumerate(prompts):
        for sample in (0, 1):
            whole = theirs.apply_chat_template(lines[number + 12 * sample]["messages"], return_dict=False)
            answer = store.answer(prompt, sample)
            # The template ends with <|im_end|> and a line break, which nobody learns.
            assert [*prompt.tokens, *answer.tokens, *tokenizer.encode("\n")] == whole
            assert answer.tokens[-1] == tokenizer.eos_id and answer.finished


def test_shards_and_limits(tmp_path: Path, folder: Path, inputs: tuple[Path, Path]) -> None:
    assert run(*inputs, tmp_path / "one.jsonl", folder) == 0
    assert run(*inputs, tmp_path / "many", folder, "--num-shards=3") == 0
    shards = sorted((tmp_path / "many").glob("*.jsonl"))
    assert sorted((tmp_path / "many").iterdir()) == sorted([*shards, *map(index_path, shards)])
    assert not (tmp_path / "one.jsonl.partial.index").exists() and index_path(tmp_path / "one.jsonl").exists()
    assert len(shards) == 3 and all(len(shard.read_text().splitlines()) > 2 for shard in shards)
    one, many = read_store(tmp_path / "one.jsonl", folder), read_store(tmp_path / "many", folder)
    assert run(*inputs, tmp_path / "first.jsonl", folder, "--answers-per-prompt=1") == 0
    first = read_store(tmp_path / "first.jsonl", folder)
    for prompt in read_prompts(inputs[1], HuggingFaceTokenizer(folder, ChatOptions()), 99, "refuse")[0]:
        two, the_same, one_only = ([each.answer(prompt, sample) for sample in (0, 1)] for each in (one, many, first))
        assert two == the_same and two[0] != two[1] and one_only == [two[0]] * 2
    shards[1].write_text(shards[1].read_text().replace('"tokens": [', '"tokens": [9999, ', 1))
    with pytest.raises(DataError, match=r"shard_00001_of_00003.jsonl:\d: id 9999"):
        read_store(tmp_path / "many", folder)
    for shard in shards:
        shard.unlink()
    with pytest.raises(DataError, match="the folder has no .jsonl files"):
        read_store(tmp_path / "many", folder)


def test_a_cut_off_import_continues_to_the_same_store(tmp_path: Path, folder: Path, inputs: tuple[Path, Path]) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(*inputs, out, folder) == 0
    whole = out.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 3, len(whole)):
        out.unlink()
        (tmp_path / "answers.jsonl.partial").write_bytes(whole[:size])
        assert run(*inputs, out, folder) == 0
        assert out.read_bytes() == whole, f"continued from {size} bytes"
        assert not (tmp_path / "answers.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "conversations.jsonl:1: no answer"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "conversations.jsonl:1: no answer"),
        (
            [{"role": "user", "content": "Count to 1."}, {"role": "assistant", "content": "a<|im_end|>b"}],
            "conversations.jsonl:1: the answer goes on after its end token",
        ),
        ("text", "conversations.jsonl:1: .*found a string"),
        (
            [{"role": "user", "content": "other"}, {"role": "assistant", "content": "b"}],
            "none of the 1 conversations answers a prompt",
        ),
    ],
)
def test_conversations_that_cannot_be_imported(
    tmp_path: Path,
    folder: Path,
    inputs: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    messages: Any,
    message: str,
) -> None:
    inputs[0].write_text(json.dumps({"messages": messages}) + "\n")
    assert run(*inputs, tmp_path / "answers.jsonl", folder) == 2
    with pytest.raises(DataError, match=message):
        raise DataError(capsys.readouterr().err)
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_template_that_rewrites_the_prompt_is_refused(
    tmp_path: Path, folder: Path, inputs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}{{ 'A' if messages | length > 1 else 'B' }}{{ message.content }}{{ eos_token }}"
        "{% endfor %}"
    )
    assert run(*inputs, tmp_path / "answers.jsonl", folder, "--chat-template", str(template)) == 2
    err = capsys.readouterr().err
    assert "conversations.jsonl:1: the rendered prompt is not how the rendered conversation begins: from token 0" in err
    assert "'BCount to 0.'" in err and "'ACount to 0." in err


def test_prompts_that_nothing_answers_are_counted(
    tmp_path: Path, folder: Path, inputs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    conversations(inputs[0], count=5)
    assert run(*inputs, tmp_path / "answers.jsonl", folder) == 0
    out = capsys.readouterr().out
    assert re.search(r"written +│ +5 ", out) and re.search(r"without answer +│ +7 ", out)
    tokenizer = HuggingFaceTokenizer(folder, ChatOptions())
    last = read_prompts(inputs[1], tokenizer, 99, "refuse")[0][-1]
    with pytest.raises(DataError, match="no teacher answer for prompt"):
        read_store(tmp_path / "answers.jsonl", folder).answer(last, 0)


def test_a_store_stays_on_disk(tmp_path: Path) -> None:
    path, prompt = tmp_path / "answers.jsonl", Prompt("p", "p", (1,), "")
    with AnswerWriter(path, AnswerHeader("f", {}, {})) as writer:
        for index in range(200):
            writer.write(prompt, [index] * 5000, finished=True)
    tracemalloc.start()
    try:
        store = AnswerStore.read(path, "f", 200)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The ids alone would be 200 x 5000 x 4 bytes = 4 MB.
    assert kept < 200_000
    assert list(store.answer(prompt, 123).tokens) == [123] * 5000
