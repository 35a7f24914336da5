"""Bad calls: the exact message of each, before anything runs, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_lora_moe import MoELoRA, fused_experts, token_lora_mapping_from_segments, virtual_experts_lora_add
from torch_lora_moe.testing import Case, make_inputs

GOOD = make_inputs(Case())
LORA = GOOD.lora
assert LORA is not None


def changed(**parts: Any) -> MoELoRA:
    assert LORA is not None
    return LORA._replace(**parts)


# The layer: changed arguments -> message. M 17, K 2, E 6, L 3, R 8, H 40, I 24.
LAYER: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"hidden_states": [1]}, TypeError, "hidden_states: got list, expected a tensor"),
    "x dims": (
        {"hidden_states": torch.ones(2, 17, 40)},
        ValueError,
        "hidden_states: got 3 dimensions (shape [2, 17, 40]), expected 2",
    ),
    "x dtype": (
        {"hidden_states": GOOD.hidden_states.double()},
        TypeError,
        "hidden_states: got dtype float64, expected float32 or bfloat16 or float16",
    ),
    "x strides": (
        {"hidden_states": torch.ones(40, 17).t()},
        ValueError,
        "hidden_states: got strides [1, 17], expected a contiguous last dimension",
    ),
    "w13 none": ({"w13": None}, TypeError, "w13: got NoneType, expected a tensor"),
    "w13 dtype": ({"w13": GOOD.w13.half()}, TypeError, "w13: got dtype float16, expected float32"),
    "w13 device": ({"w13": GOOD.w13.to("meta")}, ValueError, "w13: got device meta, expected cpu"),
    "w13 strides": (
        {"w13": torch.ones(6, 48, 80)[:, ::2, ::2].expand(6, 24, 40)},
        ValueError,
        "w13: got strides [3840, 160, 2], expected a contiguous last dimension, or a transposed view of one",
    ),
    "w13 shape": (
        {"w13": torch.ones(6, 50, 40)},
        ValueError,
        "w13: got shape [6, 50, 40], expected [experts, 2 * intermediate of w2, hidden size] = [6, 48, 40]",
    ),
    "not gated": (
        {"is_gated": False, "lora": None},
        ValueError,
        "w13: got shape [6, 48, 40], expected [experts, 1 * intermediate of w2, hidden size] = [6, 24, 40]",
    ),
    "w2 experts": (
        {"w2": torch.ones(5, 40, 24)},
        ValueError,
        "w2: got shape [5, 40, 24], expected [experts of w13, hidden size, intermediate] = [6, 40, 24]",
    ),
    "bias": (
        {"w2_bias": torch.ones(6, 41)},
        ValueError,
        "w2_bias: got shape [6, 41], expected [experts, output features] = [6, 40]",
    ),
    "activation": (
        {"activation": "tanh"},
        ValueError,
        "activation: got 'tanh', expected one of silu, gelu, gelu_tanh, relu2, swigluoai",
    ),
    "ungated swiglu": (
        {"activation": "swigluoai", "is_gated": False},
        ValueError,
        "is_gated: got False, expected True with 'swigluoai'",
    ),
    "ungated interleaved": (
        {"interleaved": True, "is_gated": False},
        ValueError,
        "is_gated: got False, expected True with interleaved=True",
    ),
    "ids dtype": (
        {"topk_ids": GOOD.topk_ids.float()},
        TypeError,
        "topk_ids: got dtype float32, expected int32 or int64",
    ),
    "ids tokens": (
        {"topk_ids": GOOD.topk_ids[:5]},
        ValueError,
        "topk_ids: got 5 tokens, expected 17 as in hidden_states",
    ),
    "top_k 0": (
        {"topk_ids": GOOD.topk_ids[:, :0], "topk_weights": GOOD.topk_weights[:, :0].contiguous()},
        ValueError,
        "topk_ids: got top_k 0, expected at least 1",
    ),
    "ids strides": (
        {"topk_ids": GOOD.topk_ids.t().contiguous().t()},
        ValueError,
        "topk_ids: got strides [1, 17], expected a contiguous tensor",
    ),
    "weights shape": (
        {"topk_weights": torch.ones(17, 3)},
        ValueError,
        "topk_weights: got shape [17, 3], expected [tokens, top_k] = [17, 2]",
    ),
    "mapping missing": (
        {"token_lora_mapping": None},
        TypeError,
        "token_lora_mapping: got NoneType, expected a tensor (lora is given)",
    ),
    "mapping shape": (
        {"token_lora_mapping": torch.zeros(34, dtype=torch.int32)},
        ValueError,
        "token_lora_mapping: got shape [34], expected [tokens] = [17]",
    ),
    "enabled shape": (
        {"lora": changed(adapter_enabled=torch.ones(4, dtype=torch.bool))},
        ValueError,
        "adapter_enabled: got shape [4], expected [max_loras] = [3]",
    ),
    "enabled dtype": (
        {"lora": changed(adapter_enabled=torch.ones(3))},
        TypeError,
        "adapter_enabled: got dtype float32, expected bool or int32",
    ),
    "half a pair": (
        {"lora": changed(down_b=None)},
        TypeError,
        "down_b: got NoneType, expected a tensor (down_a is given)",
    ),
    "A columns": (
        {"lora": changed(gate_up_a=torch.ones(3, 6, 16, 41))},
        ValueError,
        "gate_up_a: got 41 input features (shape [3, 6, 16, 41]), expected 40",
    ),
    "B rows": (
        {"lora": changed(down_b=torch.ones(3, 6, 39, 8))},
        ValueError,
        "down_b: got 39 output features (shape [3, 6, 39, 8]), expected 40",
    ),
    "rank": (
        {"lora": changed(gate_up_b=torch.ones(3, 6, 48, 4))},
        ValueError,
        "gate_up_a: got 16 rows (shape [3, 6, 16, 40]), expected 2 * rank 4 of gate_up_b",
    ),
    "slots of a pair": (
        {"lora": changed(gate_up_b=torch.ones(2, 6, 48, 8))},
        ValueError,
        "gate_up_b: got 2 slots, expected 3 as in gate_up_a",
    ),
    "slots of a layer": (
        {"lora": changed(down_a=torch.ones(2, 6, 8, 24), down_b=torch.ones(2, 6, 40, 8))},
        ValueError,
        "down_a: got 2 slots, expected 3 as in gate_up_a",
    ),
    "experts": (
        {"lora": changed(down_a=torch.ones(3, 5, 8, 24))},
        ValueError,
        "down_a: got 5 experts, expected 6 or 1",
    ),
    "A strides": (
        {"lora": changed(down_a=torch.ones(3, 6, 24, 8).transpose(2, 3))},
        ValueError,
        "down_a: got strides [1152, 192, 1, 8], expected a contiguous tensor",
    ),
}


@pytest.mark.parametrize("cache", [False, True], ids=["op checks", "wrapper checks"])
@pytest.mark.parametrize(("changes", "error", "message"), LAYER.values(), ids=LAYER.keys())
def test_layer(changes: dict[str, Any], error: type[Exception], message: str, cache: bool) -> None:
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "lora", "token_lora_mapping")
    arguments = {**dict(zip(names, GOOD.args, strict=True)), **GOOD.kwargs, **changes}
    if not cache and any(not isinstance(arguments[name], torch.Tensor) for name in names[:5]):
        return  # torch's own dispatcher refuses these
    routing_cache: dict[str, Any] = {}
    with pytest.raises(error) as caught:
        fused_experts(**arguments, routing_cache=routing_cache if cache else None)
    assert str(caught.value) == message
    assert not routing_cache


OUTPUT = torch.zeros(17, 2, 48)
ADD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x none": ({"hidden_states": None}, TypeError, "hidden_states: got NoneType, expected a tensor"),
    "output dims": (
        {"output": torch.zeros(34, 48)},
        ValueError,
        "output: got 2 dimensions (shape [34, 48]), expected 3",
    ),
    "output tokens": (
        {"output": torch.zeros(17, 3, 48)},
        ValueError,
        "output: got shape [17, 3, 48], expected [tokens, top_k, N] = [17, 2, N]",
    ),
    "rows": ({"hidden_states": torch.ones(18, 40)}, ValueError, "hidden_states: got 18 rows, expected 17 or 34"),
    "slices": ({"num_slices": 5}, ValueError, "num_slices: got 5, expected a divisor of the 48 output columns"),
    "columns": (
        {"output": torch.zeros(17, 2, 46)},
        ValueError,
        "lora_b: got 48 output features (shape [3, 6, 48, 8]), expected 46",
    ),
    "mapping none": ({"token_lora_mapping": None}, TypeError, "token_lora_mapping: got NoneType, expected a tensor"),
    "weights none": (
        {"mul_routed_weight": True},
        TypeError,
        "topk_weights: got NoneType, expected a tensor (mul_routed_weight is set)",
    ),
    "experts": ({"lora_a": torch.ones(3, 4, 16, 40)}, ValueError, "lora_a: got 4 experts, expected 6 or 1"),
    "no slots": (
        {"lora_a": torch.ones(0, 6, 16, 40), "lora_b": torch.ones(0, 6, 48, 8)},
        ValueError,
        "lora_a: got 0 slots, expected at least 1",
    ),
    "rank 0": (
        {"lora_a": torch.ones(3, 6, 0, 40), "lora_b": torch.ones(3, 6, 48, 0)},
        ValueError,
        "lora_b: got rank 0, expected at least 1",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), ADD.values(), ids=ADD.keys())
def test_lora_add(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    assert LORA is not None
    arguments: dict[str, Any] = {
        "output": OUTPUT,
        "hidden_states": GOOD.hidden_states,
        "lora_a": LORA.gate_up_a,
        "lora_b": LORA.gate_up_b,
        "topk_ids": GOOD.topk_ids,
        "topk_weights": None,
        "token_lora_mapping": GOOD.token_lora_mapping,
        "num_slices": 2,
    }
    routing_cache: dict[str, Any] = {}
    with pytest.raises(error) as caught:
        virtual_experts_lora_add(**{**arguments, **changes}, routing_cache=routing_cache)
    assert str(caught.value) == message
    assert not routing_cache
    assert not OUTPUT.any()


SCHEDULE = torch.ops.lora_moe.route(GOOD.topk_ids, GOOD.token_lora_mapping, None, 6, 3)
SHRUNK = torch.zeros(1, 34, 16)
TOKENS = (GOOD.topk_ids, GOOD.token_lora_mapping, None)
OPS: dict[str, tuple[Callable[[], Any], str]] = {
    "route experts": (
        lambda: torch.ops.lora_moe.route(GOOD.topk_ids, None, None, 0, 3),
        "num_experts: got 0, expected at least 1",
    ),
    "route slots": (
        lambda: torch.ops.lora_moe.route(GOOD.topk_ids, None, None, 6, -1),
        "max_loras: got -1, expected at least 0",
    ),
    "route limit": (
        lambda: torch.ops.lora_moe.route(GOOD.topk_ids, None, None, 2**16, 2**15),
        "max_loras: got 32768 slots of 65536 experts, expected fewer than 2**31 virtual experts",
    ),
    "shrink schedule": (
        lambda: torch.ops.lora_moe.lora_shrink(GOOD.hidden_states, LORA.gate_up_a, *TOKENS, SCHEDULE[:, 1:], 6),
        "schedule: got shape [9, 34], expected [9, pairs + 1] = [9, 35]",
    ),
    "shrink split": (
        lambda: torch.ops.lora_moe.lora_shrink(GOOD.hidden_states, LORA.gate_up_a, *TOKENS, None, 6, 0),
        "split_k: got 0, expected at least 1",
    ),
    "shrink experts": (
        lambda: torch.ops.lora_moe.lora_shrink(GOOD.hidden_states, LORA.gate_up_a, *TOKENS, None, 7),
        "lora_a: got 6 experts, expected 7 or 1",
    ),
    "shrink rows": (
        lambda: torch.ops.lora_moe.lora_shrink(GOOD.hidden_states[:9], LORA.gate_up_a, *TOKENS, None, 6),
        "hidden_states: got 9 rows, expected 17 or 34",
    ),
    "expand rank": (
        lambda: torch.ops.lora_moe.lora_expand_add_(OUTPUT, SHRUNK, LORA.gate_up_b, *TOKENS, None, None, 6),
        "shrunk: got shape [1, 34, 16], expected [split_k, pairs, num_slices * rank] = [1, 34, 8]",
    ),
    "expand weights": (
        lambda: torch.ops.lora_moe.lora_expand_add_(
            OUTPUT, SHRUNK, LORA.gate_up_b, *TOKENS, None, torch.ones(17, 1), 6, 2
        ),
        "topk_weights: got shape [17, 1], expected [tokens, top_k] = [17, 2]",
    ),
    "segments": (
        lambda: token_lora_mapping_from_segments(torch.tensor([0, 2]), torch.tensor([1, 2]), 2),
        "req_to_lora: got shape [2], expected [requests] (one fewer than seg_indptr) = [1]",
    ),
    "segments length": (
        lambda: token_lora_mapping_from_segments(torch.tensor([0, 2]), torch.tensor([1]), -1),
        "num_tokens: got -1, expected at least 0",
    ),
}


@pytest.mark.parametrize(("call", "message"), OPS.values(), ids=OPS.keys())
def test_direct_op_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        call()
    assert str(caught.value) == message


def test_traced_calls_are_checked_too() -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(17, 41)
        with pytest.raises(ValueError, match=r"w13: got shape \[6, 48, 40\], expected"):
            fused_experts(x, *GOOD.args[1:])
