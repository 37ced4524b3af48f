"""Hugging Face folders: the same logits as transformers, the same bits after a round trip, and what is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks

pytest.importorskip("transformers")
from tests import hf_models

LAYOUTS = {2: [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (2, 1, 2), (1, 2, 2)]}
"""World size to (tensor, pipeline, expert) parallel sizes."""
TOKENS = torch.arange(24).reshape(2, 12) * 7 % hf_models.VOCAB_SIZE


def _load(folder: Path, layout: Any, *, dtype: torch.dtype = torch.float32, padded_to: int = 8) -> tuple[Any, Any]:
    from megatron_tropd.hf_config import model_config, read_config
    from megatron_tropd.huggingface import load_huggingface
    from megatron_tropd.models import build_model

    config = replace(model_config(read_config(folder)), make_vocab_size_divisible_by=padded_to)
    model = build_model(config, layout, vocab_size=hf_models.VOCAB_SIZE, max_sequence_length=64, dtype=dtype, seed=None)
    load_huggingface(folder, model, layout, config, vocab_size=hf_models.VOCAB_SIZE)
    return model, config


def _logits(model: Any, layout: Any) -> torch.Tensor | None:
    """Whole logits on the last stage, None elsewhere; stages pass the hidden state by hand."""
    import torch.distributed as dist

    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    hidden = torch.empty(TOKENS.shape[1], TOKENS.shape[0], model.config.hidden_size)
    stages = dist.get_process_group_ranks(layout.groups.pp)
    if not layout.is_first_stage:
        dist.recv(hidden, stages[layout.pipeline_rank - 1])
        model.set_input_tensor(hidden)
    model.eval()  # Megatron's experts refuse to train under tensor parallelism without sequence parallelism
    with torch.no_grad():
        output = model(TOKENS, positions, attention_mask=None)
    if not layout.is_last_stage:
        dist.send(output.contiguous(), stages[layout.pipeline_rank + 1])
        return None
    shards = [torch.empty_like(output) for _ in range(layout.tensor_parallel_size)]
    dist.all_gather(shards, output.contiguous(), group=layout.groups.tp)
    whole = torch.cat(shards, dim=-1)
    assert not whole[..., hf_models.VOCAB_SIZE :].any()
    return whole[..., : hf_models.VOCAB_SIZE]


def _fits(name: str, ep: int) -> bool:
    """Whether the experts of a family divide over ``ep`` ranks."""
    return ep == 1 or hf_models.FAMILIES[name].get("num_experts", 1) % ep == 0


def _logits_and_exports(folders: dict[str, str], out: str, world_size: int) -> dict[str, tuple[Any, Any]]:
    from megatron_tropd.hf_export import export_huggingface
    from tests import tiny

    found = {}
    for tp, pp, ep in LAYOUTS[world_size]:
        layout = tiny.start(tp=tp, pp=pp, ep=ep)
        for name, folder in folders.items():
            if not _fits(name, ep):
                continue
            model, config = _load(Path(folder), layout)
            logits = _logits(model, layout)
            frequencies = model.rotary_pos_emb.inv_freq.numpy()
            found[f"{name} tp{tp} pp{pp} ep{ep}"] = (frequencies, None if logits is None else logits.numpy())
            exported = Path(out) / f"{name}-tp{tp}-pp{pp}-ep{ep}"
            transfer = export_huggingface(
                model, layout, config, exported, Path(folder), vocab_size=hf_models.VOCAB_SIZE, max_shard_bytes=20_000
            )
            sizes = [tensor.nbytes for tensor in hf_models.tensors_of(exported).values()]
            assert (transfer.num_tensors, transfer.num_bytes) == (len(sizes), sum(sizes))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: hf_models.save_model(root / name, name) for name in hf_models.FAMILIES}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logits_are_those_of_transformers_and_the_round_trip_keeps_every_bit(
    folders: dict[str, Path], tmp_path: Path, world_size: int
) -> None:
    names = {name: str(folder) for name, folder in folders.items()}
    ranks = run_ranks(world_size, _logits_and_exports, names, str(tmp_path), world_size)
    for name, folder in folders.items():
        expected_frequencies, expected = hf_models.frequencies_and_logits(folder, TOKENS)
        for tp, pp, ep in LAYOUTS[world_size]:
            if not _fits(name, ep):
                continue
            case = f"{name} tp{tp} pp{pp} ep{ep}"
            logits = [each[case][1] for each in ranks if each[case][1] is not None]
            assert len(logits) == world_size // pp
            for each in logits:
                np.testing.assert_allclose(each, expected, atol=1e-4, rtol=0, err_msg=case)
            np.testing.assert_allclose(ranks[0][case][0], expected_frequencies, rtol=1e-6, err_msg=case)
            _assert_same_folder(tmp_path / f"{name}-tp{tp}-pp{pp}-ep{ep}", folder)


def _export_cut_off(folder: str, out: str) -> list[list[str]]:
    """Shards that each attempt wrote: cut off in the third, continued, and begun anew for other weights."""
    from megatron_tropd import hf_export
    from tests import tiny

    layout = tiny.start(tp=1, pp=1)
    model, config = _load(Path(folder), layout)
    write, attempts = hf_export.write_shard, []

    def cut_off(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if len(attempts[-1]) == 2:
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, tensors)
        attempts[-1].append(path.name)

    def recorded(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write(path, tensors)
        attempts[-1].append(path.name)

    def export(name: str, source: str | None) -> None:
        attempts.append([])
        hf_export.export_huggingface(
            model, layout, config, Path(out) / name, Path(folder), vocab_size=hf_models.VOCAB_SIZE,
            max_shard_bytes=20_000, source=source,
        )  # fmt: skip

    for name, sources in {"same": ("a", "a"), "other": ("a", "b"), "nameless": (None, None)}.items():
        hf_export.write_shard = cut_off
        with pytest.raises(KeyboardInterrupt):
            export(name, sources[0])
        hf_export.write_shard = recorded
        export(name, sources[1])
    return attempts


def test_an_export_that_was_killed_keeps_the_shards_it_has(folders: dict[str, Path], tmp_path: Path) -> None:
    (attempts,) = run_ranks(1, _export_cut_off, str(folders["qwen3"]), str(tmp_path))
    begun, continued, *others = (set(names) for names in attempts)
    shards = {path.name for path in (tmp_path / "same").glob("*.safetensors")}
    assert len(begun) == 2 and len(continued) == len(shards) - 2 > 1 and begun | continued == shards
    assert [len(names) for names in others] == [2, len(shards), 2, len(shards)]
    for name in ("same", "other", "nameless"):
        _assert_same_folder(tmp_path / name, folders["qwen3"])
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert "export.json" not in names and not any(name.endswith(".part") for name in names)


class _Tracker:
    """The most bytes that tensors handed to it have held at one time."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._forget, tensor.nbytes)
        return tensor

    def _forget(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _peaks(folder: str, out: str, max_shard_bytes: int) -> dict[str, int]:
    """Host bytes held at once while reading and while writing, on a rank that reads and writes."""
    from megatron_tropd import hf_export, hf_files
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    reading, writing = _Tracker(), _Tracker()
    read, gather = hf_files.TensorFiles.read, hf_export._gather
    hf_files.TensorFiles.read = lambda *args, **kwargs: reading.add(read(*args, **kwargs))  # type: ignore[method-assign]
    hf_export._gather = lambda *args, **kwargs: {  # type: ignore[assignment]
        name: writing.add(tensor) for name, tensor in gather(*args, **kwargs).items()
    }
    model, config = _load(Path(folder), layout)
    hf_export.export_huggingface(
        model, layout, config, Path(out), Path(folder), vocab_size=hf_models.VOCAB_SIZE, max_shard_bytes=max_shard_bytes
    )
    return {"reading": reading.peak, "writing": writing.peak}


def test_no_more_than_a_parameter_is_read_and_a_shard_written_at_once(tmp_path: Path) -> None:
    folder = hf_models.save_model(tmp_path / "model", "qwen3", num_hidden_layers=12)
    sizes = [tensor.nbytes for tensor in hf_models.tensors_of(folder).values()]
    reader, other = run_ranks(2, _peaks, str(folder), str(tmp_path / "out"), 40_000)
    # The parts of one parameter (three for QKV) while those of the one before are let go.
    assert 0 < reader["reading"] <= 6 * max(sizes) < sum(sizes) / 4
    # A shard, and tensors of the last parameter that belong to the next.
    assert 0 < reader["writing"] <= 40_000 + 2 * max(sizes) < sum(sizes) / 2
    assert other["reading"] == reader["reading"] and other["writing"] == 0


def _assert_same_folder(found: Path, expected: Path) -> None:
    ours, theirs = hf_models.tensors_of(found), hf_models.tensors_of(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    index = json.loads((found / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(theirs)
    assert all((found / file).stat().st_size < 30_000 for file in index["weight_map"].values())
    assert len(set(index["weight_map"].values())) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------- config


def _config_values(name: str, **changes: Any) -> dict[str, Any]:
    values = {**hf_models.SIZES, "rms_norm_eps": 1e-6, **hf_models.FAMILIES[name], **changes}
    return {key: value for key, value in values.items() if value is not ...}


def test_the_rope_of_transformers_4_and_5_is_read_and_written_back() -> None:
    from megatron_tropd.hf_config import config_values, model_config

    scaling = {key: value for key, value in hf_models.LLAMA3_ROPE.items() if key != "rope_theta"}
    new = _config_values("llama3", dtype="bfloat16")
    old = _config_values("llama3", torch_dtype="bfloat16", rope_parameters=..., rope_theta=500000, rope_scaling=scaling)
    for values in (new, old):
        config = model_config(values)
        assert (config.rotary_base, config.rope_scaling_factor) == (500000, 8.0)
        written = config_values(config, values, vocab_size=hf_models.VOCAB_SIZE, dtype="bfloat16")
        assert written == {**values, "architectures": ["LlamaForCausalLM"]}


def test_a_student_of_another_size_is_written_over_its_reference() -> None:
    from megatron_tropd.hf_config import HuggingFaceError, config_values, model_config

    reference = _config_values("qwen3", layer_types=["full_attention"] * 4)
    student = replace(model_config(reference), num_layers=2, ffn_hidden_size=24, rope_scaling_factor=4.0)
    written = config_values(student, reference, vocab_size=45, dtype="float32")
    assert written["num_hidden_layers"] == len(written["layer_types"]) == 2
    assert model_config(written) == student
    with pytest.raises(
        HuggingFaceError, match="a llama config.json cannot express this model: qk_layernorm: .* another"
    ):
        config_values(student, _config_values("llama"), vocab_size=45, dtype="float32")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gemma"}, "model_type 'gemma' .* supported: llama .*mistral.*qwen2.*qwen3"),
        ("llama", {"model_type": "qwen3_next"}, "model_type 'qwen3_next' .* is not supported"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures .* is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rms_norm_eps": ...}, "rms_norm_eps must be a number above 0, found None"),
        ("llama", {"num_hidden_layers": "4"}, "num_hidden_layers must be a whole number"),
        ("llama", {"rope_theta": 10000.5}, "rope_theta = 10000.5 is not a whole number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling .*linear.* is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling .*yarn"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of each head"),
        (
            "llama",
            {"rope_parameters": {**hf_models.LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
            "{'original_max_position_embeddings': 4096} is not supported: Megatron fixes",
        ),
        ("llama", {"rope_parameters": {**hf_models.LLAMA3_ROPE, "high_freq_factor": 8}}, "'high_freq_factor': 8"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = .0. is not supported: only"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported: only 1 is"),
        ("qwen3_moe", {"num_experts": ...}, "num_experts must be a whole number of at least 1, found None"),
        ("mistral", {"sliding_window": 64}, "sliding_window = 64 is shorter than max_position_embeddings"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, "sliding_window = 64"),
    ],
)
def test_what_megatron_cannot_express_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    from megatron_tropd.hf_config import HuggingFaceError, model_config

    with pytest.raises(HuggingFaceError, match=message):
        model_config(_config_values(name, **changes))


def test_both_names_of_the_number_of_experts_are_read_and_written_back() -> None:
    from megatron_tropd.hf_config import config_values, model_config

    old = _config_values("qwen3_moe", torch_dtype="float32", architectures=["Qwen3MoeForCausalLM"])
    new = {("num_local_experts" if key == "num_experts" else key): value for key, value in old.items()}
    for values in (old, new):
        config = model_config(values)
        assert (config.num_moe_experts, config.moe_router_topk, config.moe_router_pre_softmax) == (4, 2, False)
        written = config_values(replace(config, num_moe_experts=8), values, vocab_size=45, dtype="float32")
        assert model_config(written).num_moe_experts == 8 and ("num_experts" in written) == ("num_experts" in values)


def test_windows_that_change_nothing_are_accepted() -> None:
    from megatron_tropd.hf_config import model_config

    assert model_config(_config_values("mistral", sliding_window=128)) == model_config(_config_values("mistral"))
    for changes in ({}, {"use_sliding_window": True, "max_window_layers": 4}):
        assert model_config(_config_values("qwen2", sliding_window=64, **changes)).add_qkv_bias


# ----------------------------------------------------------------------------------------------- damaged folders


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The folder's tensors, changed, as one file."""
    from safetensors.torch import save_file

    tensors = hf_models.tensors_of(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def _shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def _move_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))


def _point_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))


def _only_pickled(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def _truncate(folder: Path) -> None:
    content = _shard(folder, 2).read_bytes()
    _shard(folder, 2).write_bytes(content[: len(content) // 2])


def _with_nan(tensors: dict[str, torch.Tensor]) -> None:
    # Rows of the second tensor-parallel rank: every rank has to refuse, not the reader alone.
    tensors["model.layers.3.mlp.up_proj.weight"][-1, 0] = torch.nan


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing-shard": (lambda folder: _shard(folder, 2).unlink(), "lacks files that its index names: model-00003-of"),
    "truncated": (_truncate, "model-00003-of-.* is truncated or damaged"),
    "moved": (_move_in_index, "lists tensors that are not in the file it names: model.norm.weight"),
    "outside": (_point_outside, "names files outside of its folder"),
    "index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[1]"), "index.json is damaged"),
    "pickled": (_only_pickled, "only safetensors weights are read"),
    "nan": (lambda folder: _rewrite(folder, _with_nan), "NaN or infinite weights: model.layers.3.mlp.up_proj.weight"),
    "unknown": (
        lambda folder: _rewrite(folder, lambda tensors: tensors.update({"model.extra": torch.ones(2)})),
        "config and weights disagree: unknown tensors: model.extra",
    ),
    "missing-tensor": (
        lambda folder: _rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias")),
        "config and weights disagree: missing tensors: model.layers.1.self_attn.k_proj.bias",
    ),
    "integers": (
        lambda folder: _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).byte()})),
        "model.norm.weight has type U8",
    ),
    "shape": (
        lambda folder: hf_models.edit_config(folder, intermediate_size=64),
        r"layers.0.mlp.down_proj.weight has shape \[32, 48\], config.json asks for \[32, 64\]",
    ),
    "vocabulary": (
        lambda folder: hf_models.edit_config(folder, vocab_size=64),
        r"embed_tokens.weight has shape \[45, 32\], config.json asks for \[64, 32\]",
    ),
    "untied": (
        lambda folder: hf_models.edit_config(folder, tie_word_embeddings=False),
        "missing tensors: lm_head.weight",
    ),
    "tied-and-different": (
        lambda folder: _rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(45, 32)})),
        "tie_word_embeddings, but lm_head.weight differs",
    ),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
}


def _refusals(folders: dict[str, str], good: str, out: str) -> tuple[dict[str, str], list[str]]:
    """Each folder's message; then those of writing: existing output, another model's config, no space on the disk."""
    import safetensors.torch

    from megatron_tropd.hf_config import HuggingFaceError, model_config, read_config
    from megatron_tropd.hf_export import export_huggingface
    from megatron_tropd.huggingface import load_huggingface
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    messages = {}
    model, config = _load(Path(good), layout)
    for name, folder in folders.items():
        given = config if name == "config" else model_config(read_config(Path(folder)))
        with pytest.raises(HuggingFaceError) as error:
            load_huggingface(Path(folder), model, layout, given, vocab_size=given.vocab_size)
        messages[name] = str(error.value)
    load_huggingface(Path(good), model, layout, config, vocab_size=hf_models.VOCAB_SIZE)  # what was refused is in it

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    texts = []
    with pytest.raises(HuggingFaceError) as error:
        load_huggingface(Path(good), model, layout, replace(config, num_layers=2, kv_channels=4), vocab_size=46)
    texts.append(str(error.value))
    with pytest.raises(HuggingFaceError) as error:
        export_huggingface(model, layout, config, Path(good), Path(good), vocab_size=45)
    texts.append(str(error.value))
    space = shutil.disk_usage
    shutil.disk_usage = lambda path: space(path)._replace(free=1000)  # type: ignore[assignment]
    with pytest.raises(HuggingFaceError) as error:
        export_huggingface(model, layout, config, Path(out) / "full", Path(good), vocab_size=45)
    texts.append(str(error.value))
    shutil.disk_usage = space
    save_file, safetensors.torch.save_file = safetensors.torch.save_file, full
    with pytest.raises(HuggingFaceError) as error:
        export_huggingface(model, layout, config, Path(out) / "full", Path(good), vocab_size=45)
    texts.append(str(error.value))
    safetensors.torch.save_file = save_file
    if layout.tensor_parallel_rank == 1:  # it writes nothing itself
        model.decoder.layers[2].mlp.linear_fc2.weight.data[0, 0] = torch.nan
    with pytest.raises(HuggingFaceError) as error:
        export_huggingface(model, layout, config, Path(out) / "full", Path(good), vocab_size=45)
    return messages, [*texts, str(error.value)]


def test_damaged_folders_and_outputs_that_cannot_be_written_are_refused_on_every_rank(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    damaged = {}
    for name, (damage, _) in DAMAGES.items():
        damaged[name] = str(shutil.copytree(folders["qwen2"], tmp_path / name))
        damage(tmp_path / name)
    for messages, texts in run_ranks(2, _refusals, damaged, str(folders["qwen2"]), str(tmp_path)):
        for name, (_, pattern) in DAMAGES.items():
            assert re.search(pattern, messages[name]), f"{name}: {messages[name]}"
        assert re.search(
            "num_layers: the folder has 4, this run 2; kv_channels: .* 8, .* 4; vocab_size: .* 45", texts[0]
        )
        assert re.search("the output folder .* exists: remove it", texts[1])
        assert re.search("the weights take 0.1 MB, .* has 0.0 MB free: free some space", texts[2])
        assert re.search("model.safetensors could not be written .*No space left", texts[3])
        assert re.search("the model has NaN or infinite weights: model.layers.2.mlp.down_proj.weight;", texts[4])
    assert not list(tmp_path.glob("full*")), "nothing half-written stays"


def test_a_repeated_tied_output_layer_and_old_rotary_buffers_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    from megatron_tropd.hf_files import TensorFiles

    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "copy"))
    shapes = {name: tuple(tensor.shape) for name, tensor in hf_models.tensors_of(folder).items()}

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _rewrite(folder, add)
    TensorFiles(folder).check(shapes, tied="model.embed_tokens.weight")


def test_grouped_experts_of_transformer_engine_have_the_names_of_single_ones() -> None:
    """TEGroupedMLP keeps expert 11's matrices as `linear_fc1.weight11`; Megatron's local layers, one module each."""
    from megatron_tropd.hf_config import model_config
    from megatron_tropd.hf_mapping import mappings, table_name

    config = replace(model_config(_config_values("qwen3_moe")), num_moe_experts=12)
    names = {mapping.megatron for mapping in mappings(config)}
    for name in ("mlp.experts.linear_fc1.weight11", "mlp.experts.linear_fc2.weight0", "pre_mlp_layernorm.weight"):
        assert f"decoder.layers.2.{table_name(name, config)}" in names
    assert table_name("mlp.experts.linear_fc1.weight11", config) == table_name(
        "mlp.experts.local_experts.11.linear_fc1.weight", config
    )
    dense = model_config(_config_values("qwen3"))
    assert table_name("pre_mlp_layernorm.weight", dense) == "mlp.linear_fc1.layer_norm_weight"
