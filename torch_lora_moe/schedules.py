"""The schedule of a batch on a GPU: from tokens to grids and the kernels of route."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_lora_moe import checks, routing
from torch_lora_moe.checks import like
from torch_lora_moe.config import power_of_two
from torch_lora_moe.kernels import route as kernels
from torch_lora_moe.plans import Plan, new_plans, on_device, overlaps, remember
from torch_lora_moe.steps import Run, Steps

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
    given = (topk_ids, token_lora_mapping, adapter_enabled)
    schedule = route_plan(*given, num_experts, max_loras)(*given)
    assert schedule is not None
    return schedule


def route_plan(
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> RoutePlan:
    """The plan of a route, which is checked when it is made."""
    key = (like(topk_ids), like(token_lora_mapping), like(adapter_enabled), num_experts, max_loras)
    plan = _ROUTE_PLANS.get(key)
    if plan is None:
        checks.check_routing(topk_ids, token_lora_mapping, adapter_enabled, num_experts, max_loras)
        mapped = token_lora_mapping is not None and max_loras > 0
        flagged, pdl = mapped and adapter_enabled is not None, overlaps(topk_ids.device)
        plan = RoutePlan(topk_ids.shape, num_experts, max_loras, mapped, flagged, pdl)
        remember(_ROUTE_PLANS, key, plan)
    return plan


class RoutePlan(Steps):
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
        self.sizes, self.shape = (
            (num_pairs, top_k, num_experts, max_loras, most_tiles),
            routing.schedule_shape(num_pairs),
        )
        bins = max(16, power_of_two(num_experts))
        common = {"BINS": bins, "TILE_ROWS": tile_rows, "HAS_MAPPING": mapped, "HAS_ENABLED": flagged, "PDL": pdl}
        columns = 8 if bins <= 1024 else 1
        # whose flags are the bits of one number
        few = flagged and max_loras <= 32
        self.launches: list[Plan] = []
        self.cut: Plan | None = None
        if routing.cuts_runs(num_pairs, num_experts * max_loras):
            chunk = 512 if num_pairs <= 4096 else 1024 if num_pairs <= 65536 else 4096
            block = min(16384, max(1024, power_of_two(num_pairs)))
            runs = {"RUN_ROWS": routing.RUN_ROWS, "CHUNK": chunk, "BLOCK": block, "PDL": pdl}
            options = (16 if block > 8192 else 8, 1)
            self.cut = Plan(kernels.cut_runs, (-(-num_pairs // chunk), 1, 1), runs, options, pdl)
        if num_pairs <= RANKED_PAIRS:
            ks = power_of_two(top_k)
            tokens = min(512, max(64, power_of_two(num_pairs))) // ks
            unroll = min(4, power_of_two(-(-num_tokens // max(tokens, 1))))
            blocks = {"K_POW2": ks, "BLOCK_T": max(tokens, 1), "UNROLL": unroll, "BLOCK_P": 16, "BLOCK_C": columns}
            wide = num_experts * (max_loras + 1) * num_pairs >= 2**31
            grid = (-(-num_pairs // 16) + -(-most_tiles // columns), 1, 1)
            constants = {**common, "FEW_SLOTS": few, "WIDE": wide, **blocks}
            self.launches = [Plan(kernels.route_ranked, grid, constants, dependent=pdl)]
            return
        # few long chunks share few histograms, but each pair meets all others of its chunk
        self.chunk = 128 if num_pairs <= 16384 else 256 if num_pairs <= 131072 else 512
        # a histogram for several chunks: each program of the third launch reads them all
        counted = min(4096, max(512, power_of_two(num_pairs // 64)))
        self.num_chunks, self.num_counted = -(-num_pairs // self.chunk), -(-num_pairs // counted)
        self.bins = bins
        slots = max(32, power_of_two(max_loras + 1))
        order = {"HAS_ENABLED": flagged, "FEW_SLOTS": few, "PDL": pdl, "BINS": slots, "CHUNK": 64}
        order["BLOCK_Q"] = min(4096, max(1024, power_of_two(num_tokens)))
        count = {"BINS": bins, "HAS_MAPPING": mapped, "PDL": pdl, "CHUNK": counted}
        rows = max(1, min(64, 4096 // bins, power_of_two(self.num_counted)))
        others = 32 if self.chunk == 256 else 16
        scatter = {
            **common,
            "CHUNK": self.chunk,
            "COUNTED": counted,
            "BLOCK_Q": others,
            "BLOCK_H": rows,
            "BLOCK_C": columns,
        }
        programs = self.num_chunks + -(-most_tiles // columns)
        self.launches = [
            Plan(kernels.order_tokens, (-(-num_tokens // 64), 1, 1), order, (8, 1), pdl),
            Plan(kernels.count_experts, (self.num_counted, 1, 1), count, (4, 1), pdl),
            Plan(kernels.scatter_pairs, (programs, 1, 1), scatter, (4, 1), pdl),
        ]

    def run(self, run: Run, topk_ids: Tensor, mapping: Tensor | None, enabled: Tensor | None) -> None:
        """The call of the op: the schedule is what it returns."""
        self.fill(run, run.new_result(topk_ids, self.shape, torch.int32), topk_ids, mapping, enabled)

    def fill(
        self, run: Run, schedule: Tensor, topk_ids: Tensor, mapping: Tensor | None, enabled: Tensor | None
    ) -> None:
        """Launches into ``schedule``, of ``shape``."""
        if self.num_pairs == 0:
            schedule.zero_()
            return
        mapping = topk_ids if mapping is None else mapping
        enabled = topk_ids if enabled is None else enabled
        if len(self.launches) == 1:
            run(self.launches[0], (topk_ids, mapping, enabled, schedule), self.num_tokens, *self.sizes)
        else:
            self._scatter(run, schedule, topk_ids, mapping, enabled)
        if self.cut is not None:
            run(self.cut, (schedule,), self.num_pairs)

    def _scatter(self, run: Run, schedule: Tensor, topk_ids: Tensor, mapping: Tensor, enabled: Tensor) -> None:
        order = run.new(topk_ids, (-(-self.num_tokens // 4) * 4,), torch.int32)
        experts = run.new(topk_ids, (self.num_pairs,), torch.int32)
        histograms = run.new(topk_ids, (self.num_counted * self.bins,), torch.int32)
        rank, count, scatter = self.launches
        if self.mapped:
            run(rank, (mapping, enabled, order), self.num_tokens, self.max_loras)
        run(count, (topk_ids, order, experts, histograms), self.num_pairs, self.top_k, self.num_experts)
        tensors = (mapping, enabled, order, experts, histograms, schedule)
        run(scatter, tensors, *self.sizes, self.num_chunks, self.num_counted)


def routed(
    run: Run,
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """A schedule that nothing reads after ``run``."""
    plan = route_plan(topk_ids, token_lora_mapping, adapter_enabled, num_experts, max_loras)
    schedule = run.new(topk_ids, plan.shape, torch.int32)
    plan.fill(run, schedule, topk_ids, token_lora_mapping, adapter_enabled)
    return schedule
