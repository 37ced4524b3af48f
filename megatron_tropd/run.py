"""A run put together from its config: layout, tokenizer, models, optimizer, folder; resumed where it stopped."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd import distributed
from megatron_tropd.checkpoint import Description, find_checkpoint, load_checkpoint, save_checkpoint
from megatron_tropd.config import Config, ConfigError, ModelConfig, architecture
from megatron_tropd.config_checks import layout_sizes, teacher_sizes, validate
from megatron_tropd.config_drift import snapshot
from megatron_tropd.config_layout_checks import expert_sizes, virtual_pipeline_size
from megatron_tropd.config_parser import config_text
from megatron_tropd.config_sides import num_generators
from megatron_tropd.determinism import enable_determinism
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.exports import drop_exports, export_reference, export_student, exports
from megatron_tropd.hf_config import HuggingFaceError
from megatron_tropd.integrity import write_durably
from megatron_tropd.layer_spec import use_transformer_engine
from megatron_tropd.monitor import Monitor
from megatron_tropd.step import Learner
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.tokenizer_builder import build_tokenizers
from megatron_tropd.trackers import require_trackers
from megatron_tropd.watchdog import Watchdog
from megatron_tropd.writing import BackgroundWriter, on_main

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What every command needs once the process groups stand."""

    config: Config
    layout: Layout
    tokenizer: Tokenizer
    folder: Path
    teacher_tokenizer: Tokenizer
    """The student's, where ``tokenizer.teacher`` is not set."""
    monitor: Monitor
    stop_requested: bool = False
    """SIGTERM has arrived on this rank."""
    base: dict[str, Any] = field(default_factory=dict)
    """With LoRA: the weights that the adapters are trained on, as `describe_base` has them."""

    @cached_property
    def background(self) -> BackgroundWriter | None:
        """Writes checkpoints while training goes on; None with ``training.async_save=false``."""
        return BackgroundWriter() if self.config.training.async_save else None

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def max_sequence_length(self) -> int:
        """Longest trajectory, tokens: prompt budget + response budget."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def max_teacher_length(self) -> int:
        """The same as the teacher reads it, which may have a longer prompt."""
        longest = self.config.teacher_context.max_prompt_length
        return max(self.max_sequence_length, (longest or 0) + self.config.rollout.max_response_length)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights: fp32 on the CPU, bf16 on GPUs, unless the config says otherwise."""
        auto = torch.float32 if ON_CPU else torch.bfloat16
        types = {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16}
        return types[self.config.training.precision]

    def request_stop(self) -> None:
        """End after the step in hand, or `generate`'s chunk, with what has been done kept, as after SIGTERM."""
        self.stop_requested = True

    def should_stop(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on every rank."""
        flag = torch.tensor(float(self.stop_requested), device=self.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        """The config with the hashes of its input files, as a checkpoint keeps it."""
        return snapshot(self.config)

    def keep_config(self) -> None:
        """Write ``config.yaml`` into the run folder, once nothing in there is another run's."""
        if self.layout.is_main:
            write_durably(self.folder / "config.yaml", config_text(self.config))

    def describe(self, step: int) -> Description:
        """What a checkpoint of this run's student at ``step`` is of."""
        return Description(
            step=step,
            seed=self.config.training.seed,
            vocab_size=vocab_size(self.config.student, self.tokenizer),
            tokenizer=self.tokenizer.fingerprint,
            architecture=architecture(self.config.student),
            config=self.snapshot,
            adapter=self.config.lora.shape() | self.base,
        )


def vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """True vocabulary size of a model."""
    return model.vocab_size or tokenizer.vocab_size


@contextmanager
def open_run(config: Config, command: str) -> Iterator[Run]:
    """Check the config, start the process groups, catch SIGTERM; tear everything down at the end.

    A config or tokenizer error is raised on every rank before any group exists. `evaluate` has nothing to keep when it
    is stopped: SIGTERM ends it as it does any process. With ``training.one_step_off`` the run
    is that of this rank's side: the generators' has the teacher's layout, and logs in a folder of its own.
    """
    validate(config, distributed.world_size(), command)
    require_trackers(config)
    _refuse_what_is_not_here(config)
    tokenizer, teacher_tokenizer = build_tokenizers(config.tokenizer)
    if command in ("train", "sft") and exports(config):
        export_reference(config, vocab_size=vocab_size(config.student, tokenizer))
    generators = num_generators(config, command)
    side = distributed.own_side(generators) if generators else None
    generates = side is not None and side.is_generator
    tensor_parallel_size, pipeline_parallel_size = teacher_sizes(config) if generates else layout_sizes(config, command)
    expert_parallel_size, expert_tensor_size = expert_sizes(config, command, tensor_parallel_size)
    if config.training.deterministic:
        enable_determinism()
    layout = distributed.initialize(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size if command in ("train", "sft") else 1,
        seed=config.training.seed,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
        sequence_parallel=config.parallel.sequence_parallel and tensor_parallel_size > 1,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config, command),
        expert_model_parallel_size=expert_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size,
        side=side,
    )
    folder = Path(config.output_dir) / ("generators" if generates else "")
    run = Run(config, layout, tokenizer, folder, teacher_tokenizer, Monitor(config, layout, folder, command))

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        run.request_stop()

    previous = signal.getsignal(signal.SIGTERM)
    if command != "evaluate":
        signal.signal(signal.SIGTERM, request_stop)
    watchdog = Watchdog(
        layout,
        timeout_seconds=60 * config.parallel.distributed_timeout_minutes,
        on_end=run.monitor.journal.report_hang,
    )
    watchdog.start()
    try:
        with run.monitor:
            if command not in ("train", "sft") and not run.checkpoints.exists():
                run.keep_config()
            yield run
    finally:
        watchdog.stop()
        signal.signal(signal.SIGTERM, previous)
        distributed.finish(layout)


def _refuse_what_is_not_here(config: Config) -> None:
    """ConfigError for options whose hardware or library this machine lacks."""
    if config.optimizer.optimizer_cpu_offload and ON_CPU:
        raise ConfigError(
            "optimizer.optimizer_cpu_offload moves state from GPUs to the host; PyTorch sees no GPU: set it to false"
        )
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None and model.fp8 is not None and not use_transformer_engine():
            raise ConfigError(
                f"{name}.fp8 {model.fp8} needs a GPU and Transformer Engine, which do not work here: leave it out, or "
                "run in a container that has them"
            )


def resume(run: Run, learner: Learner, restore: Callable[[Path], None]) -> int:
    """Continue from the run folder's newest checkpoint, whose path ``restore`` gets; returns the steps done, or 0."""
    if run.background is not None:
        run.background.finish()
    newest = find_checkpoint(run.checkpoints, fall_back=run.config.training.fall_back, is_main=run.layout.is_main)
    if newest is None:
        return 0
    allow = run.config.training.allow_config_changes
    step = load_checkpoint(newest, learner, run.describe(0), allow_config_changes=allow)
    restore(newest)
    run.monitor.journal.steps_done = step
    if run.layout.is_main:
        logger.info("resumed from %s", newest)
    if run.config.training.export_hf_on_save:
        export(run, learner, step)  # where a crash came between the checkpoint and its export
    return step


def save(run: Run, learner: Learner, step: int, files: Mapping[str, str]) -> None:
    """Checkpoint of ``step`` steps done, with ``training.async_save`` only begun; and its export where asked for."""
    training = run.config.training
    save_checkpoint(
        run.checkpoints,
        learner,
        run.describe(step),
        keep=training.keep_checkpoints,
        keep_every=training.keep_every,
        files=files,
        background=run.background,
    )
    if training.export_hf_on_save:
        try:
            export(run, learner, step, anew=True)
        except HuggingFaceError:
            if run.background is not None:
                run.background.finish()  # the run ends here, and the checkpoint in hand is whole
            raise


def export(run: Run, learner: Learner, step: int, *, anew: bool = False) -> None:
    """The student after ``step`` steps as a Hugging Face folder; one that is there is left alone, unless ``anew``."""
    config = run.config
    learner.gather.finish()
    size = vocab_size(config.student, run.tokenizer)
    export_student(torch.nn.ModuleList(learner.students), run.layout, config, step, vocab_size=size, anew=anew)
    if config.training.export_hf_on_save:
        on_main(lambda: drop_exports(run.folder, run.checkpoints, newest=step), run.layout.is_main)
