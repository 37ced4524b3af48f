"""Student and teacher that differ in named special tokens: what the teacher reads, and which of its rows judges."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config import TokenizerConfig
from megatron_tropd.special_tokens import TokenMap, map_special_tokens
from megatron_tropd.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_tropd.tokenizer_agreement import TokenizerMismatchError, shared_vocab_size
from megatron_tropd.tokenizer_builder import build_tokenizers
from tests import tokenizers_made as made
from tests.ranks import run_ranks
from tests.test_run import MODEL, config_file

MAPPED = TokenMap({3: 40, 7: 3})
"""A chain: the teacher's 7 is displaced to 40, which is still read as 40."""
PERMUTATION = {3: 40, 7: 3, 40: 7}


@pytest.mark.parametrize(
    ("named", "judged"),
    [
        ({}, {}),
        ({4: 4}, {}),  # another name for the same id
        ({1: 2}, {1: 2, 2: 1}),
        ({1: 2, 2: 1}, {1: 2, 2: 1}),
        ({3: 40, 7: 3}, PERMUTATION),
        ({0: 5, 1: 6}, {0: 5, 1: 6, 5: 0, 6: 1}),
    ],
)
def test_what_is_displaced_closes_the_permutation(named: dict[int, int], judged: dict[int, int]) -> None:
    mapped = TokenMap(named)
    assert mapped.judged == judged and sorted(judged) == sorted(judged.values())
    assert [mapped.feed(index) for index in range(8)] == [named.get(index, index) for index in range(8)]


def _tokenizers(folder: Path) -> dict[str, HuggingFaceTokenizer]:
    renamed = ("<s>", "<|im_start|>", "</s>")
    return {
        name: HuggingFaceTokenizer(made.save_byte_level_bpe(folder / name, **settings))
        for name, settings in {
            "base": {"eos": "<|endoftext|>"},
            "chat": {},
            "renamed": {"special": renamed, "eos": "</s>", "pad": "<s>"},
            "longer": {"extra": ("<end>",), "eos": "<end>"},
        }.items()
    }


def test_tokenizers_that_differ_in_named_special_tokens_agree_and_others_do_not(tmp_path: Path) -> None:
    tokenizers = _tokenizers(tmp_path)
    base, chat, renamed, longer = (tokenizers[name] for name in ("base", "chat", "renamed", "longer"))
    for student, teacher, names, named in (
        (base, chat, {"<|endoftext|>": "<|im_end|>"}, {0: 2}),
        (chat, base, {"<|im_end|>": "<|endoftext|>"}, {2: 0}),
        (chat, renamed, {"<|im_end|>": "</s>", "<|endoftext|>": "<s>"}, {2: 2, 0: 0}),
        (base, renamed, {"<|im_end|>": "<s>", "<|endoftext|>": "</s>"}, {2: 0, 0: 2}),
        (chat, longer, {"<|im_end|>": "<end>"}, {2: 400}),
    ):
        with pytest.raises(TokenizerMismatchError):
            shared_vocab_size(student, teacher)
        assert shared_vocab_size(student, teacher, names) == 400
        assert map_special_tokens(student, teacher, names).named == named
    for student, teacher, names, message in (
        (base, chat, {"<|endoftext|>": "<|im_start|>"}, "the student ends a response with id 0 .* the teacher with 2"),
        (chat, renamed, {"<|im_end|>": "</s>"}, "1 of the 400 ids .* 0: '<|endoftext|>' and '<s>'".replace("|", "[|]")),
        (base, chat, {"the": "<|im_end|>"}, "'the' is not a special token of the student's tokenizer, which has '<"),
        (base, chat, {"<|endoftext|>": "the"}, "'the' is not a special token of the teacher's tokenizer"),
        (base, chat, {"<|endoftext|>": "<|im_end|>", "<|im_start|>": "<|im_end|>"}, "two tokens are mapped to"),
        (longer, chat, {"<end>": "<|im_end|>"}, "'<end>' is the student's id 400, the teacher has only 400 ids"),
    ):
        with pytest.raises(TokenizerMismatchError, match=message):
            shared_vocab_size(student, teacher, names)
    config = TokenizerConfig(
        kind="huggingface", model=str(tmp_path / "base"), teacher=str(tmp_path / "chat"),
        special_token_map={"<|endoftext|>": "<|im_end|>"},
    )  # fmt: skip
    assert [tokenizer.eos_id for tokenizer in build_tokenizers(config)] == [0, 2]


def test_a_normal_token_of_another_vocabulary_is_refused_in_spite_of_a_map(tmp_path: Path) -> None:
    chat = _tokenizers(tmp_path)["base"]
    other = HuggingFaceTokenizer(made.save_byte_level_bpe(tmp_path / "other", sentences=["some other words, other"]))
    with pytest.raises(TokenizerMismatchError, match="are different tokens"):
        shared_vocab_size(chat, other, {"<|endoftext|>": "<|im_end|>"})


def test_sentencepiece_control_tokens(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"control_symbols": ["<end>", "<other>"]}
    student = SentencePieceTokenizer(made.save_sentencepiece(tmp_path / "a.model", **settings))
    teacher = SentencePieceTokenizer(made.save_sentencepiece(tmp_path / "b.model", **settings, eos_piece="</end>"))
    assert map_special_tokens(student, teacher, {"</s>": "</end>"}).named == {student.eos_id: teacher.eos_id}
    assert shared_vocab_size(student, teacher, {"</s>": "</end>"}) == student.vocab_size
    with pytest.raises(TokenizerMismatchError, match="1 of the .* ids .* 2: '</s>' and '</end>'"):
        shared_vocab_size(student, teacher)


def _judge_the_end_token(tp: int) -> list[float]:
    """Reward, forward KL and the gradient on the student's logits where the student has sampled its end token."""
    from megatron_tropd.objectives import preset
    from megatron_tropd.relabel import move_rows
    from megatron_tropd.vocab_parallel import OutputHead, fused_head_loss
    from tests import tiny

    layout = tiny.start(tp=tp, pp=1)
    rank, group = layout.tensor_parallel_rank, layout.groups.tp
    student_V1 = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[:, None].chunk(tp)[rank].clone().requires_grad_()
    teacher_V1 = torch.tensor([0.125, 0.0625, 0.0625, 0.75]).log()[:, None].chunk(tp)[rank].clone()
    move_rows(teacher_V1, TokenMap({1: 3}).judged, group)  # the student ends with 1, the teacher with 3
    one_11 = torch.ones(1, 1)
    found = []
    for name in ("opd", "fkl-exact"):
        loss_N, report = fused_head_loss(
            OutputHead(one_11, student_V1), OutputHead(one_11, teacher_V1), torch.tensor([1]),
            torch.tensor([2]), preset(name), vocab_size=4, group=group, uniforms_N=torch.zeros(1),
        )  # fmt: skip
        student_V1.grad = None
        loss_N.sum().backward()
        parts = [torch.empty_like(student_V1.grad) for _ in range(tp)]
        torch.distributed.all_gather(parts, student_V1.grad, group=group)
        found += [float(report["reward"]), float(loss_N), *torch.cat(parts).flatten().tolist()]
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_the_end_token_is_judged_by_the_teachers_by_hand(tp: int) -> None:
    p, q = [0.5, 0.25, 0.125, 0.125], [0.125, 0.75, 0.0625, 0.0625]  # the teacher's 3 under the student's 1
    reward = math.log(0.75 / 0.25)
    # K1's gradient on the logits: -R (one-hot - p); the forward KL's: p - q.
    opd = [-reward * ((index == 1) - p[index]) for index in range(4)]
    kl = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    expected = [reward, -reward * math.log(0.25), *opd, reward, kl, *(a - b for a, b in zip(p, q, strict=True))]
    for found in run_ranks(tp, _judge_the_end_token, tp):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def _gradients(sizes: tuple[int, int], tied: bool) -> tuple[Any, Any, Any]:
    """Gradients of a step with the relabelled teacher; and of the student's output weight in dense float64 (pp 1)."""
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.pair import output_weight
    from megatron_tropd.relabel import relabel_vocabulary
    from megatron_tropd.step import forward_backward
    from tests import tiny
    from tests.dense_reference import dense_loss

    layout = tiny.start(tp=sizes[0], pp=sizes[1])
    learner = tiny.build_learner(
        layout,
        student=dataclasses.replace(tiny.STUDENT, untie_embeddings_and_output_weights=True),
        teacher=dataclasses.replace(tiny.TEACHER, untie_embeddings_and_output_weights=not tied),
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
    )
    rows = tiny.sequences()
    for row, ids in zip(rows, itertools.permutations((3, 7, 40)), strict=False):
        row["tokens"][1:4] = ids  # read, and asked for
        row["labels"][3:6] = ids * (row["regions"][3:6] > 0)
    batch = tiny.batch_for_rank(layout, rows, num_micro_batches=1)
    dense = None
    if sizes[1] == 1:
        (one,) = batch.micro_batches
        as_read = one.tokens_BS.clone()
        for ours, theirs in MAPPED.named.items():
            as_read[one.tokens_BS == ours] = theirs
        student_NH, _ = learner.stage(one)
        _, teacher_NH = learner.stage(dataclasses.replace(one, tokens_BS=as_read))
        shards = output_weight(learner.stage.module), learner.stage.teacher_weight()
        weights = [_whole(shard_VH, layout) for shard_VH in shards]
        order = torch.tensor([PERMUTATION.get(index, index) for index in range(tiny.VOCAB_SIZE)])
        weight_VH = weights[0].requires_grad_()
        labels, regions, uniforms = (
            values.flatten()[one.loss_positions_N] for values in (one.labels_BS, one.regions_BS, one.uniforms_BS)
        )
        loss_N, _ = dense_loss(
            student_NH.detach().double() @ weight_VH.T, (teacher_NH.double() @ weights[1].T)[:, order],
            labels, regions, learner.objective, vocab_size=tiny.VOCAB_SIZE, uniforms_T=uniforms,
        )  # fmt: skip
        (loss_N.sum() / one.num_loss_terms).backward()
        dense = weight_VH.grad[: tiny.VOCAB_SIZE].tolist()
    relabel_vocabulary(learner.stage.teacher, MAPPED, layout.groups.tp)
    sums, _ = forward_backward(learner, batch)
    return {name: gradient.tolist() for name, gradient in tiny.whole_gradients(learner).items()}, dense, sums


def _whole(shard_VH: torch.Tensor, layout: Any) -> torch.Tensor:
    parts = [torch.empty_like(shard_VH) for _ in range(layout.tensor_parallel_size)]
    torch.distributed.all_gather(parts, shard_VH.detach(), group=layout.groups.tp)
    return torch.cat(parts).double()


def _gradients_of_layouts(layouts: list[tuple[int, int]]) -> dict[tuple[tuple[int, int], bool], Any]:
    return {(sizes, tied): _gradients(sizes, tied) for sizes in layouts for tied in (False, True)}


@pytest.fixture(scope="module")
def gradients() -> dict[tuple[tuple[int, int], bool], list[Any]]:
    """By (tensor, pipeline size) and whether the teacher is tied: what each rank found."""
    ranks = [run_ranks(1, _gradients_of_layouts, [(1, 1)]), run_ranks(2, _gradients_of_layouts, [(2, 1), (1, 2)])]
    return {case: [found[case] for found in world] for world in ranks for case in world[0]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
def test_gradients_against_a_dense_teacher_with_its_ids_changed(
    gradients: dict[Any, list[Any]], sizes: tuple[int, int], tied: bool
) -> None:
    ((reference, dense, sums),) = gradients[(1, 1), tied]
    expected = torch.tensor(dense, dtype=torch.float64)
    for id_ in PERMUTATION:
        assert expected[id_].norm() > 1e-3 * expected.norm()
    for found, found_dense, found_sums in gradients[sizes, tied]:
        if found_dense is not None:
            error = (torch.tensor(found["output_layer.weight"]).double() - torch.tensor(found_dense)).norm()
            assert error < 1e-5 * expected.norm()
            assert (torch.tensor(found_dense) - expected).norm() < 1e-5 * expected.norm()
        for name, gradient in found.items():
            assert (torch.tensor(gradient) - torch.tensor(reference[name])).norm() < 1e-5 * expected.norm(), name
        assert found_sums == pytest.approx(sums, rel=1e-4, abs=1e-4)


def _generate_and_train(path: str) -> None:
    from megatron_tropd.building import load_teacher, load_teachers_ahead
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.generate import generate
    from megatron_tropd.run import open_run
    from megatron_tropd.trainer import train

    config = load_config(path)
    generate(config)
    train(config)
    with open_run(config, "train") as run:
        heads = {}
        for names in ({}, config.tokenizer.special_token_map):
            run.config = dataclasses.replace(
                config, tokenizer=dataclasses.replace(config.tokenizer, special_token_map=names)
            )
            (teacher,), ahead = load_teacher(run), load_teachers_ahead(run)
            heads[len(names)] = teacher.output_layer.weight.clone()
            assert torch.equal(ahead.teachers[""].head_VH, heads[len(names)])
        order = torch.arange(heads[0].shape[0])
        order[[0, 2]] = torch.tensor([2, 0])
        assert torch.equal(heads[1], heads[0][order]) and not torch.equal(heads[1], heads[0])


def test_a_run_with_another_end_token(tmp_path: Path) -> None:
    _tokenizers(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the <|im_end|> {n}", "id": str(n)}) + "\n" for n in range(16)))
    path = config_file(
        tmp_path,
        tmp_path,
        teacher={**MODEL, "untie_embeddings_and_output_weights": True, "init_method_std": 0.4},
        data={"train": str(prompts), "validation": None, "max_prompt_length": 30},
        tokenizer={
            "kind": "huggingface", "model": str(tmp_path / "base"), "teacher": str(tmp_path / "chat"), "alphabet": "",
            "special_token_map": {"<|endoftext|>": "<|im_end|>"},
        },
        rollout={"max_response_length": 40},
        guidance={"answers": str(tmp_path / "answers.jsonl"), "schedule": "constant"},
        training={"train_iters": 1, "eval_interval": 0},
    )  # fmt: skip
    run_ranks(1, _generate_and_train, str(path), timeout=150, init_process_group=False)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["response_tokens"] > 0 and math.isfinite(metrics["loss"])
