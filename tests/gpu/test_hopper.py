"""Large batches on Hopper: both products in CUDA C++ against the oracle, and where they are taken."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layers import Layer, by_adapter, make_layer
from torch import Tensor

from torch_lora_moe import MoELoRA, fused_experts, hopper, layer
from torch_lora_moe.testing import Case, assert_within_budget, check_layer, make_inputs

pytestmark = pytest.mark.skipif(
    not hopper.available(torch.device("cuda", 0)), reason="kernels of compute capability 9.0"
)
NAN = float("nan")


def call(made: Layer) -> Tensor:
    return fused_experts(made.x, made.w13, made.w2, made.weights, made.ids, made.lora, made.mapping)


def check(made: Layer, taken: bool = True) -> Tensor:
    layer._PLANS.clear()
    result, dtype = call(made), made.x.dtype
    (plan,) = layer._PLANS.values()
    assert isinstance(plan, layer.TilePlan)
    assert (plan.tall_gate_up is not None, plan.tall_down is not None) == (taken, taken)
    assert_within_budget(result, by_adapter(made, torch.float64).cpu(), by_adapter(made, dtype).cpu(), dtype)
    # the second call goes to the driver from addresses
    assert torch.equal(call(made), result)
    return result


@pytest.mark.parametrize("rank", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("sizes", [(256, 128), (200, 120), (1032, 1096), (72, 328)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes(rank: int, slots: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    check(make_layer(700, experts=16, slots=slots, rank=rank, hidden=sizes[0], inner=sizes[1], dtype=dtype))


@pytest.mark.parametrize("tokens", [270, 500, 1000, 2100, 9000])
@pytest.mark.parametrize(("slots", "rank"), [(3, 16), (64, 32)])
def test_batches(tokens: int, slots: int, rank: int) -> None:
    check(make_layer(tokens, experts=16, slots=slots, rank=rank))


@pytest.mark.parametrize(
    "kind",
    [
        {"bias": True},
        {"interleaved": True, "bias": True, "activation": "swigluoai"},
        {"is_gated": False, "activation": "relu2", "bias": True},
        {"activation": "gelu", "weights_dtype": torch.bfloat16},
        {"activation": "gelu_tanh", "shared_outer": True},
        {"adapted": ("gate_up",), "routed_scaling_factor": 2.5},
        {"adapted": ("down",), "ids_dtype": torch.int32},
        {"adapted": ()},
    ],
    ids=lambda kind: "_".join(kind),
)
def test_kinds(kind: dict[str, Any]) -> None:
    sizes = {"num_experts": 2, "hidden_size": 200, "intermediate_size": 104}
    inputs = make_inputs(Case(num_tokens=300, dtype=torch.bfloat16, **sizes, **kind), "cuda")
    layer._PLANS.clear()
    check_layer(inputs, inputs.run())
    (plan,) = layer._PLANS.values()
    assert plan.tall_gate_up is not None
    assert plan.tall_down is not None


def test_uneven_batches() -> None:
    """Experts with all pairs, with one, with none; one adapter, none, and those that are disabled."""
    made = make_layer(3000, experts=8, slots=6, odd_ids=False)
    made.ids[:] = 3
    made.ids[5, 0] = 7
    check(made)
    check(dataclasses.replace(made, mapping=torch.full_like(made.mapping, 4)))
    check(dataclasses.replace(made, mapping=torch.full_like(made.mapping, -1)))
    check(dataclasses.replace(made, lora=made.lora._replace(adapter_enabled=torch.zeros(6, device="cuda").bool())))


@pytest.mark.parametrize("rank", [16, 64])
def test_isolation(rank: int) -> None:
    """Tokens of one slot and of none, beside others whose adapters are NaN and infinite."""
    made = make_layer(1200, slots=4, rank=rank)
    clean = call(made)
    parts = [part.clone() for part in made.lora[:4]]  # type: ignore[union-attr]
    for part in parts:
        part[1], part[2], part[3] = NAN, float("inf"), -float("inf")
    result = call(dataclasses.replace(made, lora=MoELoRA(*parts, made.lora.adapter_enabled)))
    own = (made.mapping < 1) | (made.mapping >= 4)
    assert own.sum() > 300
    assert torch.equal(result[own], clean[own])


def test_the_model_of_the_readme() -> None:
    check(make_layer(2000, top_k=8, experts=128, slots=8, hidden=2048, inner=768))


@pytest.mark.parametrize("what", ["inner", "rank", "address"])
def test_what_is_left_to_triton(what: str) -> None:
    sizes: dict[str, Any] = {"inner": {"inner": 100}, "rank": {"rank": 12}}
    made = make_layer(700, **sizes.get(what, {}))
    if what == "address":
        moved = torch.empty(made.x.numel() + 1, dtype=made.x.dtype, device="cuda")[1:].view(made.x.shape)
        made = dataclasses.replace(made, x=moved.copy_(made.x))
    layer._PLANS.clear()
    result = call(made)
    (plan,) = layer._PLANS.values()
    assert plan.tall_gate_up is None
    assert_within_budget(
        result, by_adapter(made, torch.float64).cpu(), by_adapter(made, made.x.dtype).cpu(), made.x.dtype
    )
