"""The paper's settings; the examples for clusters: planned, accepted by a dry run, their scripts start enough ranks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from megatron_tropd.config import Config
from megatron_tropd.config_parser import load_config
from megatron_tropd.hf_config import config_values
from megatron_tropd.planner import generation_memory
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


LAUNCHERS = {
    "python": 'echo "$(printf "%q " "RANK=${RANK:-}" "CPUS=${SRUN_CPUS_PER_TASK:-}" python "$@")" >>"$CALLS"',
    "torchrun": 'echo "$(printf "%q " torchrun "$@")" >>"$CALLS"',
    "scontrol": "printf 'node1\\nnode2\\n'",
    # Runs what follows its own options, as the last task would.
    "srun": 'echo "$(printf "%q " srun "$@")" >>"$CALLS"\nwhile [[ $1 == --* ]]; do shift; done\n'
    'SLURM_PROCID=63 SLURM_LOCALID=7 SLURM_NTASKS=64 exec "$@"',
}
"""What the scripts start, as stand-ins that write their arguments down."""


def _calls(name: str, folder: Path, **environment: str) -> list[list[str]]:
    """Everything that an example's script starts, from the repository's root, with an override that has a space."""
    script, _ = CLUSTERS[name]
    folder.mkdir()
    for launcher, body in LAUNCHERS.items():
        (folder / launcher).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / launcher).chmod(0o755)
    calls = folder / "calls"
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), **environment}
    command = ["bash", f"examples/{name}/{script}", "--output_dir=runs/my run"]
    subprocess.run(command, check=True, cwd=EXAMPLES.parent, env=own)
    return [shlex.split(line) for line in calls.read_text().splitlines()]


ENVIRONMENTS = {
    "qwen3_8gpu": {},
    "qwen3_2nodes": {"NODE_RANK": "1", "MASTER_ADDR": "node1"},
    "llama3_slurm": {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8", "IMAGE": "/my images/tropd.sqsh"},
}
"""What the scripts are given on a cluster."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """What each script starts."""
    folder = tmp_path_factory.mktemp("calls")
    return {name: _calls(name, folder / name, **given) for name, given in ENVIRONMENTS.items()}


def _commands(started: list[list[str]]) -> list[list[str]]:
    """The arguments of the package's own command line, one list for each time that it is started."""
    programs = [call for call in started if call[0] != "srun"]
    return [call[call.index("megatron_tropd") + 1 :] for call in programs]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_script_checks_both_commands_and_then_starts_them(name: str, calls: dict[str, list[list[str]]]) -> None:
    dry = ["--dry-run", f"--world-size={CLUSTERS[name][1]}"]
    given = [f"examples/{name}/distill.yaml", "--output_dir=runs/my run"]
    check_train, check_generate, generate, train = _commands(calls[name])
    assert train == ["train", *given] and check_train == [*train, *dry]
    assert generate[:3] == ["generate", *given] and check_generate == [*generate, *dry]


def test_the_launchers_get_what_they_need(calls: dict[str, list[list[str]]]) -> None:
    steps = [call for call in calls["llama3_slurm"] if call[0] == "srun"]
    assert len(steps) == 4 and all("--container-image=/my images/tropd.sqsh" in step for step in steps)
    ranks = [call[:2] for call in calls["llama3_slurm"] if call[0] != "srun"]
    assert ranks == [["RANK=", "CPUS=8"]] * 2 + [["RANK=63", "CPUS=8"]] * 2
    starts = [call for call in calls["qwen3_2nodes"] if call[0] == "torchrun"]
    for start, port in zip(starts, ("29500", "29501"), strict=True):
        options = dict(zip(start[1:13:2], start[2:14:2], strict=True))
        assert options == {
            "--nnodes": "2", "--node-rank": "1", "--nproc-per-node": "8", "--master-addr": "node1",
            "--master-port": port, "-m": "megatron_tropd",
        }  # fmt: skip


def _fits(config: Config, world_size: int) -> bool:
    reserve = Assumptions().memory_reserve
    return all(
        memory.peak + reserve <= GPUS["H100"].memory for memory in generation_memory(config, world_size).values()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_teachers_cache_fits_where_the_script_generates(name: str, calls: dict[str, list[list[str]]]) -> None:
    overrides = _commands(calls[name.split("/")[0]])[2][3:]
    assert _fits(load_config(EXAMPLES / name, overrides), CONFIGS[name])
    assert not _fits(load_config(EXAMPLES / name), CONFIGS[name]), "the overrides could go"


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
        output = StringIO()
        with redirect_stdout(output):
            status = main(["generate", str(EXAMPLES / name), "--dry-run", f"--world-size={gpus}"])
        results[f"generate {name}"] = status, output.getvalue()
    return results


def test_dry_runs(tmp_path: Path) -> None:
    (results,) = run_ranks(1, _dry_runs, str(tmp_path), init_process_group=False)
    for name, (status, text) in results.items():
        assert status == 0, text
        if name.startswith("generate"):
            assert text.count("but no weights (*.safetensors) yet") == 1 and "student" not in text
            continue
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
        assert _fits(config, 8), "`generate` on eight GPUs, as its first lines say"
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
