"""A teacher that reads more than the student: its prompts, its view of a batch, the gradients against a dense one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_tropd.batch import build_batch
from megatron_tropd.config import ConfigError
from megatron_tropd.data import read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_lines import LineFormat, parse_line
from megatron_tropd.tokenizer import CharacterTokenizer, Message
from megatron_tropd.types import Rollout, RolloutRequest
from tests.ranks import run_ranks
from tests.test_run import config_file, data  # noqa: F401


class ChatTokenizer(CharacterTokenizer):
    """A conversation reads as ``role:content|role:content|``."""

    def render_chat(self, messages: Any, tools: Any = None) -> str:
        return "".join(f"{message['role'][0]}:{message['content']}|" for message in messages)


TOKENIZER = ChatTokenizer("0123456789+=?{}answeroptmu:|. ")


def _read(line: dict[str, Any], template: str | None = None, system: str | None = None) -> str:
    line_format = LineFormat(
        prompt_template="{prompt}=", teacher_prompt_template=template, teacher_system_prompt=system
    )
    prompt = parse_line(line, "file:1", "1", TOKENIZER, line_format)
    assert prompt.tokens == tuple(TOKENIZER.encode(prompt.text))
    return TOKENIZER.decode(list(prompt.teacher_tokens))


def test_the_teachers_prompt_is_made_from_the_students_line() -> None:
    line = {"prompt": "1+{answer}", "answer": "3", "solution": "1+2=3"}
    assert _read(line) == ""
    # One pass: what stands in the data is not a place to fill.
    assert _read(line, "{answer}: {prompt}") == "3: 1+{answer}"
    assert _read(line, "{solution}?{prompt}=") == "1+2=3?1+{answer}="
    assert _read({"prompt": "1+2", "answer": "3"}, "{solution}?{prompt}") == "3?1+2"
    messages: list[Message] = [
        {"role": "system", "content": "t"}, {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "u"},
    ]  # fmt: skip
    assert _read({"messages": messages, "answer": "3"}, "{prompt}:{answer}") == "s:t|u:1+2|a:4|u:u:3|"
    assert _read({"messages": messages, "answer": "3"}, system="{answer}?") == "s:3?|u:1+2|a:4|u:u|"
    for wrong, options, message in [
        ({"prompt": "1+2"}, {"template": "{answer} {prompt}"}, r"context has \{answer\}, and this line has none"),
        ({"prompt": "1+2", "answer": "3"}, {"system": "{answer}"}, "use teacher_context.prompt_template"),
        ({"messages": messages[:1], "answer": "3"}, {"template": "{prompt}"}, "needs a message of the user"),
        ({"prompt": "1+2"}, {"template": "ß{prompt}"}, "file:1"),
    ]:
        with pytest.raises(DataError, match=message):
            _read(wrong, **options)


def test_a_line_names_its_teacher() -> None:
    line = {"prompt": "1+2", "teacher": "math"}
    assert parse_line(line, "file:1", "1", TOKENIZER, LineFormat(teachers=("math", "code"))).teacher == "math"
    assert parse_line(line, "file:1", "1", TOKENIZER).teacher == ""  # no teachers: a key like any other
    with pytest.raises(DataError, match="file:1: teacher 'math' is unknown; teachers has code"):
        parse_line(line, "file:1", "1", TOKENIZER, LineFormat(teachers=("code",)))


def test_the_teachers_prompt_has_a_budget_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "1+2", "answer": "3"}) + "\n")
    line_format = LineFormat(teacher_prompt_template="{answer}{answer}{answer}{prompt}")
    with pytest.raises(DataError, match="teacher's prompt has 6 tokens, its budget is 4"):
        read_prompts(path, TOKENIZER, 4, "refuse", line_format=line_format)
    (prompt,), skipped = read_prompts(path, TOKENIZER, 4, "refuse", line_format=line_format, max_teacher_length=6)
    assert len(prompt.teacher_tokens) == 6 and not skipped


def test_each_teacher_has_micro_batches_of_its_own() -> None:
    rollouts = [_rollout(index, [10], [], [20] * (index + 1)) for index in range(5)]
    for index in (1, 4):
        request = rollouts[index].request
        rollouts[index] = replace(
            rollouts[index], request=replace(request, prompt=replace(request.prompt, teacher="other"))
        )
    batch = _build(rollouts, num_micro_batches=3, size=2)
    assert [one.teacher for one in batch.micro_batches] == ["", "", "other"]
    assert [one.sample_ids for one in batch.micro_batches] == [(3, 2), (0, -1), (4, 1)]


def test_the_teachers_view_of_a_batch() -> None:
    """Prompts of 2 and 1 tokens that the teacher reads as 4 and 1; prefix, response and labels are the same."""
    rollouts = [
        _rollout(0, [10, 11], [20], [30, 31], teacher=[12, 13, 10, 11]),
        _rollout(1, [14], [], [32], teacher=[15]),
    ]
    (one,) = _build(rollouts, multiple=4).micro_batches
    assert one.tokens_BS.tolist() == [[10, 11, 20, 30], [14, 0, 0, 0]]
    assert one.teacher_tokens_BS is not None and one.teacher_positions_N is not None
    assert one.teacher_tokens_BS.tolist() == [[12, 13, 10, 11, 20, 30, 0, 0], [15, 0, 0, 0, 0, 0, 0, 0]]
    assert one.loss_positions_N.tolist() == [1, 2, 3, 4]
    assert one.teacher_positions_N.tolist() == [3, 4, 5, 8]
    (same,) = _build([_rollout(0, [10, 11], [20], [30])]).micro_batches
    assert same.teacher_tokens_BS is None and same.teacher_positions_N is None


def _rollout(
    sample: int, prompt: list[int], prefix: list[int], response: list[int], teacher: list[int] | None = None
) -> Rollout:
    asked = Prompt(str(sample), "", tuple(prompt), "", teacher_tokens=tuple(teacher or ()))
    return Rollout(RolloutRequest(sample, asked, tuple(prefix)), tuple(response), (-1.0,) * len(response), True)


def _build(rollouts: list[Rollout], *, num_micro_batches: int = 1, multiple: int = 1, size: int | None = None) -> Any:
    return build_batch(
        rollouts, step=0, seed=5, micro_batch_size=size or len(rollouts), num_micro_batches=num_micro_batches, pad_id=0,
        max_sequence_length=64, normalization="tokens", pad_to_multiple_of=multiple,
    )  # fmt: skip


def _rollouts() -> list[Rollout]:
    generator = np.random.default_rng(0)

    def tokens(low: int, high: int) -> list[int]:
        return generator.integers(2, 45, int(generator.integers(low, high))).tolist()

    found = [_rollout(i, tokens(1, 6), tokens(0, 3), tokens(1, 9), tokens(3, 14) if i % 3 else []) for i in range(8)]
    for index in (1, 3, 6):  # a prompt that the second teacher judges, with what it alone reads and without
        request = found[index].request
        request = replace(request, prompt=replace(request.prompt, teacher="other"))
        found[index] = replace(found[index], request=request)
    return found


def _gradients(layouts: list[tuple[int, int, tuple[int, int]]]) -> list[dict[str, np.ndarray]]:
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.objectives import preset
    from megatron_tropd.step import forward_backward
    from tests import tiny

    found = []
    for tp, pp, ahead in layouts:
        layout = tiny.start(tp=tp, pp=pp)
        learner = tiny.build_learner(
            layout,
            objective=preset("tropd", top_k=5, gate="soft"),
            optimizer=OptimizerConfig(use_distributed_optimizer=False),
            ahead=ahead,
            teacher_seeds={"": 2, "other": 3},
            offload=tp == 2,
        )
        forward_backward(learner, _build(_rollouts(), num_micro_batches=2, size=4))
        found.append(tiny.whole_gradients(learner))
        if torch.distributed.get_world_size() == 1:
            found.append(_dense_gradients(learner))
    # A tensor would travel as a file of this process, which may have ended when the other opens it.
    return [{name: gradient.numpy() for name, gradient in gradients.items()} for gradients in found]


def _dense_gradients(learner: Any) -> dict[str, torch.Tensor]:
    """Each sequence alone through both models, each with its own prompt; whole logits; the method in float64."""
    from tests.dense_reference import dense_loss
    from tests.tiny import VOCAB_SIZE

    def logits(model: torch.nn.Module, prompt: tuple[int, ...], rollout: Rollout) -> torch.Tensor:
        sequence = torch.tensor([[*prompt, *rollout.request.prefix, *rollout.response]])[:, :-1]
        whole_SV = model(sequence, torch.arange(sequence.shape[1])[None], attention_mask=None)[0]
        return whole_SV[len(prompt) - 1 :, :VOCAB_SIZE]

    student, total, count = learner.stage.module, 0.0, 0
    for rollout in _rollouts():
        prompt, prefix = rollout.request.prompt, rollout.request.prefix
        labels = torch.tensor([*prefix, *rollout.response])
        with torch.no_grad():
            teacher_TV = logits(
                learner.ahead.teachers[prompt.teacher].teacher, prompt.teacher_tokens or prompt.tokens, rollout
            )
        regions = torch.tensor([1] * len(prefix) + [2] * len(rollout.response))
        loss_T, _ = dense_loss(
            logits(student, prompt.tokens, rollout), teacher_TV, labels, regions, learner.objective,
            vocab_size=VOCAB_SIZE,
        )  # fmt: skip
        total, count = total + loss_T.sum(), count + len(labels)
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total / count, parameters)
    return dict(zip(names, gradients, strict=True))


def test_gradients_with_two_privileged_teachers_are_the_dense_references() -> None:
    ((sharded, dense),) = run_ranks(1, _gradients, [(1, 1, (1, 1))], timeout=200)
    norm = np.linalg.norm(np.concatenate([gradient.ravel() for gradient in dense.values()]))
    assert norm > 1e-3
    for name, gradient in dense.items():
        assert np.linalg.norm(sharded[name] - gradient[: sharded[name].shape[0]]) < 1e-5 * norm, name
    ranks = run_ranks(2, _gradients, [(2, 1, (2, 1)), (1, 2, (2, 1)), (2, 1, (1, 2))], timeout=200)
    for layouts in zip(*ranks, strict=True):
        for found in layouts:
            assert found
            for name, gradient in found.items():
                assert np.linalg.norm(gradient - sharded[name]) < 1e-5 * norm, name


def _run(path: str, command: str) -> None:
    from megatron_tropd import generate, trainer
    from megatron_tropd.config_parser import load_config

    {"generate": generate.generate, "train": trainer.train, "sft": trainer.sft}[command](load_config(path, []))


def _other_teacher(tmp_path: Path, data: Path) -> Path:  # noqa: F811
    """A config whose `sft` leaves weights of the teacher's architecture in ``tmp_path / "other"``."""
    teacher = yaml.safe_load(config_file(tmp_path / "trained", data).read_text())["teacher"]
    path = config_file(tmp_path / "trained", data, student=teacher, teacher=None, training={"train_iters": 1})
    config = yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path / "other")}
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_student_learns_from_a_teacher_that_knows_the_answer(tmp_path: Path, data: Path) -> None:  # noqa: F811
    context = {"prompt_template": "{answer}={prompt}", "max_prompt_length": 14}
    parallel = {"tensor_model_parallel_size": 2, "teacher_schedule": "ahead"}
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    lines = [line | {"teacher": "other"} if index % 2 else line for index, line in enumerate(lines)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = config_file(
        tmp_path, data, parallel=parallel, teacher_context=context, teachers={"other": str(tmp_path / "other")},
        data={"train": str(tmp_path / "train.jsonl"), "validation": None, "max_prompt_length": 6},
        training={"train_iters": 2, "eval_interval": 0}, guidance={"answers": str(tmp_path / "answers.jsonl")},
    )  # fmt: skip
    run_ranks(1, _run, str(_other_teacher(tmp_path, data)), "sft", timeout=100, init_process_group=False)
    for command in ("generate", "train"):
        run_ranks(2, _run, str(path), command, timeout=200, init_process_group=False)
    header = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert header["teacher"]["teachers"] == {"other": str(tmp_path / "other")}
    assert header["generation"]["teacher_context"]["prompt_template"] == context["prompt_template"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2"


def test_tasks_without_text_lines_have_no_teacher_context() -> None:
    from megatron_tropd.config import Config, DataConfig, ModelConfig
    from megatron_tropd.config_teacher import TeacherContextConfig
    from megatron_tropd.prompt_sources import read_training_prompts

    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8)
    context = TeacherContextConfig(prompt_template="{answer}{prompt}")
    config = Config(model, DataConfig(train="reasoning-gym:train"), "run", teacher_context=context)
    with pytest.raises(ConfigError, match="needs prompts that are text lines"):
        read_training_prompts(config, TOKENIZER, for_teacher=True)
