"""What the hooks are measured against, in plain torch: a base layer, LoRA by grouped products, a loop over adapters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe.bench.problems import Problem
from torch_lora_moe.hooks import LoRAHooks

# torch._grouped_mm takes fewer groups than this.
MOST_GROUPS = 1023


def grouped_linear(x: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
    """``x[i] @ weights[groups[i]].T`` through ``torch._grouped_mm``: sort, multiply, put back; no host sync."""
    order = torch.argsort(groups, stable=True)
    bounds = torch.arange(weights.shape[0], device=x.device, dtype=groups.dtype)
    ends = torch.searchsorted(groups[order], bounds, right=True).to(torch.int32)
    sorted_out = torch._grouped_mm(x[order], weights.transpose(1, 2), offs=ends)
    out = torch.empty_like(sorted_out)
    out[order] = sorted_out
    return out


class TorchLoRA:
    """LoRA on both projections in plain torch, with the interface of the hooks.

    ``by_adapter`` runs one pass over the batch for each adapter, as engines did before virtual experts; otherwise all
    virtual experts are groups of one product (as many products as the group limit asks for).
    """

    def __init__(self, problem: Problem, by_adapter: bool) -> None:
        self.problem = problem
        experts = problem.shape.num_experts
        slots_at_once = 1 if by_adapter else max(1, MOST_GROUPS // experts)
        max_loras = problem.lora.gate_up_a.shape[0]  # type: ignore[union-attr]
        self.spans = [(first, min(first + slots_at_once, max_loras)) for first in range(0, max_loras, slots_at_once)]

    def after_gate_up(self, x: Tensor, cache1: Tensor) -> None:
        """Adds the gate_up delta to ``[P, 2 I]``."""
        problem, lora = self.problem, self.problem.lora
        x = x.repeat_interleave(problem.shape.top_k, 0)
        self._add(cache1, x, lora.gate_up_a, lora.gate_up_b, 2, None)

    def after_down(self, h: Tensor, cache3: Tensor) -> None:
        """Adds the weighted down delta to ``[P, H]``."""
        lora = self.problem.lora
        self._add(cache3, h, lora.down_a, lora.down_b, 1, self.problem.topk_weights.reshape(-1, 1))

    def _add(
        self, out: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, slices: int, weights: Tensor | None
    ) -> None:
        assert a is not None
        assert b is not None
        experts, rank = self.problem.shape.num_experts, b.shape[-1]
        slots = self.problem.token_lora_mapping.repeat_interleave(self.problem.shape.top_k)
        ids = self.problem.topk_ids.reshape(-1)
        for first, last in self.spans:
            mine = (slots >= first) & (slots < last)
            groups = torch.where(mine, (slots - first) * experts + ids, (last - first) * experts)
            s = grouped_linear(x, a[first:last].flatten(0, 1), groups)
            width = out.shape[1] // slices
            for part in range(slices):
                columns = slice(part * width, (part + 1) * width)
                b_part = b[first:last].flatten(0, 1)[:, columns]
                delta = grouped_linear(s[:, part * rank : (part + 1) * rank].contiguous(), b_part, groups)
                if weights is not None:
                    delta = delta * weights
                # rows behind the last group were not written
                out[:, columns] += torch.where(mine[:, None], delta, 0).to(out.dtype)


def torch_layer(problem: Problem, hooks: LoRAHooks | TorchLoRA | None, overlap: bool = False) -> Tensor:
    """A base layer of plain torch calls that knows nothing of LoRA, with hooks between, or also before, its GEMMs."""
    inner, ids = problem.shape.intermediate_size, problem.topk_ids.reshape(-1)
    ahead = hooks if overlap and isinstance(hooks, LoRAHooks) else None
    if ahead is not None:
        ahead.before_gate_up(problem.x)
    cache1 = grouped_linear(problem.x.repeat_interleave(problem.shape.top_k, 0), problem.w13, ids)
    if hooks is not None:
        hooks.after_gate_up(problem.x, cache1)
    h = F.silu(cache1[:, :inner]) * cache1[:, inner:]
    if ahead is not None:
        ahead.before_down(h)
    cache3 = grouped_linear(h, problem.w2, ids) * problem.topk_weights.reshape(-1, 1).to(h.dtype)
    if hooks is not None:
        hooks.after_down(h, cache3)
    return cache3.view(*problem.topk_ids.shape, -1).sum(1)
