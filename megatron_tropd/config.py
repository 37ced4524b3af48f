"""The configuration tree: frozen dataclasses, a docstring under each field; Megatron's field names where it has one.

Imports no torch, so ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Literal

Schedule = Literal["none", "half-cosine", "quarter-cosine", "linear", "exponential", "constant"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and weights of one model (student or teacher)."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the hidden state."""
    num_attention_heads: int
    """Number of query heads."""
    ffn_hidden_size: int
    """Width of the feed-forward layer (of each of its two halves with SwiGLU)."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); None: as many as query heads."""
    kv_channels: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of norm."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every norm."""
    swiglu: bool = True
    """Gated SiLU feed-forward (Llama, Qwen) instead of GELU."""
    qk_layernorm: bool = False
    """Norm on queries and keys (Qwen3)."""
    add_qkv_bias: bool = False
    """Bias on the QKV projection alone (Qwen2)."""
    rotary_base: int = 10000
    """Base period of the rotary position embedding."""
    rope_scaling_factor: float | None = None
    """Llama-3 RoPE scaling factor (original length 8192); None: no scaling."""
    untie_embeddings_and_output_weights: bool = False
    """Separate weights for embedding and output layer."""
    vocab_size: int | None = None
    """True vocabulary size of this model; None: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times tensor_model_parallel_size."""
    init_method_std: float = 0.02
    """Standard deviation of freshly initialised weights."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Uneven pipeline split: layers on the first stage; None: even."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Uneven pipeline split: layers on the last stage; None: even."""
    load: str | None = None
    """Checkpoint folder to take the weights from (a run's checkpoints folder or one step of it); None: random."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout both models share. Data-parallel size = world size / (tensor x pipeline)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer and the vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages; each holds a slice of the student and of the teacher."""
    distributed_timeout_minutes: int = 30
    """A collective that waits longer than this ends the job."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids; shared by student and teacher."""

    kind: Literal["characters", "sentencepiece"] = "characters"
    """One id per character of an alphabet, or a SentencePiece model file."""
    alphabet: str = "0123456789+-=., abcdefghijklmnopqrstuvwxyz"
    """kind=characters: the characters, in id order; id 0 is padding, 1 is end of text, characters follow from 2."""
    model: str | None = None
    """kind=sentencepiece: path of the .model file."""


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from. Files are JSONL: {"prompt": str, "answer": str (optional), "id": str (optional)}."""

    train: str
    """JSONL of training prompts."""
    validation: str | None = None
    """JSONL of held-out prompts with answers; None: no evaluation."""
    max_prompt_length: int = 1024
    """Token budget of a prompt."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """A longer prompt is an error, or is skipped and counted."""


@dataclass(frozen=True)
class RolloutConfig:
    """Generation by the student (and by the teacher for guidance answers)."""

    samples_per_prompt: int = 4
    """Rollouts of each prompt in a step."""
    max_response_length: int = 8192
    """Token budget of prefix + response."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. The trust region is defined at 1."""
    top_p: float = 1.0
    """Nucleus mass to sample from; 1 is off."""
    max_batch_size: int = 256
    """Most sequences the engine decodes at once on one data-parallel rank."""


@dataclass(frozen=True)
class GuidanceConfig:
    """Teacher-written prefixes (METHOD 1, off-policy guidance)."""

    answers: str | None = None
    """JSONL store of teacher answers (`python -m megatron_tropd generate`); required unless schedule is none."""
    schedule: Literal["auto"] | Schedule = "auto"
    """How the longest prefix shrinks over training; auto: half-cosine for tropd, none for the other objectives."""
    max_prefix_length: int | None = None
    """L_train, tokens: the longest prefix at step 0; None: rollout.max_response_length."""
    prefix_draw: Literal["truncate", "uniform"] = "truncate"
    """Length l = min(|answer|, L_max), or drawn uniformly in [0, L_max] first."""
    min_on_policy_tokens: int = 0
    """Cut the prefix so that at least this many tokens of the answer are left to the student."""
    fraction: float = 1.0
    """Share of the rollouts that get a prefix."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """Overrides of the objective's preset; None keeps what the preset says (METHOD 1 and 2)."""

    gate: Literal["bernoulli", "static", "soft", "none"] | None = None
    """Trust gate."""
    outlier: Literal["fkl", "mask", "clip"] | None = None
    """What an outlier token contributes."""
    tau: float | None = None
    """Threshold in nats of the static gate and of clip."""
    top_k: int | None = None
    """Teacher ids in the truncated forward KL."""
    beta: float | None = None
    """Guidance coefficient (tropd), or the mixing weight of jsd-exact."""
    renormalize: Literal["none", "teacher", "both"] | None = None
    """Renormalisation over the top-k set."""
    tail: Literal["none", "bucket"] | None = None
    """The mass outside the top-k set as one extra event."""
    student_log_prob_min: float | None = None
    """Clamp of the student's log-prob in the truncated forward KL."""
    fkl_as: Literal["loss", "reward"] | None = None
    """Forward KL as a direct loss, or as a detached reward (reproduces the collapse the paper reports)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's optimizer and scheduler."""

    lr: float = 5e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after warm-up."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay (norms and biases excluded, as Megatron does)."""
    adam_beta1: float = 0.9
    """AdamW beta1."""
    adam_beta2: float = 0.999
    """AdamW beta2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 is off."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length, sizes and bookkeeping of a run."""

    train_iters: int = 200
    """Optimizer steps of the whole run."""
    global_batch_size: int = 512
    """Sequences per step over all ranks (prompts x samples_per_prompt)."""
    micro_batch_size: int = 4
    """Sequences per forward on one rank."""
    seed: int = 1234
    """Keys initialisation, data order, sampling and the trust gate."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 main gradients on GPUs, fp32 on the CPU."""
    normalization: Literal["tokens", "sequences", "kept"] = "tokens"
    """Denominator of the loss: response positions of the global batch, a mean per sequence, or kept positions."""
    recompute: bool = False
    """Recompute the student's activations in the backward (Megatron full, uniform)."""
    eval_interval: int = 0
    """Steps between held-out evaluations; 0: only at the end."""
    eval_samples: int = 256
    """Held-out prompts per evaluation."""
    save_interval: int = 50
    """Steps between checkpoints; the last step and SIGTERM always save."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    log_rollouts: int = 4
    """Rollouts written out as text per step."""


@dataclass(frozen=True)
class Config:
    """One run."""

    student: ModelConfig
    """The model that is trained (also by `sft`)."""
    data: DataConfig
    """Prompts."""
    output_dir: str
    """Run folder: config, metrics, checkpoints, plots. Starting again with the same folder resumes."""
    teacher: ModelConfig | None = None
    """The frozen model that judges; required by `train` and `generate`."""
    objective: str = "tropd"
    """Preset: tropd, opd, fkl, rkl-exact, fkl-exact, jsd-exact."""
    objective_options: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """Overrides of the preset."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Teacher prefixes."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to ids."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and scheduler."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, sizes, bookkeeping."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, what was found and what to do."""


OBJECTIVES = ("tropd", "opd", "fkl", "rkl-exact", "fkl-exact", "jsd-exact")
"""Presets that `train` takes; ``objectives.preset`` defines them."""


def resolved_schedule(config: Config) -> Schedule:
    """The prefix schedule in force: ``auto`` is half-cosine for TrOPD and none for the other objectives."""
    if config.guidance.schedule != "auto":
        return config.guidance.schedule
    return "half-cosine" if config.objective == "tropd" else "none"


def validate(config: Config, world_size: int, command: str) -> None:
    """Every check across fields that needs no file and no process group. Raises ConfigError.

    ``command`` is train, sft, generate or evaluate; ``world_size`` the number of processes.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    _require(tp >= 1 and pp >= 1, f"parallel sizes must be at least 1, found tensor {tp} and pipeline {pp}")
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into tensor_model_parallel_size {tp} x pipeline_model_parallel_size "
        f"{pp} = {tp * pp}: start a multiple of {tp * pp} processes (torchrun --nproc-per-node)",
    )
    _check_model("student", config.student, tp, pp)
    if config.teacher is not None:
        _check_model("teacher", config.teacher, tp, pp)
    _require(
        config.teacher is not None or command not in ("train", "generate"),
        f"`{command}` needs a teacher: add a teacher section with its architecture and load",
    )
    _check_rollout(config)
    if command in ("train", "sft"):
        _check_training(config, world_size // (tp * pp), command)
    if command in ("train", "generate"):
        _check_guidance(config, command)
    if command == "evaluate":
        _require(
            config.data.validation is not None, "`evaluate` needs data.validation, a JSONL of prompts with answers"
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_model(name: str, model: ModelConfig, tp: int, pp: int) -> None:
    groups = model.num_query_groups or model.num_attention_heads
    sizes = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": groups,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
    }
    for field_name, value in sizes.items():
        _require(value >= 1, f"{name}.{field_name} must be at least 1, found {value}")
    for field_name in ("ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        _require(
            sizes[field_name] % tp == 0,
            f"{name}.{field_name} {sizes[field_name]} is not divisible by tensor_model_parallel_size {tp}: "
            f"use a tensor parallel size that divides it",
        )
    _require(
        model.num_attention_heads % groups == 0,
        f"{name}.num_attention_heads {model.num_attention_heads} is not divisible by num_query_groups {groups}",
    )
    _require(
        model.kv_channels is not None or model.hidden_size % model.num_attention_heads == 0,
        f"{name}.hidden_size {model.hidden_size} is not divisible by num_attention_heads "
        f"{model.num_attention_heads}: set {name}.kv_channels",
    )
    _check_pipeline(name, model, pp)


def _check_pipeline(name: str, model: ModelConfig, pp: int) -> None:
    uneven = {
        "num_layers_in_first_pipeline_stage": model.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": model.num_layers_in_last_pipeline_stage,
    }
    given = {field_name: value for field_name, value in uneven.items() if value is not None}
    _require(pp > 1 or not given, f"{name}.{next(iter(given), '')} needs pipeline_model_parallel_size > 1")
    _require(all(value >= 1 for value in given.values()), f"{name}: a pipeline stage needs at least one layer: {given}")
    layers, stages = model.num_layers - sum(given.values()), pp - len(given)
    _require(
        layers >= stages and (layers == 0 if stages == 0 else layers % stages == 0),
        f"{name}.num_layers {model.num_layers} cannot be split over pipeline_model_parallel_size {pp}"
        + (f" with {given}" if given else "")
        + f": the remaining {layers} layers do not divide over {stages} stages; change num_layers or the uneven split "
        "(num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage)",
    )


def _check_rollout(config: Config) -> None:
    rollout = config.rollout
    _require(rollout.temperature >= 0, f"rollout.temperature must be >= 0, found {rollout.temperature}")
    _require(0 < rollout.top_p <= 1, f"rollout.top_p must be in (0, 1], found {rollout.top_p}")
    for name in ("samples_per_prompt", "max_response_length", "max_batch_size"):
        _require(getattr(rollout, name) >= 1, f"rollout.{name} must be at least 1, found {getattr(rollout, name)}")
    _require(config.data.max_prompt_length >= 1, "data.max_prompt_length must be at least 1")


def _check_training(config: Config, dp: int, command: str) -> None:
    training = config.training
    samples = config.rollout.samples_per_prompt if command == "train" else 1
    _require(training.train_iters >= 1, f"training.train_iters must be at least 1, found {training.train_iters}")
    _require(training.micro_batch_size >= 1, "training.micro_batch_size must be at least 1")
    rows = training.micro_batch_size * dp
    unit = math.lcm(rows, samples)
    size = training.global_batch_size
    below, above = size // unit * unit, (size // unit + 1) * unit
    _require(
        size >= 1 and size % unit == 0,
        f"training.global_batch_size {size} must be a multiple of micro_batch_size {training.micro_batch_size} x "
        f"data-parallel size {dp}"
        + (f" and of rollout.samples_per_prompt {samples}" if samples > 1 else "")
        + f": try {f'{below} or ' if below else ''}{above}",
    )
    if command == "train":
        _require(config.objective in OBJECTIVES, _unknown_objective(config.objective))


def _unknown_objective(name: str) -> str:
    near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)[0]
    return f"unknown objective {name!r}: did you mean {near!r}? Valid: {', '.join(OBJECTIVES)}"


def _check_guidance(config: Config, command: str) -> None:
    guidance, budget = config.guidance, config.rollout.max_response_length
    if command == "generate":
        _require(guidance.answers is not None, "`generate` needs guidance.answers, the file to write")
        return
    _require(
        guidance.answers is not None or resolved_schedule(config) == "none",
        f"guidance.schedule {resolved_schedule(config)} needs teacher answers: set guidance.answers (written by "
        "`python -m megatron_tropd generate`), or guidance.schedule=none",
    )
    longest = guidance.max_prefix_length
    _require(
        longest is None or 0 <= longest <= budget,
        f"guidance.max_prefix_length {longest} must be between 0 and rollout.max_response_length {budget}",
    )
    _require(0 <= guidance.fraction <= 1, f"guidance.fraction must be in [0, 1], found {guidance.fraction}")
    _require(guidance.min_on_policy_tokens >= 0, "guidance.min_on_policy_tokens must be >= 0")
