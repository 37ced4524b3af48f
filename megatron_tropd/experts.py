"""The load-balancing loss of a student's routers.

That of one layer and one micro-batch with n tokens, padding aside, is (Switch Transformer, arXiv 2101.03961, eq. 4)
L = E * sum_i f_i P_i over the E experts: f_i the share of routed tokens that i gets, P_i its mean router probability;
1 where all get as much. A step's is the mean of L over the micro-batches of all data-parallel ranks, each counted by n,
and ``moe_aux_loss_coeff`` times that, summed over the layers, is added to the distillation loss. By its definition it
depends on which sequences share a micro-batch.

Shape suffixes: ``T`` tokens of this rank's micro-batch, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist

from megatron_tropd.distributed import Layout
from megatron_tropd.types import Batch

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter


class BalancedRouter(TopKRouter):
    """Megatron's router with a load-balancing loss that counts every token once.

    Megatron's own weighs each tensor-parallel rank's part by the rank's number of tokens, which padding makes differ,
    and is not finite for a micro-batch of padding alone.
    """

    weighted_loss: torch.Tensor | float = 0.0
    """This rank's sum of n L over the micro-batches since it was last set to 0."""

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Attach n L to ``probs``, whose backward adds its gradient; both inputs ``[T, E]`` are 0 for padding."""
        assert with_padding_mask
        tokens_E = routing_map.sum(dim=0)
        dist.all_reduce(tokens_E, group=self.tp_cp_group)  # each rank has its own positions
        num_tokens = (tokens_E.sum() / self.topk).clamp(min=1)
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=tokens_E,
            total_num_tokens=num_tokens,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=1.0,
        )
        self.weighted_loss = self.weighted_loss + (num_tokens * loss).detach()
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(probs, self.config.moe_aux_loss_coeff * num_tokens * loss)
        return attached


class LoadBalance:
    """The load-balancing loss of one step: made before the schedule, read after it."""

    def __init__(self, students: Sequence[GPTModel], batch: Batch, layout: Layout):
        """Tell Megatron what to multiply n L with, so that its division by the global number of loss terms leaves a
        mean over tokens. ``students``: this rank's chunks. Every rank calls it."""
        self._layout = layout
        modules = chain.from_iterable(student.modules() for student in students)
        self._routers = [module for module in modules if isinstance(module, BalancedRouter)]
        self._num_layers = students[0].config.num_layers
        counts = torch.tensor(
            [
                sum(one.num_tokens for one in batch.micro_batches),
                sum(one.num_loss_terms for one in batch.micro_batches),
            ],
            dtype=torch.float64,
            device=layout.device,
        )
        dist.all_reduce(counts, group=layout.groups.dp)
        self._num_tokens, num_loss_terms = counts.tolist()
        # Of one dimension, as Megatron's own scales are, which it copies into one another. The schedule reads the first
        # chunk's config.
        scale = torch.tensor([max(1.0, num_loss_terms) / max(1.0, self._num_tokens)])
        students[0].config.moe_grad_scale_func = lambda: scale
        for router in self._routers:
            router.weighted_loss = 0.0

    def metrics(self) -> dict[str, float]:
        """``load_balancing_loss``: the step's mean of L over the layers, the coefficient apart; equal on every rank."""
        total = torch.tensor(
            float(sum(router.weighted_loss for router in self._routers)),
            dtype=torch.float64,
            device=self._layout.device,
        )
        dist.all_reduce(total)  # each rank of a stage has the part of its own positions
        return {"load_balancing_loss": float(total) / (max(1.0, self._num_tokens) * self._num_layers)}
