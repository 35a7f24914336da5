"""What stands for a weight in a launch: as Triton's own descriptor, in the installed version of Triton, and kept."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

descriptors = pytest.importorskip("triton.tools.tensor_descriptor")


def test_descriptor_is_tritons_own() -> None:
    from torch_lora_moe.descriptors import Address, descriptor

    weight = torch.zeros(3, 20, 64, dtype=torch.bfloat16)[:, :, :48]
    mine = descriptor(weight, weight, [16, 32])
    own = descriptors.TensorDescriptor(weight, [60, 48], [64, 1], [16, 32])
    assert {name: vars(mine)[name] for name in asdict(own)} == {**vars(own)}
    assert set(vars(mine)) == set(vars(own))
    assert descriptor(weight, Address(640), [16, 32]).base.data_ptr() == 640


def test_a_descriptor_is_kept_for_its_address() -> None:
    from torch_lora_moe.plans import Plan

    weight = torch.zeros(20, 64, dtype=torch.bfloat16)
    plan = Plan(None, (1, 1, 1), {}, matrices={1: [16, 32], 3: [16, 64]})
    first = plan._descriptor(1, weight, 640)
    assert plan._descriptor(1, weight, 640) is first
    assert plan._descriptor(3, weight, 640).block_shape == [16, 64]
    assert plan._descriptor(1, weight, 1280).base.data_ptr() == 1280
    assert plan._descriptor(1, weight, 640).base.data_ptr() == 640


def test_a_launch_fuses_products_and_sums() -> None:
    """It says so itself: Triton's default differs from version to version."""
    from torch_lora_moe.plans import Plan

    options = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **given: options.append(given)

    Plan(Kernel(), (1, 1, 1), {}, (2, 3))((torch.zeros(4),))
    assert options == [{"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}]


def test_layers_whose_weights_start_elsewhere_have_plans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy engine takes those that start at a multiple of 16 bytes, each by itself."""
    from torch_lora_moe import layer, plans
    from torch_lora_moe.testing import Case, make_inputs

    monkeypatch.setattr(plans.Plan, "__call__", lambda *launch: None)
    monkeypatch.setattr(layer, "_PLANS", {})
    inputs = make_inputs(Case(num_tokens=40, dtype=torch.bfloat16))
    x, w13, w2, weights, ids, lora, mapping = inputs.args
    own = [w13, w2, lora.gate_up_b, lora.down_b]
    for moved in (None, 0, 1, 2, 3):
        w = list(own)
        if moved is not None:
            w[moved] = torch.empty(own[moved].numel() + 1, dtype=own[moved].dtype)[1:].view(own[moved].shape)
        parts = (lora.gate_up_a, w[2], lora.down_a, w[3], mapping, lora.adapter_enabled)
        for _ in range(2):
            layer.fused_experts(x, w[0], w[1], weights, ids, None, *parts, **inputs.kwargs)
    assert len(layer._PLANS) == 5


def test_programs_share_the_rows_of_long_runs() -> None:
    from torch_lora_moe.config import LaunchConfig, run_pieces
    from torch_lora_moe.launch import ShrinkPlan, run_programs

    def programs(num_tokens: int) -> int:
        x, ids = torch.empty(num_tokens, 64), torch.empty(num_tokens, 2, dtype=torch.int32)
        mapping, a = torch.empty(num_tokens, dtype=torch.int32), torch.empty(2, 8, 32, 64)
        plan = ShrinkPlan(x, a, ids, mapping, None, None, 8, config=LaunchConfig(32, 32, 64, 4, 3))
        assert plan.launches[0].grid[0] == run_programs(2 * num_tokens, 16) * run_pieces(2 * num_tokens, 16, 32)
        return plan.launches[0].grid[0] // run_programs(2 * num_tokens, 16)

    assert programs(8000) > programs(600) > 1


@pytest.mark.parametrize(("num_tokens", "most"), [(500, 396), (4000, 2048)])
def test_few_programs_beside_the_ends_of_products(num_tokens: int, most: int) -> None:
    from torch_lora_moe.launch import ShrinkPlan

    x, ids = torch.empty(num_tokens, 64), torch.empty(num_tokens, 8, dtype=torch.int32)
    tokens = (ids, torch.empty(num_tokens, dtype=torch.int32), None, None)
    plan = ShrinkPlan(x, torch.empty(8, 128, 32, 64), *tokens, 128, in_order=True, first_tiles=100, share=0.6)
    programs = [launch.grid[0] for launch in plan.launches]
    assert len(programs) == 2
    assert max(programs) <= most
    assert (min(programs) == 396) == (most == 396)
    (whole,) = ShrinkPlan(x, torch.empty(8, 128, 32, 64), *tokens, 128, in_order=True).launches
    assert whole.grid[0] > 396


def test_batches_of_all_sizes_share_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is compiled a few times for all batch sizes, not once for each."""
    from torch_lora_moe import layer, plans, schedules
    from torch_lora_moe.checks import FusedArguments

    compiled: dict[str, set[object]] = {}

    def note(plan: plans.Plan, tensors: object, *sizes: float) -> None:
        key = (plan.constants, *plan.options.values(), str(plan.matrices))
        compiled.setdefault(plan.kernel.__name__, set()).add(key)

    monkeypatch.setattr(plans.Plan, "__call__", note)
    monkeypatch.setattr(schedules, "_ROUTE_PLANS", {})
    slots, (hidden, inner, experts, top_k), rank = 8, (256, 128, 16, 4), 16
    w13, w2 = torch.empty(experts, 2 * inner, hidden), torch.empty(experts, hidden, inner)
    shapes = ((2 * rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank))
    lora = [torch.empty(slots, experts, *shape) for shape in shapes]
    for tokens in [*range(1, 200), *range(200, 4096, 13)]:
        x, ids = torch.empty(tokens, hidden), torch.empty(tokens, top_k, dtype=torch.int32)
        mapping = torch.empty(tokens, dtype=torch.int32)
        call = FusedArguments(x, w13, w2, torch.empty(tokens, top_k), ids, None, *lora, mapping)
        layer._plan(call)(call)
    few = {name: compiled.pop(name) for name in ("gate_up_pairs", "down_tokens")}
    assert max(map(len, few.values())) <= 4
    assert {"gate_up_tiles", "down_tiles", "shrink_runs", "scatter_pairs"} <= set(compiled)
    assert max(map(len, compiled.values())) <= 24
