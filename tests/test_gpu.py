"""What needs a GPU: the Triton kernels as compiled code, bf16 and NCCL, whole runs. `make gpu`; skipped elsewhere.

Every check is against the CPU or dense float64, whose own tests run everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_run import config_file
from tests.test_run import data as data  # the fixture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

REPOSITORY = Path(__file__).resolve().parent.parent
_PATHS = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
ON_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(_PATHS)}
TILED = (8380, 8400, 8448)
"""(shared ids, student's padded vocabulary, teacher's): several tiles of a row."""


def _on_gpu[Case](case: Case) -> Case:
    moved = {
        field.name: value.cuda()
        for field in dataclasses.fields(case)  # type: ignore[arg-type]
        if isinstance(value := getattr(case, field.name), torch.Tensor)
    }
    return dataclasses.replace(case, **moved)  # type: ignore[type-var]


def test_every_objective_in_triton_agrees_with_dense_float64() -> None:
    """Value, gradient and report, in place and not; bf16 within the rounding of its gradient."""
    from tests.vocab_parallel_cases import VARIANTS, check_against_dense, make_case

    worst: dict[str, float] = {}
    for sizes, dtype, variants in (
        ((103, 112, 128), torch.float32, VARIANTS),
        ((103, 112, 128), torch.bfloat16, VARIANTS[::3]),
        (TILED, torch.float32, VARIANTS[::4]),
        (TILED, torch.bfloat16, VARIANTS[1::4]),
    ):
        case = _on_gpu(make_case(*sizes, dtype=dtype))
        for number, objective in enumerate(variants):
            options = {
                "full_statistics": objective.needs_teacher and number % 2 == 0,
                "inplace_backward": number % 3 == 0,
            }
            with torch.device("cuda"):
                errors = check_against_dense(case, objective, None, **options)
            for what, error in zip(("value", "gradient"), errors, strict=True):
                key = f"{what} {dtype} {sizes[0]}"
                worst[key] = max(worst.get(key, 0.0), error)
    print("\nlargest relative errors:", json.dumps(worst, indent=1))


def test_triton_agrees_with_the_readable_twin_at_a_real_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd.kernels.backend import BACKEND_VARIABLE
    from megatron_tropd.objectives import preset
    from tests.vocab_parallel_cases import make_case, relative_error, run_sharded

    case = _on_gpu(make_case(151643, 151936, 152064, num_tokens=256, dtype=torch.bfloat16))
    for objective in (preset("tropd"), preset("opd"), preset("rkl-exact"), preset("fkl-exact"), preset("jsd-exact")):
        found = {}
        for backend in ("triton", "torch"):
            monkeypatch.setenv(BACKEND_VARIABLE, backend)
            with torch.device("cuda"):
                found[backend] = run_sharded(case, objective, None)
        (loss, _, gradient), (twin_loss, _, twin_gradient) = found["triton"], found["torch"]
        assert relative_error(loss, twin_loss.double()) < 3e-6, objective.name
        assert relative_error(gradient, twin_gradient.double()) < 1e-3, objective.name  # a rounding to bf16 each


def test_the_same_inputs_give_the_same_bits() -> None:
    from megatron_tropd.objectives import preset
    from tests.vocab_parallel_cases import make_case, run_sharded

    case = _on_gpu(make_case(*TILED, dtype=torch.bfloat16))
    with torch.device("cuda"):
        first, second = (run_sharded(case, preset("tropd", top_k=64), None) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])


def test_fused_heads_agree_with_the_loss_on_whole_logits() -> None:
    from tests import test_fused_head
    from tests.vocab_parallel_cases import VARIANTS, relative_error

    case = _on_gpu(test_fused_head.make_case())
    for objective in VARIANTS[::3]:
        with torch.device("cuda"):
            wanted = test_fused_head.run_head(case, objective, None, fused=False)
            for recompute in (False, True):
                found = test_fused_head.run_head(case, objective, None, chunk_size=5, recompute=recompute)
                # fp32 products in another order, whose difference K1 multiplies with terms of size 10.
                torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-5)
                for a, b in zip(found[2:], wanted[2:], strict=True):
                    assert relative_error(a, b.double()) < 1e-4, (objective.name, recompute)


_STEP = """
import sys, torch
from tests import tiny
layout = tiny.start(tp=1, pp=1)
learner = tiny.build_learner(layout)
from megatron_tropd.step import forward_backward
import dataclasses
batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
def move(micro):
    return dataclasses.replace(micro, **{
        f.name: v.to(layout.device) for f in dataclasses.fields(micro)
        if isinstance(v := getattr(micro, f.name), torch.Tensor)})
batch = dataclasses.replace(batch, micro_batches=tuple(map(move, batch.micro_batches)))
sums, _ = forward_backward(learner, batch)
torch.save(({k: v.cpu() for k, v in tiny.whole_gradients(learner).items()}, sums, str(layout.device)), sys.argv[1])
"""


def test_a_whole_step_has_the_gradients_of_the_cpu(tmp_path: Path) -> None:
    """fp32 weights through Megatron's schedule and DDP over NCCL, with whichever layer spec is there."""
    found = {}
    for name, environment in (("cpu", ON_CPU), ("gpu", {**ON_CPU, "CUDA_VISIBLE_DEVICES": "0"})):
        path = tmp_path / name
        _run([sys.executable, "-c", _STEP, str(path)], environment)
        found[name] = torch.load(path, weights_only=True)
    assert found["gpu"][2].startswith("cuda") and found["cpu"][2] == "cpu"
    for name, wanted in found["cpu"][0].items():
        error = float((found["gpu"][0][name] - wanted).norm() / wanted.norm().clamp(min=1e-9))
        assert error < 1e-3, (name, error)
    assert found["gpu"][1]["loss"] == pytest.approx(found["cpu"][1]["loss"], rel=1e-4)


def test_attention_over_pages_is_exact() -> None:
    from megatron_tropd.kernels.paged_attention import attend_one_token
    from tests.test_paged_attention import LENGTHS, WIDTHS, make_pages, worst_error

    for sizes in (*WIDTHS, (16, 8, 64, 128), (32, 4, 256, 64)):
        for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            pages = make_pages(*sizes, dtype, "cuda")
            found = attend_one_token(**vars(pages))
            assert worst_error(found, pages) < bound, (sizes, dtype)
            assert not found[LENGTHS.index(0)].any()


_ROLLOUTS = """
from tests import tiny
from tests.test_dynamic_engine import _assert_same, _build, _errors, _other_weights, _pairs
layout = tiny.start(tp=1, pp=1)
model = _build(layout)
for name, (static, dynamic, report) in _pairs(model, layout).items():
    print(name, report)
    _assert_same(dynamic, static)
_errors(model, layout)
_assert_same(*_other_weights(model, layout))
"""


def test_dynamic_batching_gives_the_responses_of_static_batching() -> None:
    """In fp32, with the kernel over pages and with CUDA graphs."""
    _run([sys.executable, "-c", _ROLLOUTS], {**ON_CPU, "CUDA_VISIBLE_DEVICES": "0"})


def test_whole_runs_in_bf16_and_fp32(tmp_path: Path, data: Path) -> None:
    """SFT, distillation with evaluations and checkpoints, resumption; fp32 close to the same run on the CPU."""
    metrics = {}
    gpu = {**ON_CPU, "CUDA_VISIBLE_DEVICES": "0"}
    for name, precision, environment in (("bf16", "bf16", gpu), ("gpu", "fp32", gpu), ("cpu", "fp32", ON_CPU)):
        path = config_file(tmp_path / name, data, training={"precision": precision, "train_iters": 4})
        _run([sys.executable, "-m", "megatron_tropd", "train", str(path)], environment)
        metrics[name] = _metrics(tmp_path / name)
        assert len(metrics[name]) == 5 and all("loss" in line for line in metrics[name][:4])
        gap = max(line["log_prob_gap"] for line in metrics[name][:4])
        assert gap < (0.05 if precision == "bf16" else 1e-4), (name, gap)
    # The first step's samples are the same, up to a draw that falls within rounding of a border.
    assert metrics["gpu"][0]["loss"] == pytest.approx(metrics["cpu"][0]["loss"], rel=1e-3)
    # Two more steps from the checkpoint.
    _run(
        [
            sys.executable,
            "-m",
            "megatron_tropd",
            "train",
            str(tmp_path / "bf16" / "config.yaml"),
            "--training.train_iters=6",
        ],
        gpu,
    )
    assert [line["step"] for line in _metrics(tmp_path / "bf16")][-3:] == [4, 5, 6]


def test_a_deterministic_run_gives_the_same_bits_twice(tmp_path: Path, data: Path) -> None:
    found = []
    for name in ("first", "second"):
        path = config_file(
            tmp_path / name, data, training={"deterministic": True, "train_iters": 3, "precision": "bf16"}
        )
        _run([sys.executable, "-m", "megatron_tropd", "train", str(path)], {**ON_CPU, "CUDA_VISIBLE_DEVICES": "0"})
        found.append([{k: v for k, v in line.items() if "second" not in k} for line in _metrics(tmp_path / name)])
    assert found[0] == found[1]


def test_an_optimizer_in_host_memory_takes_the_same_steps(tmp_path: Path, data: Path) -> None:
    """Also over a resumption in the middle, with no schedule that would know of the shorter run."""
    found = {}
    for name, offload, ends in (("device", False, [4]), ("host", True, [2, 4])):
        options = {"optimizer_cpu_offload": offload, "lr": 1e-3}
        training = {"train_iters": 4, "precision": "bf16"}
        path = config_file(tmp_path / name, data, optimizer=options, training=training, guidance={"schedule": "none"})
        for end in ends:
            command = [sys.executable, "-m", "megatron_tropd", "train", str(path), f"--training.train_iters={end}"]
            _run(command, {**ON_CPU, "CUDA_VISIBLE_DEVICES": "0"})
        found[name] = {line["step"]: line["loss"] for line in _metrics(tmp_path / name) if "loss" in line}
    assert found["host"] == pytest.approx(found["device"], rel=2e-2)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
