"""Virtual experts against a loop over adapters, on the sixteen configurations of the original system's test.

The weights differ per adapter, per expert and between gate and up: with one constant for all, a dropped half or a
swapped slot would go unseen.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe.testing import Case, Inputs, check_layer, make_inputs


def one_adapter_at_a_time(inputs: Inputs) -> Tensor:
    """For each adapter its tokens, for each expert its pairs: the loop that virtual experts replace."""
    case, lora, kwargs = inputs.case, inputs.lora, inputs.kwargs
    assert lora is not None
    inner, rank = case.intermediate_size, case.rank
    out = torch.zeros_like(inputs.hidden_states)
    for slot, expert in itertools.product(range(-1, case.max_loras), range(case.num_experts)):
        token, k = torch.where((inputs.topk_ids == expert) & (inputs.token_lora_mapping == slot)[:, None])
        x = inputs.hidden_states[token]
        gate_up = F.linear(x, inputs.w13[expert], kwargs["w13_bias"][expert])
        if slot >= 0:
            a, b = lora.gate_up_a[slot, expert], lora.gate_up_b[slot, expert]
            gate_up[:, :inner] += x @ a[:rank].T @ b[:inner].T
            gate_up[:, inner:] += x @ a[rank:].T @ b[inner:].T
        h = F.silu(gate_up[:, :inner]) * gate_up[:, inner:]
        y = F.linear(h, inputs.w2[expert], kwargs["w2_bias"][expert])
        if slot >= 0:
            y = y + h @ lora.down_a[slot, expert].T @ lora.down_b[slot, expert].T
        out.index_add_(0, token, y * inputs.topk_weights[token, k, None])
    return out


@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [8, 20])
@pytest.mark.parametrize("rank", [8, 16])
def test_parity(tokens: int, top_k: int, experts: int, rank: int) -> None:
    case = Case(
        num_tokens=tokens,
        top_k=top_k,
        num_experts=experts,
        rank=rank,
        max_loras=2,
        hidden_size=512,
        intermediate_size=1024,
        bias=True,
        odd_ids=False,
    )
    inputs = make_inputs(case)
    actual = inputs.run()
    torch.testing.assert_close(actual, one_adapter_at_a_time(inputs), rtol=1e-5, atol=2e-5)
    if tokens == 32:  # the float64 oracle takes seconds at this size
        check_layer(inputs, actual)
