"""Weights that differ between replicas, or change by themselves, stop the run and the rank is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import config_file

data = test_run.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_flipped_bit_and_exchanged_element_changes_the_hash(dtype: torch.dtype) -> None:
    from megatron_tropd.replicas import fingerprint

    module = torch.nn.Linear(5, 7).to(dtype)
    seen = {tuple(fingerprint(module).tolist())}
    bits = module.weight.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for bit in range(8 * dtype.itemsize - 1):
        bits[3, 2] ^= 1 << bit
        seen.add(tuple(fingerprint(module).tolist()))
        bits[3, 2] ^= 1 << bit
    bits[:2] = bits[:2].flip(0)
    seen.add(tuple(fingerprint(module).tolist()))
    assert len(seen) == 8 * dtype.itemsize + 1


def test_the_hash_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd import replicas

    module = torch.nn.Linear(50, 7)
    whole = replicas.fingerprint(module)
    monkeypatch.setattr(replicas, "HASH_CHUNK", 16)
    assert torch.equal(replicas.fingerprint(module), whole)


def _train_and_corrupt(configs: list[tuple[str, str, int, int]]) -> list[str]:
    """Each run, with one bit of one weight of one rank flipped when that step begins; what ended it."""
    import torch.distributed as dist

    from megatron_tropd import trainer
    from megatron_tropd.config_parser import load_config

    original, ends = trainer.train_step, []
    for path, model, rank, step in configs:

        def corrupted(learner, batch, model=model, rank=rank, step=step):  # type: ignore[no-untyped-def]
            if batch.step == step and dist.get_rank() == rank:
                weight = next(learner.stage.get_submodule(model).parameters())
                weight.data.view(torch.int32).flatten()[11] ^= 1
            return original(learner, batch)

        trainer.train_step = corrupted
        try:
            trainer.train(load_config(path))
            ends.append("finished")
        except ValueError as error:
            ends.append(str(error))
    trainer.train_step = original
    return ends


def test_a_flipped_bit_in_one_replica_stops_every_rank_and_names_the_one(tmp_path: Path, data: Path) -> None:
    def config(name: str, interval: int, **sections: dict) -> str:
        training = {"train_iters": 3, "eval_interval": 0}
        guard = {"replica_check_interval": interval}
        return str(config_file(tmp_path / name, data, guard=guard, training=training, **sections))

    tp2 = {"tensor_model_parallel_size": 2}
    overlap = {"overlap_param_gather": True}
    cases = [
        (config("student", 1, optimizer=overlap), "module", 1, 2),
        (config("teacher", 2), "teacher", 0, 2),
        (config("alone", 1, parallel=tp2), "module", 1, 1),  # no replica to compare with
        (config("first", 2), "module", 1, 0),  # nothing remembered yet, no majority among two
        (config("whole", 2, optimizer=overlap), "module", 1, 99),
    ]
    first, second = run_ranks(2, _train_and_corrupt, cases, timeout=200)
    assert first == second
    student, teacher, alone, start, whole = first
    changed = "(first in {}.embedding.word_embeddings.weight) changed since the last optimizer step"
    assert f"step 2: the weights of rank 1 {changed.format('module')}" in student
    assert f"step 2: the weights of rank 0 {changed.format('teacher')}" in teacher
    assert f"step 1: the weights of rank 1 {changed.format('module')}" in alone
    assert "step 0: the weights of rank 0 (first in" in start and ", rank 1 (first in" in start
    assert "are not those of the other replicas" in start
    assert whole == "finished"
    assert not (tmp_path / "student" / "run" / "checkpoints" / "step_3").exists()
