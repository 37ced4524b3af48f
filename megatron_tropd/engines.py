"""Where the student generates: on its trainer's own weights, or on an inference copy that follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_tropd.batch import balanced_shares
from megatron_tropd.building import student_padded_vocab_size
from megatron_tropd.config import RolloutConfig
from megatron_tropd.distributed import Layout, active
from megatron_tropd.phases import Phases
from megatron_tropd.refit import InferenceCopy, build_inference_copy, inference_layout
from megatron_tropd.rollout import RolloutEngine, build_engine
from megatron_tropd.run import Run
from megatron_tropd.step import Learner
from megatron_tropd.types import Rollout, RolloutRequest

# isort: split
from megatron.core.models.gpt import GPTModel


class Engines:
    """Builds the engines of a run, all on one set of weights."""

    def __init__(
        self,
        model: GPTModel,
        layout: Layout,
        *,
        copy: InferenceCopy | None = None,
        version: Callable[[], int] = lambda: 0,
    ):
        """``model`` is this rank's slice in ``layout``, whose replicas ask for rollouts (of interleaved stages one, and
        then a copy has to generate).

        With a ``copy`` that generates, and before it does takes the weights over if ``version()`` has changed.
        """
        self.model = model
        self.layout = layout
        self.copy = copy
        self.version = version

    @property
    def racing(self) -> Layout:
        """The layout whose replicas each run a race of their own where an engine is asked for ``enough``."""
        return self.layout if self.copy is None else self.copy.layout

    def refit_metrics(self, phases: Phases) -> dict[str, float]:
        """``seconds_refit`` since the last call, which ``phases`` counts too; empty without a copy."""
        if self.copy is None:
            return {}
        seconds = self.copy.pop_seconds()
        phases.add("refit", seconds)
        return {"seconds_refit": seconds}

    def build(self, config: RolloutConfig, **options: Any) -> RolloutEngine:
        """The engine that ``rollout.build_engine`` chooses, with its ``options``."""
        if self.copy is None:
            return build_engine(self.model, self.layout, config, **options)
        with active(self.copy.layout):
            engine = build_engine(self.copy.model, self.copy.layout, config, **options)
        return CopyEngine(engine, self.copy, self.layout, self.version)


def training_engines(run: Run, learner: Learner) -> Engines:
    """Those of a run that trains, on a copy where ``rollout.tensor_model_parallel_size`` asks for one. Where other
    ranks generate, the copy is theirs, and these engines, for evaluations, read the trainer's weights."""
    config, student = run.config, learner.students[-1]
    tensor_parallel_size = config.rollout.tensor_model_parallel_size
    if tensor_parallel_size is None or run.layout.link is not None:
        return Engines(student, run.layout)
    copy = build_inference_copy(
        config.student,
        (learner.students, run.layout),
        inference_layout(run.layout, tensor_model_parallel_size=tensor_parallel_size),
        padded_vocab_size=student_padded_vocab_size(run),
        max_sequence_length=run.max_sequence_length,
        dtype=run.dtype,
        check_interval=config.rollout.refit_check_interval,
        lora=config.lora if config.lora.rank else None,
    )
    # Every optimizer step counts one, and a checkpoint brings its own number back.
    return Engines(student, run.layout, copy=copy, version=lambda: int(learner.scheduler.num_steps))


class CopyEngine:
    """An engine on the inference copy, for callers in the trainer's layout.

    The copy's replicas are others than the trainer's, so every rank calls it: the requests of all are dealt to the
    copy's replicas by expected length, and each caller gets the rollouts of its own. A rollout depends on its request
    alone, so it is the same wherever it is generated.
    """

    def __init__(self, engine: RolloutEngine, copy: InferenceCopy, callers: Layout, version: Callable[[], int]):
        """``engine`` is in the copy's layout."""
        self.engine = engine
        self.copy = copy
        self.callers = callers
        self.version = version

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_length: int,
        max_new_tokens: int | None = None,
        enough: int | None = None,
    ) -> list[Rollout]:
        """See ``rollout.RolloutEngine``; here no replica is independent of the others.

        With ``enough`` the caller has dealt: the requests are those of this rank's replica of the copy.
        """
        self.copy.follow(self.version())
        if enough is not None:
            with active(self.copy.layout):
                return self.engine.generate(
                    requests, max_response_length=max_response_length, max_new_tokens=max_new_tokens, enough=enough
                )
        by_caller = _gathered(list(requests), self.callers)
        everything = [request for share in by_caller for request in share]
        # What is read at once, and the most that is then written token by token.
        most = max_response_length if max_new_tokens is None else max_new_tokens
        lengths = [
            len(one.prompt.tokens) + min(most, max_response_length - len(one.prefix) - len(one.earlier))
            for one in everything
        ]
        shares = balanced_shares(lengths, self.copy.layout.data_parallel_size)
        mine = [everything[index] for index in shares[self.copy.layout.data_parallel_rank]]
        with active(self.copy.layout):
            generated = self.engine.generate(
                mine, max_response_length=max_response_length, max_new_tokens=max_new_tokens
            )
        found = {
            index: rollout
            for share, rollouts in zip(shares, _gathered(generated, self.copy.layout), strict=True)
            for index, rollout in zip(share, rollouts, strict=True)
        }
        first = sum(len(share) for share in by_caller[: self.callers.data_parallel_rank])
        return [found[first + index] for index in range(len(requests))]


def _gathered[Item](items: list[Item], layout: Layout) -> list[list[Item]]:
    """What every data-parallel replica of ``layout`` has, in their order."""
    everyones = [items] * layout.data_parallel_size
    if len(everyones) > 1:
        dist.all_gather_object(everyones, items, group=layout.groups.dp)
    return everyones
