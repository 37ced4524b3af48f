"""Readers of what users give: whatever the bytes, a value or one of the named errors; nothing hangs or is written."""

from __future__ import annotations

import json
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_tropd.config import ModelConfig
from megatron_tropd.config_parser import field_names
from megatron_tropd.integrity import CheckpointError, refuse_unsafe_pickle
from tests.fuzzed_readers import CHECKPOINT_FILES, read_checkpoint, read_config, read_jsonl

CASES = pytest.mark.parametrize(
    "cases", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
SECONDS_PER_CASE = 10
"""Of CPU time; what never ends is pytest's timeout's to find."""

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**25, max_value=10**40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["1e3", "../../etc/passwd", "\ud800", "\x00", "nan", "${HOME}", "!!python/object", "1+1="])
)


def trees(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Nested values under likely keys."""

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5)

    return st.recursive(scalars, grow, max_leaves=12)


def bombs() -> st.SearchStrategy[bytes]:
    """Deep nesting, long lines, long numbers."""
    halves = [(b"[", b"]"), (b'{"a":', b"}"), (b"1", b""), (b"\xf0", b""), (b"- ", b""), (b'{"id":"x"}\n', b"")]
    return st.builds(
        lambda count, half: half[0] * count + half[1] * count, st.integers(1, 100_000), st.sampled_from(halves)
    )


def check(
    cases: int, strategy: st.SearchStrategy[Any], read: Callable[[Path, Any], None], *, examples: Sequence[Any] = ()
) -> int:
    """``read(folder, case)`` for the ``examples`` and ``cases`` drawn ones; returns how many that were.

    The folder may hold the case's files alone afterwards.
    """
    count = 0

    @settings(
        max_examples=cases,
        deadline=None,  # of the wall clock, which a busy machine stretches
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(case: Any) -> None:
        nonlocal count
        count += 1
        with tempfile.TemporaryDirectory() as folder:
            inside = Path(folder, "run")
            inside.mkdir()
            started = time.process_time()
            read(inside, case)
            assert time.process_time() - started < SECONDS_PER_CASE
            assert [path.name for path in Path(folder).iterdir()] == ["run"]

    for case in examples:
        one = example(case)(one)
    one()
    assert count >= cases, f"only {count} cases could be drawn"
    return count


def _bytes_of(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass")
    except ValueError:
        return b"?"


keys_of_lines = st.sampled_from(["prompt", "answer", "id", "tokens", "tokenizer", "finished", "teacher", "x"])
lines = trees(keys_of_lines).map(_bytes_of)
prompt_lines = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["1+1=", "2+2=", "", "x", "\ud800"])}, optional={"id": scalars, "answer": scalars}
).map(_bytes_of)
files = st.lists(lines | prompt_lines | st.binary(max_size=60), max_size=6).map(b"\n".join) | bombs()


@CASES
def test_jsonl(cases: int, record_property: Callable[[str, object], None]) -> None:
    count = check(cases, files, read_jsonl)
    record_property("trials", ("prompt files and answer stores fuzzed", count))


names = sorted({part for name in field_names() for part in name.split(".")})
sections = st.dictionaries(st.sampled_from(names) | st.text(max_size=5), trees(st.sampled_from(names)), max_size=6)
SMALLEST = {
    "student": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8},
    "data": {"train": "train.jsonl"},
    "output_dir": "run",
}


@st.composite
def almost_configs(draw: st.DrawFn) -> bytes:
    """A valid config with one field of one section replaced by anything."""
    name = draw(st.sampled_from(sorted(field_names())))
    section, _, leaf = name.partition(".")
    config: dict[str, Any] = json.loads(json.dumps(SMALLEST))
    if leaf and section != "teacher":
        config.setdefault(section, {})[leaf] = draw(scalars)
    else:
        config[section] = draw(trees(st.sampled_from(names)))
    return yaml.safe_dump(config, allow_unicode=True).encode("utf-8", errors="surrogatepass")


YAML_TRICKS = [
    b"!!python/object/apply:os.system ['touch ../pwned']",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]",
    b"student: &s\n  num_layers: *s",
    b"&x [*x]",
    b"<<: {a: b}",
    b"2026-01-01",
    b"? {a: b}\n: c",
    b"{[1]: 2}",
    b"--- 1\n--- 2",
]


@CASES
def test_yaml(cases: int, record_property: Callable[[str, object], None]) -> None:
    dumped = sections.map(lambda tree: yaml.safe_dump(tree).encode("utf-8", errors="surrogatepass"))
    units = [b"[", b"- ", b"{a: ", b"a:\n ", b"&a "]
    small_bombs = st.builds(lambda count, unit: unit * count, st.integers(1, 500), st.sampled_from(units))
    contents = almost_configs() | dumped | st.binary(max_size=80) | small_bombs | st.sampled_from(YAML_TRICKS)
    large_bombs = [unit * 20_000 for unit in units]
    record_property("trials", ("configs fuzzed", check(cases, contents, read_config, examples=large_bombs)))


class Malicious:
    """What a pickle may ask for."""

    def __init__(self, call: Any, *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


LONG_NAMES = [
    ("latest", b"1" * 256),
    ("latest", b"step_" + b"1" * 256),
    ("latest", b"step_" + b"1" * 5000),
    ("manifest.json", json.dumps({"files": {"x" * 256: {"size": 1, "sha256": ""}}}).encode()),
]
"""File names longer than file systems take."""


@CASES
def test_checkpoint_metadata(cases: int, record_property: Callable[[str, object], None]) -> None:
    architecture = st.dictionaries(st.sampled_from(list(ModelConfig.__dataclass_fields__)), scalars, max_size=6)
    keys = ["step", "seed", "vocab_size", "tokenizer", "architecture", "files", "size", "sha256"]
    descriptions = st.fixed_dictionaries({key: scalars for key in keys[:4]} | {"architecture": architecture | scalars})
    entries = st.dictionaries(st.text() | st.just("../x"), trees(st.sampled_from(keys)))
    manifests = st.fixed_dictionaries({"files": entries})
    calls = [Malicious(exec, "open('pwned', 'w')"), Malicious(eval, "1"), Malicious(getattr, "x", "y"), [1]]
    pickles = st.builds(pickle.dumps, st.sampled_from(calls), st.integers(0, 5))
    content = (
        st.binary(max_size=80)
        | (descriptions | manifests | trees(st.sampled_from(keys))).map(_bytes_of)
        | bombs()
        | pickles
    )
    files = st.tuples(st.sampled_from(CHECKPOINT_FILES), content)
    count = check(cases, files, lambda folder, case: read_checkpoint(folder, *case), examples=LONG_NAMES)
    record_property("trials", ("checkpoint metadata files fuzzed", count))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path: Path, protocol: int) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(Path.touch, tmp_path / "pwned"), protocol))
    with pytest.raises(CheckpointError, match="not part of a checkpoint's metadata"):
        refuse_unsafe_pickle(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_the_fuzzer_that_is_guided_by_coverage_finds_nothing_in_a_short_run(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("atheris")
    from tools.fuzz import NAMES, fuzz

    for name in NAMES:
        count, words = fuzz(name, 30, tmp_path)
        assert count > 20 and not words, words
        record_property("trials", ("cases drawn by coverage", count))
