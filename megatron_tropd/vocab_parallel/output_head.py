"""A model's output layer, read a chunk of tokens at a time, and the gradient of its weight.

Shape suffixes: ``N`` tokens, ``C`` tokens of one chunk, ``V`` vocabulary shard, ``H`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Vocabulary rows of the fp32 weight gradient that grow at a time on the CPU: the fp32 copy of the
# logits' gradient that a product needs there stays small.
_WEIGHT_ROWS_CPU = 1024
# A chunk adds its weight gradient to an fp32 buffer: 8 bytes per weight, against 2 x 4 FLOP of the student's products
# and 2 x (teacher width / student width) of the teacher's per weight and token. At the 184 FLOP per byte of an H200
# (790 TFLOP/s, 4.3 TB/s) these tokens, divided by 4 + the ratio of the widths, keep it at 12 % of the products.
_CHUNK_TOKENS = 6144
_CHUNK_GRANULE = 256
# Launching a chunk's kernels takes a GPU's host one to three milliseconds. Products of these FLOP keep the GPU busy for
# four (at 790 TFLOP/s), so that it does not wait; but no more tokens than these, for a chunk's logits take memory.
_CHUNK_FLOP, _CHUNK_MOST = 3e12, 4096


@dataclass(frozen=True)
class OutputHead:
    """A model before its output layer: its logits are ``hidden_NH @ weight_VH.T``, this rank's shard ``[N, V]``.

    Both in one dtype (bf16, fp16 or fp32). ``hidden_NH`` is the same on every rank of the vocabulary's group;
    ``weight_VH`` is this rank's rows of the (tied or untied) output weight.
    """

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor

    def logits(self, span: slice, *, fp32: bool) -> torch.Tensor:
        """A fresh ``[C, V]`` without gradient, free to be overwritten: in the head's dtype, or as summed, in fp32."""
        hidden_CH, weight_VH = self.hidden_NH[span].detach(), self.weight_VH.detach()
        if not fp32 or hidden_CH.dtype == torch.float32:
            return hidden_CH @ weight_VH.T
        if hidden_CH.is_cuda:
            return torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32)
        logits_CV = torch.empty(hidden_CH.shape[0], weight_VH.shape[0])
        for start in range(0, weight_VH.shape[0], _WEIGHT_ROWS_CPU):
            rows = slice(start, start + _WEIGHT_ROWS_CPU)
            logits_CV[:, rows] = hidden_CH.float() @ weight_VH[rows].float().T
        return logits_CV


def recommended_chunk_size(
    num_tokens: int, num_ids: int, student_hidden_size: int, teacher_hidden_size: int = 0, *, fp32_logits: bool = False
) -> int:
    """Tokens per chunk: enough to hide the weight gradient's additions, and the host's launches, behind the products;
    at most a quarter of all.

    ``num_ids`` are the rows of the student's weight on this rank. A chunk holds both models' logits, so a quarter of
    the tokens keeps the peak at half of one logits matrix; from there on it falls with the number of tokens. Logits in
    fp32 are twice as large: an eighth.
    """
    by_cost = _CHUNK_TOKENS / (4 + teacher_hidden_size / student_hidden_size)
    by_launch = _CHUNK_FLOP / (num_ids * (6 * student_hidden_size + 2 * teacher_hidden_size))
    tokens = min(max(by_cost, min(by_launch, _CHUNK_MOST)), num_tokens / (8 if fp32_logits else 4))
    return max(_CHUNK_GRANULE, round(tokens / _CHUNK_GRANULE) * _CHUNK_GRANULE)


class WeightGradient:
    """The sum over chunks of ``logits gradient^T @ hidden``, fp32 ``[V, H]``."""

    def __init__(self, weight_VH: torch.Tensor, *, into_main_grad: bool):
        """``into_main_grad``: add straight to Megatron's fp32 main gradient where the weight has one."""
        self._weight_VH = weight_VH
        self._in_place = into_main_grad and has_main_grad(weight_VH)
        self._total_VH = (
            _main_grad(weight_VH) if self._in_place else torch.zeros_like(weight_VH.detach(), dtype=torch.float32)
        )

    def add(self, gradient_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        """One chunk's part."""
        if gradient_CV.dtype == torch.float32:
            self._total_VH.addmm_(gradient_CV.T, hidden_CH)
            return
        if gradient_CV.is_cuda:
            # bf16 factors, an fp32 sum, and no product in between: torch has no other name for it.
            torch.ops.aten.addmm.dtype_out(self._total_VH, gradient_CV.T, hidden_CH, torch.float32, out=self._total_VH)
            return
        for start in range(0, gradient_CV.shape[1], _WEIGHT_ROWS_CPU):
            rows = slice(start, start + _WEIGHT_ROWS_CPU)
            self._total_VH[rows].addmm_(gradient_CV[:, rows].T.float(), hidden_CH.float())

    def finish(self, scale: torch.Tensor | None = None) -> torch.Tensor:
        """What a backward returns for the weight; ``scale`` (0-dim) multiplies the sum."""
        if self._in_place:
            assert scale is None
            return _already_added(self._weight_VH)
        if scale is not None:
            self._total_VH.mul_(scale)
        if has_main_grad(self._weight_VH):
            _main_grad(self._weight_VH).add_(self._total_VH)
            return _already_added(self._weight_VH)
        return self._total_VH.to(self._weight_VH.dtype)


def has_main_grad(weight_VH: torch.Tensor) -> bool:
    """Whether Megatron's DistributedDataParallel keeps an fp32 gradient of this weight."""
    known = hasattr(weight_VH, "grad_added_to_main_grad") and getattr(weight_VH, "main_grad", None) is not None
    return known and _main_grad(weight_VH).dtype == torch.float32


def _main_grad(weight_VH: torch.Tensor) -> torch.Tensor:
    return weight_VH.main_grad  # type: ignore[attr-defined]


def _already_added(weight_VH: torch.Tensor) -> torch.Tensor:
    """Megatron's convention for a gradient that is in ``main_grad`` already: a stand-in that its hook drops.

    A tied weight also takes the embedding's gradient through autograd, which adds the two: then the hook keeps the sum
    and the stand-in must be zero.
    """
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    tied = getattr(weight_VH, "zero_out_wgrad", False)
    return torch.zeros_like(weight_VH) if tied else torch.empty_like(weight_VH)
