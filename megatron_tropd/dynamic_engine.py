"""Generation with Megatron's dynamic batching: paged KV cache, in-flight batching, chunked prefill, prefix caching.

Shape suffixes: ``N`` requests of one ``generate``, ``S`` places of a response, ``B`` sequences of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from megatron_tropd.config_rollout import DynamicEngineConfig
from megatron_tropd.decode_graphs import DecodeGraphs
from megatron_tropd.distributed import Layout
from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.models import release_inference_state, whole_sequences
from megatron_tropd.race import NEVER, Race
from megatron_tropd.rollout_requests import begin, checked_rollout, num_given_tokens, refuse_what_does_not_fit, written
from megatron_tropd.sampling import SamplingOptions
from megatron_tropd.types import Rollout, RolloutRequest

# isort: split
from megatron.core.inference.config import InferenceConfig, KVCacheManagementMode
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)
_NUM_GRAPHS = 16
"""Most sizes of decoding steps, each half the next."""


@dataclass(frozen=True)
class DynamicReport:
    """What one ``generate`` took."""

    num_steps: int
    """Forward passes."""
    num_evicted: int
    """Times that a sequence lost its KV blocks to others, to be computed again."""
    num_chunks: int
    """Parts of prompts that were read before the prompt's last part."""
    num_prompt_tokens: int
    """Tokens of prompts (and prefixes) that were read."""
    num_shared_tokens: int
    """Tokens of prompts that were not, for another sequence had them in its KV blocks."""
    kv_cache_bytes: int
    """Of this rank's KV cache."""


class DynamicEngine:
    """Megatron's ``DynamicInferenceEngine``: a sequence that ends makes room for the next one at once.

    The KV cache is a buffer of blocks that a sequence takes as it grows; samples of one prompt share the blocks of
    what they have in common. It lives for one ``generate``, so that training has the memory, and nothing computed by
    other weights can be read.
    """

    def __init__(self, model: GPTModel, layout: Layout, options: SamplingOptions, config: DynamicEngineConfig):
        """As ``StaticEngine``, whose responses these are, up to the rounding of matrix products."""
        self.model = model
        self.layout = layout
        self.options = options
        self.config = config
        self.report: DynamicReport | None = None
        """Of the last ``generate`` that had anything to do."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_length: int,
        max_new_tokens: int | None = None,
        enough: int | None = None,
    ) -> list[Rollout]:
        """See ``rollout.RolloutEngine``.

        Raises ValueError, before anything runs, where a sequence could outgrow the model or the KV cache, or a prefix
        its budget, and afterwards where the model's logits were not finite. Leaves the model ready to train.
        """
        refuse_what_does_not_fit(
            requests, max_response_length=max_response_length, max_sequence_length=self.model.max_sequence_length
        )
        rollouts, waiting = begin(requests, eos_id=self.options.eos_id, max_response_length=max_response_length)
        race = None if enough is None else Race(enough, len(requests) - len(waiting), self.layout.device)
        if not waiting or (race is not None and race.is_over()):
            return rollouts
        most = max_response_length if max_new_tokens is None else max_new_tokens
        responses = _Responses(self, [requests[index] for index in waiting], max_response_length, most, race)
        try:
            with whole_sequences(self.model), InferenceMode.active():
                self.model.eval()
                self._run(responses)
        finally:
            release_inference_state(self.model)
        for index, rollout in zip(waiting, responses.rollouts(), strict=True):
            rollouts[index] = rollout
        return rollouts

    def _run(self, responses: _Responses) -> None:
        """Fill in all responses."""
        context = self._context(responses)
        graphs = DecodeGraphs() if self.config.cuda_graphs else None
        controller = _Controller(GPTInferenceWrapper(self.model, context), responses, graphs)
        engine = DynamicInferenceEngine(controller, context)
        try:
            for row, request in enumerate(responses.requests):
                given = [*request.prompt.tokens, *written(request)]
                limit = SamplingParams(num_tokens_to_generate=responses.limits[row], termination_id=self.options.eos_id)
                engine.add_request(row, given, limit)
            while engine.has_unfinished_requests():
                steps = controller.num_steps
                engine.step_modern()
                if controller.num_steps == steps:
                    raise RuntimeError(
                        f"Megatron's dynamic engine made no step, with {len(engine.waiting_request_ids)} requests "
                        "waiting: set rollout.engine=static, or raise rollout.dynamic.buffer_size_gb"
                    )
            self.report = DynamicReport(
                num_steps=controller.num_steps,
                num_evicted=engine.evicted_request_count,
                num_chunks=responses.num_chunks,
                num_prompt_tokens=context.lifetime_prefill_token_count,
                num_shared_tokens=engine._prefill_tokens_skipped,
                kv_cache_bytes=context.memory_buffer.nbytes,
            )
            logger.debug("dynamic engine: %s", self.report)
        finally:
            controller.release()
            context.deallocate_inference_state_buffers()

    def _context(self, responses: _Responses) -> DynamicInferenceContext:
        """A KV cache with room for ``max_batch_size`` of the requests at once, or as much of it as is allowed."""
        config, tensor_parallel_size = self.config, self.layout.tensor_parallel_size
        max_requests = min(self.options.max_batch_size, len(responses.requests))
        max_requests = -(-max_requests // tensor_parallel_size) * tensor_parallel_size
        blocks = responses.num_blocks(config.block_size_tokens)
        wanted = sum(sorted(blocks, reverse=True)[:max_requests]) + 1  # one to write padding to
        block_bytes = self._block_bytes()
        if config.buffer_size_gb is not None:
            wanted = min(wanted, int(config.buffer_size_gb * 2**30 / block_bytes))
        context = _Context(
            self.model.config,
            InferenceConfig(
                block_size_tokens=config.block_size_tokens,
                buffer_size_gb=(wanted + 0.5) * block_bytes / 2**30,
                max_requests=max_requests,
                max_tokens=DynamicInferenceContext.round_up_tokens(max(config.max_tokens, max_requests)),
                kv_cache_management_mode=KVCacheManagementMode.RECOMPUTE,
                max_sequence_length=self.model.max_sequence_length,
                pg_collection=self.layout.groups,
                enable_chunked_prefill=config.enable_chunked_prefill,
                enable_prefix_caching=config.enable_prefix_caching,
                num_cuda_graphs=_NUM_GRAPHS if config.cuda_graphs else None,
                use_cuda_graphs_for_non_decode_steps=False,
            ),
        )
        longest = max(map(num_given_tokens, responses.requests))
        if longest > context.max_tokens and not config.enable_chunked_prefill:
            raise ValueError(
                f"a prompt with its prefix has {longest} tokens, more than rollout.dynamic.max_tokens = "
                f"{config.max_tokens}: raise it, or set rollout.dynamic.enable_chunked_prefill=true"
            )
        room = context.kv_block_allocator.total_count - 1
        if max(blocks) > room:  # where there is no limit the buffer was made for them
            raise ValueError(
                f"rollout.dynamic.buffer_size_gb = {config.buffer_size_gb} holds {room} blocks of "
                f"{config.block_size_tokens} tokens, and the longest sequence may need {max(blocks)}: raise it to "
                f"{(max(blocks) + 1) * block_bytes / 2**30:.3g} at least"
            )
        # Masked keys count for nothing as long as they are numbers.
        context.memory_buffer.zero_()
        return context

    def _block_bytes(self) -> int:
        """Bytes of a block on this rank: keys and values of its layers and heads."""
        model_config = self.model.config
        heads = max(model_config.num_query_groups // self.layout.tensor_parallel_size, 1)
        tokens = self.config.block_size_tokens
        numbers = 2 * len(self.model.decoder.layers) * tokens * heads * model_config.kv_channels
        return int(numbers * model_config.params_dtype.itemsize)


class _Context(DynamicInferenceContext):
    """Megatron's context, in which every sequence has a block of its own."""

    def check_availability(self, req: DynamicInferenceRequest) -> tuple[bool, bool, bool]:
        """Whether there is room for the request: Megatron asks before it admits one.

        What is given may end where a block does. If that block were shared too, taking a sequence's blocks away could
        free none, and Megatron's engine would stop with every sequence waiting for one.
        """
        if req.precomputed_block_hashes and len(req.prompt_tokens) % self.block_size_tokens == 0:
            req.precomputed_block_hashes[-1] = req.request_id + 1  # beside 63 bits of SHA-256, a hash of nothing else
        available: tuple[bool, bool, bool] = super().check_availability(req)
        return available


class _Responses:
    """The requests of one ``generate``, and what was sampled for each: tokens, log-probs, entropies.

    Kept on the device, by place in the response: decoding does not wait for them.
    """

    def __init__(
        self,
        engine: DynamicEngine,
        requests: Sequence[RolloutRequest],
        max_response_length: int,
        most: int,
        race: Race | None,
    ):
        self.engine = engine
        self.requests = requests
        self.race = race
        budgets = [max_response_length - len(written(request)) for request in requests]
        self.limits = [min(most, budget) for budget in budgets]
        """Most tokens of each response."""
        self.num_chunks = 0
        device = engine.layout.device
        self._budgets_N = torch.tensor(budgets, device=device)
        self._given_N = torch.tensor([num_given_tokens(request) for request in requests])
        self._lengths_N = torch.zeros_like(self._given_N)
        sample_ids_N1 = torch.tensor([[request.sample_id] for request in requests], device=device)
        positions_NS = self._given_N.to(device).unsqueeze(1) + torch.arange(max(self.limits), device=device)
        self._uniforms_NS = uniforms(engine.options.seed, Stream.SAMPLING, sample_ids_N1, positions_NS)
        self._tokens_NS = torch.zeros(positions_NS.shape, dtype=torch.int64, device=device)
        self._log_probs_NS = torch.zeros(positions_NS.shape, device=device)
        self._entropies_NS = torch.zeros(positions_NS.shape, device=device) if engine.options.with_entropies else None

    def num_blocks(self, block_size: int) -> list[int]:
        """KV blocks that each request needs at its longest."""
        return [
            -(-(num_given_tokens(request) + limit) // block_size)
            for request, limit in zip(self.requests, self.limits, strict=True)
        ]

    def sample(self, logits_BV: torch.Tensor, rows_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B]`` at ``positions_B`` of the requests ``rows_B`` (int64, both on the CPU), equal on every rank.

        A request that has lost its race gets the end token, so that Megatron ends it; what was sampled is kept. A
        position within what is given is that of a prompt still being read: what is sampled there counts for nothing,
        here or in Megatron.
        """
        places_B = positions_B - self._given_N[rows_B]
        counts_B = places_B >= 0
        self.num_chunks += len(counts_B) - int(counts_B.sum())
        self._lengths_N[rows_B[counts_B]] = places_B[counts_B] + 1
        at = rows_B.to(self._tokens_NS.device), places_B.clamp(min=0).to(self._tokens_NS.device)
        tokens_B, log_probs_B, entropies_B = self.engine.options.sample(logits_BV, self._uniforms_NS[at])
        # What is sampled at place 0 before the prompt is read is written over when it is.
        self._tokens_NS[at] = tokens_B
        self._log_probs_NS[at] = log_probs_B
        if self._entropies_NS is not None and entropies_B is not None:
            self._entropies_NS[at] = entropies_B
        return tokens_B if self.race is None else self._end_losers(self.race, tokens_B, *at, counts_B.to(at[0].device))

    def _end_losers(
        self, race: Race, tokens_B: torch.Tensor, rows_B: torch.Tensor, places_B: torch.Tensor, counts_B: torch.Tensor
    ) -> torch.Tensor:
        """``tokens_B``, or the end token for requests that cannot be among the first any more; all on the device."""
        lengths_B = places_B + 1
        is_end_B = (tokens_B == self.engine.options.eos_id) | (lengths_B >= self._budgets_N[rows_B])
        race.add(torch.where(counts_B & is_end_B, lengths_B, NEVER))
        return torch.where(counts_B & (lengths_B >= race.most), self.engine.options.eos_id, tokens_B)

    def rollouts(self) -> list[Rollout]:
        """What was generated, in the order of the requests; the end token belongs to the response."""
        all_tokens, all_log_probs = self._tokens_NS.tolist(), self._log_probs_NS.tolist()
        all_entropies = [[]] * len(self.requests) if self._entropies_NS is None else self._entropies_NS.tolist()
        return [
            checked_rollout(
                request,
                all_tokens[row][:length],
                all_log_probs[row][:length],
                all_entropies[row][:length],
                eos_id=self.engine.options.eos_id,
            )
            for row, (request, length) in enumerate(zip(self.requests, self._lengths_N.tolist(), strict=True))
        ]


class _Controller(TextGenerationController):
    """Megatron's step of dynamic batching with our sampling."""

    def __init__(self, wrapper: GPTInferenceWrapper, responses: _Responses, graphs: DecodeGraphs | None):
        super().__init__(wrapper, tokenizer=SimpleNamespace(eod=responses.engine.options.eos_id))
        self.responses = responses
        self.graphs = graphs
        self.num_steps = 0

    def _dynamic_step_forward_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Logits of this step, by a CUDA graph where Megatron has made the step one of few sizes."""
        context = self.inference_wrapped_model.inference_context
        if self.graphs is None or not context.using_cuda_graph_this_step():
            super()._dynamic_step_forward_logits(input_ids, position_ids)
            return
        inputs = {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
        self._all_logits_cuda = self.graphs.run(
            input_ids.shape[1], lambda: self.inference_wrapped_model.run_one_forward_step(inputs)
        )

    def _dynamic_step_sample_logits(self) -> None:
        """Tokens of this step's active requests, where Megatron looks for them."""
        context = self.inference_wrapped_model.inference_context
        rows_B = context.request_ids[context.paused_request_count : context.total_request_count].long()
        positions_B = context.get_active_sequence_lengths().long()
        logits_BV = self._all_logits_cuda[0, : len(rows_B)]
        self._sampled_tokens_cuda[: len(rows_B)] = self.responses.sample(logits_BV, rows_B, positions_B)
        self.num_steps += 1

    def detokenize(self, *_: Any, **__: Any) -> str:
        """No text: rollouts are token ids."""
        return ""

    def release(self) -> None:
        """Let go of what is on the device, and of the engine, which holds on to this."""
        self.graphs = None
        self._all_logits_cuda = torch.empty(0)
        self.set_stop_word_finished_ids_callback(None)
