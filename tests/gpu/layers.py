"""Layers and oracles at sizes where the pair-by-pair reference is too slow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe import MoELoRA


@dataclass
class Layer:
    """A gated silu layer with adapters, on the GPU."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor
    mapping: Tensor
    lora: MoELoRA


def make_layer(
    tokens: int,
    top_k: int = 4,
    experts: int = 16,
    slots: int = 4,
    rank: int = 16,
    hidden: int = 256,
    inner: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    odd_ids: bool = True,
) -> Layer:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int32)

    margin = 1 if odd_ids else 0
    lora = MoELoRA(
        normal(slots, experts, 2 * rank, hidden, scale=hidden**-0.5),
        normal(slots, experts, 2 * inner, rank, scale=rank**-0.5),
        normal(slots, experts, rank, inner, scale=inner**-0.5),
        normal(slots, experts, hidden, rank, scale=rank**-0.5),
        torch.ones(slots, dtype=torch.bool, device="cuda"),
    )
    return Layer(
        normal(tokens, hidden),
        normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
        normal(experts, hidden, inner, scale=inner**-0.5),
        torch.rand(tokens, top_k, generator=generator, device="cuda"),
        integers(-margin, experts + margin, tokens, top_k),
        integers(-margin, slots + margin, tokens),
        lora,
    )


def by_adapter(layer: Layer, dtype: torch.dtype) -> Tensor:
    """One adapter and one expert at a time, ``[M, H]`` in ``dtype``, on the GPU."""
    out = torch.zeros(layer.x.shape, dtype=torch.promote_types(dtype, torch.float32), device="cuda")
    a13, b13, a2, b2, enabled = layer.lora
    assert a13 is not None
    assert enabled is not None
    slots, rank = a13.shape[0], a2.shape[2]
    inner = layer.w2.shape[2]
    flags = enabled.tolist()
    known = (layer.mapping >= 0) & (layer.mapping < slots)
    effective = torch.where(known & enabled[layer.mapping.clamp(0, slots - 1).long()].bool(), layer.mapping, -1)
    for slot in [-1, *(slot for slot in range(slots) if flags[slot])]:
        for expert in range(layer.w13.shape[0]):
            token, k = torch.where((layer.ids == expert) & (effective == slot)[:, None])
            if token.numel() == 0:
                continue
            x = layer.x[token].to(dtype)
            gate_up = F.linear(x, layer.w13[expert].to(dtype))
            if slot >= 0:
                s = F.linear(x, a13[slot, expert].to(dtype))
                b = b13[slot, expert].to(dtype)
                gate_up = gate_up + torch.cat([s[:, :rank] @ b[:inner].T, s[:, rank:] @ b[inner:].T], 1)
            h = F.silu(gate_up[:, :inner]) * gate_up[:, inner:]
            y = F.linear(h, layer.w2[expert].to(dtype))
            if slot >= 0:
                y = y + F.linear(F.linear(h, a2[slot, expert].to(dtype)), b2[slot, expert].to(dtype))
            out.index_add_(0, token, layer.weights[token, k, None].to(out.dtype) * y.to(out.dtype))
    return out.to(dtype)
