"""The readers that the fuzz tests and `tools/fuzz.py` give bytes to; none lets through what is no named error."""

from __future__ import annotations

import contextlib
import json
import pickle
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from megatron_tropd.answers import AnswerStore
from megatron_tropd.checkpoint import latest_checkpoint, read_description
from megatron_tropd.config import ConfigError
from megatron_tropd.config_checks import validate
from megatron_tropd.config_parser import load_config
from megatron_tropd.data import read_prompts
from megatron_tropd.integrity import CheckpointError, refuse_unsafe_pickle, seal, verify
from megatron_tropd.jsonl import DataError
from megatron_tropd.tokenizer import CharacterTokenizer

TOKENIZER = CharacterTokenizer("0123456789+=")


def read_jsonl(folder: Path, content: bytes) -> None:
    """As prompts, with and without limits on the answers, and as a store of teacher answers."""
    path = folder / "file.jsonl"
    path.write_bytes(content)
    for attempt in (
        lambda: read_prompts(path, TOKENIZER, 8, "skip"),
        lambda: read_prompts(path, TOKENIZER, 8, "refuse", max_answer_length=4),
        lambda: AnswerStore.read(str(path), TOKENIZER.fingerprint, TOKENIZER.vocab_size),
    ):
        with contextlib.suppress(DataError):
            attempt()


def read_config(folder: Path, content: bytes) -> None:
    """As the config of a run on two ranks."""
    path = folder / "config.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        validate(load_config(path), 2, "train")


CHECKPOINT_FILES = ("latest", "tropd.json", ".metadata", "manifest.json")


@cache
def _whole_checkpoint() -> dict[str, bytes]:
    """The files of a sealed checkpoint without tensors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("latest", "tropd.json", ".metadata"):
            (folder / file).write_bytes(b"{}" if file == "tropd.json" else pickle.dumps({}))
        seal(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_checkpoint(folder: Path, name: str, content: bytes) -> None:
    """As one of the ``CHECKPOINT_FILES`` of a checkpoint that is whole but for it."""
    step = folder / "step_2"
    step.mkdir(exist_ok=True)
    for file, whole in _whole_checkpoint().items():
        (step / file).write_bytes(whole)
    (folder / "latest").write_text("step_2")
    (folder / name if name == "latest" else step / name).write_bytes(content)
    for attempt in (
        lambda: verify(step),
        lambda: refuse_unsafe_pickle(step),
        lambda: read_description(step),
        lambda: latest_checkpoint(folder),
    ):
        with contextlib.suppress(CheckpointError):
            attempt()


def read_any_checkpoint_file(folder: Path, content: bytes) -> None:
    """The first byte chooses the file, the others are in it."""
    if content:
        read_checkpoint(folder, CHECKPOINT_FILES[content[0] % len(CHECKPOINT_FILES)], content[1:])


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "jsonl": read_jsonl,
    "config": read_config,
    "checkpoint": read_any_checkpoint_file,
}

_LINE = {"prompt": "1+1=", "answer": "2", "id": "a", "teacher": "t", "messages": [{"role": "user", "content": "1+1="}]}
_HEADER = {"tokenizer": TOKENIZER.fingerprint, "teacher": {}, "generation": {}}
_CONFIG = b"student: &s {num_layers: 2, hidden_size: 8, num_attention_heads: 2, ffn_hidden_size: 8}\nteacher: *s\n"
SEEDS: dict[str, list[bytes]] = {
    "jsonl": [
        json.dumps(_LINE).encode(),
        b"\n".join(json.dumps(line).encode() for line in (_HEADER, {"id": "a", "tokens": [1, 2], "finished": True})),
    ],
    "config": [_CONFIG + b"data: {train: a.jsonl}\noutput_dir: run\n", b"a: !!python/object/apply:os.system [x]"],
    "checkpoint": [
        b"\0step_2",
        b'\1{"step": 2, "seed": 1, "vocab_size": 3, "tokenizer": "x", "architecture": {"num_layers": 2}}',
        b"\2" + pickle.dumps({"state_dict_metadata": {"a": 1}}),
        b'\3{"files": {"a": {"size": 1, "sha256": ""}}}',
    ],
}
"""Files that are nearly right, for a fuzzer to begin with."""
