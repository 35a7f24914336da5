"""CPU kernels of the ops, in torch: vectorised over pairs where rows are few, one matrix product a group where many.

Called by ``ops`` with arguments already checked. Arithmetic is fp32 whatever the storage, rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe import routing
from torch_lora_moe.checks import FusedArguments

# Gathering a weight per row costs a copy of it; above this many elements a product per group is cheaper.
GATHER_LIMIT = 1 << 19


@dataclass(frozen=True)
class Group:
    """Neighbouring sorted rows ``[start, stop)`` that share the weight at index ``weight``."""

    weight: int
    start: int
    stop: int


def route(
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """See ``reference.route`` for what it returns."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    schedule = torch.full(routing.schedule_shape(num_pairs), -1, dtype=torch.int32)
    schedule[:, num_pairs] = 0
    if num_pairs == 0:
        return schedule

    experts = topk_ids.reshape(-1).long()
    slots = _effective_slots(token_lora_mapping, adapter_enabled, max_loras, num_tokens).repeat_interleave(top_k)
    known = (experts >= 0) & (experts < num_experts)
    key = torch.where(known, experts * (max_loras + 1) + slots + 1, num_experts * (max_loras + 1))
    order = key.argsort(stable=True)[: int(known.sum())]
    experts, slots = experts[order], slots[order]

    _put(schedule[routing.SORTED_TOKEN_IDS], order)
    virtual = torch.where(slots >= 0, slots * num_experts + experts, -1)
    _put(schedule[routing.SORTED_VIRTUAL_IDS], virtual)
    tile_rows = routing.expert_tile_rows(num_pairs, num_experts)
    _put_tiles(schedule[routing.EXPERT_TILE_IDS : routing.EXPERT_TILE_ROWS + 1], experts, tile_rows)
    if routing.cuts_runs(num_pairs, num_experts * max_loras):
        _put_runs(schedule[routing.LORA_RUN_IDS : routing.LORA_RUN_ROWS + 1], virtual)
        starts = schedule[routing.LORA_RUN_STARTS, : schedule[routing.LORA_RUN_STARTS, -1]]
        started = torch.searchsorted(starts, torch.arange(virtual.numel(), dtype=torch.int32), right=True)
        _put(schedule[routing.SORTED_RUN_IDS], torch.where(virtual >= 0, started - 1, started))
    return schedule


def _effective_slots(mapping: Tensor | None, enabled: Tensor | None, max_loras: int, num_tokens: int) -> Tensor:
    if mapping is None or max_loras == 0:
        return torch.full((num_tokens,), -1, dtype=torch.int64)
    slots = mapping.long()
    used = (slots >= 0) & (slots < max_loras)
    if enabled is not None:
        used &= enabled.bool()[slots.clamp(0, max_loras - 1)]
    return torch.where(used, slots, -1)


def _put(row: Tensor, values: Tensor) -> None:
    row[: values.numel()] = values
    row[-1] = values.numel()


def _put_tiles(rows: Tensor, groups: Tensor, height: int) -> None:
    """Cuts equal neighbours of ``groups`` into tiles and writes their ids, starts and row counts."""
    ids, counts = groups.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    per_group = (counts + height - 1) // height
    group = torch.arange(ids.numel()).repeat_interleave(per_group)
    offset = (torch.arange(group.numel()) - (per_group.cumsum(0) - per_group)[group]) * height
    _put(rows[0], ids[group])
    _put(rows[1], starts[group] + offset)
    _put(rows[2], (counts[group] - offset).clamp(max=height))


def _put_runs(rows: Tensor, virtual: Tensor) -> None:
    """Writes the ids, starts and row counts of the runs of adapted rows."""
    row = torch.arange(virtual.numel())
    first = (row % routing.RUN_ROWS == 0) | (virtual != virtual.roll(1))
    last = first.roll(-1)
    if last.numel():
        last[-1] = True
    starts, ends = (first & (virtual >= 0)).nonzero().squeeze(1), (last & (virtual >= 0)).nonzero().squeeze(1)
    _put(rows[0], virtual[starts])
    _put(rows[1], starts)
    _put(rows[2], ends - starts + 1)


def lora_shrink(
    hidden_states: Tensor,
    lora_a: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    num_experts: int,
    split_k: int = 1,
) -> Tensor:
    """Rank vectors in ``split_k`` fp32 planes ``[split_k, P, rows of A]``; zero for pairs that LoRA skips."""
    num_pairs, in_features = topk_ids.numel(), hidden_states.shape[1]
    if schedule is None:
        schedule = route(topk_ids, token_lora_mapping, adapter_enabled, num_experts, lora_a.shape[0])
    planes = torch.zeros(split_k, num_pairs, lora_a.shape[2])
    pairs, groups = _lora_groups(schedule, lora_a, num_experts)
    pairs_per_row = num_pairs // max(hidden_states.shape[0], 1)
    x = hidden_states[pairs // max(pairs_per_row, 1)].float()
    chunk = -(-in_features // split_k)
    for plane, start in zip(planes, range(0, in_features, max(chunk, 1)), strict=False):
        columns = slice(start, start + chunk)
        plane[pairs] = _grouped_linear(x[:, columns], lora_a.flatten(0, 1)[..., columns], groups)
    return planes


def lora_expand_add_(
    output: Tensor,
    shrunk: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    topk_weights: Tensor | None,
    num_experts: int,
    num_slices: int = 1,
) -> None:
    """``output[t, k] += weight * B @ s`` for the pairs that LoRA does not skip."""
    if schedule is None:
        schedule = route(topk_ids, token_lora_mapping, adapter_enabled, num_experts, lora_b.shape[0])
    pairs, groups = _lora_groups(schedule, lora_b, num_experts)
    delta = _expand(shrunk.sum(0)[pairs], lora_b, groups, num_slices)
    if topk_weights is not None:
        delta *= topk_weights.reshape(-1, 1)[pairs].float()
    token, k = pairs // output.shape[1], pairs % output.shape[1]
    output[token, k] = (output[token, k].float() + delta).to(output.dtype)


def lora_add_(
    output: Tensor,
    hidden_states: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    topk_weights: Tensor | None,
    num_slices: int = 1,
) -> None:
    """A shrink and an expand."""
    num_experts = max(lora_a.shape[1], lora_b.shape[1])
    tokens = (topk_ids, token_lora_mapping, adapter_enabled)
    if schedule is None:
        schedule = route(*tokens, num_experts, lora_a.shape[0])
    shrunk = lora_shrink(hidden_states, lora_a, *tokens, schedule, num_experts)
    lora_expand_add_(output, shrunk, lora_b, *tokens, schedule, topk_weights, num_experts, num_slices)


def fused_experts(call: FusedArguments) -> Tensor:
    """The whole layer, its intermediates in sorted order."""
    (num_tokens, top_k), num_experts = call.topk_ids.shape, call.w13.shape[0]
    schedule = call.schedule
    if schedule is None:
        schedule = route(call.topk_ids, call.token_lora_mapping, call.adapter_enabled, num_experts, call.max_loras)
    pairs, groups = _expert_groups(schedule)

    x = call.hidden_states[pairs // top_k].float()
    gate_up = _biased(_grouped_linear(x, call.w13, groups), call.w13_bias, groups)
    if call.interleaved:
        gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
    _add_lora(gate_up, x, call.gate_up_a, call.gate_up_b, schedule, num_experts, call.num_slices)
    h = _activate(gate_up, call)
    y = _biased(_grouped_linear(h, call.w2, groups), call.w2_bias, groups)
    _add_lora(y, h, call.down_a, call.down_b, schedule, num_experts, 1)

    weighted = torch.zeros(num_tokens * top_k, call.w2.shape[1])
    weighted[pairs] = y * call.topk_weights.reshape(-1, 1)[pairs].float()
    out = weighted.view(num_tokens, top_k, call.w2.shape[1]).sum(1) * call.routed_scaling_factor
    return out.to(call.hidden_states.dtype)


def _expert_groups(schedule: Tensor) -> tuple[Tensor, list[Group]]:
    """The sorted pairs and their groups by expert."""
    tiles = schedule[routing.EXPERT_TILE_IDS : routing.EXPERT_TILE_ROWS + 1]
    ids, starts, rows = tiles[:, : int(tiles[0, -1])].tolist()
    groups: list[Group] = []
    for expert, start, count in zip(ids, starts, rows, strict=True):
        if groups and groups[-1].weight == expert:  # tiles of one expert are joined again
            groups[-1] = Group(expert, groups[-1].start, start + count)
        else:
            groups.append(Group(expert, start, start + count))
    num_pairs = int(schedule[routing.SORTED_TOKEN_IDS, -1])
    return schedule[routing.SORTED_TOKEN_IDS, :num_pairs].long(), groups


def _lora_groups(schedule: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, list[Group]]:
    """The pairs that LoRA adapts, in sorted order, and their groups by index into ``weights.flatten(0, 1)``."""
    num_pairs = int(schedule[routing.SORTED_TOKEN_IDS, -1])
    pairs, virtual = schedule[:2, :num_pairs]
    adapted = virtual >= 0
    ids, counts = virtual[adapted].unique_consecutive(return_counts=True)
    if weights.shape[1] == 1:
        ids = ids // num_experts
    groups, start = [], 0
    for weight, count in zip(ids.tolist(), counts.tolist(), strict=True):
        groups.append(Group(weight, start, start + count))
        start += count
    return pairs[adapted].long(), groups


def _grouped_linear(x: Tensor, weights: Tensor, groups: list[Group]) -> Tensor:
    """``x[rows] @ weights[group].T`` for each group: fp32 ``[rows of x, N]``; ``weights`` is ``[groups, N, in]``."""
    _, num_out, num_in = weights.shape
    sizes = [group.stop - group.start for group in groups]
    if x.shape[0] * num_out * num_in <= GATHER_LIMIT:
        index = torch.tensor(
            [group.weight for group in groups for _ in range(group.start, group.stop)], dtype=torch.int64
        )
        # vectors on the left: dot products, where matrices there are added up column by column, which loses more digits
        return torch.bmm(x.unsqueeze(1), weights[index].float().transpose(1, 2)).squeeze(1)
    out = x.new_empty(x.shape[0], num_out)
    # views are made for all groups at once where that can be: one by one they cost as much as small products
    transposed = weights.transpose(1, 2)
    for group, rows, target in zip(groups, x.split(sizes), out.split(sizes), strict=True):
        torch.mm(rows, transposed[group.weight].float(), out=target)
    return out


def _biased(rows: Tensor, bias: Tensor | None, groups: list[Group]) -> Tensor:
    if bias is not None:
        for group in groups:
            rows[group.start : group.stop] += bias[group.weight].float()
    return rows


def _expand(shrunk: Tensor, lora_b: Tensor, groups: list[Group], num_slices: int) -> Tensor:
    """``B @ s`` by slices: slice ``i`` of the output rows uses slice ``i`` of the rank vector."""
    weights = lora_b.flatten(0, 1).unflatten(1, (num_slices, -1))
    pieces = [_grouped_linear(s, weights[:, i], groups) for i, s in enumerate(shrunk.chunk(num_slices, dim=1))]
    return torch.cat(pieces, dim=1)


def _add_lora(
    rows: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, schedule: Tensor, num_experts: int, num_slices: int
) -> None:
    """Adds the LoRA delta of sorted rows ``x`` to sorted ``rows``, leaving the rows of skipped pairs untouched."""
    if a is None or b is None:
        return
    adapted = (schedule[routing.SORTED_VIRTUAL_IDS, : x.shape[0]] >= 0).nonzero().squeeze(1)
    if adapted.numel() == 0:
        return
    _, groups = _lora_groups(schedule, a, num_experts)
    shrunk = _grouped_linear(x[adapted], a.flatten(0, 1), groups)
    if b.shape[1] != a.shape[1]:
        _, groups = _lora_groups(schedule, b, num_experts)
    rows.index_add_(0, adapted, _expand(shrunk, b, groups, num_slices))


def _activate(gate_up: Tensor, call: FusedArguments) -> Tensor:
    """``act(gate) * up`` of rows that hold the gate first, or ``act`` of the whole row."""
    if not call.is_gated:
        return _UNARY[call.activation](gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    if call.activation == "swigluoai":
        gate, up = gate.clamp(max=call.swiglu_limit), up.clamp(-call.swiglu_limit, call.swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(call.swiglu_alpha * gate)
    return _UNARY[call.activation](gate) * up


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
