"""CUDA kernels of the ops: from tensors to grids, launch configurations and the Triton kernels.

At decode the host is the bottleneck, so a call is planned once for each set of shapes, dtypes and strides: the plan
holds the checked call's grid, constants and compiled kernel, and later calls look it up and launch. Nothing here reads
device memory on the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_lora_moe import checks, routing
from torch_lora_moe.checks import like
from torch_lora_moe.config import LaunchConfig, launch_config, power_of_two, run_pieces, shrink_planes
from torch_lora_moe.kernels import expand, shrink
from torch_lora_moe.kernels import route as route_kernels
from torch_lora_moe.plans import Plan, new_plans, on_device, overlaps, remember

# Programs that share the runs of a product; beyond it they take turns, so that unused slots cost nothing.
MOST_RUN_PROGRAMS = 2048
# Above this many pairs ranking every pair against all others costs more than two more launches. The GPU would be 1 us
# quicker with those from some 2,500 pairs on, but the host slower.
RANKED_PAIRS = 4096


_ROUTE_PLANS = new_plans()


@on_device
def route(
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """See ``reference.route`` for what it returns."""
    key = (like(topk_ids), like(token_lora_mapping), like(adapter_enabled), num_experts, max_loras)
    plan = _ROUTE_PLANS.get(key)
    if plan is None:
        checks.check_routing(topk_ids, token_lora_mapping, adapter_enabled, num_experts, max_loras)
        mapped = token_lora_mapping is not None and max_loras > 0
        flagged, pdl = mapped and adapter_enabled is not None, overlaps(topk_ids.device)
        plan = RoutePlan(topk_ids.shape, num_experts, max_loras, mapped, flagged, pdl)
        remember(_ROUTE_PLANS, key, plan)
    return plan(topk_ids, token_lora_mapping, adapter_enabled)


class RoutePlan:
    """The launches of a route: one up to `RANKED_PAIRS` pairs, else three (two without a mapping), and one for runs."""

    def __init__(
        self, shape: torch.Size, num_experts: int, max_loras: int, mapped: bool, flagged: bool, pdl: bool
    ) -> None:
        num_tokens, self.top_k = shape
        self.num_tokens, self.num_pairs = num_tokens, num_tokens * self.top_k
        self.num_experts, self.max_loras, self.mapped = num_experts, max_loras, mapped
        num_pairs, top_k = self.num_pairs, self.top_k
        tile_rows = routing.expert_tile_rows(num_pairs, num_experts)
        most_tiles = min(num_pairs, num_pairs // tile_rows + num_experts)
        self.sizes = (num_pairs, top_k, num_experts, max_loras, most_tiles)
        bins = max(16, power_of_two(num_experts))
        common = {"BINS": bins, "TILE_ROWS": tile_rows, "HAS_MAPPING": mapped, "HAS_ENABLED": flagged, "PDL": pdl}
        columns = 8 if bins <= 1024 else 1
        self.launches: list[Plan] = []
        self.cut: Plan | None = None
        if routing.cuts_runs(num_pairs, num_experts * max_loras):
            chunk = 512 if num_pairs <= 4096 else 1024 if num_pairs <= 65536 else 4096
            runs = {"RUN_ROWS": routing.RUN_ROWS, "CHUNK": chunk, "BLOCK": 8192, "PDL": pdl}
            self.cut = Plan(route_kernels.cut_runs, (-(-num_pairs // chunk), 1, 1), runs, (8, 1), pdl)
        if num_pairs <= RANKED_PAIRS:
            ks = power_of_two(top_k)
            tokens = min(512, max(64, power_of_two(num_pairs))) // ks
            unroll = min(4, power_of_two(-(-num_tokens // max(tokens, 1))))
            blocks = {"K_POW2": ks, "BLOCK_T": max(tokens, 1), "UNROLL": unroll, "BLOCK_P": 16, "BLOCK_C": columns}
            wide = num_experts * (max_loras + 1) * num_pairs >= 2**31
            grid = (-(-num_pairs // 16) + -(-most_tiles // columns), 1, 1)
            constants = {**common, "WIDE": wide, **blocks}
            self.launches = [Plan(route_kernels.route_ranked, grid, constants, dependent=pdl)]
            return
        # few long chunks share few histograms, but each pair meets all others of its chunk
        self.chunk = 128 if num_pairs <= 16384 else 256 if num_pairs <= 131072 else 512
        self.num_chunks = -(-num_pairs // self.chunk)
        self.bins = bins
        slots = max(32, power_of_two(max_loras + 1))
        order = {"HAS_ENABLED": flagged, "PDL": pdl, "BINS": slots, "CHUNK": 64, "BLOCK_Q": 1024}
        count = {"BINS": bins, "HAS_MAPPING": mapped, "PDL": pdl, "CHUNK": self.chunk}
        rows = max(1, min(64, 4096 // bins))
        others = 32 if self.chunk == 256 else 16
        scatter = {**common, "CHUNK": self.chunk, "BLOCK_Q": others, "BLOCK_H": rows, "BLOCK_C": columns}
        programs = self.num_chunks + -(-most_tiles // columns)
        self.launches = [
            Plan(route_kernels.order_tokens, (-(-num_tokens // 64), 1, 1), order, (8, 1), pdl),
            Plan(route_kernels.count_experts, (self.num_chunks, 1, 1), count, (4, 1), pdl),
            Plan(route_kernels.scatter_pairs, (programs, 1, 1), scatter, (4, 1), pdl),
        ]

    def __call__(self, topk_ids: Tensor, mapping: Tensor | None, enabled: Tensor | None) -> Tensor:
        """Launches and returns the schedule."""
        schedule = topk_ids.new_empty(routing.schedule_shape(self.num_pairs), dtype=torch.int32)
        if self.num_pairs == 0:
            return schedule.zero_()
        mapping = topk_ids if mapping is None else mapping
        enabled = topk_ids if enabled is None else enabled
        if len(self.launches) == 1:
            self.launches[0]((topk_ids, mapping, enabled, schedule), self.num_tokens, *self.sizes)
        else:
            self._scatter(topk_ids, mapping, enabled, schedule)
        if self.cut is not None:
            self.cut((schedule,), self.num_pairs)
        return schedule

    def _scatter(self, topk_ids: Tensor, mapping: Tensor, enabled: Tensor, schedule: Tensor) -> None:
        order = topk_ids.new_empty(-(-self.num_tokens // 4) * 4, dtype=torch.int32)
        experts = topk_ids.new_empty(self.num_pairs, dtype=torch.int32)
        histograms = topk_ids.new_empty(self.num_chunks * self.bins, dtype=torch.int32)
        rank, count, scatter = self.launches
        if self.mapped:
            rank((mapping, enabled, order), self.num_tokens, self.max_loras)
        count((topk_ids, order, experts, histograms), self.num_pairs, self.top_k, self.num_experts)
        tensors = (mapping, enabled, order, experts, histograms, schedule)
        scatter(tensors, *self.sizes, self.num_chunks)


_SHRINK_PLANS = new_plans()


@on_device
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
    tensors = (hidden_states, lora_a, topk_ids, token_lora_mapping, adapter_enabled, schedule)
    key = (*map(like, tensors), num_experts, split_k)
    plan = _SHRINK_PLANS.get(key)
    if plan is None:
        checks.check_shrink(*tensors, num_experts, split_k)
        plan = ShrinkPlan(*tensors, num_experts, split_k)
        remember(_SHRINK_PLANS, key, plan)
    out = hidden_states.new_empty((split_k, topk_ids.numel(), lora_a.shape[2]), dtype=torch.float32)
    if topk_ids.numel():
        if plan.sorts and schedule is None:
            schedule = route(topk_ids, token_lora_mapping, adapter_enabled, num_experts, lora_a.shape[0])
        plan(hidden_states, lora_a, out, topk_ids, token_lora_mapping, adapter_enabled, schedule)
    return out


def run_programs(num_pairs: int, num_virtual_experts: int) -> int:
    """Programs for the runs of a batch: one each for as many as there can be, up to `MOST_RUN_PROGRAMS`."""
    return min(num_pairs, -(-num_pairs // routing.RUN_ROWS) + num_virtual_experts, MOST_RUN_PROGRAMS)


class ShrinkPlan:
    """The launch of a shrink.

    ``sorts``: whether it reads a schedule; then ``clear``: whether skipped pairs are zeroed, ``in_order``: whether its
    input is, and ``pieces`` programs share the rows of a run. ``first_tiles``: those of its input that are complete
    when it starts, if not all are (0); sorted pairs then go in two launches, with a ``share`` of them in the first.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        lora_a: Tensor,
        topk_ids: Tensor,
        token_lora_mapping: Tensor,
        adapter_enabled: Tensor | None,
        schedule: Tensor | None,
        num_experts: int,
        split_k: int | None = None,
        config: LaunchConfig | None = None,
        clear: bool = True,
        sorts: bool | None = None,
        in_order: bool = False,
        pieces: int | None = None,
        first_tiles: int = 0,
        share: float = 1.0,
    ) -> None:
        (num_tokens, top_k), in_features = topk_ids.shape, hidden_states.shape[1]
        num_pairs, (max_loras, experts, rows, _) = num_tokens * top_k, lora_a.shape
        self.sorts = routing.lora_sorts(num_pairs, num_experts * max_loras) if sorts is None else sorts
        self.split_k = shrink_planes(num_pairs, in_features, self.sorts) if split_k is None else split_k
        kernel = "shrink_runs" if self.sorts else "shrink_pairs"
        config = config or launch_config(kernel, num_pairs, rows, in_features, hidden_states.device)
        if not self.sorts and config.block_m > 1:
            kernel = "shrink_streams"
        blocks = -(-in_features // config.block_k)
        pdl = overlaps(hidden_states.device)
        chunk = -(-blocks // self.split_k) * config.block_k
        constants: dict[str, Any] = {
            "STRIDE_X": hidden_states.stride(0),
            "IN": in_features,
            "ROWS": rows,
            "CHUNK": chunk,
            "EVEN_PLANES": chunk * self.split_k == in_features,
            "SHARED": experts == 1 and num_experts > 1,
            "HAS_ENABLED": adapter_enabled is not None,
        }
        if pieces is None:
            pieces = run_pieces(num_pairs, num_experts * max_loras, config.block_m) if self.sorts else 1
        if self.sorts:
            constants |= {"CLEAR": clear, "IN_ORDER": in_order, "PIECES": pieces, "BLOCK_M": config.block_m}
        constants |= {"BLOCK_R": config.block_n, "BLOCK_K": config.block_k, "SPLIT": first_tiles > 0, "PDL": pdl}
        most = run_programs(num_pairs, num_experts * max_loras) if self.sorts else num_pairs
        options = (config.num_warps, config.num_stages)
        self.launches = []
        # more programs than on average, so that they seldom have to take turns
        for part in (share, 1 - share) if first_tiles and self.sorts else (1.0,):
            runs = min(most, math.ceil(most * (part + 0.125)))
            grid = (runs * pieces, -(-rows // config.block_n), self.split_k)
            self.launches.append(Plan(getattr(shrink, kernel), grid, constants, options, pdl, 3))
        pairs_per_row = max(num_pairs // max(hidden_states.shape[0], 1), 1)
        self.sizes = (num_pairs, top_k, pairs_per_row, num_experts, max_loras, first_tiles)

    def __call__(
        self,
        x: Tensor,
        a: Tensor,
        out: Tensor,
        ids: Tensor,
        mapping: Tensor,
        enabled: Tensor | None,
        schedule: Tensor | None,
        part: int = 0,
    ) -> None:
        """Launches, of two launches the one that ``part`` says."""
        enabled, schedule = ids if enabled is None else enabled, ids if schedule is None else schedule
        sizes = (*self.sizes, part) if self.sorts else self.sizes
        self.launches[part]((x, a, out, ids, mapping, enabled, schedule), *sizes)


_EXPAND_PLANS = new_plans()


@on_device
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
    tensors = (output, shrunk, lora_b, topk_ids, token_lora_mapping, adapter_enabled, schedule, topk_weights)
    key = (*map(like, tensors), num_experts, num_slices)
    plan = _EXPAND_PLANS.get(key)
    if plan is None:
        checks.check_expand(*tensors, num_experts, num_slices)
        plan = ExpandPlan(output, lora_b, adapter_enabled, topk_weights, num_experts, num_slices, shrunk.shape[0])
        remember(_EXPAND_PLANS, key, plan)
    if topk_ids.numel():
        if plan.sorts and schedule is None:
            schedule = route(topk_ids, token_lora_mapping, adapter_enabled, num_experts, lora_b.shape[0])
        plan(output, shrunk, lora_b, topk_ids, token_lora_mapping, adapter_enabled, schedule, topk_weights)


class ExpandPlan:
    """The launch of an expand; ``sorts``: whether it reads a schedule, ``behind_shrink``: its shrink goes first."""

    def __init__(
        self,
        output: Tensor,
        lora_b: Tensor,
        adapter_enabled: Tensor | None,
        topk_weights: Tensor | None,
        num_experts: int,
        num_slices: int,
        num_planes: int,
        config: LaunchConfig | None = None,
        behind_shrink: bool = False,
    ) -> None:
        num_tokens, top_k, out_features = output.shape
        num_pairs, (max_loras, experts, _, rank) = num_tokens * top_k, lora_b.shape
        self.sorts = routing.lora_sorts(num_pairs, num_experts * max_loras)
        kernel = "expand_runs" if self.sorts else "expand_pairs"
        columns = out_features // num_slices
        config = config or launch_config(kernel, num_pairs, columns, rank, output.device)
        pdl = overlaps(output.device)
        strides = dict(zip(("STRIDE_M", "STRIDE_K", "STRIDE_N"), output.stride(), strict=True))
        shape: dict[str, Any] = {"SLICE": columns, "NUM_SLICES": num_slices, "RANK": rank}
        variant: dict[str, Any] = {"SHARED": experts == 1 and num_experts > 1}
        weighted, behind = {"HAS_WEIGHTS": topk_weights is not None}, {"BEHIND_SHRINK": behind_shrink}
        even = num_tokens <= 1 or output.stride(0) == top_k * output.stride(1)
        if self.sorts:
            blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": config.block_k, "PDL": pdl}
            shape = {**strides, "EVEN_ROWS": even, **shape, "NUM_PLANES": num_planes}
            constants = {**shape, **variant, **weighted, **behind, **blocks}
            self.sizes: tuple[int, ...] = (num_pairs, top_k, num_experts)
            first = run_programs(num_pairs, num_experts * max_loras)
        else:
            shape = {**strides, **shape, "RANK_POW2": power_of_two(rank)}
            variant["HAS_ENABLED"] = adapter_enabled is not None
            constants = {**shape, **variant, **weighted, **behind, "BLOCK_N": config.block_n, "PDL": pdl}
            self.sizes = (num_pairs, top_k, num_experts, max_loras, num_planes)
            first = num_pairs
        grid = (first, num_slices * -(-columns // config.block_n), 1)
        self.launch = Plan(getattr(expand, kernel), grid, constants, (config.num_warps, config.num_stages), pdl, 3)

    def __call__(
        self,
        output: Tensor,
        shrunk: Tensor,
        b: Tensor,
        ids: Tensor,
        mapping: Tensor,
        enabled: Tensor | None,
        schedule: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Launches."""
        weights = ids if weights is None else weights
        if self.sorts and schedule is not None:
            self.launch((output, shrunk, b, schedule, weights), *self.sizes)
        else:
            enabled = ids if enabled is None else enabled
            self.launch((output, shrunk, b, ids, mapping, enabled, weights), *self.sizes)


class AddPlan:
    """The two launches of one projection."""

    def __init__(
        self,
        output: Tensor,
        hidden_states: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        topk_ids: Tensor,
        token_lora_mapping: Tensor,
        adapter_enabled: Tensor | None,
        schedule: Tensor | None,
        topk_weights: Tensor | None,
        num_slices: int,
        shrink_config: LaunchConfig | None = None,
        expand_config: LaunchConfig | None = None,
    ) -> None:
        self.num_pairs = topk_ids.numel()
        self.num_experts, self.max_loras = max(lora_a.shape[1], lora_b.shape[1]), lora_a.shape[0]
        tokens = (topk_ids, token_lora_mapping, adapter_enabled, schedule)
        self.shrink = ShrinkPlan(hidden_states, lora_a, *tokens, self.num_experts, config=shrink_config, clear=False)
        sizes = (self.num_experts, num_slices, self.shrink.split_k, expand_config)
        self.expand = ExpandPlan(output, lora_b, adapter_enabled, topk_weights, *sizes, behind_shrink=True)
        self.shrunk = (self.shrink.split_k, self.num_pairs, lora_a.shape[2])

    def __call__(
        self,
        output: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        mapping: Tensor,
        enabled: Tensor | None,
        schedule: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Launches."""
        if self.shrink.sorts and schedule is None:
            schedule = route(ids, mapping, enabled, self.num_experts, self.max_loras)
        shrunk = x.new_empty(self.shrunk, dtype=torch.float32)
        self.shrink(x, a, shrunk, ids, mapping, enabled, schedule)
        self.expand(output, shrunk, b, ids, mapping, enabled, schedule, weights)


_ADD_PLANS = new_plans()


@on_device
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
    """A shrink and an expand of one projection, looked up and checked as one."""
    tensors = (output, hidden_states, lora_a, lora_b, topk_ids, token_lora_mapping)
    optional = (adapter_enabled, schedule, topk_weights)
    key = (*[(t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors], *map(like, optional), num_slices)
    plan = _ADD_PLANS.get(key)
    if plan is None:
        checks.check_lora_add(*tensors, *optional, num_slices)
        plan = AddPlan(*tensors, *optional, num_slices)
        remember(_ADD_PLANS, key, plan)
    if plan.num_pairs:
        plan(*tensors, *optional)
