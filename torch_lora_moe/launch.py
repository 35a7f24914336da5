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
from torch_lora_moe.config import (
    MULTIPROCESSORS,
    LaunchConfig,
    launch_config,
    power_of_two,
    run_pieces,
    shrink_planes,
)
from torch_lora_moe.kernels import expand, shrink
from torch_lora_moe.plans import Plan, new_plans, on_device, overlaps, remember
from torch_lora_moe.schedules import routed
from torch_lora_moe.steps import Run, Steps

# Programs that share the runs of a product; beyond it they take turns, so that unused slots cost nothing.
MOST_RUN_PROGRAMS = 2048
# Of a shrink in two launches of up to so many pairs: it shares the GPU with the ends of products, and fewer programs
# leave those more room.
FEW_PAIRS, MOST_SPLIT_PROGRAMS = 4096, 3 * MULTIPROCESSORS

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
        shape = (split_k, topk_ids.numel(), lora_a.shape[2])
        plan = ShrinkSteps(ShrinkPlan(*tensors, num_experts, split_k), shape, num_experts, lora_a.shape[0])
        remember(_SHRINK_PLANS, key, plan)
    out = plan(*tensors)
    assert out is not None
    return out


class ShrinkSteps(Steps):
    """The call of the op: a route where it sorts and has no schedule, and the shrink."""

    def __init__(self, shrink: ShrinkPlan, shape: tuple[int, int, int], num_experts: int, max_loras: int) -> None:
        self.shrink, self.shape, self.num_experts, self.max_loras = shrink, shape, num_experts, max_loras

    def run(
        self,
        run: Run,
        x: Tensor,
        a: Tensor,
        ids: Tensor,
        mapping: Tensor,
        enabled: Tensor | None,
        schedule: Tensor | None,
    ) -> None:
        """Launches, unless there is nothing to do."""
        out = run.new_result(x, self.shape, torch.float32)
        if ids.numel():
            if self.shrink.sorts and schedule is None:
                schedule = routed(run, ids, mapping, enabled, self.num_experts, self.max_loras)
            self.shrink(run, x, a, out, ids, mapping, enabled, schedule)


def run_programs(num_pairs: int, num_virtual_experts: int) -> int:
    """Programs for the runs of a batch: one each for as many as there can be, up to `MOST_RUN_PROGRAMS`."""
    return min(num_pairs, -(-num_pairs // routing.RUN_ROWS) + num_virtual_experts, MOST_RUN_PROGRAMS)


class ShrinkPlan:
    """The launch of a shrink.

    ``sorts``: whether it reads a schedule; then ``clear``: whether skipped pairs are zeroed, ``in_order``: whether its
    input is, and ``pieces`` programs share the rows of a run. ``early``: all but its input is complete when it starts.
    ``first_tiles``: those of its input that are, too (0: none); sorted pairs then go in two launches, with a ``share``
    of them in the first.
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
        early: bool = False,
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
        constants |= {"BLOCK_R": config.block_n, "BLOCK_K": config.block_k}
        if kernel == "shrink_pairs":
            constants["EARLY"] = early
        constants |= {"SPLIT": first_tiles > 0, "PDL": pdl}
        most = run_programs(num_pairs, num_experts * max_loras) if self.sorts else num_pairs
        options = (config.num_warps, config.num_stages)
        self.launches = []
        splits = first_tiles > 0 and self.sorts
        at_once = MOST_SPLIT_PROGRAMS // pieces if splits and num_pairs <= FEW_PAIRS else most
        for part in (share, 1 - share) if splits else (1.0,):
            # more programs than on average, so that they seldom have to take turns
            runs = min(most, math.ceil(most * (part + 0.125)), max(1, at_once))
            grid = (runs * pieces, -(-rows // config.block_n), self.split_k)
            self.launches.append(Plan(getattr(shrink, kernel), grid, constants, options, pdl, 3))
        pairs_per_row = max(num_pairs // max(hidden_states.shape[0], 1), 1)
        self.sizes = (num_pairs, top_k, pairs_per_row, num_experts, max_loras, first_tiles)

    def __call__(
        self,
        run: Run,
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
        run(self.launches[part], (x, a, out, ids, mapping, enabled, schedule), *sizes)


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
        sizes = (num_experts, num_slices, shrunk.shape[0])
        expand = ExpandPlan(output, lora_b, adapter_enabled, topk_weights, *sizes)
        plan = ExpandSteps(expand, num_experts, lora_b.shape[0])
        remember(_EXPAND_PLANS, key, plan)
    plan(*tensors)


class ExpandSteps(Steps):
    """The call of the op: a route where it sorts and has no schedule, and the expand."""

    def __init__(self, expand: ExpandPlan, num_experts: int, max_loras: int) -> None:
        self.expand, self.num_experts, self.max_loras = expand, num_experts, max_loras

    def run(
        self,
        run: Run,
        output: Tensor,
        shrunk: Tensor,
        b: Tensor,
        ids: Tensor,
        mapping: Tensor,
        enabled: Tensor | None,
        schedule: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Launches, unless there is nothing to do."""
        if ids.numel():
            if self.expand.sorts and schedule is None:
                schedule = routed(run, ids, mapping, enabled, self.num_experts, self.max_loras)
            self.expand(run, output, shrunk, b, ids, mapping, enabled, schedule, weights)


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
        run: Run,
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
            run(self.launch, (output, shrunk, b, schedule, weights), *self.sizes)
        else:
            enabled = ids if enabled is None else enabled
            run(self.launch, (output, shrunk, b, ids, mapping, enabled, weights), *self.sizes)


class AddPlan(Steps):
    """The call of the op: a route where it sorts and has no schedule, and the two launches of one projection."""

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

    def run(
        self,
        run: Run,
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
        """Launches, unless there is nothing to do."""
        if self.num_pairs == 0:
            return
        if self.shrink.sorts and schedule is None:
            schedule = routed(run, ids, mapping, enabled, self.num_experts, self.max_loras)
        shrunk = run.new(x, self.shrunk, torch.float32)
        self.shrink(run, x, a, shrunk, ids, mapping, enabled, schedule)
        self.expand(run, output, shrunk, b, ids, mapping, enabled, schedule, weights)


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
    plan(*tensors, *optional)
