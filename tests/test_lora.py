"""LoRA students: gradients of a dense reference in every layout, checkpoints of adapters alone, generation, exports."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("peft")
from tests import hf_models

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"tp1": {"tp": 1, "pp": 1}},
    2: {
        "tp2": {"tp": 2, "pp": 1},
        "tp2 sequence": {"tp": 2, "pp": 1, "sequence_parallel": True},
        "tp2 recompute": {"tp": 2, "pp": 1},
        "pp2": {"tp": 1, "pp": 2},
        "pp2 recompute": {"tp": 1, "pp": 2},
        "dp2": {"tp": 1, "pp": 1},
        "cp2": {"tp": 1, "pp": 1, "cp": 2},
        "cp2 recompute": {"tp": 1, "pp": 1, "cp": 2},
    },
}
TEACHERS = ("apart", "base", "base ahead")
MODES = ("fused", "fused-recompute", "logits")
RANK, ALPHA = 4, 8.0
TOKENS = torch.arange(24).reshape(2, 12) * 7 % hf_models.VOCAB_SIZE


def _modes(name: str, teacher: str) -> tuple[str, ...]:
    return MODES if teacher == "apart" and name in ("tp1", "tp2", "pp2") else MODES[:1]


def _lora(**changes: Any) -> Any:
    from megatron_tropd.config_lora import LoraConfig

    return LoraConfig(**{"rank": RANK, "alpha": ALPHA} | changes)


def _learner(layout: Any, name: str, teacher: str, **changes: Any) -> Any:
    from tests import tiny

    return tiny.build_learner(
        layout,
        lora=_lora(base_is_teacher=teacher != "apart"),
        ahead=(layout.tensor_parallel_size, layout.pipeline_size) if teacher == "base ahead" else None,
        recompute=name.endswith("recompute"),
        **changes,
    )


def _batch(layout: Any) -> Any:
    from tests import tiny

    return tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)


def _work(folder: str, hf: str, world_size: int) -> dict[str, dict[str, Any]]:
    """Everything that is compared, by layout and then by what it is; gradients go to files."""
    from tests import tiny

    found: dict[str, dict[str, Any]] = {}
    for name, sizes in LAYOUTS[world_size].items():
        layout = tiny.start(**sizes)
        _write_gradients(Path(folder), name, layout)
        mine = found[name] = {"fingerprint": _fingerprint(layout)}
        if "recompute" in name:
            continue
        mine["tokens"] = _generate(layout)
        mine |= _continue_or_begin(Path(folder) / "checkpoints", name, layout)
        if "sequence" not in name and name != "dp2":
            mine["logits"] = _export(Path(folder), Path(hf), name, layout)
        if name == "tp1":
            mine["dense"] = _compare_with_dense(layout)
            mine["sizes"] = _sizes(layout)
    return found


def _write_gradients(folder: Path, name: str, layout: Any) -> None:
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.step import forward_backward
    from tests import tiny

    for teacher in TEACHERS:
        learner = _learner(layout, name, teacher, optimizer=OptimizerConfig(use_distributed_optimizer=False))
        for mode in _modes(name, teacher):
            learner.stage.output_head = mode
            sums, _ = forward_backward(learner, _batch(layout))
            gradients = tiny.whole_gradients(learner)
            if layout.tensor_parallel_rank == layout.data_parallel_rank == layout.context_parallel_rank == 0:
                torch.save((gradients, sums), folder / f"{name}-{teacher}-{mode}-{layout.pipeline_rank}.pt")


def _fingerprint(layout: Any) -> list[str]:
    """Of an untied and a padded base, and of one that differs in one element."""
    from megatron_tropd.models import build_model
    from megatron_tropd.weights import weights_fingerprint
    from tests import tiny

    sizes = {"vocab_size": tiny.VOCAB_SIZE, "max_sequence_length": 64, "dtype": torch.float32}
    found = []
    for config in (tiny.STUDENT, tiny.TEACHER):
        model = build_model(config, layout, seed=1, **sizes)
        found.append(weights_fingerprint(model, layout, config, vocab_size=tiny.VOCAB_SIZE))
    if layout.is_first_stage and layout.tensor_parallel_rank == 0:
        model.decoder.layers[0].self_attention.linear_proj.weight.data[3, 5] += 1e-6
    return [*found, weights_fingerprint(model, layout, config, vocab_size=tiny.VOCAB_SIZE)]


def _generate(layout: Any) -> list[tuple[int, ...]]:
    from megatron_tropd.config import RolloutConfig
    from megatron_tropd.prompt import Prompt
    from megatron_tropd.rollout import build_engine
    from megatron_tropd.types import RolloutRequest
    from tests import tiny

    learner = _learner(layout, "", "base")
    sizes = {"vocab_size": learner.vocab_size, "eos_id": learner.vocab_size + 1, "seed": 5}
    engine = build_engine(learner.stage.module, layout, RolloutConfig(max_batch_size=4), **sizes)
    prompt = Prompt(id="p", text="p", tokens=(2, 9, 4), answer="")
    requests = [RolloutRequest(sample, prompt, ()) for sample in range(4)]
    with_adapters = [each.response for each in engine.generate(requests, max_response_length=8)]
    if layout.tensor_parallel_size * layout.pipeline_size == 1:
        merged = tiny.build_learner(layout, teacher=None)
        _copy_merged(learner.stage.module, merged.stage.module)
        engine = build_engine(merged.stage.module, layout, RolloutConfig(max_batch_size=4), **sizes)
        assert with_adapters == [each.response for each in engine.generate(requests, max_response_length=8)]
        assert learner.stage.module.training
    else:
        engine = _on_a_copy(learner).build(RolloutConfig(max_batch_size=4), **sizes)
        assert with_adapters == [each.response for each in engine.generate(requests, max_response_length=8)]
    return with_adapters


def _on_a_copy(learner: Any) -> Any:
    """Engines on an inference copy, which follows base and adapters and is checked when it does."""
    from megatron_tropd.engines import Engines
    from megatron_tropd.refit import build_inference_copy, inference_layout
    from tests import tiny

    layout, student = learner.layout, learner.stage.module
    copy = build_inference_copy(
        tiny.STUDENT,
        ([student], layout),
        inference_layout(layout, tensor_model_parallel_size=3 - layout.tensor_parallel_size),
        padded_vocab_size=student.vocab_size,
        max_sequence_length=64,
        dtype=torch.float32,
        check_interval=1,
        lora=_lora(),
    )
    return Engines(student, layout, copy=copy, version=lambda: 1)


def _copy_merged(adapted: Any, plain: Any) -> None:
    from megatron_tropd.lora import is_adapter, merger

    merged, own = merger(adapted), dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        if not is_adapter(name):
            own[name].data.copy_(merged(parameter))


def _compare_with_dense(layout: Any) -> float:
    """Largest error of an adapter's gradient against that of W = W0 + s B A: dA = s B^T dW, dB = s dW A^T."""
    from megatron_tropd.lora import adapted_layers
    from megatron_tropd.step import forward_backward
    from tests import tiny

    adapted, plain = _learner(layout, "", "apart"), tiny.build_learner(layout)
    _copy_merged(adapted.stage.module, plain.stage.module)
    for learner in (adapted, plain):
        forward_backward(learner, _batch(layout))
    worst = 0.0
    for name, linear in adapted_layers(adapted.stage.module):
        whole_OI = plain.stage.module.get_parameter(f"{name}.weight").main_grad
        adapter = linear.adapter
        pairs = [
            (adapter.lora_A.main_grad, ALPHA / RANK * adapter.lora_B.T @ whole_OI),
            (adapter.lora_B.main_grad, ALPHA / RANK * whole_OI @ adapter.lora_A.T),
        ]
        worst = max([worst, *(float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs)])
    return worst


def _sizes(layout: Any) -> dict[str, int]:
    """Elements of adapters, of Megatron's gradient buffers, and of the optimizer's moments; what a step moves."""
    from megatron_tropd.lora import is_adapter
    from megatron_tropd.step import train_step
    from tests import measured_bytes

    learner = _learner(layout, "", "base")
    before = {name: parameter.detach().clone() for name, parameter in learner.stage.module.named_parameters()}
    train_step(learner, _batch(layout))
    moved = {
        name for name, parameter in learner.stage.module.named_parameters() if not torch.equal(parameter, before[name])
    }
    bytes_of = measured_bytes.resident_bytes(learner)
    return {
        "adapters": sum(tensor.numel() for name, tensor in before.items() if is_adapter(name)),
        "gradients": bytes_of["gradients"] // 4,
        "optimizer": bytes_of["optimizer"] // 4,
        "base moved": sum(not is_adapter(name) for name in moved),
        "adapters moved": len(moved),
        "adapter tensors": sum(is_adapter(name) for name in before),
    }


def _description(step: int, base: str = "aaaa", **changes: Any) -> Any:
    from megatron_tropd.checkpoint import Description
    from megatron_tropd.config import architecture
    from tests import tiny

    adapter = _lora(**changes).shape() | {"base": None, "base_fingerprint": base}
    return Description(step, 1, tiny.VOCAB_SIZE, "tokenizer", architecture(tiny.STUDENT), adapter=adapter)


def _continue_or_begin(folder: Path, name: str, layout: Any) -> dict[str, Any]:
    """Two steps, a checkpoint, two steps more; or from that checkpoint the two steps more. Losses and last weights."""
    from megatron_tropd.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from megatron_tropd.lora import adapted_layers
    from megatron_tropd.step import train_step

    learner, batch = _learner(layout, "", "apart"), _batch(layout)
    found: dict[str, Any] = {}
    path = latest_checkpoint(folder)
    if path is None:
        for _ in range(2):
            train_step(learner, batch)
        path = save_checkpoint(folder, learner, _description(2), keep=1)
        found["losses"] = [train_step(learner, batch)["loss"] for _ in range(2)]
        found["uninterrupted"] = _weights(learner, adapted_layers)
        learner = _learner(layout, "", "apart")
    assert load_checkpoint(path, learner, _description(0)) == 2
    found["resumed losses"] = [train_step(learner, batch)["loss"] for _ in range(2)]
    found["resumed"] = _weights(learner, adapted_layers)
    found["refused"] = _refusals(path, learner) if name == "tp2" else []
    return found


def _weights(learner: Any, adapted_layers: Any) -> list[Any]:
    layers = adapted_layers(learner.stage.module)
    return [part.detach().numpy() for _, linear in layers for part in linear.adapter.parameters()]


def _refusals(path: Path, learner: Any) -> list[str]:
    from megatron_tropd.checkpoint import load_checkpoint, load_weights
    from megatron_tropd.integrity import CheckpointError
    from tests import tiny

    found = []
    sizes = {"vocab_size": tiny.VOCAB_SIZE, "tokenizer": "tokenizer"}
    attempts: list[Any] = [
        lambda: load_checkpoint(path, learner, _description(0, base="bbbb")),
        lambda: load_checkpoint(path, learner, _description(0, rank=8)),
        lambda: load_checkpoint(path, learner, replace(_description(0), adapter={})),
        lambda: load_weights(path, learner.stage.module, tiny.STUDENT, **sizes),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError) as error:
            attempt()
        found.append(str(error.value))
    return found


def _export(folder: Path, hf: Path, name: str, layout: Any) -> list[Any] | None:
    """Adapters on a Hugging Face model: written merged, as PEFT and as a checkpoint; our logits, and those of the
    checkpoint put together with its base again, on the last stage."""
    from megatron_tropd.checkpoint import Description
    from megatron_tropd.config import architecture
    from megatron_tropd.hf_config import model_config, read_config
    from megatron_tropd.hf_export import export_huggingface
    from megatron_tropd.hf_peft import export_peft
    from megatron_tropd.lora import add_adapters, trained_state
    from megatron_tropd.models import build_model
    from megatron_tropd.weights import describe_base, load_weights_of
    from tests import tiny

    config = replace(model_config(read_config(hf)), make_vocab_size_divisible_by=8)
    own = {"vocab_size": hf_models.VOCAB_SIZE}
    sizes = own | {"max_sequence_length": 64, "dtype": torch.float32, "seed": None}
    model = build_model(config, layout, megatron_linears=True, **sizes)
    load_weights_of(hf, model, layout, config, **own, tokenizer="")
    base = describe_base(str(hf), model, layout, config, **own)
    add_adapters(model, _lora(), layout, seed=4)
    tiny.draw_adapters(model, layout)
    export_huggingface(model, layout, config, folder / f"merged {name}", hf, **own)
    export_peft(model, layout, config, _lora(), folder / f"peft {name}", base=str(hf))
    logits = _logits(model, layout)
    description = Description(1, 1, hf_models.VOCAB_SIZE, "", architecture(config), adapter=_lora().shape() | base)
    _save_state(folder / f"adapters {name}", {"model": trained_state(model)}, description, layout)
    again = build_model(config, layout, **sizes)
    load_weights_of(folder / f"adapters {name}", again, layout, config, **own, tokenizer="")
    composed = _logits(again, layout)
    return None if logits is None or composed is None else [logits.numpy(), composed.numpy()]


def _save_state(path: Path, state: Any, description: Any, layout: Any) -> None:
    from dataclasses import asdict

    from megatron_tropd.integrity import seal
    from megatron_tropd.writing import on_main, write_state

    on_main(lambda: path.mkdir(), layout.is_main)
    write_state(state, path)

    def finish() -> None:
        (path / "tropd.json").write_text(json.dumps(asdict(description)))
        seal(path)

    on_main(finish, layout.is_main)


def _logits(model: Any, layout: Any) -> torch.Tensor | None:
    from tests.test_huggingface import _logits as logits_of

    return logits_of(model, layout)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.save_model(tmp_path_factory.mktemp("hf") / "llama", "llama")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, hf: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder with files, and by layout what each rank found. The checkpoint is written by tp2, the first."""
    folder = tmp_path_factory.mktemp("lora")
    results: dict[str, list[dict[str, Any]]] = {}
    for world_size in (2, 1):
        ranks = run_ranks(world_size, _work, str(folder), str(hf), world_size, timeout=400)
        results |= {name: [rank[name] for rank in ranks] for name in LAYOUTS[world_size]}
    return folder, results


def _gradients(folder: Path, name: str, teacher: str, mode: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    stages = [torch.load(path) for path in sorted(folder.glob(f"{name}-{teacher}-{mode}-?.pt"))]
    return {key: value for gradients, _ in stages for key, value in gradients.items()}, stages[-1][1]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradients_of_adapters_are_the_same_in_every_layout(found: Any, teacher: str) -> None:
    folder, results = found
    reference, sums = _gradients(folder, "tp1", teacher, "fused")
    assert len(reference) == 2 * 4 * 2 and all(".adapter.lora_" in name for name in reference)
    assert all(gradient.norm() > 0 for gradient in reference.values())
    norm = torch.cat([gradient.flatten() for gradient in reference.values()]).norm()
    for name in results:
        for mode in _modes(name, teacher):
            gradients, found_sums = _gradients(folder, name, teacher, mode)
            assert set(gradients) == set(reference), (name, mode)
            for key, gradient in gradients.items():
                error = (gradient - reference[key]).norm() / norm
                assert error < 1e-5, f"{name}, {mode}: {key} {error}"
            assert found_sums == pytest.approx(sums, rel=1e-4, abs=1e-4)


def test_gradients_are_those_of_the_dense_weight(found: Any) -> None:
    assert found[1]["tp1"][0]["dense"] < 1e-4


def test_the_base_as_teacher_is_the_same_in_both_schedules_and_no_other_teacher(found: Any) -> None:
    together, ahead, apart = (
        _gradients(found[0], "tp1", teacher, "fused") for teacher in ("base", "base ahead", "apart")
    )
    assert together[1] == pytest.approx(ahead[1], rel=1e-6, abs=1e-6)
    for name, gradient in together[0].items():
        torch.testing.assert_close(gradient, ahead[0][name])
        assert not torch.allclose(gradient, apart[0][name], rtol=0.1), name


def test_only_adapters_have_gradients_and_optimizer_state_and_move(found: Any) -> None:
    sizes = found[1]["tp1"][0]["sizes"]
    assert sizes["base moved"] == 0 and sizes["adapters moved"] == sizes["adapter tensors"] == 16
    assert sizes["adapters"] <= sizes["gradients"] < sizes["adapters"] + 16 * 64  # each starts at a multiple of 64
    assert 2 * sizes["adapters"] <= sizes["optimizer"] < 2 * (sizes["adapters"] + 16 * 64)


def test_generation_reads_the_adapters_in_every_layout(found: Any) -> None:
    tokens = {name: [rank["tokens"] for rank in ranks] for name, ranks in found[1].items() if "recompute" not in name}
    (reference,) = tokens["tp1"]  # compared with merged weights where it was made
    assert len(set(reference)) == 4
    assert all(rank == reference for ranks in tokens.values() for rank in ranks)


def test_the_fingerprint_of_a_base_is_its_own_in_every_layout(found: Any) -> None:
    prints = {tuple(rank["fingerprint"]) for ranks in found[1].values() for rank in ranks}
    ((student, teacher, changed),) = prints
    assert len({student, teacher, changed}) == 3


def test_adapters_resume_bit_for_bit_and_in_other_layouts(found: Any) -> None:
    for rank in found[1]["tp2"]:
        assert rank["losses"] == rank["resumed losses"] and len(rank["resumed"]) == 16
        for uninterrupted, resumed in zip(rank["uninterrupted"], rank["resumed"], strict=True):
            assert (uninterrupted == resumed).all()
    losses = found[1]["tp2"][0]["losses"]
    for name, ranks in found[1].items():
        for rank in ranks if "recompute" not in name else ():
            assert rank["resumed losses"] == pytest.approx(losses, rel=1e-5), name


def test_a_checkpoint_holds_adapters_alone(found: Any) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(found[0] / "checkpoints" / "step_2").read_metadata().state_dict_metadata
    tensors = {name for name in names if "lora_" in name or "embedding" in name or "weight" in name}
    assert tensors and all(".adapter.lora_" in name for name in tensors)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (0, ["trained on other weights", "aaaa", "bbbb", "student.load"]),
        (1, ["lora.rank: the checkpoint has 4, this run 8"]),
        (2, ["LoRA adapters of rank 4 alone", "set lora.rank"]),
        (3, ["holds LoRA adapters alone", "megatron-to-hf"]),
    ],
)
def test_what_does_not_fit_a_checkpoint_of_adapters(found: Any, index: int, words: list[str]) -> None:
    for rank in found[1]["tp2"]:
        assert all(word in rank["refused"][index] for word in words), rank["refused"][index]


def _peft_logits(hf: Path, adapters: Path) -> np.ndarray:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: np.ndarray = peft.PeftModel.from_pretrained(base, adapters)(TOKENS).logits.numpy()
    return logits


def test_exports_give_transformers_and_peft_our_logits(found: Any, hf: Path) -> None:
    folder, results = found
    _, plain = hf_models.frequencies_and_logits(hf, TOKENS)
    logits = {}
    for name in ("tp1", "tp2", "pp2"):
        ours, composed = next(rank["logits"] for rank in results[name] if rank["logits"] is not None)
        _, merged = hf_models.frequencies_and_logits(folder / f"merged {name}", TOKENS)
        for other in (composed, merged, _peft_logits(hf, folder / f"peft {name}")):
            assert abs(other - ours).max() < 1e-4
        logits[name] = ours
    assert abs(plain - logits["tp1"]).max() > 0.1
    for one, other in itertools.pairwise(logits.values()):
        assert abs(one - other).max() < 1e-4


def _config_file(folder: Path, hf: Path) -> Path:
    """Self-distillation on one layout, exported as PEFT; responses are short and every line has an answer."""
    import yaml

    lines = [{"prompt": f"{index}:{index + 1}=", "answer": str(2 * index + 1)} for index in range(8)]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    untied = {"ffn_hidden_size": 48, "untie_embeddings_and_output_weights": True, "make_vocab_size_divisible_by": 8}
    values = {
        "output_dir": str(folder / "run"),
        "student": {**sizes, **untied, "load": str(hf)},
        "lora": {"rank": RANK, "base_is_teacher": True, "export": "peft"},
        "teacher_context": {"prompt_template": "{answer}{prompt}", "max_prompt_length": 16},
        "tokenizer": {"kind": "huggingface", "model": str(hf)},
        "data": {"train": str(data), "validation": str(data), "max_prompt_length": 8},
        "guidance": {"schedule": "none"},
        "objective": "rkl-exact",
        "rollout": {"samples_per_prompt": 2, "max_response_length": 5},
        "parallel": {"teacher_schedule": "ahead", "tensor_model_parallel_size": 2},
        "optimizer": {"lr": 0.01},
        "training": {"train_iters": 2, "global_batch_size": 8, "micro_batch_size": 4, "save_interval": 1,
                     "async_save": True, "export_hf_on_save": True},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _train_on_and_evaluate(path: str) -> dict[str, float]:
    """Two steps, a third from the checkpoint; on rank 0, which writes them, what `evaluate` measures of the newest."""
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.evaluate import evaluate
    from megatron_tropd.trainer import train

    train(load_config(path))
    train(load_config(path, ["--training.train_iters=3"]))
    evaluate(load_config(path))
    if os.environ["RANK"] != "0":
        return {}
    found: dict[str, float] = json.loads((Path(path).parent / "run" / "evaluation.json").read_text())
    return found


def _convert(run: str, out: str, hf: str) -> None:
    from tools.convert_checkpoint import main

    assert main(["megatron-to-hf", f"--megatron={run}", f"--out={out}", f"--hf={hf}"]) == 0


def test_a_run_learns_from_its_own_base_that_knows_more(tmp_path: Path, hf: Path) -> None:
    from safetensors.torch import load_file

    evaluated, _ = run_ranks(2, _train_on_and_evaluate, str(_config_file(tmp_path, hf)), timeout=300)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert sorted(steps) == [0, 1, 2]
    assert all(line["reverse_kl_k3"] > 0 and line["grad_norm"] > 0 for line in steps.values())
    assert max(line["log_prob_gap_max"] for line in steps.values()) < 1e-4  # rollouts have the adapters, too
    # `evaluate` puts adapters and base together: the same greedy answers as the run's last evaluation.
    assert evaluated["accuracy"] == lines[-1]["accuracy"]
    first, last = (load_file(tmp_path / "run" / "hf" / f"step_{step}" / "adapter_model.safetensors") for step in (2, 3))
    assert first.keys() == last.keys() and len(first) == 4 * 7 * 2
    assert all(not torch.equal(tensor, last[name]) for name, tensor in first.items())
    run_ranks(1, _convert, str(tmp_path / "run"), str(tmp_path / "out"), str(hf), init_process_group=False)
    _, merged = hf_models.frequencies_and_logits(tmp_path / "out", TOKENS)
    assert abs(merged - _peft_logits(hf, tmp_path / "run" / "hf" / "step_3")).max() < 1e-4
