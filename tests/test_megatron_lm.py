"""Checkpoints as Megatron-LM writes them: loaded in another layout, legacy ones only when allowed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config import ModelConfig
from megatron_tropd.integrity import CheckpointError
from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import MODEL, config_file

data = test_run.data
STUDENT = ModelConfig(**{**MODEL, "add_qkv_bias": True})
VOCAB_SIZE = 14
ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "group_query_attention": False,
    "num_query_groups": 1,  # of what is switched off
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "qk_layernorm": False,
    "add_qkv_bias": True,
    "num_experts": None,
    "moe_router_topk": 4,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": False,
    "padded_vocab_size": 16,
    "tensor_model_parallel_size": 2,
    "data_path": ["0.3", "/data/a", "0.7", "/data/b"],
}


def _write_as_megatron_lm(folder: Path) -> None:
    """``iter_0000007`` at tp 2, as core 0.19 writes it; ``legacy/iter_0000007`` is the same as older ones wrote it."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict
    from megatron.core.dist_checkpointing.strategies.common import save_common
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlan
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    new, legacy = folder / "iter_0000007", folder / "legacy" / "iter_0000007"
    arguments = Namespace(
        **ARGUMENTS, params_dtype=torch.float32, attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder,
    )  # fmt: skip
    state = {"model": _build(tp=2).sharded_state_dict(), "args": arguments, "iteration": 7, "checkpoint_version": 3.0}
    if dist.get_rank() == 0:
        new.mkdir()
    dist.barrier()
    dist_checkpointing.save(state, str(new))
    if dist.get_rank() == 0:
        shutil.copytree(new, legacy)
        save_common(load_common_state_dict(new), str(legacy))
        metadata = pickle.loads((legacy / ".metadata").read_bytes())
        entries = metadata.state_dict_metadata
        for name in [name for name in entries if name.startswith("common_state")]:
            del entries[name]
        metadata.planner_data = {"all_local_plans": [MCoreSavePlan()]}
        (legacy / ".metadata").write_bytes(pickle.dumps(metadata))
        for parent in (folder, legacy.parent):
            (parent / "latest_checkpointed_iteration.txt").write_text("7\n")
    dist.barrier()


def _build(*, tp: int, pp: int = 1, config: ModelConfig = STUDENT, seed: int = 3) -> Any:
    from megatron_tropd.models import build_model
    from tests import tiny

    sizes = {"vocab_size": VOCAB_SIZE, "max_sequence_length": 8, "dtype": torch.float32}
    return build_model(config, tiny.start(tp=tp, pp=pp), seed=seed, **sizes)


def _load(folder: str, evaluations: list[str]) -> tuple[list[str], list[str]]:
    """What loading the folders' checkpoints in another layout says, and what whole runs that start from them say."""
    from megatron_tropd.megatron_lm import find_iteration, load_megatron_lm

    root = Path(folder)
    _write_as_megatron_lm(root)
    messages = []
    for path, config, allow, vocab_size in (
        (root, STUDENT, False, VOCAB_SIZE),
        (root / "legacy" / "iter_0000007", STUDENT, True, VOCAB_SIZE),
        (root / "legacy", STUDENT, False, VOCAB_SIZE),
        (root, STUDENT, False, 17),
        (root, replace(STUDENT, ffn_hidden_size=64), False, VOCAB_SIZE),
    ):
        expected, loaded = _build(tp=1, pp=2), _build(tp=1, pp=2, config=config, seed=4)
        iteration = find_iteration(path)
        assert iteration is not None
        try:
            load_megatron_lm(iteration, loaded, config, vocab_size=vocab_size, allow_legacy=allow)
            same = all(map(torch.equal, expected.parameters(), loaded.parameters()))
            messages.append("the weights" if same else "other weights")
        except CheckpointError as error:
            messages.append(str(error))
    return messages, test_run._messages_of(evaluations, "evaluate")


def test_weights_come_in_another_layout_and_legacy_ones_only_when_allowed(tmp_path: Path, data: Path) -> None:
    student = {"load": str(tmp_path / "legacy"), "add_qkv_bias": True}
    allow = {"allow_legacy_checkpoints": True}
    evaluations = [
        str(config_file(tmp_path / str(index), data, student=student, training=training))
        for index, training in enumerate(({}, allow))
    ]
    for (new, legacy, refused, rows, width), (run_refused, run_allowed) in run_ranks(
        2, _load, str(tmp_path), evaluations, timeout=200
    ):
        assert new == legacy == "the weights"
        for message in (refused, run_refused):
            assert "common.pt is a pickle, as Megatron-Core before 0.19 wrote it" in message
            assert "training.allow_legacy_checkpoints=true" in message
        assert "embedding.word_embeddings.weight: the checkpoint has [16, 32], this run wants 17 or more rows" in rows
        assert "ffn_hidden_size: the checkpoint has 48, this run 64" in width
        assert run_allowed == "no error"
    assert json.loads((tmp_path / "1" / "run" / "evaluation.json").read_text())["num_prompts"] == 16
    events = [json.loads(line) for line in (tmp_path / "1" / "run" / "logs" / "rank_0.jsonl").read_text().splitlines()]
    warnings = [event["message"] for event in events if event.get("level") == "warning"]
    assert any("allow_legacy_checkpoints: reading the pickle" in text for text in warnings)
    assert any("its tokenizer is not compared" in text for text in warnings)
    _check_a_pickle_that_runs_code(tmp_path)


def _check_a_pickle_that_runs_code(folder: Path) -> None:
    """Allowed or not, and whichever of the two pickles it is."""
    from megatron_tropd.megatron_lm import check_arguments

    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "pwned",)

    legacy = folder / "legacy" / "iter_0000007"
    check_arguments(legacy, STUDENT, allow_legacy=True)
    common = torch.load(legacy / "common.pt", weights_only=True)
    torch.save({**copy.deepcopy(common), "iteration": Malicious()}, legacy / "common.pt")
    with pytest.raises(CheckpointError, match="does not read without running code"):
        check_arguments(legacy, STUDENT, allow_legacy=True)
    torch.save({"iteration": 7}, legacy / "common.pt")
    with pytest.raises(CheckpointError, match="does not say of which model it is"):
        check_arguments(legacy, STUDENT, allow_legacy=True)
    (legacy / "common.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(CheckpointError, match="is damaged, or holds"):
        check_arguments(legacy, STUDENT, allow_legacy=True)
    new = folder / "iter_0000007"
    for shard in new.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="iter_0000007 is damaged"):
        check_arguments(new, STUDENT, allow_legacy=False)
    (new / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="not part of a checkpoint's metadata"):
        check_arguments(new, STUDENT, allow_legacy=True)
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"moe_router_topk": 1, "rope_scaling_factor": 2.0}, None),  # of a dense model without scaling
        ({"group_query_attention": True, "num_query_groups": 2}, "num_query_groups: the checkpoint has 2, this run 4"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon: the checkpoint has 1e-06, this run 1e-05"),
        ({"num_experts": 8}, "num_experts: the checkpoint has 8, this run None"),
        ({"use_rope_scaling": True}, "rope_scaling_factor: the checkpoint has 8.0, this run None"),
        ({"window_size": (128, 0)}, "window_size: the checkpoint has '(128, 0)', this run None"),
        ({"rotary_percent": 0.5}, "rotary_percent: the checkpoint has 0.5, this run 1.0"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p: the checkpoint has True, this run False"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type: the checkpoint has"),
    ],
)
def test_arguments_that_make_another_model_are_named(changes: dict[str, Any], difference: str | None) -> None:
    from megatron_tropd.megatron_lm import differing_arguments

    found = differing_arguments(ARGUMENTS | changes, STUDENT)
    assert len(found) == (difference is not None)
    assert difference is None or difference in found[0]


def test_rope_scaling_that_only_the_config_has_is_another_model() -> None:
    from megatron_tropd.megatron_lm import differing_arguments

    found = differing_arguments(ARGUMENTS, replace(STUDENT, rope_scaling_factor=8.0))
    assert found == ["rope_scaling_factor: the checkpoint has None, this run 8.0"]


def test_which_iteration_a_folder_means_and_what_is_never_read(tmp_path: Path) -> None:
    from megatron_tropd.megatron_lm import check_arguments, iteration_in

    assert iteration_in(tmp_path) is None
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for text, name in (("12", "iter_0000012"), ("release\n", "release")):
        tracker.write_text(text)
        assert iteration_in(tmp_path) == tmp_path / name
    with pytest.raises(CheckpointError, match="release is not there"):
        check_arguments(tmp_path / "release", STUDENT, allow_legacy=True)
    tracker.write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not an iteration"):
        iteration_in(tmp_path)
    (tmp_path / "iter_0000012" / "mp_rank_00").mkdir(parents=True)
    assert iteration_in(tmp_path / "iter_0000012") == tmp_path / "iter_0000012"
    with pytest.raises(CheckpointError, match="ckpt-convert-format torch_dist"):
        check_arguments(tmp_path / "iter_0000012", STUDENT, allow_legacy=True)
    (tmp_path / "tropd.json").touch()
    assert iteration_in(tmp_path) is None  # one of ours
