"""Generation with Megatron's static batching, on the trainer's own weights.

Shape suffixes: ``B`` sequences of a static batch, ``S`` positions of prompt + prefix + earlier tokens + response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import batched, pairwise
from types import SimpleNamespace
from typing import Any

import torch

from megatron_tropd.distributed import Layout
from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.models import release_inference_state, whole_sequences
from megatron_tropd.race import NEVER, Race
from megatron_tropd.rollout_requests import begin, checked_rollout, num_given_tokens, refuse_what_does_not_fit, written
from megatron_tropd.sampling import SamplingOptions
from megatron_tropd.types import Rollout, RolloutRequest

# isort: split
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel


class StaticEngine:
    """Megatron's static batching: a batch is prefilled to its shortest member, then decodes in step.

    It drives Megatron's ``TextGenerationController`` directly. The ``StaticInferenceEngine`` around that adds
    a scheduler of its own, reseeds torch's global generator and prints a progress bar at every call.

    The KV cache covers the longest prompt + the budget for every sequence of a batch, and a finished sequence
    is computed until the last one is: choose ``max_batch_size`` for both.
    """

    def __init__(self, model: GPTModel, layout: Layout, options: SamplingOptions):
        """``model`` is this rank's unwrapped slice, read anew at every ``generate``."""
        self.model = model
        self.layout = layout
        self.options = options

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_length: int,
        max_new_tokens: int | None = None,
        enough: int | None = None,
    ) -> list[Rollout]:
        """See ``rollout.RolloutEngine``.

        Raises ValueError, before anything runs, where a sequence could outgrow the model or what is given its
        budget, and afterwards where the model's logits were not finite. Leaves the model ready to train.
        """
        refuse_what_does_not_fit(
            requests, max_response_length=max_response_length, max_sequence_length=self.model.max_sequence_length
        )
        rollouts, waiting = begin(requests, eos_id=self.options.eos_id, max_response_length=max_response_length)
        most = max_response_length if max_new_tokens is None else min(max_new_tokens, max_response_length)
        race = None if enough is None else Race(enough, len(requests) - len(waiting), self.layout.device)
        try:
            with whole_sequences(self.model), InferenceMode.active():
                for indices in self._batches(requests, waiting, most):
                    if race is not None and race.is_over():
                        break
                    batch = [requests[index] for index in indices]
                    generated = self._generate_batch(batch, max_response_length, most, race)
                    for index, rollout in zip(indices, generated, strict=True):
                        rollouts[index] = rollout
        finally:
            release_inference_state(self.model)
        return rollouts

    def _batches(
        self, requests: Sequence[RolloutRequest], waiting: Sequence[int], most: int
    ) -> Iterator[tuple[int, ...]]:
        """Indices in ``waiting``, shortest first: neighbours in length share a batch.

        It prefills to its shortest member and steps from there, so over a gap wider than the ``most`` tokens that one
        may be given, a batch of its own is the shorter way.
        """
        shortest_first = sorted(waiting, key=lambda index: num_given_tokens(requests[index]))
        lengths = [num_given_tokens(requests[index]) for index in shortest_first]
        cuts = [place for place in range(1, len(lengths)) if lengths[place] - lengths[place - 1] > most]
        for start, end in pairwise((0, *cuts, len(lengths))):
            yield from batched(shortest_first[start:end], self.options.max_batch_size)

    def _generate_batch(
        self, requests: Sequence[RolloutRequest], max_response_length: int, most: int, race: Race | None
    ) -> list[Rollout]:
        """Generate for requests that all have room for a token; the KV cache lives for this batch only."""
        num_positions = max(
            min(len(request.prompt.tokens) + max_response_length, num_given_tokens(request) + most)
            for request in requests
        )
        context = StaticInferenceContext(max_batch_size=len(requests), max_sequence_length=num_positions)
        context.config.pg_collection = self.layout.groups
        wrapper = GPTInferenceWrapper(self.model, context)
        controller = _Controller(self, wrapper, requests, max_response_length, most, race)
        longest = max(num_given_tokens(request) for request in requests)
        sampling_params = SamplingParams(num_tokens_to_generate=num_positions - longest)
        controller.generate_all_output_tokens_static_batch(
            {
                row: InferenceRequest(
                    request_id=row,
                    prompt="",
                    prompt_tokens=[*request.prompt.tokens, *written(request)],
                    sampling_params=sampling_params,
                )
                for row, request in enumerate(requests)
            }
        )
        return controller.rollouts()


class _Controller(TextGenerationController):
    """Megatron's generation loop with our sampling, a budget for each request, and a record of both.

    Megatron's own log-probs would make it form logits for every prompt token and run over padded ids; those
    of the sampled tokens are taken where the token is.
    """

    def __init__(
        self,
        engine: StaticEngine,
        wrapper: GPTInferenceWrapper,
        requests: Sequence[RolloutRequest],
        max_response_length: int,
        most: int,
        race: Race | None,
    ):
        super().__init__(wrapper, tokenizer=SimpleNamespace(eod=engine.options.eos_id))
        self.engine = engine
        self.requests = requests
        self.race = race
        device = engine.layout.device
        prompt_lengths_B = torch.tensor([len(request.prompt.tokens) for request in requests], device=device)
        self.given_B = torch.tensor([num_given_tokens(request) for request in requests], device=device)
        self.budgets_B = prompt_lengths_B + max_response_length
        """Where each sequence must end, as a position after its last token."""
        self.limits_B = torch.minimum(self.budgets_B, self.given_B + most)
        """Where it is cut off."""
        self.ends_B = self.limits_B.clone()
        """Where it did end, or was."""
        sample_ids_B1 = torch.tensor([[request.sample_id] for request in requests], device=device)
        positions_S = torch.arange(wrapper.inference_context.max_sequence_length, device=device)
        self.uniforms_BS = uniforms(engine.options.seed, Stream.SAMPLING, sample_ids_B1, positions_S)
        self.log_probs_BS = torch.zeros_like(self.uniforms_BS)
        self.entropies_BS = torch.zeros_like(self.uniforms_BS) if engine.options.with_entropies else None
        self.tokens_BS = torch.empty(0, dtype=torch.int64, device=device)

    def sample_from_logits(self, last_token_logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Tokens ``[B]`` of the next position from logits ``[B, padded vocabulary]``, equal on every rank."""
        position = self.inference_wrapped_model.inference_context.sequence_len_offset
        tokens_B, self.log_probs_BS[:, position], entropies_B = self.engine.options.sample(
            last_token_logits, self.uniforms_BS[:, position]
        )
        if self.entropies_BS is not None and entropies_B is not None:
            self.entropies_BS[:, position] = entropies_B
        return tokens_B

    def update_generation_status(
        self,
        updated_prompts_tokens: torch.Tensor,
        generation_started: torch.Tensor,
        current_context_end_position: int,
        is_generation_done_tensor: torch.Tensor,
        generated_sequence_lengths: torch.Tensor,
        termination_id: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B]`` flags: which sequences have their end token, have used up their budget, or are cut off.

        The lengths stay 0: Megatron's, which leave the end token out, are not what ``rollouts`` reads.
        """
        self.tokens_BS = updated_prompts_tokens
        end = current_context_end_position + 1
        running_B = generation_started & ~is_generation_done_tensor
        ended_B = running_B & ((updated_prompts_tokens[:, end - 1] == termination_id) | (end >= self.budgets_B))
        if self.race is not None:
            self.race.add(torch.where(ended_B, end - self.given_B, NEVER))
            self.limits_B = torch.minimum(self.limits_B, self.given_B + self.race.most)
        stopped_B = ended_B | (running_B & (end >= self.limits_B))
        self.ends_B = torch.where(stopped_B, end, self.ends_B)
        return is_generation_done_tensor | stopped_B, generated_sequence_lengths

    def detokenize_generations(self, *_: Any, **__: Any) -> tuple[str, None]:
        """No text: rollouts are token ids."""
        return "", None

    def rollouts(self) -> list[Rollout]:
        """What was generated, in the order of the requests; the end token belongs to the response."""
        all_tokens, all_log_probs = self.tokens_BS.tolist(), self.log_probs_BS.tolist()
        all_entropies = [[]] * len(self.requests) if self.entropies_BS is None else self.entropies_BS.tolist()
        rollouts = []
        for row, (request, end) in enumerate(zip(self.requests, self.ends_B.tolist(), strict=True)):
            sampled = slice(num_given_tokens(request), end)
            columns = all_tokens[row][sampled], all_log_probs[row][sampled], all_entropies[row][sampled]
            rollouts.append(checked_rollout(request, *columns, eos_id=self.engine.options.eos_id))
        return rollouts
