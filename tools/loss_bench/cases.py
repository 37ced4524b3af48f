"""The objectives that are compared, their inputs, and the dense float64 gradient that decides what is right.

Shape suffixes: ``T`` tokens, ``V`` vocabulary (this rank's unless said otherwise), ``H`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from dense_reference import dense_loss  # type: ignore[import-not-found]
from vocab_parallel_cases import relative_error, unshard  # type: ignore[import-not-found]

from megatron_tropd.objectives import Objective, preset

HEAD = "fused head"
"""Forward KL from the hidden states: both output layers are part of what is timed."""
CASES = {
    "K1": preset("opd"),
    "top-k FKL": preset("fkl"),
    "FKL": preset("fkl-exact"),
    "RKL": preset("rkl-exact"),
    "JSD": preset("jsd-exact"),
    "TrOPD mix": preset("tropd"),
    HEAD: preset("fkl-exact"),
}
"""The mix: one token in five is guidance, about 8 % of the others are outliers; all metrics (entropies, full KLs)."""
ERROR_TOKENS = 16
HEAD_SIZES = {"cpu": (256, 512), "cuda": (4096, 8192)}
"""Hidden sizes of student and teacher, by device: on a GPU those of an 8B and a 70B model."""


@dataclass(frozen=True)
class Inputs:
    """This rank's shards; the vocabulary divides evenly. The head's case has hidden states and weights, no logits."""

    tokens_T: torch.Tensor
    regions_T: torch.Tensor
    uniforms_T: torch.Tensor
    group: dist.ProcessGroup
    vocab_size: int
    """Of all ranks."""
    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    student_TH: torch.Tensor
    student_VH: torch.Tensor
    teacher_TH: torch.Tensor
    teacher_VH: torch.Tensor

    @property
    def from_hidden(self) -> bool:
        """Whether this is the head's case."""
        return bool(self.student_TH.numel())

    @property
    def leaf(self) -> torch.Tensor:
        """What the compared gradient is of: the student's logits, or its hidden states."""
        return self.student_TH if self.from_hidden else self.student_TV

    @property
    def num_logits(self) -> int:
        """Elements of one model's logits on this rank."""
        return self.tokens_T.shape[0] * self.vocab_size // dist.get_world_size(self.group)

    def with_leaf(self, leaf: torch.Tensor) -> Inputs:
        """The same with another leaf."""
        return replace(self, student_TH=leaf) if self.from_hidden else replace(self, student_TV=leaf)

    def head(self, count: int) -> Inputs:
        """The first tokens, in tensors of their own."""
        names = ("student_TV", "teacher_TV", "tokens_T", "regions_T", "uniforms_T", "student_TH", "teacher_TH")
        return replace(self, **{name: getattr(self, name)[:count].clone() for name in names})


def make_inputs(case: str, num_tokens: int, vocab_size: int, device: torch.device) -> Inputs:
    """Two similar models in bf16: sampled tokens are rejected about 8 % of the time. The same numbers at every tp."""
    generator = torch.Generator(device).manual_seed(0)
    size, rank = dist.get_world_size(), dist.get_rank()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tensors = dict.fromkeys(
        ("student_TV", "teacher_TV", "student_TH", "student_VH", "teacher_TH", "teacher_VH"), torch.empty(0)
    )
    if case == HEAD:
        width, teacher_width = HEAD_SIZES[device.type]
        student_TH = normal(num_tokens, width)
        student_VH = normal(vocab_size, width) * 2 * width**-0.5
        noise_TH = normal(num_tokens, teacher_width - width)
        noise_VH = normal(vocab_size, teacher_width - width)
        tensors["student_TH"], tensors["student_VH"] = student_TH, student_VH.chunk(size)[rank]
        tensors["teacher_TH"] = torch.cat((student_TH, noise_TH), -1)
        teacher_VH = torch.cat((student_VH, noise_VH * 0.2 * (teacher_width - width) ** -0.5), -1)
        tensors["teacher_VH"] = teacher_VH.chunk(size)[rank]
        tokens_T = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device=device)
    else:
        student_TV = 2 * normal(num_tokens, vocab_size)
        teacher_TV = student_TV + 0.2 * normal(num_tokens, vocab_size)
        tokens_T = torch.multinomial(student_TV.softmax(-1), 1, generator=generator)[:, 0]
        tensors["student_TV"], tensors["teacher_TV"] = (x.chunk(size, dim=1)[rank] for x in (student_TV, teacher_TV))
    regions_T = torch.full((num_tokens,), 2, device=device)
    if case == "TrOPD mix":
        regions_T[::5] = 1
    uniforms_T = torch.rand(num_tokens, generator=generator, device=device)
    assert dist.group.WORLD is not None
    return Inputs(
        tokens_T, regions_T, uniforms_T, dist.group.WORLD, vocab_size,
        **{name: tensor.bfloat16().to(device).contiguous() for name, tensor in tensors.items()},
    )  # fmt: skip


def exact_gradient(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """The float64 gradient of the sum of the losses on the leaf, whole, on the CPU."""
    group = inputs.group
    exact_leaf = inputs.leaf.detach().cpu() if inputs.from_hidden else unshard(inputs.leaf, group).cpu()
    exact_leaf = exact_leaf.double().requires_grad_()
    student_TV, teacher_TV = exact_leaf, inputs.teacher_TV
    if inputs.from_hidden:
        student_VH, teacher_VH = (
            unshard(x.T.contiguous(), group).T.cpu().double() for x in (inputs.student_VH, inputs.teacher_VH)
        )
        student_TV, teacher_TV = exact_leaf @ student_VH.T, inputs.teacher_TH.cpu().double() @ teacher_VH.T
    else:
        teacher_TV = unshard(teacher_TV, group).cpu()
    loss_T, _ = dense_loss(
        student_TV, teacher_TV, inputs.tokens_T.cpu(), inputs.regions_T.cpu(), objective,
        vocab_size=inputs.vocab_size, uniforms_T=inputs.uniforms_T.cpu(),
    )  # fmt: skip
    loss_T.sum().backward()
    assert exact_leaf.grad is not None
    return exact_leaf.grad


def gradient_error(inputs: Inputs, found: torch.Tensor, objective: Objective) -> float:
    """Relative error of this rank's gradient of the leaf, together with the other ranks'."""
    if inputs.from_hidden:
        whole = found.float()
        dist.all_reduce(whole, group=inputs.group)  # each rank has its vocabulary shard's part
    else:
        whole = unshard(found, inputs.group)
    return relative_error(whole.cpu(), exact_gradient(inputs, objective))
