"""Teacher answers written as a folder of files: by hand, and by `generate` on two replicas that are killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.answer_shards import ShardedAnswerWriter, open_writer
from megatron_tropd.answers import AnswerHeader, AnswerStore, AnswerWriter
from megatron_tropd.data import read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.tokenizer import CharacterTokenizer
from tests import test_run
from tests.ranks import run_ranks

HEADER = AnswerHeader("f" * 64, {"load": "runs/teacher"}, {"temperature": 1.0})
PROMPTS = [Prompt(f"p{index}", f"{index}=", (index, 13), "") for index in range(7)]
data = test_run.data


def _write_missing(folder: Path) -> None:
    with ShardedAnswerWriter(folder, HEADER, 3) as writer:
        for prompt in PROMPTS:
            if not writer.num_answers[prompt.id]:
                writer.write(prompt, (*prompt.tokens, 1), finished=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def test_shards_are_full_but_the_last_and_read_as_one_store(tmp_path: Path) -> None:
    _write_missing(tmp_path)
    assert {name: content.count(b"\n") for name, content in _contents(tmp_path).items()} == {
        "shard_00000.jsonl": 4, "shard_00001.jsonl": 4, "shard_00002.jsonl": 2,
    }  # fmt: skip
    store = AnswerStore.read(tmp_path, "f" * 64, 14)
    store.require(PROMPTS)
    assert [tuple(store.answer(prompt, 0).tokens) for prompt in PROMPTS] == [(*each.tokens, 1) for each in PROMPTS]


def test_a_killed_writer_continues_to_the_same_files(tmp_path: Path) -> None:
    _write_missing(tmp_path / "whole")
    whole = _contents(tmp_path / "whole")
    everything = b"".join(whole.values())
    for size in range(0, len(everything), 17):
        folder = tmp_path / str(size)
        folder.mkdir()
        left = size
        for name, content in whole.items():
            if left > 0:
                (folder / name).write_bytes(content[:left])
            left -= len(content)
        _write_missing(folder)
        assert _contents(folder) == whole, f"continued from {size} bytes"
    # A line lost from an earlier shard is made up for in the last.
    lines = whole["shard_00000.jsonl"].splitlines(keepends=True)
    (tmp_path / "whole" / "shard_00000.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    _write_missing(tmp_path / "whole")
    assert [content.count(b"\n") for content in _contents(tmp_path / "whole").values()] == [3, 4, 3]
    AnswerStore.read(tmp_path / "whole", "f" * 64, 14).require(PROMPTS)


def test_a_store_of_the_other_kind_or_of_another_run_is_refused(tmp_path: Path) -> None:
    _write_missing(tmp_path / "folder")
    with pytest.raises(DataError, match="folder is a folder: set guidance.answers_per_shard to continue it"):
        open_writer(tmp_path / "folder", HEADER, 0)
    with AnswerWriter(tmp_path / "file.jsonl", HEADER):
        pass
    with pytest.raises(DataError, match=r"file.jsonl is one file: set guidance.answers_per_shard=0 to continue it"):
        open_writer(tmp_path / "file.jsonl", HEADER, 3)
    with pytest.raises(DataError, match=r"shard_00000.jsonl:1: the file exists with another header"):
        open_writer(tmp_path / "folder", AnswerHeader("e" * 64, {}, {}), 3)


def _generate(path: str, answers: dict[str, int], die_at_line: int | None) -> None:
    """Stores by path, each with so many answers in a shard; rank 0 is killed in the middle of a line."""
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.generate import generate

    write, lines = AnswerWriter._write, []

    def write_or_die(self: AnswerWriter, line: bytes) -> None:
        lines.append(line)
        if len(lines) == die_at_line:
            write(self, line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, line)

    AnswerWriter._write = write_or_die  # type: ignore[method-assign]
    for store, answers_per_shard in answers.items():
        generate(
            load_config(path, [f"--guidance.answers={store}", f"--guidance.answers_per_shard={answers_per_shard}"])
        )


def _generate_until_told_to_stop(path: str, store: str) -> tuple[dict[str, Any], list[str]]:
    """Rank 1 alone gets SIGTERM while the second chunk is generated; returns this rank's exit report and messages."""
    from megatron_tropd import generate
    from megatron_tropd.config_parser import load_config

    answer, chunks = generate._generate_over_replicas, []

    def answer_and_signal(*arguments: Any) -> Any:
        chunks.append(1)
        if len(chunks) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(*arguments)

    generate._generate_over_replicas = answer_and_signal
    config = load_config(path, [f"--guidance.answers={store}", "--guidance.answers_per_shard=24"])
    generate.generate(config)
    logs = Path(config.output_dir) / "logs"
    events = [json.loads(line) for line in (logs / f"rank_{os.environ['RANK']}.jsonl").open()]
    report = json.loads((logs / f"rank_{os.environ['RANK']}.exit.json").read_text())
    return report, [event["message"] for event in events if event["event"] == "log"]


def test_two_replicas_that_are_killed_continue_to_the_same_store(tmp_path: Path, data: Path) -> None:
    rollout: dict[str, Any] = {"samples_per_prompt": 2, "max_response_length": 5, "max_batch_size": 7}
    path = str(test_run.config_file(tmp_path, data, rollout=rollout))
    killed, stopped, whole, one_file = (str(tmp_path / name) for name in ("killed", "stopped", "whole", "one.jsonl"))
    # 64 answers; line 33 (headers are lines too) is the seventh answer of the second shard.
    with pytest.raises(AssertionError, match="the process ended without a word"):
        run_ranks(2, _generate, path, {killed: 24}, 33)
    left = _contents(Path(killed))
    assert [content.count(b"\n") for content in left.values()] == [25, 7] and not left["shard_00001.jsonl"].endswith(
        b"\n"
    )
    # SIGTERM on one rank: both end by themselves with whole chunks of 2 x 7 answers.
    for report, messages in run_ranks(2, _generate_until_told_to_stop, path, stopped):
        assert (report["outcome"], report["error"]) == ("sigterm", None)
        assert messages[-1].startswith("SIGTERM: wrote 28 of the 64 answers that were missing; start again"), messages
    left = _contents(Path(stopped))
    assert [content.count(b"\n") for content in left.values()] == [25, 5] and left["shard_00001.jsonl"].endswith(b"\n")
    run_ranks(2, _generate, path, {killed: 24, stopped: 24, whole: 24, one_file: 0}, None)
    shards = _contents(Path(killed))
    assert shards == _contents(Path(stopped)) == _contents(Path(whole)) and len(shards) == 3
    lines = [line for content in shards.values() for line in content.splitlines()[1:]]
    assert lines == Path(one_file).read_bytes().splitlines()[1:] and len(lines) == 64
    tokenizer = CharacterTokenizer("0123456789+=")
    prompts, _ = read_prompts(data / "train.jsonl", tokenizer, 16, "refuse")
    AnswerStore.read(killed, tokenizer.fingerprint, tokenizer.vocab_size).require(prompts)
