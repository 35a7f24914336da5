"""The whole layer on a GPU, LoRA folded into its two products.

One token, or so few that a sort would cost more than it spares, go pair by pair (``token_layer``).
More tokens: route, shrink, the gate_up tiles with LoRA B and the activation (``kernels.gate_up``), shrink, the down
tiles with LoRA B, and the sum over experts (``kernels.down``). Every kernel may start before the one it depends on has
ended, and waits for it where it first reads what that one writes. Long products go in two launches (``split``):
gate_up, gate_up, shrink, down; or with runs gate_up, gate_up, shrink, down, shrink, down, each on tiles of its own.
Where experts have many pairs each, on a Hopper, the two products are those of ``hopper``, in one launch each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_lora_moe import checks, hopper, routing, split
from torch_lora_moe.checks import NUM_TENSORS, FusedArguments, like
from torch_lora_moe.config import (
    LaunchConfig,
    Product,
    TileConfig,
    down_config,
    expected_tiles,
    fitted,
    fitted_shrink,
    gate_up_config,
    layer_shrink_config,
    power_of_two,
    shared_memory,
    streamed_ranks,
    streamed_runs,
)
from torch_lora_moe.kernels import down, gate_up
from torch_lora_moe.launch import ShrinkPlan
from torch_lora_moe.plans import Plan, misalignment, new_plans, on_device, overlaps, remember
from torch_lora_moe.schedules import routed
from torch_lora_moe.split import Launch
from torch_lora_moe.steps import Run
from torch_lora_moe.token_layer import LayerSteps, TokenPlan, weight_strides


def _is_matrix(w: Tensor, block_k: int) -> bool:
    """Whether a tensor descriptor can stand for a weight: rows in steps of 16 bytes, experts one behind the other.

    fp32, which no tensor core multiplies here, comes through pointers.
    """
    size = w.element_size()
    if size != 2:
        return False
    whole = w.stride(2) == 1 and w.stride(0) == w.shape[1] * w.stride(1) and w.stride(1) * size % 16 == 0
    return whole and w.data_ptr() % 16 == 0 and w.shape[2] >= block_k and w.shape[0] * w.shape[1] < 2**31


def _shrink_choice(call: FusedArguments, a: Tensor, sorts: bool) -> tuple[LaunchConfig, int, int]:
    """Configuration, planes and programs for each run of the rank vectors of one projection."""
    num_pairs, num_experts = call.topk_ids.numel(), call.w13.shape[0]
    sizes = (num_pairs, num_experts * call.max_loras, a.shape[2], a.shape[3], sorts)
    config, planes, pieces = layer_shrink_config(*sizes)
    return fitted_shrink(config, a.element_size(), shared_memory(a.device)), planes, pieces


class TileLaunch(NamedTuple):
    """A launch over tiles, in parts of them: the first one, and those that wait (see `split.Launch`)."""

    plan: Plan
    first_tile: int
    waits_from: int


class _Shrink:
    """The rank vectors of one projection inside the layer; ``how``: as for `ShrinkPlan`."""

    def __init__(self, call: FusedArguments, x: Tensor, a: Tensor, sorts: bool, **how: Any) -> None:
        config, planes, pieces = _shrink_choice(call, a, sorts)
        tokens = (call.topk_ids, call.token_lora_mapping, call.adapter_enabled, None)
        how |= {"config": config, "clear": False, "sorts": sorts, "pieces": pieces}
        self.plan = ShrinkPlan(x, a, *tokens, call.w13.shape[0], planes, **how)  # type: ignore[arg-type]
        # a sum of one plane is rounded where it is made, as the product would
        self.dtype = x.dtype if planes == 1 else torch.float32
        self.shape, self.planes = (planes, call.topk_ids.numel(), a.shape[2]), planes

    def __call__(self, run: Run, call: FusedArguments, x: Tensor, a: Tensor, schedule: Tensor | None) -> Tensor:
        shrunk = run.new(x, self.shape, self.dtype)
        self.launch(run, call, x, a, schedule, shrunk)
        return shrunk

    def launch(
        self,
        run: Run,
        call: FusedArguments,
        x: Tensor,
        a: Tensor,
        schedule: Tensor | None,
        shrunk: Tensor,
        part: int = 0,
    ) -> None:
        """One launch into ``shrunk``, the second one of two with ``part`` 1."""
        mapping = call.token_lora_mapping
        assert mapping is not None
        self.plan(run, x, a, shrunk, call.topk_ids, mapping, call.adapter_enabled, schedule, part)


class TilePlan(LayerSteps):
    """The launches of a layer over the tiles of the sorted order."""

    def __init__(self, call: FusedArguments) -> None:
        x, (num_tokens, self.top_k) = call.hidden_states, call.topk_ids.shape
        self.num_pairs, self.num_experts = num_tokens * self.top_k, call.w13.shape[0]
        self.max_loras, pdl = call.max_loras, overlaps(x.device)
        self.rows = routing.expert_tile_rows(self.num_pairs, self.num_experts)
        self.tiles = min(self.num_pairs, self.num_pairs // self.rows + self.num_experts)
        self.hidden, self.inner = x.shape[1], call.w2.shape[2]
        h = x.new_empty(self.num_pairs, self.inner)
        self.has_runs = routing.cuts_runs(self.num_pairs, self.num_experts * self.max_loras)
        # a shrink that goes pair by pair finds its rows by pair
        self.in_order = self.has_runs or call.down_a is None
        self.gate_up_shrink = self.down_shrink = None
        if call.gate_up_a is not None:
            self.gate_up_shrink = _Shrink(call, x, call.gate_up_a, self.has_runs)
        planes = 1 if self.gate_up_shrink is None else self.gate_up_shrink.planes
        down_planes = 1 if call.down_a is None else _shrink_choice(call, call.down_a, self.has_runs)[1]
        early = (self.gate_up_shrink is not None, call.down_a is not None)
        tall_gate_up = hopper.Product(call, x, call.w13, call.gate_up_b, call.w13_bias, False, early[0])
        tall_down = hopper.Product(call, h, call.w2, call.down_b, call.w2_bias, True, early[1])
        self.tall_gate_up = self._tall(tall_gate_up, planes, pdl)
        self.tall_down = self._tall(tall_down, down_planes, pdl)
        first = self._product(call.w13, call.gate_up_b, self.inner, planes, pdl)
        second = self._product(call.w2, call.down_b, self.hidden, down_planes, pdl)
        gate_up_tile, down_tile = self._gate_up_config(call, first), self._down_config(call, second)
        self.used = split.used_tiles(self.num_pairs, self.num_experts, self.rows, self.tiles)
        # down goes in two launches where its rank vectors do, run by run
        self.splits_down = self.has_runs and call.down_a is not None
        gate_up_rounds = split.rounds(first, gate_up_tile, call.num_slices, self.used)
        down_rounds = split.rounds(second, down_tile, 1, self.used) if self.splits_down else None
        splits = pdl and self.tall_gate_up is None and self.tall_down is None
        self.first_tiles = split.first_tiles(splits, gate_up_tile, self.used, gate_up_rounds, down_rounds)
        if call.down_a is not None:
            how = {"first_tiles": self.first_tiles, "share": self.first_tiles / self.used}
            self.down_shrink = _Shrink(call, h, call.down_a, self.has_runs, early=True, in_order=self.in_order, **how)
        self.gate_up = self._gate_up(call, gate_up_tile, planes, pdl)
        self.down = self._down(call, down_tile, down_planes, pdl)
        block = min(1024, max(16, power_of_two(self.hidden)))
        constants = {"TOP_K": self.top_k, "SIZE": self.hidden, "BLOCK": block, "PDL": pdl}
        grid = (num_tokens, -(-self.hidden // block), 1)
        self.sum = Plan(down.sum_pairs, grid, constants, (4, 1), pdl, aligned=3)

    def _tall(self, product: hopper.Product, planes: int, pdl: bool) -> hopper.ProductPlan | None:
        """The launch of a product of experts with many sorted pairs, None where it goes in tiles of this module."""
        many = self.rows == routing.MOST_TILE_ROWS and self.in_order and planes == 1
        if not (many and pdl and hopper.available(product.x.device) and hopper.takes(product)):
            return None
        return hopper.ProductPlan(product, self.num_experts + self.num_pairs // hopper.MOST)

    def _streamed(self, config: TileConfig, b: Tensor | None, slices: int, tma: bool) -> int:
        """Runs on their way at once where LoRA streams, else 0."""
        return streamed_runs(config, slices, b.shape[3]) if tma and b is not None and config.lora_streams else 0

    def _tiles(self, config: TileConfig, b: Tensor | None, planes: int, slices: int, tma: bool) -> dict[str, Any]:
        rank, stream = 0 if b is None else b.shape[3], self._streamed(config, b, slices, tma)
        # fewer than 8 columns of a slot are no vector that a tensor core takes
        ranks = max(8, min(64, config.lora_columns, power_of_two(rank))) if rank else 16
        groups = max(1, config.lora_columns // ranks)
        if stream:
            ranks, groups = streamed_ranks(rank), 1
        return {
            "RANK": rank,
            "NUM_PLANES": planes,
            "SHARED": b is not None and b.shape[1] < self.num_experts,
            "GROUPS": groups,
            "BLOCK_R": ranks,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_TILES": config.group_tiles,
            "PARTS": self.rows // config.block_m,
            "HALVES": config.block_m == 128,
            "HAS_RUNS": self.has_runs,
            "IN_ORDER": self.in_order,
            "PRELOAD": config.lora_preload and 0 < rank <= ranks and not stream,
            "STREAM": stream,
            "LORA_STAGES": 1 if stream else config.lora_stages,
            "TMA": tma,
        }

    def _fitted(self, config: TileConfig, block_n: int, rank: int, w: Tensor) -> TileConfig:
        config = fitted(config, block_n, rank, w.element_size(), shared_memory(w.device))
        # a grid of two dimensions has no room for more
        return config if self._parts(config) < 2**16 else replace(config, group_tiles=8)

    def _parts(self, config: TileConfig) -> int:
        """Those of all tiles."""
        return self.tiles * (self.rows // config.block_m)

    def _grid(self, blocks: int, config: TileConfig, tiles: int) -> tuple[int, int, int]:
        parts = tiles * (self.rows // config.block_m)
        return (blocks, parts, 1) if config.group_tiles == 1 else (blocks * parts, 1, 1)

    def _product(self, w: Tensor, b: Tensor | None, columns: int, planes: int, pdl: bool) -> Product:
        rank = 0 if b is None else b.shape[3]
        streams = pdl and planes == 1 and b is not None and _is_matrix(b.flatten(1, 2), 8)
        tiles = expected_tiles(self.num_pairs, self.num_experts, self.rows)
        size, slots = w.element_size(), max(1, self.max_loras)
        sizes = (self.num_pairs, self.rows, tiles, columns, w.shape[2], size, rank, self.has_runs, slots)
        return Product(*sizes, self.num_pairs / (self.num_experts * slots), streams)

    def _gate_up_config(self, call: FusedArguments, product: Product) -> TileConfig:
        config = gate_up_config(product, call.is_gated)
        return self._fitted(config, config.block_n * call.num_slices, product.rank, call.w13)

    def _down_config(self, call: FusedArguments, product: Product) -> TileConfig:
        config = down_config(product)
        return self._fitted(config, config.block_n, product.rank, call.w2)

    def _launches(
        self,
        kernel: Any,
        config: TileConfig,
        columns: int,
        constants: dict[str, Any],
        launches: list[Launch],
        **how: Any,
    ) -> list[TileLaunch]:
        """Each launch with the first of its tiles and what it waits for, in parts of tiles."""
        plans, parts = [], self.rows // config.block_m
        for tiles, first, waits_from in launches:
            grid = self._grid(-(-columns // config.block_n), config, tiles)
            plan = Plan(kernel, grid, constants, (config.num_warps, config.num_stages), aligned=6, **how)
            plans.append(TileLaunch(plan, first * parts, max(waits_from * parts, -1)))
        return plans

    def _gate_up(self, call: FusedArguments, config: TileConfig, planes: int, pdl: bool) -> list[TileLaunch]:
        w, b = call.w13, call.gate_up_b
        width = config.block_n * (2 if call.interleaved else 1)
        tma = pdl and _is_matrix(w, config.block_k)
        # tall tiles are multiplied by both slices as one, which reads their rows from shared memory half as often
        joint = tma and call.is_gated and not call.interleaved and config.block_m >= 64
        constants = {
            "STRIDE_X": call.hidden_states.stride(0),
            **weight_strides(w),
            "IN": self.hidden,
            "SLICE": self.inner,
            "IS_GATED": call.is_gated,
            "INTERLEAVED": call.interleaved,
            "ACTIVATION": call.activation,
            "HAS_BIAS": call.w13_bias is not None,
            **self._tiles(config, b, planes, call.num_slices, tma),
            "JOINT": joint,
            "EARLY": self.gate_up_shrink is not None,
            "SPLIT": self.first_tiles > 0,
            "PDL": pdl,
        }
        matrices = {1: [*([2] if joint else []), width, config.block_k]} if tma else {}
        if constants["STREAM"]:
            matrices[7] = [config.block_n, constants["BLOCK_R"]]
        launches = split.launches(self.tiles, self.first_tiles, self.used, False)
        how = {"dependent": pdl, "matrices": matrices}
        return self._launches(gate_up.gate_up_tiles, config, self.inner, constants, launches, **how)

    def _down(self, call: FusedArguments, config: TileConfig, planes: int, pdl: bool) -> list[TileLaunch]:
        w, b = call.w2, call.down_b
        tma = pdl and _is_matrix(w, config.block_k)
        # what a tensor descriptor can stand for: at least one block, rows in steps of 16 bytes
        fits = self.num_pairs >= config.block_m and self.inner * w.element_size() % 16 == 0
        h_tma = tma and self.in_order and fits
        shape = self._tiles(config, b, planes, 1, tma)
        constants = {
            **weight_strides(w),
            "IN": self.inner,
            "OUT": self.hidden,
            "HAS_BIAS": call.w2_bias is not None,
            **shape,
            "H_TMA": h_tma,
            "SPLIT": self.first_tiles > 0,
            "PDL": pdl,
        }
        matrices = {1: [config.block_n, config.block_k]} if tma else {}
        if h_tma:
            matrices[8] = [config.block_m, config.block_k]
        if constants["STREAM"]:
            matrices[9] = [config.block_n, constants["BLOCK_R"]]
        if self.splits_down:
            launches = split.launches(self.tiles, self.first_tiles, self.used, True)
        else:
            launches = [Launch(self.tiles, 0, self.first_tiles or -1)]
        how = {"dependent": pdl, "matrices": matrices}
        return self._launches(down.down_tiles, config, self.hidden, constants, launches, **how)

    def run(self, run: Run, call: FusedArguments) -> None:
        """Makes the launches of the layer."""
        x, ids, schedule = call.hidden_states, call.topk_ids, call.schedule
        if schedule is None:
            enabled = call.adapter_enabled if self.max_loras else None
            schedule = routed(run, ids, call.token_lora_mapping, enabled, self.num_experts, self.max_loras)
        h = run.new(x, (self.num_pairs, self.inner))
        y = run.new(x, (self.num_pairs, self.hidden))
        out = run.new_result(x, x.shape)
        shrunk, b = y, call.w13
        if self.gate_up_shrink is not None and call.gate_up_a is not None and call.gate_up_b is not None:
            shrunk, b = self.gate_up_shrink(run, call, x, call.gate_up_a, schedule), call.gate_up_b
        bias = call.w13 if call.w13_bias is None else call.w13_bias
        activation = (call.swiglu_alpha, call.swiglu_limit)
        if self.tall_gate_up is not None:
            tensors = (x, call.w13, h, shrunk, b, bias, call.topk_weights, schedule)
            run(self.tall_gate_up, tensors, self.num_pairs, *activation)
        else:
            sizes = (self.num_pairs, self.top_k, self.num_experts, *activation)
            for launch, *tiles in self.gate_up:
                run(launch, (x, call.w13, bias, h, shrunk, b, schedule, b), *sizes, *tiles)
        shrunk, b = h, call.w2
        if self.down_shrink is not None and call.down_a is not None and call.down_b is not None:
            shrunk, b = self.down_shrink(run, call, h, call.down_a, schedule), call.down_b
        bias = call.w2 if call.w2_bias is None else call.w2_bias
        if self.tall_down is not None:
            tensors = (h, call.w2, y, shrunk, b, bias, call.topk_weights, schedule)
            run(self.tall_down, tensors, self.num_pairs, *activation)
        else:
            tensors = (h, call.w2, bias, y, shrunk, b, schedule, call.topk_weights, h, b)  # type: ignore[assignment]
            for part, (launch, *tiles) in enumerate(self.down):
                if part and self.down_shrink is not None and call.down_a is not None:
                    self.down_shrink.launch(run, call, h, call.down_a, schedule, shrunk, part)
                run(launch, tensors, self.num_pairs, self.num_experts, *tiles)
        run(self.sum, (y, ids, out), call.routed_scaling_factor, self.num_experts)


class EmptyPlan:
    """No token, nothing to launch."""

    def __init__(self, call: FusedArguments) -> None:
        pass

    def __call__(self, call: FusedArguments) -> Tensor:
        """An empty result."""
        return torch.empty_like(call.hidden_states, memory_format=torch.contiguous_format)


def _plan(call: FusedArguments) -> TilePlan | TokenPlan | EmptyPlan:
    num_tokens, top_k = call.topk_ids.shape
    if num_tokens == 0:
        return EmptyPlan(call)
    sorts = routing.layer_sorts(num_tokens, top_k, call.w13.shape[0], call.expert_bytes)
    return TilePlan(call) if sorts else TokenPlan(call)


_PLANS = new_plans()


@on_device
def fused_experts(*args: object, **kwargs: object) -> Tensor:
    """The whole layer with LoRA on both projections."""
    call = FusedArguments(*args, **kwargs)  # type: ignore[arg-type]
    # what does not start at a multiple of 16 bytes cannot come through the copy engine, nor in copies of 16 bytes
    copied = [w for w in (call.hidden_states, call.w13, call.w2, call.gate_up_b, call.down_b) if w is not None]
    key = (misalignment(*copied), *map(like, call[:NUM_TENSORS]), *call[NUM_TENSORS:])  # type: ignore[arg-type]
    plan = _PLANS.get(key)
    if plan is None:
        checks.check_fused(call)
        plan = _plan(call)
        remember(_PLANS, key, plan)
    return plan(call)
