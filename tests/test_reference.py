"""The oracle against a second formulation: merged weights, one dense layer for each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe import reference
from torch_lora_moe.testing import Case, Inputs, error_budget, make_inputs


def merged(weight: Tensor, a: Tensor, b: Tensor, slot: int, halves: int) -> Tensor:
    """``weight + B @ A`` of one slot for all experts, written with einsum over explicit halves."""
    a, b = a[slot].double(), b[slot].double()
    a = a.expand(b.shape[0] if a.shape[0] == 1 else -1, -1, -1).unflatten(1, (halves, -1))
    b = b.expand(a.shape[0] if b.shape[0] == 1 else -1, -1, -1).unflatten(1, (halves, -1))
    return weight.double() + torch.einsum("ehor,ehri->ehoi", b, a).flatten(1, 2)


def layer_by_merged_weights(inputs: Inputs) -> Tensor:
    lora, halves = inputs.lora, inputs.case.num_slices
    assert lora is not None
    out = torch.zeros(inputs.hidden_states.shape, dtype=torch.float64)
    for token, slot in enumerate(inputs.slots):
        w13, w2 = inputs.w13.double(), inputs.w2.double()
        if slot >= 0:
            w13 = merged(inputs.w13, lora.gate_up_a, lora.gate_up_b, slot, halves)
            w2 = merged(inputs.w2, lora.down_a, lora.down_b, slot, 1)
        for k, expert in enumerate(inputs.topk_ids[token].tolist()):
            if 0 <= expert < inputs.case.num_experts:
                gate_up = F.linear(inputs.hidden_states[token].double(), w13[expert])
                inner = gate_up.shape[0] // halves
                h = F.silu(gate_up[:inner]) * (gate_up[inner:] if halves == 2 else 1)
                out[token] += inputs.topk_weights[token, k].double() * F.linear(h, w2[expert])
    return out


def test_oracle_equals_merged_weights() -> None:
    for case in (Case(), Case(shared_outer=True), Case(is_gated=False, rank=5), Case(enabled=(False, True, True))):
        inputs = make_inputs(case)
        torch.testing.assert_close(inputs.oracle(), layer_by_merged_weights(inputs), rtol=1e-6, atol=1e-6)


def test_activations_by_hand() -> None:
    gate, up = torch.tensor([9.0, -2.0], dtype=torch.float64), torch.tensor([-8.0, 3.0], dtype=torch.float64)
    expected = torch.stack(
        [-6 * 7 * torch.sigmoid(gate.new_tensor(1.5 * 7)), 4 * -2 * torch.sigmoid(gate.new_tensor(-3.0))]
    )
    for interleaved, gate_up in ((False, torch.cat([gate, up])), (True, torch.stack([gate, up], 1).flatten())):
        actual = reference.activate(gate_up, "swigluoai", True, interleaved, 1.5, 7.0)
        torch.testing.assert_close(actual, expected)
    assert reference.activate(torch.tensor([-1.0, 3.0]), "relu2", False, False, 0, 0).tolist() == [0, 9]


def test_the_budget_sees_a_dropped_half() -> None:
    """The whole suite leans on this: losing LoRA on the up half is far outside of the budget, in any precision."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_inputs(Case(dtype=dtype, hidden_size=64, intermediate_size=48))
        assert inputs.lora is not None
        assert inputs.lora.gate_up_b is not None
        oracle, worst = inputs.oracle(), error_budget(inputs.oracle(), inputs.oracle(dtype), dtype)
        inputs.lora.gate_up_b[:, :, inputs.case.intermediate_size :] = 0
        error = (inputs.oracle() - oracle).abs()
        assert error.max() > worst[0]
        assert error.square().mean().sqrt() > 2 * worst[1]
