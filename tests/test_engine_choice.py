"""Which engine generates: by the config, the model, the layout and the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.config import ConfigError
from megatron_tropd.config_checks import problems
from megatron_tropd.config_parser import load_config
from megatron_tropd.config_rollout import DynamicEngineConfig, RolloutConfig
from megatron_tropd.engine_choice import Place, choose_engine
from tests.test_config import write


def _rollout(engine: str, cuda_graphs: bool | None = None) -> RolloutConfig:
    return RolloutConfig(engine=engine, dynamic=DynamicEngineConfig(cuda_graphs=cuda_graphs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rollout", "place", "on_gpu", "wanted"),
    [
        (_rollout("auto"), Place(), True, ("dynamic", True)),
        (_rollout("auto"), Place(), False, ("static", False)),
        (_rollout("auto"), Place(pipeline=2), True, ("static", False)),
        (_rollout("auto"), Place(context=2), True, ("static", False)),
        (_rollout("auto"), Place(expert=2), True, ("static", False)),
        (_rollout("auto"), Place(has_experts=True), True, ("static", False)),
        (_rollout("auto"), Place(has_fp8=True), True, ("static", False)),
        (_rollout("auto", cuda_graphs=False), Place(), True, ("static", False)),
        (_rollout("auto", cuda_graphs=True), Place(), True, ("dynamic", True)),
        (_rollout("static"), Place(), True, ("static", False)),
        (_rollout("dynamic"), Place(), True, ("dynamic", True)),
        (_rollout("dynamic"), Place(), False, ("dynamic", False)),
        (_rollout("dynamic", cuda_graphs=False), Place(), True, ("dynamic", False)),
        (_rollout("dynamic"), Place(pipeline=2), True, ("dynamic", False)),
        (_rollout("dynamic"), Place(has_experts=True), True, ("dynamic", False)),
    ],
)
def test_the_choice(rollout: RolloutConfig, place: Place, on_gpu: bool, wanted: tuple[str, bool]) -> None:
    choice = choose_engine(rollout, place, on_gpu=on_gpu)
    assert (choice.kind, choice.cuda_graphs) == wanted
    assert choice.reason.startswith("auto: " if rollout.engine == "auto" else f"rollout.engine={rollout.engine}")


@pytest.mark.parametrize(
    ("rollout", "place", "message"),
    [
        (_rollout("dynamic"), Place(context=2), "context_parallel_size is 2.*: set rollout.engine=static"),
        (_rollout("dynamic"), Place(expert=4), "expert_model_parallel_size is 4.*: set rollout.engine=static"),
        (_rollout("auto", cuda_graphs=True), Place(has_experts=True), "the model is not dense.*: leave it out"),
        (_rollout("dynamic", cuda_graphs=True), Place(pipeline=2), "there are 2 pipeline stages: leave it out"),
    ],
)
def test_what_cannot_run_is_refused(rollout: RolloutConfig, place: Place, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_engine(rollout, place, on_gpu=True)


def test_graphs_that_are_asked_for_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU"):
        choose_engine(_rollout("dynamic", cuda_graphs=True), Place(), on_gpu=False)


def test_kernels_that_want_larger_blocks() -> None:
    """flash-attn 2's, which take multiples of 256 tokens."""
    small = _rollout("auto")
    assert choose_engine(small, Place(), on_gpu=True, block_multiple=256).kind == "static"
    large = replace(small, dynamic=DynamicEngineConfig(block_size_tokens=512))
    assert choose_engine(large, Place(), on_gpu=True, block_multiple=256).kind == "dynamic"
    with pytest.raises(ConfigError, match="block_size_tokens=64 is no multiple of 256.*: set it to 256"):
        choose_engine(_rollout("dynamic"), Place(), on_gpu=True, block_multiple=256)


_EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 8}
_DYNAMIC = {"engine": "dynamic"}
_GRAPHS = {"dynamic": {"cuda_graphs": True}}


@pytest.mark.parametrize(
    ("changes", "world_size", "command", "message"),
    [
        (
            {"parallel": {"context_parallel_size": 2}, "rollout": _DYNAMIC},
            2,
            "train",
            "is not offered where parallel.context_parallel_size is 2: set rollout.engine=static",
        ),
        (
            {"parallel": {"expert_model_parallel_size": 2}, "teacher": _EXPERTS, "rollout": _DYNAMIC},
            2,
            "train",
            "rollout.engine=dynamic is not offered where parallel.expert_model_parallel_size is 2",
        ),
        ({"teacher": _EXPERTS, "rollout": _GRAPHS}, 1, "generate", "not offered where the model is not dense"),
        ({"teacher": _EXPERTS, "rollout": _GRAPHS}, 1, "train", None),
        ({"parallel": {"context_parallel_size": 2}, "rollout": _DYNAMIC}, 2, "evaluate", None),
        (
            {
                "parallel": {"pipeline_model_parallel_size": 2},
                "rollout": {**_DYNAMIC, **_GRAPHS, "tensor_model_parallel_size": 1},
            },
            2,
            "train",
            None,
        ),
    ],
)
def test_a_config_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], world_size: int, command: str, message: str | None
) -> None:
    """Where it is the student that generates, or the teacher, and in which layout."""
    found = problems(load_config(write(tmp_path, **changes)), world_size, command)
    assert found == [] if message is None else any(message in each for each in found), found


def test_an_engine_asks_with_its_model_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_tropd import rollout

    built: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        rollout, "DynamicEngine", lambda model, layout, options, config: built.append(("dynamic", config))
    )
    monkeypatch.setattr(rollout, "StaticEngine", lambda *_, **__: built.append(("static", None)))
    layout: Any = SimpleNamespace(pipeline_size=1, context_parallel_size=1, expert_parallel_size=1)
    for on_cpu, experts in ((True, None), (False, None), (False, 8)):
        monkeypatch.setattr(rollout, "ON_CPU", on_cpu)
        config = SimpleNamespace(num_moe_experts=experts, fp8=None, params_dtype=torch.float32)
        model: Any = SimpleNamespace(config=config)
        rollout.build_engine(model, layout, _rollout("auto"), vocab_size=9, eos_id=1, seed=0)
    assert [kind for kind, _ in built] == ["static", "dynamic", "static"] and built[1][1].cuda_graphs is True
