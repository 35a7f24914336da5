"""``torch.library.opcheck``, all four tests, for every op over all variants it can see, dynamic shapes included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import opcheck

from torch_lora_moe import MoELoRA, routing
from torch_lora_moe.testing import Case, Inputs, make_inputs

ops = torch.ops.lora_moe


def schedule_of(inputs: Inputs) -> Tensor:
    return ops.route(*route_args(inputs))


def route_args(inputs: Inputs) -> tuple[object, ...]:
    case, enabled = inputs.case, inputs.lora.adapter_enabled if inputs.lora is not None else None
    return inputs.topk_ids, inputs.token_lora_mapping, enabled, case.num_experts, case.max_loras


def test_route(lora_variant: Case) -> None:
    inputs = make_inputs(lora_variant)
    opcheck(ops.route.default, route_args(inputs))
    opcheck(ops.route.default, (inputs.topk_ids, None, None, lora_variant.num_experts, 0))


def test_lora_shrink(lora_variant: Case) -> None:
    inputs = make_inputs(lora_variant)
    lora = inputs.lora or MoELoRA(None, None, None, None)
    tokens = (inputs.topk_ids, inputs.token_lora_mapping, lora.adapter_enabled)
    for a, rows in ((lora.gate_up_a, lora_variant.num_tokens), (lora.down_a, inputs.topk_ids.numel())):
        if a is not None:
            x = torch.randn(rows, a.shape[3]).to(lora_variant.dtype)
            for schedule, split_k in ((None, 1), (schedule_of(inputs), 4)):
                opcheck(ops.lora_shrink.default, (x, a, *tokens, schedule, lora_variant.num_experts, split_k))


def test_lora_expand_add_(lora_variant: Case) -> None:
    inputs = make_inputs(lora_variant)
    lora = inputs.lora or MoELoRA(None, None, None, None)
    tokens = (inputs.topk_ids, inputs.token_lora_mapping, lora.adapter_enabled)
    # each way to pass a tensor with each of the others, if not all at once
    ways = (
        ((None, None), (schedule_of(inputs), inputs.topk_weights)),
        ((None, inputs.topk_weights), (schedule_of(inputs), None)),
    )
    for b, num_slices, given in ((lora.gate_up_b, lora_variant.num_slices, ways[0]), (lora.down_b, 1, ways[1])):
        if b is not None:
            shrunk = torch.randn(2, inputs.topk_ids.numel(), num_slices * lora_variant.rank)
            wide = torch.randn(lora_variant.num_tokens, lora_variant.top_k, b.shape[2] + 6).to(lora_variant.dtype)
            outputs = wide[:, :, 2:-4], wide[:, :, 2:-4].contiguous()
            for output, (schedule, weights) in zip(outputs, given, strict=True):
                args = (output, shrunk, b, *tokens, schedule, weights, lora_variant.num_experts, num_slices)
                opcheck(ops.lora_expand_add_.default, args)


def test_lora_add_(lora_variant: Case) -> None:
    inputs = make_inputs(lora_variant)
    lora = inputs.lora or MoELoRA(None, None, None, None)
    tokens = (inputs.topk_ids, inputs.token_lora_mapping, lora.adapter_enabled)
    if lora.gate_up_a is not None:
        output = torch.randn(*inputs.topk_ids.shape, lora.gate_up_b.shape[2]).to(lora_variant.dtype)
        args = (output, inputs.hidden_states, lora.gate_up_a, lora.gate_up_b, *tokens)
        opcheck(ops.lora_add_.default, (*args, None, None, lora_variant.num_slices))
        opcheck(ops.lora_add_.default, (*args, schedule_of(inputs), inputs.topk_weights, lora_variant.num_slices))


def test_fused_experts(variant: Case) -> None:
    inputs = make_inputs(variant)
    x, w13, w2, weights, ids, lora, mapping = inputs.args
    *parts, enabled = lora or (None,) * 5
    for schedule in (None, schedule_of(inputs) if lora is not None else None):
        args = (x, w13, w2, weights, ids, schedule, *parts, mapping, enabled)
        opcheck(ops.fused_experts.default, args, inputs.kwargs)


def test_meta_tensors_give_shapes(variant: Case) -> None:
    """The fakes also serve plain meta tensors: shape, dtype and strides of the real result."""
    inputs = make_inputs(variant, "cpu")
    meta = make_inputs(variant, "meta") if variant.mapping is None and variant.enabled is None else None
    if meta is None:
        return
    real = inputs.run()
    fake = meta.run()
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert ops.route(*route_args(meta)).shape == routing.schedule_shape(inputs.topk_ids.numel())
