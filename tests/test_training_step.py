"""The gradient of a whole training step does not depend on how the work is spread."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

LAYOUTS = {
    1: ["tp1 pp1"],
    2: ["tp2 pp1", "tp2 pp1 sequence", "tp1 pp2", "tp1 pp1", "tp2 pp1 ahead-2-1", "tp1 pp1 ahead-2-1",
        "tp1 pp2 ahead-2-1", "tp2 pp1 recompute"],
    4: ["tp2 pp2", "tp2 pp2 sequence", "tp2 pp1", "tp2 pp1 sequence", "tp1 pp2", "tp2 pp1 ahead-1-2",
        "tp1 pp2 ahead-2-1", "tp1 pp2 ahead-2-2", "tp2 pp2 ahead-1-1", "tp2 pp1 sequence ahead-2-2"],
    8: ["tp2 pp2", "tp2 pp2 ahead-2-4"],
}  # fmt: skip
"""World size -> tensor and pipeline parallel sizes, whether sequence parallel, the sizes of a teacher that judges
ahead, and whether activations are computed again; the rest is data parallel."""
UNEVEN = {
    1: ["tp1 pp1 deep"],
    2: ["tp1 pp2 deep", "tp1 pp2 deep ahead-1-2"],
    4: ["tp1 pp4 deep", "tp2 pp2 deep sequence", "tp1 pp4 deep ahead-1-4", "tp1 pp4 deep ahead-2-2"],
}
"""Deep models in stages of unlike length, as ``STAGES`` says; beside them on one rank."""
SHARDED = {
    2: ["tp1 pp1 sharded", "tp1 pp1 sharded overlap"],
    4: ["tp1 pp1 sharded", "tp1 pp2 sharded", "tp2 pp1 sharded", "tp1 pp1 sharded overlap", "tp1 pp2 sharded overlap"],
}
"""With Megatron's DistributedOptimizer; ``overlap``: gradients are reduced behind the backward."""
STUDENT_LAYERS, TEACHER_LAYERS = 6, 7
STAGES: dict[int, tuple[tuple[int | None, int | None], tuple[int | None, int | None]]] = {
    1: ((None, None), (None, None)),
    2: ((4, None), (None, 4)),
    4: ((1, 1), (2, 1)),
}
"""Pipeline size -> (layers of the first stage, of the last) of the student, and of the teacher."""
MICRO_BATCHES = (1, 2, 4)
MODES = {1: ("logits", "fused", "fused-recompute"), 2: ("fused", "fused-recompute"), 4: ("fused",), 8: ("fused",)}
"""World size -> how the last stage gets from hidden states to losses. Chunks of 3 tokens divide no micro-batch's."""


def _cases(world_size: int) -> list[tuple[str, int, str]]:
    """(layout, micro-batches, mode)."""
    cases = list(itertools.product(LAYOUTS[world_size], MICRO_BATCHES, MODES[world_size]))
    cases += [(layout, 4 if world_size > 1 else 1, "fused") for layout in UNEVEN.get(world_size, ())]
    return cases + [(layout, 2, "fused") for layout in SHARDED.get(world_size, ())]


def _models(layout: str) -> dict[str, Any]:
    """The arguments of `tiny.build_learner` that say which models."""
    from tests import tiny

    if "deep" not in layout:
        return {}
    _, teacher_pp = _teacher_sizes(layout) or (1, int(layout.split()[1][2:]))
    found = {}
    for name, model, num_layers, pp in (
        ("student", tiny.STUDENT, STUDENT_LAYERS, int(layout.split()[1][2:])),
        ("teacher", tiny.TEACHER, TEACHER_LAYERS, teacher_pp),
    ):
        first, last = STAGES[pp][name == "teacher"]
        found[name] = dataclasses.replace(
            model,
            num_layers=num_layers,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
    return found


def _sizes(layout: str) -> dict[str, int | bool]:
    """The arguments of `tiny.start`."""
    tp, pp, *rest = layout.split()
    return {"tp": int(tp[2:]), "pp": int(pp[2:]), "sequence_parallel": "sequence" in rest}


def _teacher_sizes(layout: str) -> tuple[int, int] | None:
    """Tensor and pipeline parallel size of a teacher that judges ahead."""
    *_, last = layout.split()
    if not last.startswith("ahead"):
        return None
    _, tp, pp = last.split("-")
    return int(tp), int(pp)


def _write_gradients(folder: str, world_size: int) -> None:
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.step import forward_backward
    from tests import tiny

    for name, cases in itertools.groupby(_cases(world_size), key=lambda case: case[0]):
        layout = tiny.start(**_sizes(name))
        # Without the distributed optimizer every replica keeps the whole reduced gradient, which is what is compared.
        learner = tiny.build_learner(
            layout,
            optimizer=OptimizerConfig(use_distributed_optimizer="sharded" in name),
            ahead=_teacher_sizes(name),
            offload=name.startswith("tp1 pp1"),
            recompute=name.endswith("recompute"),
            overlap=name.endswith("overlap"),
            **_models(name),
        )
        for _, num_micro_batches, mode in cases:
            learner.stage.output_head = mode
            batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=num_micro_batches)
            if name.endswith("overlap"):
                forward_backward(learner, batch)  # Megatron overlaps once a first batch has told the gradients' order
            sums, _ = forward_backward(learner, batch)
            if name.endswith("overlap"):
                assert not any(group.is_first_batch for group in learner.chunks[0].bucket_groups)
            if "sharded" in name:
                tiny.gather_gradient_shards(learner)
            gradients = tiny.whole_gradients(learner)
            if layout.tensor_parallel_rank == 0:
                ranks = f"{layout.data_parallel_rank}-{layout.pipeline_rank}"
                torch.save((gradients, sums), Path(folder) / f"{name}-{num_micro_batches}-{mode}-{ranks}.pt")


@pytest.fixture(scope="module")
def gradient_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    for world_size in LAYOUTS:
        (folder / str(world_size)).mkdir()
        run_ranks(world_size, _write_gradients, str(folder / str(world_size)), world_size, timeout=300)
    return folder


def _reference(folder: Path, *, deep: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    name = "tp1 pp1 deep-1-fused" if deep else "tp1 pp1-1-logits"
    gradients, sums = torch.load(folder / "1" / f"{name}-0-0.pt")
    return gradients, sums


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_gradients_are_the_same_for_every_layout_and_micro_batch_split(gradient_folder: Path, world_size: int) -> None:
    for layout, num_micro_batches, mode in _cases(world_size):
        reference, reference_sums = _reference(gradient_folder, deep="deep" in layout)
        norm = torch.cat([g.flatten() for g in reference.values()]).norm()
        sizes = _sizes(layout)
        for dp_rank in range(world_size // (sizes["tp"] * sizes["pp"])):
            prefix = f"{layout}-{num_micro_batches}-{mode}-{dp_rank}"
            stages = [
                torch.load(gradient_folder / str(world_size) / f"{prefix}-{stage}.pt") for stage in range(sizes["pp"])
            ]
            assert set().union(*(gradients for gradients, _ in stages)) == set(reference)
            for gradients, sums in stages:
                for name, gradient in gradients.items():
                    error = (gradient - reference[name]).norm() / norm
                    assert error < 1e-5, f"{layout}, {num_micro_batches} micro-batches, {mode}: {name} {error}"
                assert sums == pytest.approx(reference_sums, rel=1e-4, abs=1e-4)


def test_stages_of_unlike_length_hold_the_layers_they_should(gradient_folder: Path) -> None:
    wanted = {("2", "tp1 pp2 deep"): [4, 2], ("4", "tp1 pp4 deep ahead-2-2"): [1, 2, 2, 1]}
    for (world_size, layout), counts in wanted.items():
        files = (gradient_folder / world_size / f"{layout}-4-fused-0-{stage}.pt" for stage in range(len(counts)))
        layers = [{name.split(".")[2] for name in torch.load(file)[0] if ".layers." in name} for file in files]
        assert [len(found) for found in layers] == counts


@pytest.mark.parametrize("world_size", SHARDED)
def test_reducing_gradients_behind_the_backward_changes_no_bit(gradient_folder: Path, world_size: int) -> None:
    compared = 0
    for path in (gradient_folder / str(world_size)).glob("* overlap-*.pt"):
        gradients, sums = torch.load(path)
        wanted, wanted_sums = torch.load(path.with_name(path.name.replace(" overlap", "")))
        assert sums == wanted_sums and gradients.keys() == wanted.keys()
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())
        compared += 1
    assert compared == {2: 2, 4: 8}[world_size]


def test_the_reference_gradient_is_not_trivial(gradient_folder: Path) -> None:
    gradients, sums = _reference(gradient_folder)
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    assert (
        sums["guidance_tokens"] > 0 and sums["on_policy_tokens"] > 0 and 0 < sums["outlier"] < sums["on_policy_tokens"]
    )


def _record_messages() -> None:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_tropd.step import forward_backward
    from tests import tiny

    layout = tiny.start(tp=1, pp=2)
    learner = tiny.build_learner(layout)
    sent: dict[str, set[int]] = {"next": set(), "prev": set()}
    communicate = P2PCommunicator._communicate

    def recorded(self, *, tensor_send_next, tensor_send_prev, **rest):  # type: ignore[no-untyped-def]
        for direction, tensor in (("next", tensor_send_next), ("prev", tensor_send_prev)):
            if tensor is not None:
                sent[direction].add(tensor.shape[-1])
        return communicate(self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, **rest)

    P2PCommunicator._communicate = recorded
    forward_backward(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=4))
    both = tiny.STUDENT.hidden_size + tiny.TEACHER.hidden_size
    assert sent == (
        {"next": {both}, "prev": set()} if layout.rank == 0 else {"next": set(), "prev": {tiny.STUDENT.hidden_size}}
    )


def test_both_hidden_states_travel_forward_and_the_students_gradient_alone_backward() -> None:
    run_ranks(2, _record_messages)


def _refuse_a_gap(tp: int, pp: int) -> tuple[list[int], tuple[int, ...]]:
    """(Three samples in which engine and trainer disagree most, those that the refusal names)."""
    from megatron_tropd.config_watch import GuardConfig
    from megatron_tropd.guard import Guard
    from megatron_tropd.step import LogProbGapError, train_step
    from megatron_tropd.types import Batch, TokenRegion
    from tests import tiny

    layout = tiny.start(tp=tp, pp=pp)
    guard = Guard(GuardConfig(max_dumped_samples=3))
    learner = dataclasses.replace(tiny.build_learner(layout), max_log_prob_gap=1.0, guard=guard)
    rows = tiny.sequences()
    chosen = [index for index, row in enumerate(rows) if (row["regions"] == TokenRegion.ON_POLICY).any()][2::-1]
    log_probs = dict(zip(chosen, (1e7, 1e5, 1e3), strict=True))
    mine = iter(range(layout.data_parallel_rank, len(rows), layout.data_parallel_size))
    micro_batches = []
    for micro_batch in tiny.batch_for_rank(layout, rows, num_micro_batches=2).micro_batches:
        samples = tuple(next(mine) for _ in micro_batch.sample_ids)
        for row, sample in enumerate(samples):
            micro_batch.rollout_log_probs_BS[row] = log_probs.get(sample, 0.0)
        micro_batches.append(dataclasses.replace(micro_batch, sample_ids=samples))
    with pytest.raises(LogProbGapError) as refusal:
        train_step(learner, Batch(tuple(micro_batches), step=0))
    return chosen, refusal.value.samples


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_refused_step_names_the_worst_samples_of_all_replicas(tp: int, pp: int) -> None:
    # (4 ranks: two data-parallel replicas, each with half of the samples.)
    for chosen, named in run_ranks(4, _refuse_a_gap, tp, pp):
        assert named == tuple(chosen)


def _refuse_non_finite_numbers() -> None:
    from megatron_tropd.step import NonFiniteError, train_step
    from tests import tiny

    layout = tiny.start(tp=2, pp=2)
    learner = tiny.build_learner(layout)
    rows = tiny.sequences()
    poisoned = next(index for index, row in enumerate(rows) if row["regions"].any())
    # The teacher's embedding of one token is broken, and one sequence alone reads that token (padding reads token 0).
    unused = next(i for i in range(1, tiny.VOCAB_SIZE) if not any((row["tokens"] == i).any() for row in rows))
    rows[poisoned]["tokens"][1] = unused
    if layout.is_first_stage:
        weight = learner.stage.teacher.embedding.word_embeddings.weight
        first = layout.tensor_parallel_rank * weight.shape[0]
        if first <= unused < first + weight.shape[0]:
            weight.data[unused - first] = torch.nan
    before = [parameter.clone() for parameter in learner.stage.module.parameters()]
    with pytest.raises(NonFiniteError, match=rf"step 0: the loss is not finite \(samples \[{poisoned}\]\)"):
        train_step(learner, tiny.batch_for_rank(layout, rows, num_micro_batches=1))
    for parameter, old in zip(learner.stage.module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_optimizer_moves() -> None:
    run_ranks(4, _refuse_non_finite_numbers)


def _train_in_bfloat16() -> list[float]:
    from megatron_tropd.step import train_step
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    learner = tiny.build_learner(layout, dtype=torch.bfloat16)
    batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
    losses = [train_step(learner, batch)["loss"] for _ in range(3)]
    parameters = list(learner.stage.module.parameters())
    assert all(
        parameter.dtype is torch.bfloat16 and parameter.main_grad.dtype is torch.float32 for parameter in parameters
    )
    return losses


def _train_in_float32() -> list[float]:
    from megatron_tropd.step import train_step
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    learner = tiny.build_learner(layout)
    batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
    return [train_step(learner, batch)["loss"] for _ in range(3)]


def test_bfloat16_weights_train_with_float32_main_gradients() -> None:
    (low, other), (high, _) = run_ranks(2, _train_in_bfloat16), run_ranks(2, _train_in_float32)
    assert low == other
    assert low == pytest.approx(high, rel=0.05)


def _compare_heads_of_an_untied_student() -> float:
    """Largest difference between the gradients through whole logits and through the fused heads, bf16 weights too."""
    import dataclasses

    from megatron_tropd.step import forward_backward
    from tests import tiny

    worst = 0.0
    untied = dataclasses.replace(tiny.STUDENT, untie_embeddings_and_output_weights=True)
    for (tp, pp), dtype in itertools.product([(2, 1), (1, 2)], [torch.float32, torch.bfloat16]):
        layout = tiny.start(tp=tp, pp=pp)
        learner = tiny.build_learner(layout, student=untied, dtype=dtype)
        batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
        found = {}
        for mode in ("logits", "fused", "fused-recompute"):
            learner.stage.output_head = mode
            forward_backward(learner, batch)
            found[mode] = torch.cat([buffer.grad_data.flatten().clone() for buffer in learner.chunks[0].buffers])
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        for mode in ("fused", "fused-recompute"):
            error = float((found[mode] - found["logits"]).norm() / found["logits"].norm())
            assert error < tolerance, (tp, pp, dtype, mode, error)
            worst = max(worst, error / tolerance)
    return worst


def test_the_fused_heads_of_an_untied_student() -> None:
    assert max(run_ranks(2, _compare_heads_of_an_untied_student)) < 1


def _gradients_of_a_student_with_experts() -> list[dict[str, list]]:
    import dataclasses

    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.step import forward_backward
    from tests import tiny

    experts = dataclasses.replace(tiny.STUDENT, num_moe_experts=4, moe_ffn_hidden_size=24, moe_router_topk=2)
    found = []
    for sizes in ({"tp": 1, "pp": 1}, {"tp": 2, "pp": 1, "sequence_parallel": True}, {"tp": 1, "pp": 2}):
        layout = tiny.start(**sizes)
        optimizer = OptimizerConfig(use_distributed_optimizer=False)
        learner = tiny.build_learner(layout, student=experts, optimizer=optimizer)
        forward_backward(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2))
        found.append({name: gradient.tolist() for name, gradient in tiny.whole_gradients(learner).items()})
    return found


def test_the_gradients_of_a_student_with_experts_are_the_same_for_every_layout() -> None:
    first, last = (
        [{name: torch.tensor(values) for name, values in found.items()} for found in rank]
        for rank in run_ranks(2, _gradients_of_a_student_with_experts)
    )
    reference, tensor, _ = first
    pipeline = {name: gradient for rank in (first, last) for name, gradient in rank[2].items()}
    assert any("experts" in name for name in reference)
    for found in (tensor, pipeline):
        assert set(found) == set(reference)
        for name, gradient in found.items():
            assert (gradient - reference[name]).norm() <= 1e-5 * reference[name].norm() + 1e-7, name
    assert all(gradient.norm() > 0 for name, gradient in reference.items() if "router" in name)


def _run_sequence_parallel_head() -> list[list]:
    """Gradients of the hidden states and of the weight through Megatron's output layer, sequence parallel and not."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from megatron_tropd.objectives import preset
    from megatron_tropd.pair import loss_position_hidden
    from megatron_tropd.vocab_parallel import OutputHead, fused_head_loss
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    generator = torch.Generator().manual_seed(0)
    hidden_SBH = torch.randn(6, 2, 8, generator=generator)
    weight_VH, teacher_VH = torch.randn(20, 8, generator=generator), torch.randn(20, 8, generator=generator)
    mask_BS = torch.rand(2, 6, generator=generator) < 0.7
    tokens_N = torch.randint(0, 20, (int(mask_BS.sum()),), generator=generator)
    rank, found = layout.tensor_parallel_rank, []
    for sequence_parallel in (True, False):
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2,
            sequence_parallel=sequence_parallel, use_cpu_initialization=True,
        )  # fmt: skip
        layer = ColumnParallelLinear(
            8, 20, config=config, init_method=torch.nn.init.zeros_, bias=False, tp_group=layout.groups.tp
        )
        layer.weight.data.copy_(weight_VH.chunk(2)[rank])
        leaf_SBH = (hidden_SBH.chunk(2)[rank] if sequence_parallel else hidden_SBH).clone().requires_grad_()
        rows_NH = loss_position_hidden(
            hidden_states=leaf_SBH, output_layer=layer, context=mask_BS.flatten().nonzero()[:, 0]
        )
        loss_N, _ = fused_head_loss(
            OutputHead(rows_NH, layer.weight), OutputHead(rows_NH.detach(), teacher_VH.chunk(2)[rank]), tokens_N,
            torch.full_like(tokens_N, 2), preset("fkl-exact"), vocab_size=20, group=layout.groups.tp, chunk_size=3,
        )  # fmt: skip
        loss_N.sum().backward()
        found += [leaf_SBH.grad if sequence_parallel else leaf_SBH.grad.chunk(2)[rank], layer.weight.grad]
    return [gradient.tolist() for gradient in found]


def test_the_fused_head_under_sequence_parallelism() -> None:
    for hidden, weight, wanted_hidden, wanted_weight in run_ranks(2, _run_sequence_parallel_head):
        assert torch.tensor(wanted_hidden).any() and torch.tensor(wanted_weight).any()
        torch.testing.assert_close(torch.tensor(hidden), torch.tensor(wanted_hidden))
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(wanted_weight))


def _step_with_every_objective() -> list[dict[str, dict[str, float]]]:
    """The metrics of one step by preset, on two tensor-parallel ranks and on two pipeline stages; nothing moves."""
    import dataclasses

    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.objectives import PRESETS
    from megatron_tropd.step import train_step
    from tests import tiny

    found = []
    for tp, pp in [(2, 1), (1, 2)]:
        layout = tiny.start(tp=tp, pp=pp)
        learner = tiny.build_learner(layout, optimizer=OptimizerConfig(lr=0.0))
        batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
        learners = {name: dataclasses.replace(learner, objective=objective) for name, objective in PRESETS.items()}
        found.append({name: train_step(learner, batch) for name, learner in learners.items()})
    return found


def test_every_objective_trains_in_every_layout() -> None:
    (tensor, pipeline), _ = run_ranks(2, _step_with_every_objective)
    for name, metrics in tensor.items():
        assert metrics["grad_norm"] > 0, name
        assert metrics["grad_norm"] == pytest.approx(pipeline[name]["grad_norm"], rel=1e-4), name
        assert metrics["loss"] == pytest.approx(pipeline[name]["loss"], rel=1e-4, abs=1e-6), name
        # The sampled estimates of the reverse KL are facts about the rollouts, whatever the objective.
        assert metrics["reverse_kl_k3"] == pytest.approx(tensor["opd"]["reverse_kl_k3"], rel=1e-6), name
    assert tensor["opd"]["reverse_kl_k3"] > 0
    assert tensor["seq-kd"]["loss"] == tensor["sft"]["loss"]
    assert tensor["tropd-aopd"]["grad_norm"] == pytest.approx(tensor["aopd"]["grad_norm"], rel=0.05)
