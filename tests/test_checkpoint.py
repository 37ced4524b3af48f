"""Checkpoints: every layout reads what another wrote, and nothing is ever half there."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2)]}


def _description(step: int) -> Any:
    from megatron_tropd.checkpoint import Description, architecture
    from tests import tiny

    return Description(step, 1, tiny.VOCAB_SIZE, "tokenizer", architecture(tiny.STUDENT))


def _two_steps_save_and_a_third(folder: str) -> tuple[float, int]:
    """The loss after two more steps, and how many bytes a save expected to write."""
    from megatron_tropd import checkpoint
    from megatron_tropd.checkpoint import save_checkpoint
    from megatron_tropd.step import train_step
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    learner = tiny.build_learner(layout)
    batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=1)
    for step in (1, 2):
        train_step(learner, batch)
        save_checkpoint(Path(folder), learner, _description(step), keep=1)
    num_bytes = checkpoint._global_bytes(checkpoint._training_state(learner, is_loading=False), layout)
    train_step(learner, batch)
    return train_step(learner, batch)["loss"], num_bytes


def _load_and_take_two_steps(folder: str, world_size: int) -> list[float]:
    from megatron_tropd.checkpoint import latest_checkpoint, load_checkpoint
    from megatron_tropd.step import train_step
    from tests import tiny

    losses = []
    for tp, pp in LAYOUTS[world_size]:
        layout = tiny.start(tp=tp, pp=pp)
        learner = tiny.build_learner(layout)
        path = latest_checkpoint(Path(folder))
        assert path is not None and load_checkpoint(path, learner, _description(0)) == 2
        batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=1)
        train_step(learner, batch)
        losses.append(train_step(learner, batch)["loss"])
    return losses


@dataclass(frozen=True)
class Saved:
    folder: Path
    loss: float
    num_bytes: int


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("checkpoints")
    (found, _) = run_ranks(2, _two_steps_save_and_a_third, str(folder))
    return Saved(folder, *found)


def _check_losses(saved: Saved, found: list[list[float]]) -> None:
    """The second step after loading depends on the optimizer's moments and step count, not on the weights alone."""
    for losses in found:
        assert losses == pytest.approx([saved.loss] * len(losses), rel=1e-5)


def test_weights_and_optimizer_continue_on_four_ranks(saved: Saved) -> None:
    _check_losses(saved, run_ranks(4, _load_and_take_two_steps, str(saved.folder), 4))


def _on_one_rank(folder: str) -> tuple[list[float], tuple[float, float, int]]:
    return _load_and_take_two_steps(folder, 1), _resume_with_another_learning_rate(folder)


def test_one_rank_continues_and_takes_its_learning_rate_from_the_config(saved: Saved) -> None:
    ((losses, found),) = run_ranks(1, _on_one_rank, str(saved.folder))
    _check_losses(saved, [losses])
    assert found == (0.003, 0.5, 2)


def test_the_space_that_a_save_asks_for_is_that_of_its_tensors(saved: Saved) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(saved.folder / "step_2").read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
    assert saved.num_bytes == sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)


def test_old_checkpoints_are_pruned_and_nothing_temporary_stays(saved: Saved) -> None:
    assert sorted(path.name for path in saved.folder.iterdir()) == ["latest", "step_2"]


# ---------------------------------------------------------------------------------------- damage, found before loading


def _damage(step: Path, kind: str) -> str:
    """Break one file of a checkpoint; returns what the message has to say."""
    shard = max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    if kind == "truncated shard":
        shard.write_bytes(content[:-100])
        return f"{shard.name} is damaged: {len(content) - 100} bytes, the manifest says {len(content)}"
    if kind == "flipped byte":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        return f"{shard.name} is damaged: its SHA-256 is not the manifest's"
    if kind == "missing shard":
        shard.unlink()
        return f"{shard.name} cannot be read (No such file or directory)"
    if kind == "no manifest":
        (step / "manifest.json").unlink()
        return "manifest.json is missing or damaged"
    (step / "common.pt").write_bytes(b"")
    return "could run code"


def _make_two_steps(saved: Saved, folder: Path) -> Path:
    """A folder with step_2 and, named by `latest`, the same as step_4."""
    shutil.copytree(saved.folder, folder)
    shutil.copytree(folder / "step_2", folder / "step_4")
    (folder / "latest").write_text("step_4")
    return folder


@pytest.fixture
def two_steps(saved: Saved, tmp_path: Path) -> Path:
    return _make_two_steps(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", ["truncated shard", "flipped byte", "missing shard", "no manifest", "pickle"])
def test_damage_is_named_and_older_checkpoints_are_taken_only_when_asked(two_steps: Path, kind: str) -> None:
    from megatron_tropd.checkpoint import CheckpointError, newest_whole_checkpoint
    from megatron_tropd.integrity import verify

    verify(two_steps / "step_4")
    assert newest_whole_checkpoint(two_steps) == two_steps / "step_4"
    message = _damage(two_steps / "step_4", kind)
    with pytest.raises(CheckpointError) as found:
        verify(two_steps / "step_4")
    assert message in str(found.value)
    assert newest_whole_checkpoint(two_steps) == two_steps / "step_2"
    _damage(two_steps / "step_2", kind)
    with pytest.raises(CheckpointError):
        newest_whole_checkpoint(two_steps)


def test_a_pointer_never_leads_out_of_the_folder(two_steps: Path) -> None:
    from megatron_tropd.checkpoint import CheckpointError, latest_checkpoint

    (two_steps / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        latest_checkpoint(two_steps)


def _what_goes_wrong(folder: str, damaged: str) -> list[str]:
    """Messages of: a load of what is damaged, a disk that is too small, a write that fails on one rank."""
    import resource

    import torch.distributed as dist

    from megatron_tropd import checkpoint, integrity
    from tests import tiny

    learner = tiny.build_learner(tiny.start(tp=2, pp=1))
    messages = []

    def attempt(action: Any) -> None:
        try:
            action()
            messages.append("no error")
        except checkpoint.CheckpointError as error:
            messages.append(str(error))

    attempt(lambda: checkpoint.load_checkpoint(Path(damaged), learner, _description(0)))
    usage = integrity.shutil.disk_usage
    integrity.shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
    attempt(lambda: checkpoint.save_checkpoint(Path(folder), learner, _description(6), keep=1))
    integrity.shutil.disk_usage = usage
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    attempt(lambda: checkpoint.save_checkpoint(Path(folder), learner, _description(8), keep=1))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    attempt(lambda: checkpoint.save_checkpoint(Path(folder), learner, _description(10), keep=1))
    return messages


def _without_permission(folder: str) -> list[str]:
    """What reading and writing checkpoints in a folder that its user may not enter says."""
    import os

    from megatron_tropd import checkpoint
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    learner = tiny.build_learner(layout)
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may enter any
    messages = []
    for action in (
        lambda: checkpoint.find_checkpoint(Path(folder), fall_back=False, is_main=layout.is_main),
        lambda: checkpoint.find_checkpoint(Path(folder), fall_back=True, is_main=layout.is_main),
        lambda: checkpoint.resolve(Path(folder)),
        lambda: checkpoint.save_checkpoint(Path(folder), learner, _description(6), keep=1),
    ):
        try:
            action()
            messages.append("no error")
        except checkpoint.CheckpointError as error:
            messages.append(str(error))
    os.seteuid(os.getuid())
    return messages


def _on_two_ranks(whole: str, broken: str, damaged: str, forbidden: str) -> tuple[list[float], list[str], list[str]]:
    losses = _load_and_take_two_steps(whole, 2)
    return losses, _what_goes_wrong(broken, damaged), _without_permission(forbidden)


def test_two_ranks_continue_and_what_goes_wrong_on_one_is_an_error_on_both(saved: Saved, tmp_path: Path) -> None:
    broken, forbidden = (_make_two_steps(saved, tmp_path / name) for name in ("broken", "forbidden"))
    damaged = tmp_path / "step_4"
    shutil.copytree(broken / "step_4", damaged)
    _damage(damaged, "flipped byte")
    forbidden.chmod(0)
    try:
        found = run_ranks(2, _on_two_ranks, str(saved.folder), str(broken), str(damaged), str(forbidden))
    finally:
        forbidden.chmod(0o700)
    _check_losses(saved, [losses for losses, _, _ in found])
    for _, (load, space, write, after), (*read, make) in found:
        assert "its SHA-256 is not the manifest's" in load and "training.fall_back=true" in load
        assert "a checkpoint needs" in space and "0.0 MiB free" in space
        assert "step_8.incomplete could not be written (rank 1: " in write and "older checkpoints are intact" in write
        assert after == "no error"
        assert all("Permission denied" in text for text in read), read
        assert "step_6.incomplete cannot be made (Permission denied)" in make
    assert sorted(path.name for path in broken.iterdir()) == ["latest", "step_10"]
    assert (broken / "latest").read_text() == "step_10"


def test_a_pointer_to_something_incomplete_and_a_damaged_description_are_refused(tmp_path: Path) -> None:
    from megatron_tropd.checkpoint import CheckpointError, latest_checkpoint, read_description, resolve

    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        resolve(tmp_path)
    (tmp_path / "latest").write_text("step_3")
    (tmp_path / "step_3").mkdir()
    with pytest.raises(CheckpointError, match="latest names step_3, which is not a complete checkpoint"):
        latest_checkpoint(tmp_path)
    for text in ("", "{", json.dumps({"step": 3}), json.dumps([3])):
        (tmp_path / "step_3" / "tropd.json").write_text(text)
        with pytest.raises(CheckpointError, match="missing or damaged"):
            read_description(tmp_path / "step_3")


def test_pruning_spares_what_latest_names_and_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    from megatron_tropd.checkpoint import _prune

    # step_9 was published by a run that crashed before `latest` moved; step_4 is the newest of the resumed run.
    for name in ("step_2", "step_3", "step_4", "step_9", "step_5.incomplete", "step_best", "7"):
        (tmp_path / name).mkdir()
    _prune(tmp_path, 0, newest=tmp_path / "step_4")
    assert len(list(tmp_path.iterdir())) == 6
    _prune(tmp_path, 2, newest=tmp_path / "step_4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "step_4", "step_9", "step_best"]
    _prune(tmp_path, 1, newest=tmp_path / "step_4", keep_every=3)
    assert (tmp_path / "step_9").exists()
    _prune(tmp_path, 1, newest=tmp_path / "step_4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "step_4", "step_best"]


def _resume_with_another_learning_rate(folder: str) -> tuple[float, float, int]:
    from megatron_tropd.checkpoint import latest_checkpoint, load_checkpoint
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.step import train_step
    from tests import tiny

    layout = tiny.start(tp=1, pp=1)
    learner = tiny.build_learner(layout, optimizer=OptimizerConfig(lr=0.003, weight_decay=0.5))
    path = latest_checkpoint(Path(folder))
    assert path is not None
    load_checkpoint(path, learner, _description(0))
    metrics = train_step(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=1))
    weight_decay = max(group["weight_decay"] for group in learner.optimizer.param_groups)
    load_checkpoint(path, learner, _description(0))  # as a rollback does
    return metrics["learning_rate"], weight_decay, learner.scheduler.num_steps


def test_the_newest_stay_and_every_so_many_steps_one_besides(tmp_path: Path) -> None:
    from megatron_tropd.checkpoint import _prune

    for step in range(1, 11):
        (tmp_path / f"step_{step}").mkdir()
        _prune(tmp_path, 2, newest=tmp_path / f"step_{step}", keep_every=4)
    assert {path.name for path in tmp_path.iterdir()} == {"step_4", "step_8", "step_9", "step_10"}


@pytest.mark.parametrize("name", ["../latest", "/etc/hostname", "..", "", "a/b", "a\0b"])
def test_a_manifest_names_files_of_its_folder_alone(two_steps: Path, name: str) -> None:
    from megatron_tropd.checkpoint import CheckpointError
    from megatron_tropd.integrity import verify

    manifest = two_steps / "step_4" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    manifest.write_text(json.dumps({"files": files | {name: {"size": 6, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="not a list of file names"):
        verify(two_steps / "step_4")
