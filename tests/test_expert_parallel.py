"""Experts spread over ranks of their own, and the routers' load-balancing loss: the same gradients as one rank's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"ep2": {"ep": 2}, "tp2 ep2, whole experts": {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}},
    1: {"one rank": {}},
    4: {
        "tp2 ep2": {"tp": 2, "ep": 2, "sequence_parallel": True},
        "pp2 ep2": {"pp": 2, "ep": 2},
        "tp2 pp2 ep2, whole experts": {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    },
}
"""World size -> name -> arguments of `tiny.start`. The first of all writes the checkpoint that the others load."""
COEFFICIENT = 0.3


def _experts(model: Any, **fields: Any) -> Any:
    return dataclasses.replace(model, num_moe_experts=4, moe_ffn_hidden_size=24, moe_router_topk=2, **fields)


def _start(**sizes: Any) -> Any:
    from tests import tiny

    return tiny.start(**{"tp": 1, "pp": 1, **sizes})


def _learner(layout: Any, *, coefficient: float = COEFFICIENT, distributed: bool = False, **rest: Any) -> Any:
    """Both models with experts. Without the distributed optimizer every replica keeps the whole reduced gradient."""
    from megatron_tropd.config import OptimizerConfig
    from tests import tiny

    return tiny.build_learner(
        layout,
        student=_experts(tiny.STUDENT, moe_aux_loss_coeff=coefficient),
        teacher=_experts(tiny.TEACHER),
        optimizer=OptimizerConfig(lr=1e-2, use_distributed_optimizer=distributed),
        **rest,
    )


def _batch(layout: Any) -> Any:
    """One sequence a micro-batch, so that every layout balances the same micro-batches."""
    from tests import tiny

    return tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=8 // layout.data_parallel_size)


def _run(folder: str, world_size: int) -> dict[str, Any]:
    """By layout: gradients and sums of a step; the losses of the steps behind a checkpoint. And what else there is."""
    from megatron_tropd.step import forward_backward
    from tests import tiny

    found: dict[str, Any] = {}
    for name, sizes in LAYOUTS[world_size].items():
        layout = _start(**sizes)
        learner = _learner(layout)
        sums, _ = forward_backward(learner, _batch(layout))
        torch.save((tiny.whole_gradients(learner), sums), Path(folder) / f"{name}-{layout.rank}.pt")
        found[name] = _steps_behind_a_checkpoint(layout, Path(folder) / "checkpoints")
    if world_size == 1:
        _compare_with_autograd(Path(folder))
    if world_size == 2:
        found["bytes"] = _resident_bytes()
        found["uneven"] = _uneven_micro_batches(Path(folder))
    if world_size == 4:
        found["replicas"] = _flip_bits()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    """The folder of gradients, and what every rank returned, by world size."""
    folder = tmp_path_factory.mktemp("gradients")
    return folder, {size: run_ranks(size, _run, str(folder), size, timeout=280) for size in LAYOUTS}


def _assert_equal_to_one_rank(folder: Path, name: str, world_size: int, wanted: str = "one rank") -> None:
    reference, reference_sums = torch.load(folder / f"{wanted}-0.pt")
    norm = torch.cat([gradient.flatten() for gradient in reference.values()]).norm()
    seen = set()
    for rank in range(world_size):
        gradients, sums = torch.load(folder / f"{name}-{rank}.pt")
        assert sums == pytest.approx(reference_sums, rel=1e-4, abs=1e-4)
        for parameter, gradient in gradients.items():
            assert (gradient - reference[parameter]).norm() < 1e-5 * norm, parameter
        seen |= set(gradients)
    assert seen == set(reference)
    assert all(gradient.norm() > 0 for parameter, gradient in reference.items() if "experts" in parameter)


@pytest.mark.parametrize(
    ("world_size", "name"), [(size, name) for size, named in LAYOUTS.items() if size > 1 for name in named]
)
def test_gradients_with_spread_experts_are_those_of_one_rank(results: Any, world_size: int, name: str) -> None:
    _assert_equal_to_one_rank(results[0], name, world_size)


# ------------------------------------------------------------------------------------------------ load-balancing loss


def _compare_with_autograd(folder: Path) -> None:
    """The step's gradient with a load-balancing loss, less that without one, is autograd's of the loss alone."""
    from megatron_tropd.models import build_model
    from megatron_tropd.step import forward_backward
    from tests import tiny

    layout = _start()
    batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
    found = {}
    for coefficient in (0.0, COEFFICIENT):
        learner = _learner(layout, coefficient=coefficient)
        sums, _ = forward_backward(learner, batch)
        found[coefficient] = tiny.whole_gradients(learner)
        if not coefficient:
            torch.save((found[coefficient], sums), folder / "one rank without balance-0.pt")
    model = build_model(
        _experts(tiny.STUDENT), layout, vocab_size=tiny.VOCAB_SIZE, max_sequence_length=64, dtype=torch.float32, seed=1
    )
    logits: list[torch.Tensor] = []
    for layer in model.decoder.layers:
        gating = layer.mlp.router.gating
        layer.mlp.router.gating = lambda hidden, gating=gating: logits.append(gating(hidden)) or logits[-1]
    total, num_tokens = torch.zeros(()), 0
    for one in batch.micro_batches:
        logits.clear()
        positions = torch.arange(one.tokens_BS.shape[1]).expand_as(one.tokens_BS)
        model(one.tokens_BS, positions, attention_mask=None)
        real_SB = ~one.padding_BS.T
        num_tokens += int(real_SB.sum())
        for logits_SBE in logits:
            total = total + int(real_SB.sum()) * _balance(logits_SBE[real_SB])
    mean = total / num_tokens
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(COEFFICIENT * mean, list(parameters.values()), allow_unused=True)
    assert sums["load_balancing_loss"] == pytest.approx(float(mean) / len(model.decoder.layers), rel=1e-5)
    assert sums["load_balancing_loss"] > 1
    norm = torch.cat([gradient.flatten() for gradient in wanted if gradient is not None]).norm()
    assert norm > 1e-3
    for name, gradient in zip(parameters, wanted, strict=True):
        difference = found[COEFFICIENT][name] - found[0.0][name]
        expected = torch.zeros_like(difference) if gradient is None else gradient[: len(difference)]
        assert (difference - expected).norm() < 1e-4 * norm, name


def _balance(logits_TE: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i P_i, from its definition."""
    num_experts = logits_TE.shape[1]
    chosen_TK = logits_TE.topk(2).indices
    share_E = torch.stack([(chosen_TK == expert).float().mean() for expert in range(num_experts)])
    return num_experts * (share_E * logits_TE.softmax(-1).mean(0)).sum()


def test_the_load_balancing_loss_is_its_definition(results: Any) -> None:
    """`_compare_with_autograd` has run; every layout reports the same loss."""
    folder, found = results
    values = {
        float(torch.load(folder / f"{name}-{rank}.pt")[1]["load_balancing_loss"])
        for world_size, named in LAYOUTS.items()
        for name in named
        for rank in range(world_size)
    }
    assert max(values) == pytest.approx(min(values), rel=1e-5)
    assert set(found[1][0]) == {"one rank"}


# ------------------------------------------------------------------------------------- micro-batches, replicas, memory


def _uneven_micro_batches(folder: Path) -> None:
    """Gradients where ranks have 4 micro-batches and 1: teacher beside the student, ahead, and ahead in a layout of its
    own with an odd number of micro-batches for its replicas."""
    from megatron_tropd.step import forward_backward
    from tests import tiny

    for name, options in {"shared": {}, "ahead": {"ahead": (1, 1)}, "ahead tp2": {"ahead": (2, 1)}}.items():
        layout = _start(ep=2)
        learner = _learner(layout, coefficient=0.0, **options)
        number = 4 if layout.rank == 0 else 1
        sums, _ = forward_backward(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=number))
        torch.save((tiny.whole_gradients(learner), sums), folder / f"uneven {name}-{layout.rank}.pt")


def test_ranks_that_share_experts_may_have_other_numbers_of_micro_batches(results: Any) -> None:
    for name in ("shared", "ahead", "ahead tp2"):
        _assert_equal_to_one_rank(results[0], f"uneven {name}", 2, "one rank without balance")


def _flip_bits() -> dict[str, str]:
    """What the replica check says when a weight of rank 3 changes: of an expert, which ranks 1 and 3 hold, or not."""
    from megatron_tropd.replicas import ReplicaCheck, ReplicaMismatchError

    found = {}
    layout = _start(ep=2)
    for name in ("", "mlp.experts.local_experts.1.linear_fc2", "self_attention.linear_proj"):
        stage, check = _learner(layout).stage, ReplicaCheck(1, layout)
        if name and layout.rank == 3:
            weight = stage.module.decoder.layers[1].get_submodule(name).weight
            weight.data.view(torch.int32).flatten()[5] ^= 1
        try:
            check.before_update(0, stage)
            found[name] = "the same"
        except ReplicaMismatchError as error:
            found[name] = str(error)
    return found


def test_replicas_of_experts_are_the_ranks_that_hold_the_same_ones(results: Any) -> None:
    for rank in results[1][4]:
        whole, expert, dense = rank["replicas"].values()
        assert whole == "the same"
        both = "rank {} (first in module.decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight)"
        assert f"the weights of {both.format(1)}, {both.format(3)} are not those" in expert
        assert "the weights of rank 3 (first in module.decoder.layers.1.self_attention.linear_proj.weight)" in dense


def _steps_behind_a_checkpoint(layout: Any, folder: Path) -> float:
    """The loss of the second step behind two that were saved; the first to come takes and saves these."""
    from megatron_tropd.checkpoint import Description, architecture, latest_checkpoint, load_checkpoint, save_checkpoint
    from megatron_tropd.distributed import from_main
    from megatron_tropd.step import train_step
    from tests import tiny

    learner, batch = _learner(layout, distributed=True), _batch(layout)
    description = Description(2, 1, tiny.VOCAB_SIZE, "tokenizer", architecture(_experts(tiny.STUDENT)))
    path = from_main(latest_checkpoint(folder))
    if path is None:
        train_step(learner, batch)
        train_step(learner, batch)
        save_checkpoint(folder, learner, description, keep=1)
    else:
        load_checkpoint(path, learner, description)
    train_step(learner, batch)
    return train_step(learner, batch)["loss"]


def test_a_checkpoint_of_spread_experts_continues_in_every_layout(results: Any) -> None:
    losses = [rank[name] for size, named in LAYOUTS.items() for name in named for rank in results[1][size]]
    assert len(losses) == 17
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def _resident_bytes() -> dict[str, int]:
    from tests import measured_bytes, tiny

    layout = _start(ep=2)
    learner = tiny.build_learner(layout, student=_planned().student, teacher=_planned().teacher, dtype=torch.bfloat16)
    return measured_bytes.resident_bytes(learner)


def _planned() -> Any:
    from megatron_tropd.config import Config, DataConfig, ParallelConfig
    from tests import tiny

    wider = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 64}
    return Config(
        student=dataclasses.replace(_experts(tiny.STUDENT), **wider),
        teacher=dataclasses.replace(_experts(tiny.TEACHER), **wider),
        data=DataConfig(train=""),
        output_dir="",
        parallel=ParallelConfig(expert_model_parallel_size=2),
    )


def test_the_planner_knows_the_bytes_of_spread_experts(results: Any) -> None:
    from megatron_tropd.planner import rank_memory

    (predicted,) = rank_memory(_planned(), 2).values()
    measured = [rank["bytes"] for rank in results[1][2]]
    for component in ("student_weights", "teacher_weights", "gradients", "optimizer"):
        found = max(rank[component] for rank in measured)
        assert predicted.components()[component] == pytest.approx(found, rel=0.1), component


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("sft", {"student": {"num_moe_experts": None, "moe_ffn_hidden_size": None}}, "no model has any"),
        ("sft", {"parallel": {"expert_model_parallel_size": 3}}, "cannot be split into expert_model_parallel_size 3"),
        ("sft", {"student": {"num_moe_experts": 3}}, "num_moe_experts 3 is not divisible by expert_model_parallel"),
        ("sft", {"parallel": {"expert_tensor_parallel_size": 5}}, "cannot be split"),
        ("sft", {"parallel": {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}}, "leave it out"),
        ("sft", {"parallel": {"teacher_expert_model_parallel_size": 2}}, "needs parallel.teacher_schedule=ahead"),
        ("sft", {"data": {"validation": "held_out.jsonl"}}, "cannot generate: give rollouts a copy"),
        ("train", {}, "cannot generate: give rollouts a copy"),
        ("sft", {"student": {"moe_aux_loss_coeff": -0.1}}, "moe_aux_loss_coeff must be at least 0"),
        ("sft", {"training": {"normalization": "kept"}}, "use tokens or sequences"),
        ("train", {"teacher": {"moe_aux_loss_coeff": 0.1}}, "the teacher is frozen"),
        ("sft", {"optimizer": {"use_distributed_optimizer": False}}, "needs optimizer.use_distributed_optimizer=true"),
    ],
)
def test_what_cannot_run_is_refused(command: str, changes: dict[str, dict[str, Any]], message: str) -> None:
    from megatron_tropd.config import ConfigError
    from megatron_tropd.config_checks import validate

    config = _planned()
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, moe_aux_loss_coeff=0.01),
        training=dataclasses.replace(config.training, global_batch_size=16),
        guidance=dataclasses.replace(config.guidance, schedule="none"),
    )
    validate(config, 4, "sft")
    for section, fields in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    with pytest.raises(ConfigError, match=message):
        validate(config, 4, command)
