"""Argument checks shared by the public functions and the ops: each failure names the argument, what came, what is due.

Only shapes, dtypes, devices and strides are looked at, never values: reading an id would stall a GPU, so out-of-range
ids are safe instead (their pairs are skipped).
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from torch_lora_moe import routing

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int32, torch.int64)
INT32_LIMIT = 2**31 - 1


class FusedArguments(NamedTuple):
    """The arguments of ``lora_moe::fused_experts`` in schema order, with the schema's defaults."""

    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    schedule: Tensor | None = None
    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None
    token_lora_mapping: Tensor | None = None
    adapter_enabled: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    activation: str = "silu"
    is_gated: bool = True
    interleaved: bool = False
    routed_scaling_factor: float = 1.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @property
    def max_loras(self) -> int:
        """Adapter slots, 0 without LoRA."""
        owner = self.gate_up_a if self.gate_up_a is not None else self.down_a
        return 0 if owner is None else owner.shape[0]

    @property
    def num_slices(self) -> int:
        """Halves of the gate_up output: 2 when gated."""
        return 2 if self.is_gated else 1

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert."""
        return (self.w13.shape[1:].numel() + self.w2.shape[1:].numel()) * self.w13.dtype.itemsize


# Its first fields, the tensors.
NUM_TENSORS = FusedArguments._fields.index("activation")


def _fail(name: str, came: object, expected: str) -> NoReturn:
    raise ValueError(f"{name}: got {came}, expected {expected}")


def _shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        _fail(name, f"shape {list(value.shape)}", f"{meaning} = {list(expected)}")


def _tensor(name: str, value: object, dims: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dim() != dims:
        _fail(name, f"{value.dim()} dimensions (shape {list(value.shape)})", f"{dims}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, expected {names}")
    if value.device != device:
        _fail(name, f"device {value.device}", f"{device}")


def _rows_contiguous(name: str, value: Tensor) -> None:
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        _fail(name, f"strides {list(value.stride())}", "a contiguous last dimension")


def _contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        _fail(name, f"strides {list(value.stride())}", "a contiguous tensor")


def check_routing(
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> None:
    """Checks the arguments of ``lora_moe::route``.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a wrong shape, device or stride, ``top_k`` below 1, or more virtual experts than int32 holds.
    """
    if not isinstance(topk_ids, Tensor):
        raise TypeError(f"topk_ids: got {type(topk_ids).__name__}, expected a tensor")
    device = topk_ids.device
    _tensor("topk_ids", topk_ids, 2, IDS, device)
    _contiguous("topk_ids", topk_ids)
    num_tokens, top_k = topk_ids.shape
    if top_k < 1:
        _fail("topk_ids", f"top_k {top_k}", "at least 1")
    if token_lora_mapping is not None:
        _tensor("token_lora_mapping", token_lora_mapping, 1, IDS, device)
        _shape("token_lora_mapping", token_lora_mapping, (num_tokens,), "[tokens]")
        _contiguous("token_lora_mapping", token_lora_mapping)
    if adapter_enabled is not None:
        _tensor("adapter_enabled", adapter_enabled, 1, (torch.bool, torch.int32), device)
        _shape("adapter_enabled", adapter_enabled, (max_loras,), "[max_loras]")
        _contiguous("adapter_enabled", adapter_enabled)
    if num_experts < 1:
        _fail("num_experts", num_experts, "at least 1")
    if max_loras < 0:
        _fail("max_loras", max_loras, "at least 0")
    if num_experts * (max_loras + 1) > INT32_LIMIT:
        _fail("max_loras", f"{max_loras} slots of {num_experts} experts", "fewer than 2**31 virtual experts")


def check_lora_pair(
    names: tuple[str, str],
    lora_a: Tensor,
    lora_b: Tensor,
    in_features: int,
    out_features: int,
    num_slices: int,
    num_experts: int | None,
    like: Tensor,
) -> int:
    """Checks A ``[L, E or 1, num_slices * R, in]`` against B ``[L, E or 1, out, R]``; returns the number of experts."""
    name_a, name_b = names
    for name, value in ((name_a, lora_a), (name_b, lora_b)):
        _tensor(name, value, 4, (like.dtype,), like.device)
        _contiguous(name, value)
    max_loras, experts_a, rows, columns = lora_a.shape
    experts_b, rank = lora_b.shape[1], lora_b.shape[3]
    if max_loras < 1:
        _fail(name_a, f"{max_loras} slots", "at least 1")
    if rank < 1:
        _fail(name_b, f"rank {rank}", "at least 1")
    if columns != in_features:
        _fail(name_a, f"{columns} input features (shape {list(lora_a.shape)})", f"{in_features}")
    if lora_b.shape[2] != out_features:
        _fail(name_b, f"{lora_b.shape[2]} output features (shape {list(lora_b.shape)})", f"{out_features}")
    if rows != num_slices * rank:
        _fail(name_a, f"{rows} rows (shape {list(lora_a.shape)})", f"{num_slices} * rank {rank} of {name_b}")
    if lora_b.shape[0] != max_loras:
        _fail(name_b, f"{lora_b.shape[0]} slots", f"{max_loras} as in {name_a}")
    experts = max(experts_a, experts_b) if num_experts is None else num_experts
    for name, count in ((name_a, experts_a), (name_b, experts_b)):
        if count not in (1, experts):
            _fail(name, f"{count} experts", f"{experts} or 1")
    return experts


def like(tensor: Tensor | None) -> tuple[object, ...] | None:
    """All of a tensor that a check looks at."""
    if tensor is None:
        return None
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.get_device()


def check_lora_add(
    output: Tensor,
    hidden_states: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    topk_weights: Tensor | None,
    num_slices: int = 1,
) -> None:
    """Checks the arguments of ``lora_moe::lora_add_``.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a wrong shape, device or stride, or sizes of two arguments that do not fit each other.
    """
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: got {type(hidden_states).__name__}, expected a tensor")
    device = hidden_states.device
    _tensor("hidden_states", hidden_states, 2, FLOATS, device)
    _rows_contiguous("hidden_states", hidden_states)
    _tensor("topk_ids", topk_ids, 2, IDS, device)
    num_tokens, top_k = topk_ids.shape
    _tensor("output", output, 3, FLOATS, device)
    if tuple(output.shape[:2]) != (num_tokens, top_k):
        _fail("output", f"shape {list(output.shape)}", f"[tokens, top_k, N] = [{num_tokens}, {top_k}, N]")
    if hidden_states.shape[0] not in (num_tokens, num_tokens * top_k):
        _fail("hidden_states", f"{hidden_states.shape[0]} rows", f"{num_tokens} or {num_tokens * top_k}")
    if num_slices < 1 or output.shape[2] % num_slices:
        _fail("num_slices", num_slices, f"a divisor of the {output.shape[2]} output columns")
    if token_lora_mapping is None:
        raise TypeError("token_lora_mapping: got NoneType, expected a tensor")
    sizes = (hidden_states.shape[1], output.shape[2], num_slices)
    experts = check_lora_pair(("lora_a", "lora_b"), lora_a, lora_b, *sizes, None, hidden_states)
    check_routing(topk_ids, token_lora_mapping, adapter_enabled, experts, lora_a.shape[0])
    if schedule is not None:
        check_schedule(schedule, num_tokens * top_k, device)
    if topk_weights is not None:
        _router_weights(topk_weights, num_tokens, top_k, device)


def _router_weights(topk_weights: Tensor | None, num_tokens: int, top_k: int, device: torch.device) -> None:
    _tensor("topk_weights", topk_weights, 2, FLOATS, device)
    assert topk_weights is not None
    _shape("topk_weights", topk_weights, (num_tokens, top_k), "[tokens, top_k]")
    _contiguous("topk_weights", topk_weights)


def check_schedule(schedule: Tensor, num_pairs: int, device: torch.device) -> None:
    """Checks that ``schedule`` is one of ``lora_moe::route`` for ``num_pairs`` pairs."""
    _tensor("schedule", schedule, 2, (torch.int32,), device)
    _shape(
        "schedule", schedule, (routing.NUM_SCHEDULE_ROWS, num_pairs + 1), f"[{routing.NUM_SCHEDULE_ROWS}, pairs + 1]"
    )
    _contiguous("schedule", schedule)


def check_shrink(
    hidden_states: Tensor,
    lora_a: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    num_experts: int,
    split_k: int = 1,
) -> None:
    """Checks the arguments of ``lora_moe::lora_shrink``; errors as `check_lora_add`."""
    device, dtype = hidden_states.device, hidden_states.dtype
    _tensor("hidden_states", hidden_states, 2, FLOATS, device)
    _rows_contiguous("hidden_states", hidden_states)
    _tensor("lora_a", lora_a, 4, (dtype,), device)
    _contiguous("lora_a", lora_a)
    if lora_a.shape[1] not in (1, num_experts):
        _fail("lora_a", f"{lora_a.shape[1]} experts", f"{num_experts} or 1")
    if lora_a.shape[3] != hidden_states.shape[1]:
        _fail("lora_a", f"{lora_a.shape[3]} input features", f"{hidden_states.shape[1]}")
    check_routing(topk_ids, token_lora_mapping, adapter_enabled, num_experts, lora_a.shape[0])
    num_tokens, top_k = topk_ids.shape
    if hidden_states.shape[0] not in (num_tokens, num_tokens * top_k):
        _fail("hidden_states", f"{hidden_states.shape[0]} rows", f"{num_tokens} or {num_tokens * top_k}")
    if schedule is not None:
        check_schedule(schedule, num_tokens * top_k, device)
    if split_k < 1:
        _fail("split_k", split_k, "at least 1")


def check_expand(
    output: Tensor,
    shrunk: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    topk_weights: Tensor | None,
    num_experts: int,
    num_slices: int = 1,
) -> None:
    """Checks the arguments of ``lora_moe::lora_expand_add_``; errors as `check_lora_add`."""
    device = output.device
    _tensor("output", output, 3, FLOATS, device)
    num_tokens, top_k, out_features = output.shape
    _tensor("lora_b", lora_b, 4, FLOATS, device)
    _contiguous("lora_b", lora_b)
    if lora_b.shape[1] not in (1, num_experts):
        _fail("lora_b", f"{lora_b.shape[1]} experts", f"{num_experts} or 1")
    if lora_b.shape[2] != out_features:
        _fail("lora_b", f"{lora_b.shape[2]} output features", f"{out_features}")
    if num_slices < 1 or out_features % num_slices:
        _fail("num_slices", num_slices, f"a divisor of the {out_features} output columns")
    check_routing(topk_ids, token_lora_mapping, adapter_enabled, num_experts, lora_b.shape[0])
    _shape("topk_ids", topk_ids, (num_tokens, top_k), "[tokens, top_k] of output")
    if schedule is not None:
        check_schedule(schedule, num_tokens * top_k, device)
    _tensor("shrunk", shrunk, 3, (torch.float32,), device)
    expected = (shrunk.shape[0], num_tokens * top_k, num_slices * lora_b.shape[3])
    _shape("shrunk", shrunk, expected, "[split_k, pairs, num_slices * rank]")
    _contiguous("shrunk", shrunk)
    if topk_weights is not None:
        _router_weights(topk_weights, num_tokens, top_k, device)


def check_fused(call: FusedArguments) -> None:
    """Checks the arguments of the whole layer.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a wrong shape, device or stride, an unknown activation, half a LoRA pair, or sizes that do not fit.
    """
    hidden_states, topk_ids = call.hidden_states, call.topk_ids
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: got {type(hidden_states).__name__}, expected a tensor")
    device = hidden_states.device
    _tensor("hidden_states", hidden_states, 2, FLOATS, device)
    _rows_contiguous("hidden_states", hidden_states)
    _check_activation(call)
    _check_weights(call)
    _tensor("topk_ids", topk_ids, 2, IDS, device)
    num_tokens, top_k = topk_ids.shape
    if num_tokens != hidden_states.shape[0]:
        _fail("topk_ids", f"{num_tokens} tokens", f"{hidden_states.shape[0]} as in hidden_states")
    _router_weights(call.topk_weights, num_tokens, top_k, device)
    _check_layer_lora(call)
    max_loras = call.max_loras
    if max_loras and call.token_lora_mapping is None:
        raise TypeError("token_lora_mapping: got NoneType, expected a tensor (lora is given)")
    enabled = call.adapter_enabled if max_loras else None
    check_routing(topk_ids, call.token_lora_mapping, enabled, call.w13.shape[0], max_loras)
    if call.schedule is not None:
        check_schedule(call.schedule, num_tokens * top_k, device)


def _check_activation(call: FusedArguments) -> None:
    if call.activation not in ACTIVATIONS:
        _fail("activation", repr(call.activation), f"one of {', '.join(ACTIVATIONS)}")
    if not call.is_gated and (call.activation == "swigluoai" or call.interleaved):
        _fail("is_gated", False, f"True with {'interleaved=True' if call.interleaved else repr(call.activation)}")


def _check_weights(call: FusedArguments) -> None:
    hidden_size, dtype, device = call.hidden_states.shape[1], call.hidden_states.dtype, call.hidden_states.device
    for name, weight in (("w13", call.w13), ("w2", call.w2)):
        _tensor(name, weight, 3, (dtype,), device)
        if weight.stride(2) != 1 and weight.stride(1) != 1:
            _fail(name, f"strides {list(weight.stride())}", "a contiguous last dimension, or a transposed view of one")
    num_experts, intermediate_size = call.w13.shape[0], call.w2.shape[2]
    gate_up_size = call.num_slices * intermediate_size
    meaning = f"[experts, {call.num_slices} * intermediate of w2, hidden size]"
    _shape("w13", call.w13, (num_experts, gate_up_size, hidden_size), meaning)
    _shape("w2", call.w2, (num_experts, hidden_size, intermediate_size), "[experts of w13, hidden size, intermediate]")
    for name, bias, size in (("w13_bias", call.w13_bias, gate_up_size), ("w2_bias", call.w2_bias, hidden_size)):
        if bias is not None:
            _tensor(name, bias, 2, FLOATS, device)
            _shape(name, bias, (num_experts, size), "[experts, output features]")
            _contiguous(name, bias)


def _check_layer_lora(call: FusedArguments) -> None:
    (num_experts, gate_up_size, hidden_size), intermediate_size = call.w13.shape, call.w2.shape[2]
    pairs = (
        (("gate_up_a", "gate_up_b"), call.gate_up_a, call.gate_up_b, (hidden_size, gate_up_size, call.num_slices)),
        (("down_a", "down_b"), call.down_a, call.down_b, (intermediate_size, hidden_size, 1)),
    )
    for names, lora_a, lora_b, sizes in pairs:
        if lora_a is None and lora_b is None:
            continue
        if lora_a is None or lora_b is None:
            missing, present = names if lora_a is None else names[::-1]
            raise TypeError(f"{missing}: got NoneType, expected a tensor ({present} is given)")
        check_lora_pair(names, lora_a, lora_b, *sizes, num_experts, call.hidden_states)
        if lora_a.shape[0] != call.max_loras:
            _fail(names[0], f"{lora_a.shape[0]} slots", f"{call.max_loras} as in gate_up_a")


def check_segments(seg_indptr: Tensor, req_to_lora: Tensor, num_tokens: int) -> None:
    """Checks the arguments of ``token_lora_mapping_from_segments``; errors as `check_lora_add`."""
    if not isinstance(seg_indptr, Tensor):
        raise TypeError(f"seg_indptr: got {type(seg_indptr).__name__}, expected a tensor")
    _tensor("seg_indptr", seg_indptr, 1, IDS, seg_indptr.device)
    if seg_indptr.shape[0] < 1:
        _fail("seg_indptr", "no entries", "[requests + 1]")
    _tensor("req_to_lora", req_to_lora, 1, IDS, seg_indptr.device)
    _shape("req_to_lora", req_to_lora, (seg_indptr.shape[0] - 1,), "[requests] (one fewer than seg_indptr)")
    if num_tokens < 0:
        _fail("num_tokens", num_tokens, "at least 0")
