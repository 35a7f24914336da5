"""``lora_shrink``, ``lora_expand_add_``, ``virtual_experts_lora_add`` and the hooks against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe import MoELoRA, build_lora_hooks, reference, virtual_experts_lora_add
from torch_lora_moe.testing import Case, Inputs, assert_within_budget, check_layer, make_inputs

NAN = float("nan")


def expected_add(
    inputs: Inputs, output: Tensor, x: Tensor, a: Tensor, b: Tensor, num_slices: int, weighted: bool, dtype: torch.dtype
) -> Tensor:
    ids, experts = inputs.topk_ids, inputs.case.num_experts
    shrunk = reference.lora_shrink(x, a, ids, inputs.slots, experts, dtype)
    delta = reference.lora_expand(shrunk, b, ids, inputs.slots, experts, num_slices, dtype)
    if weighted:
        delta = delta * inputs.topk_weights.reshape(-1, 1).to(dtype)
    return output.to(dtype) + delta.view(output.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared_outer", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_add(projection: str, weighted: bool, shared_outer: bool, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, shared_outer=shared_outer, enabled=(True, False, True))
    inputs = make_inputs(case)
    assert inputs.lora is not None
    a, b = inputs.lora[:2] if projection == "gate_up" else inputs.lora[2:4]
    num_slices = 2 if projection == "gate_up" else 1
    rows = case.num_tokens * (1 if projection == "gate_up" else case.top_k)
    x = torch.randn(rows, a.shape[3]).to(dtype)
    before = torch.randn(case.num_tokens, case.top_k, b.shape[2]).to(dtype)
    output = before.clone()
    virtual_experts_lora_add(
        output,
        x,
        a,
        b,
        inputs.topk_ids,
        inputs.topk_weights if weighted else None,
        inputs.token_lora_mapping,
        mul_routed_weight=weighted,
        adapter_enabled=inputs.lora.adapter_enabled,
        num_slices=num_slices,
    )
    exact, low = (expected_add(inputs, before, x, a, b, num_slices, weighted, kind) for kind in (torch.float64, dtype))
    assert_within_budget(output, exact, low, dtype)
    untouched = ~adapted_pairs(inputs)
    assert untouched.any()
    assert torch.equal(output[untouched], before[untouched])


def adapted_pairs(inputs: Inputs) -> Tensor:
    known = (inputs.topk_ids >= 0) & (inputs.topk_ids < inputs.case.num_experts)
    return known & (torch.tensor(inputs.slots) >= 0)[:, None]


@pytest.mark.parametrize("split_k", [1, 2, 3, 8, 64])
def test_split_k_planes_add_up(split_k: int) -> None:
    inputs = make_inputs(Case())
    assert inputs.lora is not None
    case, a = inputs.case, inputs.lora.gate_up_a
    tokens = (inputs.topk_ids, inputs.token_lora_mapping, None)
    schedule = torch.ops.lora_moe.route(*tokens, case.num_experts, case.max_loras)
    shrink = torch.ops.lora_moe.lora_shrink
    planes = shrink(inputs.hidden_states, a, *tokens, schedule, case.num_experts, split_k)
    assert torch.equal(planes, shrink(inputs.hidden_states, a, *tokens, None, case.num_experts, split_k))
    assert planes.shape == (split_k, 34, 16)
    exact, low = (
        reference.lora_shrink(inputs.hidden_states, a, inputs.topk_ids, inputs.slots, case.num_experts, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(planes.sum(0), exact, low, torch.float32)
    if 1 < split_k <= 8:
        assert (planes.abs().amax((1, 2)) > 0).all()


def test_strided_output_view() -> None:
    """A slice of a wider buffer, and one with interleaved columns."""
    inputs = make_inputs(Case(is_gated=False))
    assert inputs.lora is not None
    a, b = inputs.lora.gate_up_a, inputs.lora.gate_up_b
    routing = (inputs.topk_ids, None, inputs.token_lora_mapping)
    plain = torch.zeros(17, 2, 24)
    virtual_experts_lora_add(plain, inputs.hidden_states, a, b, *routing)
    wide = torch.full((17, 2, 60), NAN)
    views = (wide[:, :, 6:30], wide[:, :, 12:60:2], torch.full((2, 17, 24), NAN).transpose(0, 1))
    for view in views:
        before = wide.clone()
        view.zero_()
        virtual_experts_lora_add(view, inputs.hidden_states, a, b, *routing)
        assert torch.equal(view, plain)
        view.fill_(NAN)
        assert torch.equal(wide.isnan(), before.isnan())


def test_nothing_of_a_skipped_pair_is_touched() -> None:
    inputs = make_inputs(Case(enabled=(True, False, True)))
    assert inputs.lora is not None
    a, b = inputs.lora.down_a.clone(), inputs.lora.down_b.clone()
    adapted = adapted_pairs(inputs)
    x = torch.randn(34, 24)
    x[~adapted.flatten()] = NAN
    output = torch.randn(17, 2, 40).masked_fill(~adapted[..., None], NAN)
    weights = inputs.topk_weights.masked_fill(~adapted, NAN)
    a[1], b[1] = NAN, NAN
    routing = (inputs.topk_ids, weights, inputs.token_lora_mapping)
    virtual_experts_lora_add(
        output, x, a, b, *routing, mul_routed_weight=True, adapter_enabled=inputs.lora.adapter_enabled
    )
    assert torch.equal(output.isnan().any(-1), ~adapted)


def test_no_tokens() -> None:
    inputs = make_inputs(Case(num_tokens=0))
    assert inputs.lora is not None
    output = torch.empty(0, 2, 48)
    routing = (inputs.topk_ids, inputs.topk_weights, inputs.token_lora_mapping)
    virtual_experts_lora_add(output, inputs.hidden_states, *inputs.lora[:2], *routing, num_slices=2)


def base_layer_with_hooks(inputs: Inputs, flat: bool) -> Tensor:
    """Two plain GEMMs and an activation that know nothing of LoRA, with the hooks in between."""
    case = inputs.case
    assert inputs.lora is not None
    hooks = build_lora_hooks(inputs.lora, inputs.topk_ids, inputs.topk_weights, inputs.token_lora_mapping)
    known = (inputs.topk_ids >= 0) & (inputs.topk_ids < case.num_experts)
    ids = inputs.topk_ids.clamp(0, case.num_experts - 1)
    cache1 = torch.einsum("mkoh,mh->mko", inputs.w13[ids], inputs.hidden_states)
    hooks.after_gate_up(inputs.hidden_states, cache1.view(-1, cache1.shape[2]) if flat else cache1)
    h = F.silu(cache1[..., : case.intermediate_size])
    if case.is_gated:
        h = h * cache1[..., case.intermediate_size :]
    cache3 = torch.einsum("mkhi,mki->mkh", inputs.w2[ids], h) * inputs.topk_weights[..., None]
    hooks.after_down(h.flatten(0, 1), cache3.view(-1, cache3.shape[2]) if flat else cache3)
    return cache3.masked_fill(~known[..., None], 0).sum(1)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "case",
    [Case(), Case(is_gated=False), Case(shared_outer=True), Case(adapted=("down",)), Case(adapted=("gate_up",))],
    ids=["gated", "plain", "shared_outer", "down", "gate_up"],
)
def test_hooks_around_a_foreign_layer(case: Case, flat: bool) -> None:
    inputs = make_inputs(case)
    check_layer(inputs, base_layer_with_hooks(inputs, flat))


def test_hooks_without_router_weight() -> None:
    """A backend that multiplies by the router weight only when it sums."""
    inputs = make_inputs(Case(odd_ids=False))
    assert inputs.lora is not None
    routing = (inputs.topk_ids, inputs.topk_weights, inputs.token_lora_mapping)
    h, weighted = torch.randn(34, 24), torch.zeros(17, 2, 40)
    plain = torch.zeros_like(weighted)
    build_lora_hooks(inputs.lora, *routing).after_down(h, weighted)
    build_lora_hooks(inputs.lora, *routing, mul_routed_weight=False).after_down(h, plain)
    torch.testing.assert_close(plain * inputs.topk_weights[..., None], weighted)


def test_hooks_share_one_schedule() -> None:
    inputs = make_inputs(Case(odd_ids=False))
    lora = MoELoRA(*inputs.lora[:4])  # type: ignore[index]
    hooks = build_lora_hooks(lora, inputs.topk_ids, inputs.topk_weights, inputs.token_lora_mapping)
    hooks.after_gate_up(inputs.hidden_states, torch.zeros(34, 48))
    schedule = hooks.routing_cache["schedule"]
    hooks.after_down(torch.zeros(34, 24), torch.zeros(34, 40))
    assert hooks.routing_cache["schedule"] is schedule
