"""The schedule of a batch on a GPU: from tokens to grids and the kernels of route."""

from __future__ import annotations

from typing import Any

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
        self.num_tokens, self.top_k = shape
        self.num_pairs, self.num_experts, self.max_loras = shape.numel(), num_experts, max_loras
        self.mapped, self.pdl = mapped, pdl
        tile_rows = routing.expert_tile_rows(self.num_pairs, num_experts)
        self.most_tiles = min(self.num_pairs, self.num_pairs // tile_rows + num_experts)
        self.sizes = (self.num_pairs, self.top_k, num_experts, max_loras, self.most_tiles)
        self.shape = routing.schedule_shape(self.num_pairs)
        self.bins = max(16, power_of_two(num_experts))
        common = {"BINS": self.bins, "TILE_ROWS": tile_rows, "HAS_MAPPING": mapped, "HAS_ENABLED": flagged, "PDL": pdl}
        # flags that are the bits of one number
        few = {"FEW_SLOTS": flagged and max_loras <= 32}
        many = self.num_pairs > RANKED_PAIRS
        self.launches = self._by_chunks(common, few) if many else [self._ranked(common, few)]
        self.cut = self._cut() if routing.cuts_runs(self.num_pairs, num_experts * max_loras) else None

    def _columns(self) -> int:
        """Tile columns of a program that fills them."""
        return 8 if self.bins <= 1024 else 1

    def _ranked(self, common: dict[str, Any], few: dict[str, Any]) -> Plan:
        slots = power_of_two(self.top_k)
        tokens = max(1, min(512, max(64, power_of_two(self.num_pairs))) // slots)
        unroll = min(4, power_of_two(-(-self.num_tokens // tokens)))
        wide = self.num_experts * (self.max_loras + 1) * self.num_pairs >= 2**31
        blocks = {"K_POW2": slots, "BLOCK_T": tokens, "UNROLL": unroll, "BLOCK_P": 16, "BLOCK_C": self._columns()}
        grid = (-(-self.num_pairs // 16) + -(-self.most_tiles // self._columns()), 1, 1)
        return Plan(kernels.route_ranked, grid, {**common, **few, "WIDE": wide, **blocks}, dependent=self.pdl)

    def _by_chunks(self, common: dict[str, Any], few: dict[str, Any]) -> list[Plan]:
        # few long chunks share few histograms, but each pair meets all others of its chunk
        chunk = self.chunk = 128 if self.num_pairs <= 16384 else 256 if self.num_pairs <= 131072 else 512
        # a histogram for several chunks: each program of the third launch reads them all
        counted = min(4096, max(512, power_of_two(self.num_pairs // 64)))
        self.num_chunks, self.num_counted = -(-self.num_pairs // chunk), -(-self.num_pairs // counted)
        slots, tokens = max(32, power_of_two(self.max_loras + 1)), min(4096, max(1024, power_of_two(self.num_tokens)))
        order = {"HAS_ENABLED": common["HAS_ENABLED"], **few, "PDL": self.pdl}
        order |= {"BINS": slots, "CHUNK": 64, "BLOCK_Q": tokens}
        count = {"BINS": self.bins, "HAS_MAPPING": self.mapped, "PDL": self.pdl, "CHUNK": counted}
        rows = max(1, min(64, 4096 // self.bins, power_of_two(self.num_counted)))
        scatter = {**common, "CHUNK": chunk, "COUNTED": counted, "BLOCK_Q": 32 if chunk == 256 else 16}
        scatter |= {"BLOCK_H": rows, "BLOCK_C": self._columns()}
        programs = self.num_chunks + -(-self.most_tiles // self._columns())
        return [
            Plan(kernels.order_tokens, (-(-self.num_tokens // 64), 1, 1), order, (8, 1), self.pdl),
            Plan(kernels.count_experts, (self.num_counted, 1, 1), count, (4, 1), self.pdl),
            Plan(kernels.scatter_pairs, (programs, 1, 1), scatter, (4, 1), self.pdl),
        ]

    def _cut(self) -> Plan:
        """The launch that finds the runs."""
        chunk = 512 if self.num_pairs <= 4096 else 1024 if self.num_pairs <= 65536 else 4096
        block = min(16384, max(1024, power_of_two(self.num_pairs)))
        runs = {"RUN_ROWS": routing.RUN_ROWS, "CHUNK": chunk, "BLOCK": block, "PDL": self.pdl}
        options = (16 if block > 8192 else 8, 1)
        return Plan(kernels.cut_runs, (-(-self.num_pairs // chunk), 1, 1), runs, options, self.pdl)

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
