"""What the sections about text may say, alone and together. Imports no torch."""

from __future__ import annotations

import math

from megatron_tropd.config import Config
from megatron_tropd.config_data import TokenizerConfig
from megatron_tropd.config_require import require


def check_data(config: Config) -> None:
    """Tokenizers, prompt files and procedural tasks. Raises ConfigError."""
    _check_tokenizer(config.tokenizer)
    _check_mixture(config.data.train)
    _check_tasks(config)
    require(
        config.data.prompt_template.count("{prompt}") == 1,
        f"data.prompt_template must contain {{prompt}} once, found {config.data.prompt_template!r}",
    )


def _check_tokenizer(tokenizer: TokenizerConfig) -> None:
    """No option that its kind would ignore."""
    kind, has_template = tokenizer.kind, tokenizer.chat_template is not None or bool(tokenizer.chat_template_kwargs)
    require(
        kind in ("huggingface", "tiktoken") or not has_template,
        f"tokenizer.chat_template and chat_template_kwargs need control tokens; kind={kind} has none: use huggingface",
    )
    require(
        kind == "tiktoken" or not tokenizer.megatron_options,
        f"tokenizer.megatron_options are those of kind=tiktoken, found {kind}: take them out",
    )
    require(
        kind in ("huggingface", "sentencepiece") or not tokenizer.special_token_map,
        f"tokenizer.special_token_map is for kind=huggingface and sentencepiece, found {kind}: take it out",
    )
    require(
        tokenizer.teacher is not None or not tokenizer.special_token_map,
        "tokenizer.special_token_map says what the teacher's tokenizer has for tokens of the student's: set "
        "tokenizer.teacher, or take it out",
    )
    require(
        kind != "characters" or tokenizer.teacher is None,
        "tokenizer.teacher is a path, and kind=characters has none: take it out, both models share the alphabet",
    )


def _check_mixture(train: str | dict[str, float]) -> None:
    if isinstance(train, str):
        return
    require(len(train) > 0, "data.train is a mixture without files: name at least one, {path: weight}")
    for path, weight in train.items():
        require(
            math.isfinite(weight) and weight > 0,
            f"data.train: the weight of {path} must be a positive number, found {weight}; take the file out instead",
        )


def _check_tasks(config: Config) -> None:
    train = config.data.train
    sources = [*([train] if isinstance(train, str) else train), config.data.validation or "", *config.evaluation.files]
    for source in sources:
        require(
            not source.startswith("reasoning-gym") or source in ("reasoning-gym:train", "reasoning-gym:validation"),
            f"{source!r} is neither a file nor reasoning-gym:train nor reasoning-gym:validation",
        )
        require(
            not source.startswith("reasoning-gym") or len(config.tasks.kinds) > 0,
            f"{source} needs tasks.kinds, such as {{chain_sum: {{}}}}",
        )
    require(
        config.data.validation != "reasoning-gym:train" and "reasoning-gym:train" not in config.evaluation.files,
        "held-out prompts must not be those of training: use reasoning-gym:validation",
    )
