"""The paper's settings; the examples for clusters: planned, accepted by a dry run, their scripts start enough ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from megatron_tropd.config_parser import load_config
from megatron_tropd.hf_config import config_values
from megatron_tropd.planner.hardware import GPUS, Assumptions
from megatron_tropd.planner.layouts import plans
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CLUSTERS = {"qwen3_8gpu": ("run.sh", 8), "qwen3_2nodes": ("run.sh", 16), "llama3_slurm": ("train.sbatch", 64)}
"""Folder to script and number of GPUs."""
CONFIGS = {
    "qwen3_8gpu/distill.yaml": 8,
    "qwen3_2nodes/distill.yaml": 16,
    "llama3_slurm/distill.yaml": 64,
    "llama3_slurm/one_step_off.yaml": 64,
}
"""Config to number of GPUs."""
REFERENCES = {
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "llama3": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_is_the_planners(name: str) -> None:
    config = load_config(EXAMPLES / name)
    found = plans(config, CONFIGS[name], GPUS["H100"], Assumptions(), most=40)
    assert config in [plan.config for plan in found if plan.time.total <= 1.05 * found[0].time.total], (
        "plan it again: python tools/plan_run.py --config"
    )
    predicted = found[[plan.config for plan in found].index(config)].time
    (said,) = re.findall(r"predicts (\d+) s a step, of which (\d+) s are rollout", (EXAMPLES / name).read_text())
    assert (round(predicted.total), round(predicted.rollout)) == tuple(map(int, said))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_script_starts_as_many_ranks(name: str) -> None:
    script, gpus = CLUSTERS[name]
    text = _text(name, script)
    ((nodes, per_node),) = re.findall(r"^(?:nodes=(\d+) )?gpus=(\d+)$", text, flags=re.MULTILINE)
    assert int(nodes or 1) * int(per_node) == gpus
    if script.endswith(".sbatch"):
        for option, size in (("nodes", nodes), ("gpus-per-node", per_node), ("ntasks-per-node", per_node)):
            assert f"#SBATCH --{option}={size}\n" in text
    subprocess.run(["bash", "-n", str(EXAMPLES / name / script)], check=True)


def _text(name: str, file: str) -> str:
    return (EXAMPLES / name / file).read_text(encoding="utf-8")


def _stand_ins(config_path: Path) -> None:
    """The files a config names, in the working folder: whole config.json, no weights, a tokenizer of four words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = load_config(config_path)
    family = config_path.parent.name.split("_")[0]
    assert config.teacher is not None
    for model in (config.student, config.teacher):
        assert model.load is not None and model.vocab_size is not None
        reference = REFERENCES[family] | {
            "num_hidden_layers": 1, "hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1,
            "rms_norm_eps": 1e-6, "vocab_size": 1,
        }  # fmt: skip
        folder = Path(model.load)
        folder.mkdir(parents=True, exist_ok=True)
        values = config_values(model, reference, vocab_size=model.vocab_size, dtype="bfloat16")
        (folder / "config.json").write_text(json.dumps(values))
    assert config.tokenizer.model is not None
    words = {"<eos>": 0, "one": 1, "plus": 2, "two": 3}
    Tokenizer(WordLevel(words, unk_token="one")).save(f"{config.tokenizer.model}/tokenizer.json")
    Path(config.tokenizer.model, "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    for file in (config.data.train, config.data.validation):
        assert file is not None
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text('{"prompt": "one"}\n')


def _dry_runs(folder: str) -> dict[str, tuple[int, str]]:
    from megatron_tropd.__main__ import main

    results = {}
    for name, gpus in CONFIGS.items():
        own = Path(folder, name)
        own.mkdir(parents=True)
        os.chdir(own)
        _stand_ins(EXAMPLES / name)
        output = StringIO()
        with redirect_stdout(output):
            status = main(["train", str(EXAMPLES / name), "--dry-run", f"--world-size={gpus}"])
        results[name] = status, output.getvalue()
    return results


def test_dry_runs(tmp_path: Path) -> None:
    (results,) = run_ranks(1, _dry_runs, str(tmp_path), init_process_group=False)
    for name, (status, text) in results.items():
        assert status == 0, text
        assert sum(set(map(int, re.findall(r"(\d+) ranks = ", text)))) == CONFIGS[name]  # of both sides together
        assert text.count("but no weights (*.safetensors) yet") == 2, "student and teacher have a config.json alone"
        assert "teacher_answers.jsonl is not there yet" in text


def _run_planned(folder: str) -> tuple[int, str]:
    from megatron_tropd.__main__ import main
    from tools.plan_run import main as plan

    os.chdir(folder)
    source, written = EXAMPLES / "llama3_slurm" / "distill.yaml", Path("written.yaml")
    output = StringIO()
    with redirect_stdout(output):
        assert plan(["--config", str(source), "--gpus", "64", "--layout", "3", "--write", str(written)]) == 0
        _stand_ins(source)
        assert load_config(written) != load_config(source)
        models = load_config(source)
        assert replace(load_config(written).student, load=None) == replace(models.student, load=None)
        status = main(["train", str(written), "--dry-run", "--world-size=64"])
    return status, output.getvalue()


def test_what_the_planner_writes_passes_a_dry_run(tmp_path: Path) -> None:
    ((status, text),) = run_ranks(1, _run_planned, str(tmp_path), init_process_group=False)
    assert status == 0, text
    assert "limited by its rollout" in text


PAPER = {
    "qwen3_1p7b_from_nemotron_4b": (1_720_574_976, 4_022_468_096),
    "deepseek_1p5b_from_skywork_math_7b": (1_777_088_000, 7_615_616_512),
    "deepseek_1p5b_from_skywork_7b": (1_777_088_000, 7_615_616_512),
}
"""Config to the parameters of the published student and teacher architectures."""


def test_the_papers_settings_are_the_papers() -> None:
    assert {path.stem for path in (EXAMPLES / "paper").glob("*.yaml")} == set(PAPER)
    for name in PAPER:
        config = load_config(EXAMPLES / "paper" / f"{name}.yaml")
        options, optimizer, training = config.objective_options, config.optimizer, config.training
        assert (config.objective, options.gate, options.outlier, options.renormalize) == (
            "tropd", "bernoulli", "fkl", "none",
        )  # fmt: skip
        assert (options.top_k, options.beta, training.normalization) == (64, 0.001, "tokens")
        assert (config.guidance.schedule, config.guidance.fraction) == ("half-cosine", 1.0)
        assert config.guidance.max_prefix_length in (None, config.rollout.max_response_length)
        assert (training.train_iters, training.global_batch_size, config.rollout.samples_per_prompt) == (200, 512, 4)
        assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (5e-6, 0.0, "constant")
        assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
        assert (optimizer.clip_grad, optimizer.lr_warmup_iters) == (1.0, 0)
        assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_length) == (
            1.0,
            1.0,
            8192,
        )


def _sizes_on_meta() -> dict[str, tuple[int, int]]:
    import torch

    from megatron_tropd import distributed
    from megatron_tropd.models import build_model

    layout = distributed.initialize(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1, timeout_minutes=1
    )
    on_meta = replace(layout, device=torch.device("meta"))
    sizes = {}
    for name in PAPER:
        config = load_config(EXAMPLES / "paper" / f"{name}.yaml")
        counts = []
        for model in (config.student, config.teacher):
            assert model is not None and model.vocab_size is not None
            with torch.device("meta"):
                built = build_model(
                    model,
                    on_meta,
                    vocab_size=model.vocab_size,
                    max_sequence_length=9216,
                    dtype=torch.bfloat16,
                    seed=None,
                )
            assert built.vocab_size == model.vocab_size, "rows of padding would be counted"
            counts.append(sum(parameter.numel() for parameter in built.parameters()))
        sizes[name] = counts[0], counts[1]
    distributed.finish(layout)
    return sizes


def test_the_papers_models_have_their_published_sizes() -> None:
    (sizes,) = run_ranks(1, _sizes_on_meta, init_process_group=False)
    assert sizes == PAPER
