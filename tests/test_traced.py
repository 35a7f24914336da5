"""Calls of the ops as an ahead-of-time package for a GPU holds them: kernels alone, and no copies of what they read."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from torch_lora_moe import MoELoRA, build_lora_hooks, fused_experts, layer, ops, plans  # noqa: E402
from torch_lora_moe.export import _kernels_for_ops  # noqa: E402

EXPERTS, HIDDEN, INNER, TOP_K = 16, 256, 128, 4
# what each kernel writes
MADE = {
    "route_ranked": {"schedule"},
    "order_tokens": {"token_order"},
    "count_experts": {"ordered_experts", "histograms"},
    "scatter_pairs": {"schedule"},
    "cut_runs": {"schedule"},
    "shrink_pairs": {"out"},
    "shrink_streams": {"out"},
    "shrink_runs": {"out"},
    "expand_pairs": {"output"},
    "expand_runs": {"output"},
    "gate_up_tiles": {"out"},
    "down_tiles": {"out"},
    "sum_pairs": {"out"},
    "gate_up_sums": {"sums", "shrunk"},
    "gate_up_pairs": {"out", "next_shrunk"},
    "down_tokens": {"out", "shrunk"},
}


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of which nothing is asked but what it is."""
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda self: driver))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "")
    monkeypatch.setattr(plans, "has_dependent_launch", lambda device: True)
    monkeypatch.setattr(layer, "shared_memory", lambda device: 227 * 1024)


class Block(nn.Module):
    """A layer with the fused op, and what the hooks add around nothing."""

    def __init__(self, slots: int, rank: int) -> None:
        super().__init__()
        e, h, i, r = EXPERTS, HIDDEN, INNER, rank
        shapes = ((slots, e, 2 * r, h), (slots, e, 2 * i, r), (slots, e, r, i), (slots, e, h, r))
        for name, shape in zip(MoELoRA._fields[:4], shapes, strict=True):
            self.register_buffer(name, empty(*shape))
        self.register_buffer("adapter_enabled", empty(slots, dtype=torch.bool))
        self.register_buffer("w13", empty(e, 2 * i, h))
        self.register_buffer("w2", empty(e, h, i))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, mapping: Tensor) -> tuple[Tensor, ...]:
        lora = MoELoRA(*(getattr(self, name) for name in MoELoRA._fields))
        hooks = build_lora_hooks(lora, ids, weights, mapping)
        cache1, cache3 = x.new_zeros(*ids.shape, 2 * INNER), x.new_zeros(*ids.shape, HIDDEN)
        hooks.after_gate_up(x, cache1)
        hooks.after_down(x.new_zeros(ids.numel(), INNER), cache3)
        return fused_experts(x, self.w13, self.w2, weights, ids, lora, mapping), cache1, cache3


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


# nothing sorted, no runs, one launch of route and three, tiles in parts
@pytest.mark.parametrize(
    ("tokens", "slots", "rank", "parts"),
    [(1, 8, 16, 1), (5, 8, 16, 1), (20, 8, 16, 1), (400, 1, 16, 1), (3000, 8, 16, 1), (3000, 64, 64, 4)],
)
def test_graph_holds_kernels_that_change_only_what_they_make(tokens: int, slots: int, rank: int, parts: int) -> None:
    handle = ops.fused_experts
    with FakeTensorMode(), torch.no_grad(), _kernels_for_ops():
        block = Block(slots, rank).eval()
        weights, ids = empty(tokens, TOP_K, dtype=torch.float32), empty(tokens, TOP_K, dtype=torch.int64)
        batch = (empty(tokens, HIDDEN), weights, ids, empty(tokens, dtype=torch.int32))
        program = torch.export.export(block, batch).run_decompositions()
    assert ops.fused_experts is handle
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not any("lora_moe" in str(node.target) for node in calls)
    kernels = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    assert len(kernels) >= 7
    assert max(node.kwargs["kwargs"].get("PARTS", 1) for node in kernels) == parts
    for node in kernels:
        name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
        assert {*node.kwargs["tensors_to_clone"]} == MADE[name], name
        assert node.kwargs["kwargs"]["PDL"] is False
    assert {spec.kind.name for spec in program.graph_signature.output_specs} == {"USER_OUTPUT"}


def test_plans_of_a_trace_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it are there again; a module that it imports first begins without any."""
    monkeypatch.setattr(plans, "_ALL_PLANS", [])
    known = plans.new_plans()
    known["before"] = 1
    with plans.traced_launches():
        assert not known
        late = plans.new_plans()
        known["traced"] = late["traced"] = 2
    assert known == {"before": 1}
    assert not late


def test_an_export_before_any_call_of_an_op() -> None:
    """In a process of its own, where the trace is the first that needs the kernels' modules."""
    script = (
        "import sys\n"
        "from torch_lora_moe.export import _kernels_for_ops\n"
        "assert 'torch_lora_moe.layer' not in sys.modules\n"
        "with _kernels_for_ops():\n"
        "    sys.modules['torch_lora_moe.layer']._PLANS['traced'] = 1\n"
        "assert not sys.modules['torch_lora_moe.layer']._PLANS\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
