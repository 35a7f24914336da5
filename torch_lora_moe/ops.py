"""Every op of the namespace ``lora_moe``: schema, dispatch registration and fake, read from top to bottom.

Torch only. ``api`` calls the handles at the end of this file; backends register here and know nothing of dispatch.
A registration costs host time at every call, so ops are defined and implemented through one ``torch.library.Library``
(about 3 us a call) rather than ``torch.library.custom_op`` (8 to 19 us).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_lora_moe import checks, cpu, native, routing
from torch_lora_moe.checks import FusedArguments

SCHEMAS = {
    "route": (
        "route(Tensor topk_ids, Tensor? token_lora_mapping, Tensor? adapter_enabled, "
        "SymInt num_experts, SymInt max_loras) -> Tensor"
    ),
    "lora_shrink": (
        "lora_shrink(Tensor hidden_states, Tensor lora_a, Tensor topk_ids, Tensor token_lora_mapping, "
        "Tensor? adapter_enabled, Tensor? schedule, SymInt num_experts, SymInt split_k=1) -> Tensor"
    ),
    "lora_expand_add_": (
        "lora_expand_add_(Tensor(a!) output, Tensor shrunk, Tensor lora_b, Tensor topk_ids, "
        "Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, Tensor? topk_weights, "
        "SymInt num_experts, SymInt num_slices=1) -> ()"
    ),
    "lora_add_": (
        "lora_add_(Tensor(a!) output, Tensor hidden_states, Tensor lora_a, Tensor lora_b, Tensor topk_ids, "
        "Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, Tensor? topk_weights, "
        "SymInt num_slices=1) -> ()"
    ),
    "fused_experts": (
        "fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
        "Tensor? schedule=None, Tensor? gate_up_a=None, Tensor? gate_up_b=None, Tensor? down_a=None, "
        "Tensor? down_b=None, Tensor? token_lora_mapping=None, Tensor? adapter_enabled=None, "
        "Tensor? w13_bias=None, Tensor? w2_bias=None, str activation='silu', bool is_gated=True, "
        "bool interleaved=False, float routed_scaling_factor=1.0, float swiglu_alpha=1.702, "
        "float swiglu_limit=7.0) -> Tensor"
    ),
}

native.load_built()
_LIBRARY = torch.library.Library("lora_moe", "FRAGMENT")
# the C++ library may have been loaded first, and has defined them then
_DEFINED = set(torch._C._dispatch_get_all_op_names())
for _name, _schema in SCHEMAS.items():
    if f"lora_moe::{_name}" not in _DEFINED:
        _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
os.environ[native.DEFINED_BY] = str(os.getpid())


def _route_fake(
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    return topk_ids.new_empty(routing.schedule_shape(topk_ids.shape[0] * topk_ids.shape[1]), dtype=torch.int32)


def _shrink_fake(
    hidden_states: Tensor,
    lora_a: Tensor,
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor | None,
    schedule: Tensor | None,
    num_experts: int,
    split_k: int = 1,
) -> Tensor:
    shape = (split_k, topk_ids.shape[0] * topk_ids.shape[1], lora_a.shape[2])
    return hidden_states.new_empty(shape, dtype=torch.float32)


def _in_place_fake(*args: object, **kwargs: object) -> None:
    return None


def _fused_fake(call: FusedArguments) -> Tensor:
    return call.hidden_states.new_empty(call.hidden_states.shape)


def _checked(check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` behind ``check``, both with the op's own arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return run


def _on_cpu(name: str) -> Callable[..., Any]:
    """The CPU kernel of an op: that of the C++ library where it is loaded, else the torch one."""
    torch_kernel = getattr(cpu, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        return native.KERNELS.get(name, torch_kernel)(*args, **kwargs)

    return run


def _layer_on_cpu(call: FusedArguments) -> Tensor:
    out: Tensor = native.KERNELS["fused_experts"](*call) if native.KERNELS else cpu.fused_experts(call)
    return out


def _checked_layer(kernel: Callable[[FusedArguments], Tensor]) -> Callable[..., Tensor]:
    """``kernel`` of the whole layer behind its check."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        call = FusedArguments(*args, **kwargs)
        checks.check_fused(call)
        return kernel(call)

    return run


def cuda_kernel(name: str) -> Callable[..., Any]:
    """The CUDA kernel of an op; imports its module, and Triton with it."""
    kernel: Callable[..., Any] = getattr(importlib.import_module(f"torch_lora_moe.{_KERNELS[name][1]}"), name)
    return kernel


def _on_cuda(name: str) -> Callable[..., Any]:
    """The CUDA kernel of an op, imported at its first call; it checks what it has not seen before."""
    kernel: Callable[..., Any] | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = cuda_kernel(name)
        return kernel(*args, **kwargs)

    return run


# op: (CPU kernel, module of its CUDA kernel, fake)
_KERNELS = {
    "route": (
        _checked(checks.check_routing, _on_cpu("route")),
        "schedules",
        _checked(checks.check_routing, _route_fake),
    ),
    "lora_shrink": (
        _checked(checks.check_shrink, _on_cpu("lora_shrink")),
        "launch",
        _checked(checks.check_shrink, _shrink_fake),
    ),
    "lora_expand_add_": (
        _checked(checks.check_expand, _on_cpu("lora_expand_add_")),
        "launch",
        _checked(checks.check_expand, _in_place_fake),
    ),
    "lora_add_": (
        _checked(checks.check_lora_add, _on_cpu("lora_add_")),
        "launch",
        _checked(checks.check_lora_add, _in_place_fake),
    ),
    "fused_experts": (_checked_layer(_layer_on_cpu), "layer", _checked_layer(_fused_fake)),
}
for _name, (_cpu_kernel, _, _fake) in _KERNELS.items():
    _LIBRARY.impl(_name, _cpu_kernel, "CPU")
    _LIBRARY.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"lora_moe::{_name}", _fake, lib=_LIBRARY)

route = torch.ops.lora_moe.route.default
lora_shrink = torch.ops.lora_moe.lora_shrink.default
lora_expand_add_ = torch.ops.lora_moe.lora_expand_add_.default
lora_add_ = torch.ops.lora_moe.lora_add_.default
fused_experts = torch.ops.lora_moe.fused_experts.default
