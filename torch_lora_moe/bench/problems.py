"""The layers that are measured: published shapes, random weights, random routing, and the bytes they cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_lora_moe.api import MoELoRA


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer: hidden size, expert intermediate size, experts, experts per token."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "qwen3-30b-a3b-tp4": Shape(2048, 192, 128, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "olmoe-1b-7b": Shape(2048, 1024, 64, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4),
    "deepseek-v3-tp8": Shape(7168, 256, 256, 8),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "dbrx": Shape(6144, 10752, 16, 4),
    "glm-4.5-air": Shape(4096, 1408, 128, 8),
    "granite-3.0-3b-a800m": Shape(1536, 512, 40, 8),
    "llama-4-scout": Shape(5120, 8192, 16, 1),
    "minimax-m2": Shape(3072, 1536, 256, 8),
    "phi-3.5-moe": Shape(4096, 6400, 16, 2),
    "qwen2-57b-a14b": Shape(3584, 2560, 64, 8),
    "qwen3-235b-a22b": Shape(4096, 1536, 128, 8),
    "qwen3-next-80b-a3b": Shape(2048, 512, 512, 10),
    "tiny": Shape(256, 128, 16, 4),
}

# An H200: bytes a microsecond that reading weights reaches, and 16-bit operations a microsecond of a large product.
BYTES_PER_MICROSECOND = 4.3e6
FLOPS_PER_MICROSECOND = 7.8e8


@dataclass
class Problem:
    """One layer call: weights are shared by the calls of a problem, tokens and routing are each call's own."""

    shape: Shape
    x: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    token_lora_mapping: Tensor
    lora: MoELoRA

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and an expert."""
        return self.topk_ids.numel()

    def lora_bytes(self) -> int:
        """Fewest bytes that LoRA must move: active matrices, inputs and rank vectors once, outputs read and written."""
        shape, rank = self.shape, self.lora.down_b.shape[-1]  # type: ignore[union-attr]
        slots = self.token_lora_mapping[:, None].expand_as(self.topk_ids)
        virtual = (slots * shape.num_experts + self.topk_ids)[slots >= 0]
        hidden, inner, size = shape.hidden_size, shape.intermediate_size, self.x.element_size()
        matrices = rank * (2 * hidden + 2 * inner + inner + hidden) * size
        rows = virtual.numel() * (inner + 2 * (2 * inner + hidden)) * size + self.x.numel() * size
        return int(virtual.unique().numel()) * matrices + rows

    def floor(self, with_lora: bool) -> float:
        """Microseconds that the whole layer cannot beat on an H200.

        Its active weights and adapter matrices, inputs and outputs are each moved once, or its products computed,
        whichever takes longer.
        """
        shape, rank, size = self.shape, self.lora.down_b.shape[-1], self.x.element_size()  # type: ignore[union-attr]
        base = 3 * shape.hidden_size * shape.intermediate_size
        lora = 3 * rank * (shape.hidden_size + shape.intermediate_size) if with_lora else 0
        slots = self.token_lora_mapping[:, None].expand_as(self.topk_ids)
        virtual = (slots * shape.num_experts + self.topk_ids)[slots >= 0].unique().numel()
        moved = (self.topk_ids.unique().numel() * base + virtual * lora + 2 * self.x.numel()) * size
        flops = 2 * self.num_pairs * (base + lora)
        return max(float(moved) / BYTES_PER_MICROSECOND, flops / FLOPS_PER_MICROSECOND)


def make_problems(
    shape: Shape,
    num_tokens: int,
    max_loras: int,
    rank: int,
    calls: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> list[Problem]:
    """``calls`` calls of one layer with random tokens, softmax top-k routing and a random adapter for each token."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype) * scale

    lora = MoELoRA(
        normal(max_loras, experts, 2 * rank, hidden, scale=hidden**-0.5),
        normal(max_loras, experts, 2 * inner, rank, scale=rank**-0.5),
        normal(max_loras, experts, rank, inner, scale=inner**-0.5),
        normal(max_loras, experts, hidden, rank, scale=rank**-0.5),
    )
    w13, w2 = normal(experts, 2 * inner, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5)
    problems = []
    for _ in range(calls):
        logits = torch.randn(num_tokens, experts, generator=generator, device=device)
        weights, ids = logits.softmax(-1).topk(shape.top_k, -1)
        mapping = torch.randint(0, max_loras, (num_tokens,), generator=generator, device=device, dtype=torch.int32)
        weights = (weights / weights.sum(-1, keepdim=True)).contiguous()
        x = normal(num_tokens, hidden)
        problems.append(Problem(shape, x, w13, w2, weights, ids.to(torch.int32), mapping, lora))
    return problems
