"""Tokenizers of Hugging Face folders, the conversion tool, and folders as `student.load`, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_tropd.tokenizer import HuggingFaceTokenizer, huggingface_fingerprint
from megatron_tropd.tokenizer_builder import build_tokenizer
from tests.ranks import run_ranks

pytest.importorskip("safetensors")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

from tests import hf_models

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model whose embedding has three rows more than the tokenizer has ids."""
    path = tmp_path_factory.mktemp("huggingface") / "model"
    hf_models.save_model(path, "qwen2", dtype=torch.bfloat16)
    hf_models.save_tokenizer(path, num_ids=hf_models.VOCAB_SIZE - 3)
    return path


def _start(*arguments: Any, largest_file: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """``largest_file`` in bytes is where the system stops a file from growing, as a full disk would."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, check=False, preexec_fn=limit
    )


def _convert(*arguments: Any, largest_file: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    return _start("tools/convert_checkpoint.py", *arguments, largest_file=largest_file)


# ------------------------------------------------------------------------------------------------------ tokenizer


def test_a_tokenizer_folder_gives_ids_text_and_special_tokens(folder: Path) -> None:
    tokenizer = build_tokenizer("huggingface", "", str(folder))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (42, 1, 0)
    assert tokenizer.encode("0A<eos>") == [2, 19, 1]
    assert tokenizer.decode([2, 19, 1, 0]).replace(" ", "") == "0A"
    with pytest.raises(ValueError, match=r"id 42 is not in \[0, 42\)"):
        tokenizer.decode([42])


def test_the_fingerprint_is_of_what_decides_ids(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "chat"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    assert huggingface_fingerprint(copy) == huggingface_fingerprint(folder) == HuggingFaceTokenizer(copy).fingerprint
    hf_models.save_tokenizer(copy, num_ids=40)
    assert huggingface_fingerprint(copy) != huggingface_fingerprint(folder)
    (copy / "tokenizer.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        huggingface_fingerprint(copy)
    (copy / "tokenizer.json").unlink()
    assert huggingface_fingerprint(copy) is None
    (copy / "tokenizer.model").write_bytes(b"a")
    assert huggingface_fingerprint(copy) is not None


def test_tokenizer_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kind=huggingface needs tokenizer.model, a folder"):
        build_tokenizer("huggingface", "", None)
    with pytest.raises(ValueError, match="is not a folder with tokenizer.json"):
        HuggingFaceTokenizer(tmp_path / "absent")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(ValueError, match="has no end token"):
        HuggingFaceTokenizer(copy)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install megatron-tropd\[hf\]"):
        HuggingFaceTokenizer(folder)


# ----------------------------------------------------------------------------------------------------------- tool


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    out = folder.parent / "megatron"
    finished = _convert("hf-to-megatron", "--hf", folder, "--out", out, "--tp", 2)
    assert finished.returncode == 0, finished.stderr
    tensors = hf_models.tensors_of(folder).values()
    size = sum(tensor.nbytes for tensor in tensors) / 1e6
    assert f"{len(tensors)} tensors, {size:,.1f} MB of bfloat16" in finished.stdout
    return out


def test_the_tool_converts_both_ways_in_any_layout(folder: Path, converted: Path, tmp_path: Path) -> None:
    finished = _convert(
        "megatron-to-hf", "--megatron", converted, "--hf", folder, "--out", tmp_path / "back", "--pp", 2
    )
    assert finished.returncode == 0, finished.stderr
    ours, theirs = hf_models.tensors_of(tmp_path / "back"), hf_models.tensors_of(folder)
    assert set(ours) == set(theirs)
    assert all(ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_experts_are_shared_by_ranks_and_come_back_in_another_layout(tmp_path: Path) -> None:
    experts = hf_models.save_model(tmp_path / "experts", "qwen3_moe")
    for ep, message in ((3, "--ep 3 does not divide the 4 experts"), (0, "--ep must be at least 1")):
        finished = _convert("hf-to-megatron", "--hf", experts, "--out", tmp_path / "megatron", "--ep", ep)
        assert finished.returncode == 2 and message in finished.stderr
    finished = _convert("hf-to-megatron", "--hf", experts, "--out", tmp_path / "megatron", "--ep", 2)
    assert finished.returncode == 0, finished.stderr
    finished = _convert(
        "megatron-to-hf", "--megatron", tmp_path / "megatron", "--hf", experts, "--out", tmp_path / "back", "--tp", 2
    )
    assert finished.returncode == 0, finished.stderr
    ours, theirs = hf_models.tensors_of(tmp_path / "back"), hf_models.tensors_of(experts)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _check_loading(folder: str, converted: str) -> None:
    """A converted checkpoint, in a config that leaves defaults out and pads otherwise, holds the folder's weights."""
    from megatron_tropd.checkpoint import load_weights
    from megatron_tropd.config import ConfigError, ModelConfig
    from megatron_tropd.hf_mapping import mappings
    from megatron_tropd.huggingface import load_huggingface
    from megatron_tropd.models import build_model
    from megatron_tropd.tokenizer import CharacterTokenizer
    from megatron_tropd.tokenizer_builder import check_tokenizer
    from tests import tiny

    layout = tiny.start(tp=1, pp=1)
    config = ModelConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        layernorm_epsilon=1e-6,
        add_qkv_bias=True,
        make_vocab_size_divisible_by=1,
    )
    sizes = {"vocab_size": hf_models.VOCAB_SIZE, "max_sequence_length": 8, "dtype": torch.float32, "seed": 1}
    first, second = build_model(config, layout, **sizes), build_model(config, layout, **sizes)
    load_huggingface(Path(folder), first, layout, config, vocab_size=hf_models.VOCAB_SIZE)
    fingerprint = huggingface_fingerprint(folder)
    assert fingerprint is not None
    load_weights(Path(converted), second, config, vocab_size=hf_models.VOCAB_SIZE, tokenizer=fingerprint)
    assert all(map(torch.equal, first.parameters(), second.parameters()))

    on_disk = {getattr(tensor, "key", "") for tensor in first.sharded_state_dict().values()}
    ours = {re.sub(r"layers\.\d+", "layers", mapping.megatron) for mapping in mappings(config)}
    assert ours - on_disk == {"output_layer.weight"}, (
        "the table's names are those of a checkpoint; tied: no output layer"
    )

    for characters, rows, message in (("ab", 45, "another tokenizer"), ("abcd", 5, "6 ids, the model .* only 5 rows")):
        with pytest.raises(ConfigError, match=message):
            check_tokenizer(CharacterTokenizer(characters), Path(folder), rows)


def test_a_converted_checkpoint_loads_like_the_folder(folder: Path, converted: Path) -> None:
    run_ranks(1, _check_loading, str(folder), str(converted))


def test_the_tool_refuses_before_it_writes(folder: Path, converted: Path, tmp_path: Path) -> None:
    help_text = _convert("--help").stdout
    assert "hf-to-megatron" in help_text and "megatron-to-hf" in help_text
    finished = _convert("hf-to-megatron", "--hf", folder, "--out", converted, "--tp", 2)
    assert (finished.returncode, finished.stderr) == (
        2,
        f"error: the output folder {converted} exists: remove it or give another\n",
    )
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    hf_models.save_tokenizer(copy, num_ids=hf_models.VOCAB_SIZE + 1)
    finished = _convert("hf-to-megatron", "--hf", copy, "--out", tmp_path / "out")
    assert finished.returncode == 2
    assert "the tokenizer has 46 ids, the embedding only 45 rows" in finished.stderr
    hf_models.edit_config(copy, model_type="gemma")
    finished = _convert("hf-to-megatron", "--hf", copy, "--out", tmp_path / "out", "--pp", 2)
    assert finished.returncode == 2 and finished.stderr.startswith("error: config.json: model_type 'gemma'")
    finished = _convert("hf-to-megatron", "--hf", folder, "--out", tmp_path / "out", "--backend", "bridge")
    assert finished.returncode == 2 and finished.stderr.startswith(
        "error: --backend bridge needs Megatron-Bridge, which"
    )
    finished = _convert("hf-to-megatron", "--hf", folder, "--out", tmp_path / "out", "--backend", "bridge", "--tp", 2)
    assert finished.returncode == 2 and "in one process: leave out --tp" in finished.stderr
    finished = _convert("hf-to-megatron", "--hf", folder, "--out", tmp_path / "out", "--ep", 2)
    assert finished.returncode == 2 and "--ep 2 is for models with experts" in finished.stderr
    finished = _convert("megatron-to-hf", "--megatron", folder, "--hf", folder, "--out", tmp_path / "out", "--tp", 2)
    assert finished.returncode == 2 and "is a Hugging Face folder: give a checkpoint" in finished.stderr
    reference = hf_models.save_model(tmp_path / "reference", "llama")
    finished = _convert("megatron-to-hf", "--megatron", converted, "--hf", reference, "--out", tmp_path / "out")
    assert finished.returncode == 2 and "a llama config.json cannot express this model" in finished.stderr
    assert not list(tmp_path.glob("out*"))


def test_what_ranks_refuse_is_told_once(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shards = sorted(copy.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    (tmp_path / "file").touch()
    sick = Path(shutil.copytree(folder, tmp_path / "sick"))
    (last,) = (each for each in sick.glob("*.safetensors") if "model.layers.3.mlp.up_proj.weight" in load_file(each))
    tensors = load_file(last)
    tensors["model.layers.3.mlp.up_proj.weight"][-1, 0] = torch.nan  # rows of the second rank, in the last layer
    save_file(tensors, last)
    for source, out, message in (
        (sick, tmp_path / "out", f"{sick} has NaN or infinite weights: model.layers.3.mlp.up_proj.weight"),
        (copy, tmp_path / "out", f"{shards[1]} is truncated or damaged"),
        (folder, tmp_path / "file" / "out", "Not a directory"),
    ):
        finished = _convert("hf-to-megatron", "--hf", source, "--out", out, "--tp", 2)
        assert finished.returncode == 2
        assert "Traceback" not in finished.stderr, finished.stderr
        errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file", "sick"]


def test_no_space_is_one_error_and_leaves_nothing(folder: Path, converted: Path, tmp_path: Path) -> None:
    for direction, source, message in (
        ("hf-to-megatron", [], "out.incomplete/piece_00001.part could not be written"),  # after the embedding
        ("megatron-to-hf", ["--megatron", converted], "model.safetensors could not be written"),
    ):
        finished = _convert(direction, *source, "--hf", folder, "--out", tmp_path / "out", largest_file=12_000)
        assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
        errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0] and "free some space" in errors[0], finished.stderr
        assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ runs


def _config(tmp_path: Path, folder: Path, **student: Any) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in ("0A", "12", "ABC")))
    model = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "layernorm_epsilon": 1e-6,
        "add_qkv_bias": True,
        "vocab_size": hf_models.VOCAB_SIZE,
        "load": str(folder),
    }
    config = {
        "output_dir": str(tmp_path / "run"),
        "student": {**model, **student},
        "tokenizer": {"kind": "huggingface", "model": str(folder)},
        "data": {"train": str(prompts), "validation": str(prompts), "max_prompt_length": 4},
        "rollout": {"max_response_length": 4},
        "training": {"precision": "fp32"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_starts_from_a_folder_and_names_what_differs(folder: Path, tmp_path: Path) -> None:
    finished = _start("-m", "megatron_tropd", "evaluate", _config(tmp_path, folder))
    assert finished.returncode == 0, finished.stderr
    finished = _start(
        "-m", "megatron_tropd", "evaluate", _config(tmp_path, folder, ffn_hidden_size=64, vocab_size=None)
    )
    assert finished.returncode == 2
    assert (
        "ffn_hidden_size: the folder has 48, this run 64; vocab_size: the folder has 45, this run 42" in finished.stderr
    )


TOKENS = torch.arange(20).reshape(2, 10) * 7 % hf_models.VOCAB_SIZE
REFUSALS = {
    "experts": {
        "a student with experts trains with tensor_model_parallel_size 2 only where positions are spread": [
            "--parallel.tensor_model_parallel_size=2",
            "--parallel.expert_model_parallel_size=1",
        ],
        "moe_router_topk 5 is more than student.num_moe_experts 4": ["--student.moe_router_topk=5"],
        "num_moe_experts None and student.moe_ffn_hidden_size 24 belong together": ["--student.num_moe_experts=null"],
    },
    "dense": {
        "training.export_hf needs a Hugging Face folder .* Found none": [
            "--student.load=null",
            "--tokenizer.kind=characters",
        ],
        "student.load .*: a qwen2 config.json cannot express this model: qk_layernorm": ["--student.qk_layernorm=true"],
    },
}
"""Message to the overrides that bring it about."""


def _sft_twice(path: str, run: str, kind: str) -> Any:
    """Train from a folder; again, as after a crash behind the last step; then what is refused; then the checkpoint."""
    from megatron_tropd.config import ConfigError
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.trainer import sft

    sft(load_config(path))
    sft(load_config(path))
    for message, overrides in REFUSALS[kind].items():
        with pytest.raises(ConfigError, match=message):
            sft(load_config(path, overrides))
    if kind == "experts":
        _learn_from_experts(path, f"{run}-teacher")
    _export_on_save(path, f"{run}-on-save", async_save=kind == "dense")
    return _checkpoint_logits(run), {step: _checkpoint_logits(f"{run}-on-save/checkpoints/{step}") for step in KEPT}


KEPT = ("step_2", "step_3")


def _export_on_save(path: str, run: str, *, async_save: bool) -> None:
    """Train with an export beside every checkpoint, over what an earlier start left; one fails; two crashes."""
    import torch.distributed as dist

    from megatron_tropd.config_parser import load_config
    from megatron_tropd.hf_config import HuggingFaceError
    from megatron_tropd.trainer import sft

    config = load_config(
        path,
        [
            f"--output_dir={run}", "--training.export_hf=false", "--training.export_hf_on_save=true",
            "--training.save_interval=1", f"--training.async_save={async_save}",
        ],
    )  # fmt: skip
    folder = Path(run) / "hf"

    def crash(removed: str | None, *left: str) -> None:
        if dist.get_rank() == 0:
            if removed:
                shutil.rmtree(folder / removed)
            for name in left:
                (folder / name).mkdir(parents=True)
        dist.barrier()

    in_the_way = folder / "step_1.incomplete"
    crash(None, "step_3")
    if dist.get_rank() == 0:
        in_the_way.touch()
    dist.barrier()
    with pytest.raises(HuggingFaceError, match="could not be written"):
        sft(config)
    assert (Path(run) / "checkpoints" / "latest").read_text() == "step_1"  # that of the failed export
    dist.barrier()
    if dist.get_rank() == 0:
        in_the_way.unlink()
    dist.barrier()
    sft(config)
    crash("step_3", "step_4", "step_4.incomplete")
    sft(config)


def _learn_from_experts(path: str, run: str) -> None:
    """One step of a dense student under tensor parallelism, on its own answers and on the teacher's."""
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.generate import generate
    from megatron_tropd.trainer import train

    overrides = [
        f"--output_dir={run}", f"--guidance.answers={run}/answers.jsonl", "--rollout.samples_per_prompt=1",
        "--training.train_iters=1", "--training.export_hf=false", "--parallel.tensor_model_parallel_size=2",
        "--parallel.expert_model_parallel_size=1",
    ]  # fmt: skip
    config = load_config(path, overrides)
    dense = replace(config.student, num_moe_experts=None, moe_ffn_hidden_size=None, load=None)
    config = replace(config, teacher=config.student, student=dense)
    generate(config)
    train(config)


def _checkpoint_logits(run: str) -> Any:
    """Logits of the run's newest checkpoint in Megatron, each rank for itself."""
    from megatron_tropd.checkpoint import load_weights, read_description, resolve
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.models import build_model
    from tests import tiny

    layout = tiny.start(tp=1, pp=1)
    path = resolve(Path(run))
    description = read_description(path)
    config = ModelConfig(**description.architecture)
    size = description.vocab_size
    model = build_model(config, layout, vocab_size=size, max_sequence_length=16, dtype=torch.float32, seed=None)
    load_weights(path, model, config, vocab_size=size, tokenizer=description.tokenizer)
    with torch.no_grad():
        logits = model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), attention_mask=None)
    return logits[..., :size].numpy()


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_run_ends_with_a_folder_that_transformers_loads(folder: Path, tmp_path: Path, kind: str) -> None:
    """The exported weights are the last checkpoint's, moved by training, and compute what they compute in Megatron."""
    if kind == "experts":
        folder = hf_models.save_model(tmp_path / "experts", "qwen3_moe")
        experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2, "kv_channels": 16}
        untied = {"qk_layernorm": True, "add_qkv_bias": False, "untie_embeddings_and_output_weights": True}
        path = _config(tmp_path, folder, **experts, **untied)
        parallel = {"expert_model_parallel_size": 2}
    else:
        path = _config(tmp_path, folder)
        parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = yaml.safe_load(path.read_text()) | {"optimizer": {"lr": 0.01}, "parallel": parallel}
    config["training"] |= {"train_iters": 3, "global_batch_size": 2, "micro_batch_size": 1, "export_hf": True}
    del config["data"]["validation"]  # neither spread experts nor interleaved stages can generate
    path.write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    (ours, on_save), _ = run_ranks(2, _sft_twice, str(path), str(run), kind, timeout=280)
    out = run / "hf" / "step_3"
    assert [each.name for each in out.parent.iterdir()] == ["step_3"]
    _, logits = hf_models.frequencies_and_logits(out, TOKENS)
    _, before = hf_models.frequencies_and_logits(folder, TOKENS)
    assert abs(logits - before).max() > 0.01
    assert abs(ours - logits).max() < 1e-4
    assert HuggingFaceTokenizer(out).fingerprint == huggingface_fingerprint(folder)
    each = tmp_path / "run-on-save" / "hf"
    assert sorted(out.name for out in each.iterdir()) == list(KEPT), "those of the checkpoints that are kept"
    for step in KEPT:
        assert abs(on_save[step] - hf_models.frequencies_and_logits(each / step, TOKENS)[1]).max() < 1e-4
    assert abs(on_save["step_3"] - on_save["step_2"]).max() > 0.01
    if kind == "experts":
        _assert_names_of_transformer_engine(run / "checkpoints" / "step_3")


def _assert_names_of_transformer_engine(checkpoint: Path) -> None:
    """Names under which Megatron's TE layers keep experts: TEGroupedMLP, and a norm of its own before them."""
    from torch.distributed.checkpoint import FileSystemReader

    on_disk = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {name.removeprefix("model.decoder.layers.").removeprefix("decoder.layers.") for name in on_disk}
    assert {
        "self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight", "mlp.router.weight",
        "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight",
    } <= found, sorted(found)  # fmt: skip
