"""``torch.compile(fullgraph=True)`` with Inductor: equal to eager, and compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from torch_lora_moe import MoELoRA, build_lora_hooks, fused_experts, token_lora_mapping_from_segments
from torch_lora_moe.testing import Case, Inputs, check_layer, make_inputs


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(inputs: Inputs, x: Tensor, weights: Tensor, ids: Tensor, lora: MoELoRA, mapping: Tensor) -> Tensor:
    return fused_experts(x, inputs.w13, inputs.w2, weights, ids, lora, mapping, routing_cache={}, **inputs.kwargs)


def hooked(inputs: Inputs, x: Tensor, weights: Tensor, ids: Tensor, lora: MoELoRA, mapping: Tensor) -> Tensor:
    hooks = build_lora_hooks(lora, ids, weights, mapping)
    cache1 = torch.einsum("mkoh,mh->mko", inputs.w13[ids], x)
    hooks.after_gate_up(x, cache1)
    gate, up = cache1.chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * up
    cache3 = torch.einsum("mkhi,mki->mkh", inputs.w2[ids], h) * weights[..., None]
    hooks.after_down(h.flatten(0, 1), cache3)
    return cache3.sum(1)


def call(function, inputs: Inputs) -> Tensor:  # type: ignore[no-untyped-def]
    weights = (inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)
    return function(inputs, *weights, inputs.lora, inputs.token_lora_mapping)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(activation="swigluoai", interleaved=True, transposed=True, bias=True, enabled=(True, False, True)),
        Case(dtype=torch.bfloat16, is_gated=False, shared_outer=True),
        Case(adapted=("down",), routed_scaling_factor=1.5),
    ],
    ids=["gated", "gpt_oss", "bf16_plain_shared", "down"],
)
def test_compiled_layer_equals_eager(case: Case) -> None:
    inputs = make_inputs(case)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(call(compiled, inputs), call(layer, inputs))


def test_compiled_hooks_match_the_oracle() -> None:
    inputs = make_inputs(Case(odd_ids=False))
    check_layer(inputs, call(torch.compile(hooked, fullgraph=True), inputs))


def test_compiled_segments() -> None:
    compiled = torch.compile(token_lora_mapping_from_segments, fullgraph=True)
    segments = torch.tensor([0, 3, 3, 5]), torch.tensor([2, 7, -1])
    assert compiled(*segments, 7).tolist() == [2, 2, 2, -1, -1, -1, -1]


@pytest.mark.parametrize("function", [layer, hooked])
def test_contents_never_recompile(function) -> None:  # type: ignore[no-untyped-def]
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    inputs = make_inputs(Case(odd_ids=False, enabled=(True, True, True)))
    assert inputs.lora is not None
    call(compiled, inputs)
    assert counter.frame_count == 1

    outputs = []
    for change in ("nothing", "mapping", "enabled", "weights", "ids", "none adapted"):
        if change == "mapping":
            inputs.token_lora_mapping.copy_(inputs.token_lora_mapping.roll(1))
        elif change == "enabled":
            inputs.lora.adapter_enabled[1] = False
        elif change == "weights":
            inputs.lora.gate_up_b.mul_(-2)
        elif change == "ids":
            inputs.topk_ids.copy_(inputs.topk_ids.roll(1, 0))
        elif change == "none adapted":
            inputs.token_lora_mapping.fill_(-1)
        outputs.append(call(compiled, inputs))
        check_layer(inputs, outputs[-1])
    assert counter.frame_count == 1
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))


@pytest.mark.parametrize("function", [layer, hooked])
def test_another_number_of_tokens_compiles_once_more(function) -> None:  # type: ignore[no-untyped-def]
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for tokens in (17, 5, 64, 200, 33):
        inputs = make_inputs(Case(num_tokens=tokens, odd_ids=False))
        check_layer(inputs, call(compiled, inputs))
    assert counter.frame_count <= 2
