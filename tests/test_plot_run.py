"""What a run records of its tokens, and the report that shows it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import run_ranks
from tests.test_run import _train, config_file, data  # noqa: F401
from tools import plot_run


def test_recorded_tokens_are_the_samples_with_their_rewards(tmp_path: Path, data: Path) -> None:  # noqa: F811
    training = {"train_iters": 3, "eval_interval": 0, "log_tokens": 4, "log_tokens_interval": 2, "micro_batch_size": 4}
    path = config_file(tmp_path, data, training=training, parallel={"pipeline_model_parallel_size": 2})
    run_ranks(2, _train, str(path), None, timeout=200, init_process_group=False)
    run = tmp_path / "run"
    assert sorted(plot_run.recorded_steps(run)) == [0, 2]
    for step, file in plot_run.recorded_steps(run).items():
        recorded = plot_run.read_samples(file)
        whole = [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").open()]
        assert [sample["sample_id"] for sample in recorded] == sorted(line["sample_id"] for line in whole)
        by_id = {line["sample_id"]: line for line in whole}
        for sample in recorded:
            line = by_id[sample["sample_id"]]
            assert sample["prompt"] == line["prompt"]
            assert "".join(sample["text"]).removesuffix("<eos>") == line["prefix"] + line["response"]
            guided = [region == "guidance" for region in sample["region"]]
            # One character is one token; the end token is the teacher's where all of the answer is prefix.
            assert sum(guided) == len(line["prefix"]) + (guided[-1] and sample["text"][-1] == "<eos>")
            assert guided == sorted(guided, reverse=True)
            assert any(sample["reward"])
            for reward, trust, outlier, guide in zip(
                sample["reward"], sample["p_trust"], sample["outlier"], guided, strict=True
            ):
                assert trust == pytest.approx(min(1.0, math.exp(reward)), abs=2e-4)
                assert outlier in ((0.0,) if guide else (0.0, 1.0))


def _run(folder: Path, objective: str, seed: int, losses: list[float]) -> Path:
    folder.mkdir(parents=True)
    config = {"output_dir": str(folder), "objective": objective, "training": {"seed": seed, "train_iters": 3}}
    config["monitoring"] = {"run_name": folder.name}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses)]
    lines += [{"step": len(losses), "accuracy": seed / 10}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        _run(tmp_path / "a", "tropd", 1, [1.0, 2.0, 3.0]),
        _run(tmp_path / "b", "tropd", 2, [3.0, 4.0]),
        _run(tmp_path / "c", "opd", 1, [5.0, 6.0, 7.0]),
    ]


SAMPLE: dict[str, Any] = {
    "sample_id": 3, "prompt": "<script>alert(1)</script>", "answer": "4", "finished": True,
    "text": ["9", "<b>", " ", "\n", "<eos>"], "region": ["guidance", *["on-policy"] * 4],
    "reward": [0.5, -6.0, -1.0, 0.0, 2.0], "p_trust": [1.0, 0.0025, 0.37, 1.0, 1.0],
    "outlier": [0.0, 1.0, 1.0, 0.0, 0.0], "student_log_prob": [-1.0, -0.1, -0.2, -0.3, -3.0],
}  # fmt: skip


def test_runs_are_grouped_by_all_but_their_seed(runs: list[Path]) -> None:
    assert plot_run.group_runs(runs) == {"tropd": runs[:2], "opd": runs[2:]}
    assert plot_run.group_runs(runs[:2]) == {"tropd": runs[:2]}


def test_bands_are_over_the_steps_that_all_seeds_have(runs: list[Path]) -> None:
    curves = [plot_run.curves_of(run, "loss") for run in runs[:2]]
    assert plot_run.band(curves) == [(0, 2.0, 1.0, 3.0), (1, 3.0, 2.0, 4.0)]
    assert plot_run.smooth({0: 1.0, 1: 3.0, 5: 8.0}, 2) == {0: 1.0, 1: 2.0, 5: 5.5}


def test_the_report_is_one_file_without_any_code_of_the_samples(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "tokens").mkdir()
    (runs[0] / "tokens" / "step_000001.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    plot_run.main([*map(str, runs), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "<b></b>" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 2
    for name in ("curves", "p_trust"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    # The student's tokens with the lowest R first.
    assert page.index("<td>-6.00</td>") < page.index("<td>-1.00</td>")
    assert page.count('class="t o"') == 2 + 4 * 2 + 1  # the sample, the contexts of four tokens, the legend
    assert "R = -6.00 nats, P_trust = 0.003; outlier" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot_run.main([str(tmp_path)])
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err


def test_a_mean_over_no_tokens_is_no_point(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", "tropd", 1, [1.0])
    lines = [
        {"step": step, "p_trust": trust, "on_policy_share": share} for step, trust, share in [(0, 0, 0), (1, 0.5, 1)]
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_run.curves_of(run, "p_trust") == {1: 0.5}
    assert plot_run.spread([5, 1, 2, 3, 4, 9]) == [1, 3, 4, 9] and plot_run.spread([]) == []
