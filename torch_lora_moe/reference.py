"""The oracle: what every path of this package must compute, pair by pair, in plain torch.

Read this file as the specification. It favours clarity over speed, imports nothing but torch, and no backend imports
it. ``dtype`` is the type the arithmetic runs in: ``torch.float64`` makes it the oracle, a low precision makes it the
yardstick from which tests derive their error budget (see ``testing.error_budget``).

Symbols: ``M`` tokens, ``K`` experts per token (``top_k``), ``P = M * K`` pairs (pair ``p`` is token ``p // K``), ``E``
experts, ``L`` adapter slots, ``R`` padded rank, ``H`` hidden size, ``I`` intermediate size, ``G`` 2 when gated else 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_slots(
    token_lora_mapping: Tensor | None, adapter_enabled: Tensor | None, max_loras: int, num_tokens: int
) -> list[int]:
    """Adapter slot that each token really uses: -1 where it is out of ``[0, max_loras)`` or disabled."""
    if token_lora_mapping is None:
        return [-1] * num_tokens
    enabled = [True] * max_loras if adapter_enabled is None else [bool(flag) for flag in adapter_enabled.tolist()]
    return [slot if 0 <= slot < max_loras and enabled[slot] else -1 for slot in token_lora_mapping.tolist()]


def route(topk_ids: Tensor, slots: list[int], num_experts: int, tile_rows: int, run_rows: int) -> Tensor:
    """The schedule of ``lora_moe::route``: int32 ``[9, P + 1]``, rows as ``routing`` names them.

    Pairs are ordered by (expert, slot), the slot -1 first, equal pairs in their own order; pairs of an expert outside
    ``[0, num_experts)`` are left out. A tile is a run of at most ``tile_rows`` neighbours of one expert, cut from the
    start of its group. A run is neighbours of one virtual expert, cut at the order's multiples of ``run_rows`` (0: no
    runs at all); the last row has the run of each sorted pair, or the next one. Unused entries are -1; the last column
    counts the used ones.
    """
    top_k, num_pairs = topk_ids.shape[1], topk_ids.numel()
    experts = topk_ids.reshape(-1).tolist()
    order = sorted(
        (p for p in range(num_pairs) if 0 <= experts[p] < num_experts),
        key=lambda p: (experts[p], slots[p // top_k], p),
    )
    virtual = [slots[p // top_k] * num_experts + experts[p] if slots[p // top_k] >= 0 else -1 for p in order]
    tiles = _tiles([experts[p] for p in order], tile_rows)
    runs = _runs(virtual, run_rows) if run_rows else []

    run_ids = []
    for position, group in enumerate(virtual if run_rows else []):
        started = sum(first <= position for _, first, _ in runs)
        run_ids.append(started - 1 if group >= 0 else started)

    schedule = torch.full((9, num_pairs + 1), -1, dtype=torch.int32)
    tables = [[entry[part] for entry in table] for table in (tiles, runs) for part in range(3)]
    for i, row in enumerate([order, virtual, *tables, run_ids]):
        schedule[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        schedule[i, num_pairs] = len(row)
    return schedule


def _tiles(groups: list[int], height: int) -> list[tuple[int, int, int]]:
    """(group, first row, rows) of each tile over a list in which equal groups are neighbours."""
    tiles: list[tuple[int, int, int]] = []
    for row, group in enumerate(groups):
        if tiles and tiles[-1][0] == group and tiles[-1][2] < height:
            tiles[-1] = (group, tiles[-1][1], tiles[-1][2] + 1)
        else:
            tiles.append((group, row, 1))
    return tiles


def _runs(virtual: list[int], height: int) -> list[tuple[int, int, int]]:
    """(virtual expert, first row, rows) of each run of the adapted rows, cut at multiples of ``height``."""
    runs: list[tuple[int, int, int]] = []
    for row, group in enumerate(virtual):
        if group < 0:
            continue
        if runs and runs[-1][0] == group and row % height:
            runs[-1] = (group, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((group, row, 1))
    return runs


def lora_shrink(
    hidden_states: Tensor, lora_a: Tensor, topk_ids: Tensor, slots: list[int], num_experts: int, dtype: torch.dtype
) -> Tensor:
    """``s[p] = A[l, e] @ x``: ``[P, rows of A]``, zero for pairs that LoRA skips.

    ``hidden_states`` is ``[M, in]`` (shared by the pairs of a token) or ``[M * K, in]``; ``lora_a`` is
    ``[L, E or 1, rows, in]``.
    """
    num_tokens, top_k = topk_ids.shape
    rows_per_token = hidden_states.shape[0] // max(num_tokens, 1)
    shrunk = torch.zeros(num_tokens * top_k, lora_a.shape[2], dtype=dtype)
    for p, expert in enumerate(topk_ids.reshape(-1).tolist()):
        slot = slots[p // top_k]
        if slot >= 0 and 0 <= expert < num_experts:
            x = hidden_states[p if rows_per_token == top_k else p // top_k].to(dtype)
            shrunk[p] = lora_a[slot, expert if lora_a.shape[1] > 1 else 0].to(dtype) @ x
    return shrunk


def lora_expand(
    shrunk: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    slots: list[int],
    num_experts: int,
    num_slices: int,
    dtype: torch.dtype,
) -> Tensor:
    """``delta[p] = B[l, e] @ s[p]``: ``[P, N]``, zero for pairs that LoRA skips.

    ``num_slices`` equal slices of the output rows each use their own slice of the rank vector: 2 pairs the gate half
    with the first ``R`` entries and the up half with the next ``R``.
    """
    top_k = topk_ids.shape[1]
    delta = torch.zeros(topk_ids.numel(), lora_b.shape[2], dtype=dtype)
    for p, expert in enumerate(topk_ids.reshape(-1).tolist()):
        slot = slots[p // top_k]
        if slot >= 0 and 0 <= expert < num_experts:
            b = lora_b[slot, expert if lora_b.shape[1] > 1 else 0].to(dtype)
            pieces = zip(b.chunk(num_slices), shrunk[p].to(dtype).chunk(num_slices), strict=True)
            delta[p] = torch.cat([b_slice @ s_slice for b_slice, s_slice in pieces])
    return delta


def activate(
    gate_up: Tensor, activation: str, is_gated: bool, interleaved: bool, swiglu_alpha: float, swiglu_limit: float
) -> Tensor:
    """The expert's activation on the last dimension: ``act(gate) * up`` or ``act(gate_up)``.

    ``swigluoai`` is gpt-oss's clamped SwiGLU: ``(up + 1) * gate * sigmoid(alpha * gate)`` with gate at most ``limit``
    and up within ``[-limit, limit]``. ``interleaved`` means gate and up alternate along the last dimension.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x).square(),
    }
    if not is_gated:
        return functions[activation](gate_up)
    gate, up = (gate_up[..., 0::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    if activation == "swigluoai":
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(swiglu_alpha * gate)
    return functions[activation](gate) * up


def fused_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    lora: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None = None,
    token_lora_mapping: Tensor | None = None,
    *,
    activation: str = "silu",
    is_gated: bool = True,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    routed_scaling_factor: float = 1.0,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The whole layer, ``[M, H]`` in ``dtype``. Arguments as ``torch_lora_moe.fused_experts``; all on the CPU.

    For pair ``p`` of token ``t`` with expert ``e`` and slot ``l``::

        gu  = w13[e] @ x + bias + B13[l, e] @ (A13[l, e] @ x)
        h   = act(gate) * up
        y   = w2[e] @ h + bias + B2[l, e] @ (A2[l, e] @ h)
        out = routed_scaling_factor * sum over K of topk_weights * y
    """
    (num_tokens, top_k), num_experts = topk_ids.shape, w13.shape[0]
    gate_up_a, gate_up_b, down_a, down_b, adapter_enabled = lora or (None,) * 5
    owner = gate_up_a if gate_up_a is not None else down_a
    max_loras = owner.shape[0] if owner is not None else 0
    slots = effective_slots(token_lora_mapping, adapter_enabled, max_loras, num_tokens)

    out = torch.zeros(num_tokens, w2.shape[1], dtype=torch.promote_types(dtype, torch.float32))
    for p, expert in enumerate(topk_ids.reshape(-1).tolist()):
        if not 0 <= expert < num_experts:
            continue
        token = p // top_k
        pair = (topk_ids.reshape(-1, 1)[p : p + 1], [slots[token]], num_experts)
        x = hidden_states[token].to(dtype)
        gate_up = w13[expert].to(dtype) @ x
        if w13_bias is not None:
            gate_up = gate_up + w13_bias[expert].to(dtype)
        if interleaved:  # LoRA's B always holds the gate rows first
            gate_up = torch.cat([gate_up[0::2], gate_up[1::2]])
        gate_up = gate_up + _lora_delta(x, gate_up_a, gate_up_b, pair, 2 if is_gated else 1, dtype)
        h = activate(gate_up, activation, is_gated, False, swiglu_alpha, swiglu_limit)
        y = w2[expert].to(dtype) @ h
        if w2_bias is not None:
            y = y + w2_bias[expert].to(dtype)
        y = y + _lora_delta(h, down_a, down_b, pair, 1, dtype)
        out[token] += topk_weights[token, p % top_k].to(out.dtype) * y.to(out.dtype)
    return (routed_scaling_factor * out).to(dtype)


def _lora_delta(
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    pair: tuple[Tensor, list[int], int],
    num_slices: int,
    dtype: torch.dtype,
) -> Tensor | float:
    """``B @ (A @ x)`` of one pair, given as (its expert id ``[1, 1]``, its slot, number of experts)."""
    if a is None or b is None:
        return 0.0
    ids, slot, num_experts = pair
    shrunk = lora_shrink(x[None], a, ids, slot, num_experts, dtype)
    return lora_expand(shrunk, b, ids, slot, num_experts, num_slices, dtype)[0]
