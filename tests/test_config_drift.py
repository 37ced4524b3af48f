"""What a resumed run may have otherwise than the run it continues, and what is shown of it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.config import Config, DataConfig, GuidanceConfig, ModelConfig
from megatron_tropd.config_drift import FILES, MAY_CHANGE, DriftError, check_drift, compare, snapshot
from megatron_tropd.config_parser import field_names

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("train.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1+1="}\n')
    data = DataConfig(train=str(tmp_path / "train.jsonl"))
    guidance = GuidanceConfig(answers=str(tmp_path / "answers.jsonl"))
    return Config(student=MODEL, teacher=MODEL, data=data, guidance=guidance, output_dir="run")


def _with(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    *sections, leaf = name.split(".")
    section = changed
    for part in sections:
        section = section[part]
    section[leaf] = value
    return changed


def test_every_field_that_may_change_is_a_field() -> None:
    assert set(field_names()) >= MAY_CHANGE


def test_a_file_that_the_command_does_not_read_may_be_missing(config: Config, tmp_path: Path) -> None:
    guidance = dataclasses.replace(config.guidance, answers=str(tmp_path / "later.jsonl"))
    before = snapshot(dataclasses.replace(config, guidance=guidance))
    assert "guidance.answers" not in before["files"]
    (tmp_path / "later.jsonl").write_text("{}")
    after = snapshot(dataclasses.replace(config, guidance=guidance))
    assert len(after["files"]["guidance.answers"]) == 64
    assert compare(before, after) == ([], [])


def test_no_field_is_missed(config: Config) -> None:
    values = snapshot(config)
    assert compare(values, values) == ([], [])
    sections = {name.rpartition(".")[0] for name in field_names()}
    leaves = [name for name in field_names() if not isinstance(getattr(config, name, None), ModelConfig)]
    for name in leaves:
        if name in sections:
            continue
        value = 7 if name.split(".")[-1] in ("hidden_size", "num_attention_heads") else "something else"
        allowed, refused = compare(values, _with(values, name, value))
        within = {section for section in sections if name.startswith(f"{section}.")}
        may_change = not {name, *within}.isdisjoint(MAY_CHANGE | set(FILES))
        # A width changes the defaults that depend on it too.
        assert [line.split(": ")[0] for line in (allowed if may_change else refused)].count(name) == 1, name
        assert not (refused if may_change else allowed), name


def test_a_change_that_makes_another_experiment_is_refused_with_the_whole_diff(config: Config) -> None:
    before = snapshot(config)
    after = _with(_with(before, "training.seed", 5), "training.train_iters", 900)
    with pytest.raises(DriftError) as found:
        check_drift(before, after, allow=False)
    diff = "! training.seed: the checkpoint has 1234, this run 5\n  training.train_iters: the checkpoint has 200"
    assert diff in str(found.value)
    assert "training.allow_config_changes=true" in str(found.value)
    assert len(check_drift(before, after, allow=True)) == 2
    assert check_drift(before, _with(before, "training.train_iters", 900), allow=False) == [
        "training.train_iters: the checkpoint has 200, this run 900"
    ]


def test_an_input_file_is_what_is_in_it(config: Config, tmp_path: Path) -> None:
    before = snapshot(config)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(config.data.train).read_bytes())
    after = snapshot(dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(moved))))
    allowed, refused = compare(before, after)
    assert len(allowed) == 1 and not refused
    Path(config.data.train).write_text('{"prompt": "1+2="}\n')
    with pytest.raises(DriftError, match=r"! data.train: .*\(SHA-256 [0-9a-f]{12}, now [0-9a-f]{12}\)"):
        check_drift(before, snapshot(config), allow=False)


def test_mixtures_and_shards_are_what_is_in_them(config: Config, tmp_path: Path) -> None:
    def with_files(train: dict[str, float]) -> dict[str, Any]:
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, train=train))
        shards = dataclasses.replace(config.guidance, answers=str(folder))
        return snapshot(dataclasses.replace(changed, guidance=shards))

    folder = tmp_path / "answers"
    folder.mkdir()
    shard = folder / "shard_0.jsonl"
    shard.write_text("{}\n")
    one, other = str(config.data.train), str(tmp_path / "other.jsonl")
    Path(other).write_text('{"prompt": "2+2="}\n')
    before = with_files({one: 3, other: 1, "reasoning-gym:train": 1})
    assert compare(before, with_files({one: 3.0, other: 1.0, "reasoning-gym:train": 1.0})) == ([], [])
    # The order of the files decides which prompt comes when.
    for changed in ({one: 2, other: 1, "reasoning-gym:train": 1}, {other: 1, one: 3, "reasoning-gym:train": 1}):
        assert [line.split(":")[0] for line in compare(before, with_files(changed))[1]] == ["data.train"]
    corpus = tmp_path / "corpus.idx"
    corpus.write_bytes(b"index")
    corpus.with_suffix(".bin").write_bytes(b"ids")
    mixed = with_files({one: 1, str(corpus): 1})
    corpus.with_suffix(".bin").write_bytes(b"others")
    assert [line.split(":")[0] for line in compare(mixed, with_files({one: 1, str(corpus): 1}))[1]] == ["data.train"]
    shard.write_text("{}\n{}\n")
    allowed, refused = compare(before, with_files({one: 3, other: 1, "reasoning-gym:train": 1}))
    assert not allowed and [line.split(":")[0] for line in refused] == ["guidance.answers"]


def test_defaults_written_out_and_fields_of_another_version_are_no_change(config: Config) -> None:
    before = snapshot(config)
    after = _with(_with(before, "student.num_query_groups", 4), "student.kv_channels", 8)
    assert compare(before, after) == ([], [])
    assert compare(before, _with(before, "training.field_of_tomorrow", 1)) == ([], [])


@pytest.mark.parametrize("damaged", [{"student": {}}, {"student": {"num_attention_heads": 0}}, {"files": 3}, "text"])
def test_a_damaged_config_is_an_error_that_says_so(config: Config, damaged: Any) -> None:
    before = snapshot(config)
    with pytest.raises(DriftError, match="damaged"):
        check_drift({**before, **damaged} if isinstance(damaged, dict) else damaged, before, allow=False)
