"""The configuration tree: frozen dataclasses, a docstring under each field; Megatron's field names where it has one.

Imports no torch, so ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_tropd.config_data import DataConfig, TokenizerConfig
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.config_parallel import ParallelConfig
from megatron_tropd.config_rollout import RolloutConfig
from megatron_tropd.config_tasks import EvaluationConfig, TasksConfig
from megatron_tropd.config_teacher import TeacherContextConfig
from megatron_tropd.config_watch import GuardConfig, MonitoringConfig

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
    num_moe_experts: int | None = None
    """Experts in every layer (Qwen3-MoE); None: a dense model."""
    moe_ffn_hidden_size: int | None = None
    """Width of each expert's feed-forward layer; required with num_moe_experts."""
    moe_router_topk: int = 2
    """Experts that each token is sent to."""
    moe_router_pre_softmax: bool = False
    """Weigh the chosen experts by their probability among all, instead of among the chosen (norm_topk_prob: false)."""
    moe_aux_loss_coeff: float = 0.0
    """Student only: coefficient of the routers' load-balancing loss, added to the objective's; 0 keeps it out. 1 is its
    value where all experts get as many tokens, per layer; models are pre-trained with about 0.001."""
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
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Format of the linear layers' products in 8 bits, through Transformer Engine (hybrid: gradients in e5m2); weights
    stay in training.precision. None: no such products. GPUs with Transformer Engine alone."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How fp8 scales: by a tensor's present maximum, by those of earlier steps, by blocks (H100), in MX (B200)."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Uneven pipeline split: layers on the first stage; None: even."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Uneven pipeline split: layers on the last stage; None: even."""
    load: str | None = None
    """Folder to take the weights from: a checkpoint (a run's checkpoints folder or one step of it), one of Megatron-LM
    (torch_dist), or a Hugging Face model; None: random."""


@dataclass(frozen=True)
class GuidanceConfig:
    """Teacher-written prefixes (METHOD 1, off-policy guidance)."""

    answers: str | None = None
    """JSONL store of teacher answers (`python -m megatron_tropd generate`, or tools/import_answers.py), or a folder of
    such files; required unless schedule is none."""
    answers_per_shard: int = 0
    """`generate` makes `answers` a folder of files with this many answers each; 0: one file."""
    schedule: Literal["auto"] | Schedule = "auto"
    """How the longest prefix shrinks over training; auto: half-cosine for the tropd family, constant (whole answers)
    for seq-kd and gkd, none for the other objectives."""
    max_prefix_length: int | None = None
    """L_train, tokens: the longest prefix at step 0; None: rollout.max_response_length."""
    prefix_draw: Literal["truncate", "uniform"] = "truncate"
    """Length l = min(|answer|, L_max), or drawn uniformly in [0, L_max] first."""
    min_on_policy_tokens: int = 0
    """Cut the prefix so that at least this many tokens of the answer are left to the student."""
    fraction: float | None = None
    """Share of the rollouts that get a prefix; None: 1, for gkd 0.5 (its 1 - lambda)."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """Overrides of the objective's preset; None keeps what the preset says (METHOD 1 and 2)."""

    gate: Literal["bernoulli", "static", "soft", "none"] | None = None
    """Trust gate."""
    outlier: Literal["fkl", "mask", "clip"] | None = None
    """What an outlier token contributes: forward KL (full vocabulary under tropd-exact), nothing, K1 on max(R, tau)."""
    tau: float | None = None
    """Nats; threshold of the static gate and floor of clip (also reopold's: log(l) / (1 - l))."""
    top_k: int | None = None
    """Teacher ids in a top-k term."""
    beta: float | None = None
    """Guidance coefficient, or the mixing weight of jsd and jsd-exact."""
    alpha: float | None = None
    """top-d: the proximal teacher's share of the mixture; eopd: coefficient of the added forward KL."""
    entropy_tau: float | None = None
    """eopd adds its forward KL where the teacher's entropy is above this, in nats."""
    entropy_share: float | None = None
    """Learn only from this share of the global batch's on-policy tokens, those of highest student entropy (entropy-opd,
    reopold-two-stage: 0.2; the others: 1). Metrics are of these tokens."""
    switch: float | None = None
    """reopold-two-stage: until this share of the training (0.5) outliers are masked and entropy_share does not act."""
    skew: float | None = None
    """skew-fkl, skew-rkl: a, the weight of the divergence's first argument in the mixture."""
    guidance_loss: Literal["nll", "forward_kl", "divergence"] | None = None
    """Guidance tokens: -log pi_S(x); forward_kl (tropd-exact) over the full vocabulary; divergence (gkd and the other
    exact objectives): the one that on-policy tokens take."""
    task_reward: float | None = None
    """Coefficient of a task advantage on on-policy tokens: the verifier's score of a sample less the mean over the
    prompt's samples; 0: none."""
    importance_cap: float | None = None
    """Weigh on-policy tokens by min(trainer / engine probability, cap); None: no weights."""
    clip_ratio_low: float | None = None
    """PPO's clip of the trainer / engine probability in terms on the sampled token, below 1 - clip_ratio_low; None: 0.2
    where tokens are older than the weights (steps_per_rollout > 1, one_step_off, partial_learn_from=finished), else no
    ratio."""
    clip_ratio_high: float | None = None
    """And above 1 + clip_ratio_high; None: 0.28 in the same cases."""
    renormalize: Literal["none", "teacher", "both"] | None = None
    """Renormalisation over the top-k set."""
    tail: Literal["none", "bucket"] | None = None
    """The mass outside the top-k set as one extra event."""
    student_log_prob_min: float | None = None
    """Clamp of the student's log-prob in the top-k forward KL."""
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
    optimizer_cpu_offload: bool = False
    """Keep the optimizer's state (fp32 weights and Adam's moments) in host memory and take the step there: weights and
    gradients stay on the device, the step waits for both ways over the bus. Needs use_distributed_optimizer."""
    optimizer_offload_fraction: float = 1.0
    """optimizer_cpu_offload: the share of the parameters whose state is in host memory."""
    overlap_param_gather: bool = False
    """Gather the weights that the sharded optimizer has moved behind the next forward instead of at once. Generation
    needs them whole, so it gains where steps follow one another: `sft`, and training.steps_per_rollout above 1."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length, sizes and bookkeeping of a run."""

    train_iters: int = 200
    """Optimizer steps of the whole run."""
    global_batch_size: int = 512
    """Sequences per step over all ranks (prompts x samples_per_prompt)."""
    micro_batch_size: int = 4
    """Sequences per forward on one rank."""
    micro_batch_tokens: int | None = None
    """Pack sequences of like length by this many positions per forward instead, padding included; at least the longest
    sequence, data.max_prompt_length + rollout.max_response_length. Long tails then cost memory for themselves alone."""
    sequence_packing: bool = False
    """Put the sequences of a micro-batch behind one another in one row (Megatron's THD format) instead of side by side:
    no padding, and micro-batches of like size, of at most micro_batch_tokens positions. Needs micro_batch_tokens."""
    seed: int = 1234
    """Keys initialisation, data order, sampling and the trust gate."""
    steps_per_rollout: int = 1
    """Optimizer steps on one rollout: the engine generates for this many global batches, one after another with the
    same weights, and each step learns from one of them. Above 1 the later ones are off-policy, and terms on the sampled
    token take PPO's clipped ratio (objective_options.clip_ratio_low, _high). Saves and ends happen between rollouts."""
    one_step_off: bool = False
    """Generate and judge the next step's rollouts while this step trains, on ranks of their own
    (parallel.generator_ranks): they are then of the weights of one step before, never older, and terms on the sampled
    token take PPO's clipped ratio. `train` alone; the other commands use all ranks as ever."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 main gradients on GPUs, fp32 on the CPU."""
    deterministic: bool = False
    """Deterministic algorithms alone, in torch, cuBLAS, NCCL, Transformer Engine and Megatron: slower, and on GPUs the
    same run twice gives the same bits, as on the CPU it does anyway."""
    normalization: Literal["tokens", "sequences", "kept"] = "tokens"
    """Denominator of the loss: response positions of the global batch, a mean per sequence, or kept positions."""
    output_head: Literal["fused", "fused-recompute", "logits"] = "fused"
    """From hidden states to the loss. fused: a chunk of tokens at a time through both output layers, gradients taken at
    once, whole logits never exist; fused-recompute: the student's logits again in the backward, which saves an fp32
    buffer of the output weight's size and costs one more product; logits: both models' whole logits."""
    fp32_logits: bool = False
    """Fused heads in bf16: keep the logits of a chunk in fp32. bf16 rounds a logit of 16 to the nearest 0.125, which
    hides small differences between the models; costs twice the memory and traffic of a chunk's logits."""
    head_chunk_size: int | None = None
    """Tokens of a chunk of the fused heads; None: from the sizes."""
    recompute: bool = False
    """Recompute the student's activations in the backward (Megatron full, uniform)."""
    eval_interval: int = 0
    """Steps between held-out evaluations; 0: only at the end."""
    eval_samples: int = 256
    """Held-out prompts of each file per evaluation during training (`evaluate` takes all)."""
    target_accuracy: float | None = None
    """End the run, with a checkpoint, at the first evaluation whose accuracy on data.validation reaches this."""
    save_interval: int = 50
    """Steps between checkpoints; the last step and SIGTERM always save."""
    async_save: bool = False
    """Write checkpoints in the background, one at a time, while training goes on; each is published when all of it is
    on the disk."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of every this many steps are kept besides; 0: none."""
    fall_back: bool = False
    """Where the newest checkpoint is damaged, continue from the newest whole one instead of refusing."""
    allow_config_changes: bool = False
    """Resume although the config, or an input file, has changed where that makes it another experiment. What changed is
    logged."""
    allow_legacy_checkpoints: bool = False
    """Take weights also from checkpoints of Megatron-LM whose common.pt is a pickle (Megatron-Core before 0.19): to
    read one can run code. This one is read with limits; still, only do so with files that you trust."""
    max_log_prob_gap: float | None = None
    """Largest mean |trainer - engine| log-prob of the sampled tokens, in nats, that a step may have; a larger one stops
    the run. None: only logged."""
    export_hf: bool = False
    """At the end, write the student as a Hugging Face folder too: <output_dir>/hf/step_N. What config.json says beyond
    the architecture, and the tokenizer's files, come from the Hugging Face folder in student.load, tokenizer.model or
    teacher.load (the first of the student's family)."""
    export_hf_on_save: bool = False
    """The same beside every checkpoint, kept and removed with it."""
    log_rollouts: int = 4
    """Rollouts written out as text per step."""
    log_tokens: int = 0
    """Trajectories written out token by token (region, R, P_trust, outlier or not) every log_tokens_interval steps to
    <output_dir>/tokens, for tools/plot_run.py; 0: none."""
    log_tokens_interval: int = 50
    """Steps between them."""


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
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of the student's weights."""
    teachers: dict[str, str] = field(default_factory=dict)
    """More teachers by name: folders of weights, as in teacher.load, of teacher's architecture and tokenizer. A prompt
    whose line says "teacher": NAME is judged by that one, the others by `teacher`. Needs
    parallel.teacher_schedule=ahead; with parallel.offload_teacher one at a time is on the device."""
    objective: str = "tropd"
    """Preset: tropd, tropd-exact, tropd-aopd; opd, aopd, eopd, entropy-opd, reopold, reopold-two-stage, top-d, mopd,
    fkl, jsd; over the full vocabulary rkl-exact, fkl-exact, jsd-exact, gkd, skew-fkl, skew-rkl; seq-kd."""
    objective_options: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """Overrides of the preset."""
    teacher_context: TeacherContextConfig = field(default_factory=TeacherContextConfig)
    """What the teacher alone reads."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Teacher prefixes."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Procedural tasks."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to ids."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and scheduler."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, sizes, bookkeeping."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What stops a step."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """Logs, profiles, trackers."""


_WEIGHTLESS_FIELDS = (
    "load", "moe_aux_loss_coeff", "vocab_size", "init_method_std", "make_vocab_size_divisible_by", "fp8", "fp8_recipe",
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
)  # fmt: skip
"""Fields of ModelConfig that say where weights come from or how they are spread, not what the model is; the vocabulary
is compared on its own, with its true size."""


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The fields that a model's weights depend on, with every default filled in: equal for equal models."""
    fields = {name: value for name, value in asdict(model).items() if name not in _WEIGHTLESS_FIELDS}
    return fields | {
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels or model.hidden_size // model.num_attention_heads,
    }


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, what was found and what to do."""


_GUIDED_OBJECTIVES = ("tropd", "tropd-exact", "tropd-aopd")
OBJECTIVES = (
    *_GUIDED_OBJECTIVES, "opd", "aopd", "eopd", "entropy-opd", "reopold", "reopold-two-stage", "top-d", "mopd", "fkl",
    "jsd",
    "rkl-exact", "fkl-exact", "jsd-exact", "gkd", "skew-fkl", "skew-rkl", "seq-kd",
)  # fmt: skip
"""Presets that `train` takes; ``objectives.preset`` defines them."""


def resolved_fraction(config: Config) -> float:
    """The share of rollouts that get a prefix."""
    if config.guidance.fraction is not None:
        return config.guidance.fraction
    return 0.5 if config.objective == "gkd" else 1.0


def resolved_schedule(config: Config) -> Schedule:
    """The prefix schedule in force: ``auto`` is half-cosine for the tropd family, constant for seq-kd
    and gkd, else none."""
    if config.guidance.schedule != "auto":
        return config.guidance.schedule
    if config.objective in ("seq-kd", "gkd"):
        return "constant"
    return "half-cosine" if config.objective in _GUIDED_OBJECTIVES else "none"
