"""Hugging Face Transformers models (5.x) with a LoRA adapter per request.

    pool = AdapterPool(expert_layers(model), max_loras=8, max_lora_rank=16)
    pool.load("support", "path/to/adapter")
    enable(model, pool)
    with use_adapters(model, ["support", None]):
        model.generate(**batch_of_two)

Transformers hands the experts of a layer to a function chosen by name (``ALL_EXPERTS_FUNCTIONS``); ours is registered
as ``lora_moe``. Model keyword arguments do not reach that function, so the slots of a batch's requests wait in a buffer
that the layers share, where ``torch.compile`` and CUDA graphs can see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from torch_lora_moe import reference
from torch_lora_moe.adapters import AdapterPool, DenseLoRA, DenseSpec, ExpertsSpec
from torch_lora_moe.api import MoELoRA, fused_experts, virtual_experts_lora_add

NAME = "lora_moe"


class RequestSlots(nn.Module):
    """The adapter slot of each request of the running batch, shared by all layers of a model."""

    slots: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("slots", torch.full((1,), -1, dtype=torch.int32, device=device), persistent=False)
        self._by_size = {1: self.slots}

    def set(self, slots: Tensor) -> None:
        """Takes the slots of a batch over; batches of one size share one tensor, which CUDA graphs rely on."""
        self.slots = self._by_size.setdefault(slots.shape[0], torch.empty_like(slots))
        self.slots.copy_(slots)

    def per_token(self, num_tokens: int) -> Tensor:
        """Slots of ``num_tokens`` tokens, an equal share of neighbours for each request."""
        requests = self.slots.shape[0]
        if num_tokens % requests:
            raise ValueError(f"names: got {requests} requests for {num_tokens} tokens, expected an equal share each")
        return self.slots.repeat_interleave(num_tokens // requests, output_size=num_tokens)


class LayerBinding(nn.Module):
    """What one MoE layer needs to run with adapters: its slots of the pool and its activation."""

    def __init__(self, lora: MoELoRA, requests: RequestSlots, activation: str, alpha: float, limit: float) -> None:
        super().__init__()
        for name, value in zip(MoELoRA._fields, lora, strict=True):
            self.register_buffer(name, value, persistent=False)
        self.requests = requests
        self.activation, self.alpha, self.limit = activation, alpha, limit

    def lora(self) -> MoELoRA:
        """The stacked adapter matrices of the layer."""
        return MoELoRA(*(getattr(self, name) for name in MoELoRA._fields))


class DenseBinding(nn.Module):
    """What one linear layer needs to run with adapters: a MoE layer of one expert, which every token takes."""

    a: Tensor
    b: Tensor
    adapter_enabled: Tensor

    def __init__(self, lora: DenseLoRA, adapter_enabled: Tensor, requests: RequestSlots) -> None:
        super().__init__()
        for name, value in (("a", lora.a), ("b", lora.b), ("adapter_enabled", adapter_enabled)):
            self.register_buffer(name, value, persistent=False)
        self.requests = requests


def expert_layers(model: nn.Module) -> dict[str, ExpertsSpec]:
    """The MoE layers of a Transformers model that can be served, by module name.

    Raises:
        ValueError: the model has none, or one whose form the ops do not have; the message says which and why.
    """
    specs = {name: _spec(name, module) for name, module in model.named_modules() if _is_experts(module)}
    if not specs:
        raise ValueError(
            f"model: {type(model).__name__} has no experts that Transformers dispatches through its experts interface"
        )
    return specs


def dense_layers(model: nn.Module, names: Sequence[str]) -> dict[str, DenseSpec]:
    """The linear layers and routers outside the experts whose name ends in one of ``names``, by module name.

    Args:
        model: a Transformers model.
        names: last parts of module names, such as ``q_proj``, ``shared_expert.up_proj`` or ``mlp.gate``.

    Raises:
        ValueError: no linear layer or router has one of the names.
    """
    linear = _linear_layers(model)
    found: dict[str, DenseSpec] = {}
    for suffix in names:
        matches = {name: spec for name, spec in linear.items() if name == suffix or name.endswith(f".{suffix}")}
        if not matches:
            raise ValueError(f"names: no linear layer of {type(model).__name__} is named {suffix!r}")
        found |= matches
    return found


def _linear_layers(model: nn.Module) -> dict[str, DenseSpec]:
    """All linear layers and routers by module name."""
    return {
        name: DenseSpec(module.weight.shape[1], module.weight.shape[0])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or _is_router(module)
    }


def _is_router(module: nn.Module) -> bool:
    """Whether a module turns hidden states into experts, its logits a linear layer's."""
    weight = getattr(module, "weight", None)
    return "router" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.dim() == 2


def enable(model: nn.Module, pool: AdapterPool) -> None:
    """Runs the experts of ``model`` through this package, with the adapters of ``pool``.

    Args:
        model: a Transformers model on the pool's device, in the pool's dtype.
        pool: made for ``expert_layers(model)``, and ``dense_layers`` where adapters have more than experts.

    Raises:
        ValueError: the model cannot be served, or the pool was made for another model, device or dtype.
    """
    specs = expert_layers(model)
    if specs != pool.layers:
        raise ValueError("pool: its layers are not those of the model, expected expert_layers(model)")
    linear_layers = _linear_layers(model)
    for name, spec in pool.dense.items():
        if linear_layers.get(name) != spec:
            raise ValueError(
                f"pool: its dense layer {name} is no such linear layer of the model, expected dense_layers"
            )
    parameter = _first_weight(model.get_submodule(next(iter(specs))))
    if parameter.device != pool.device or parameter.dtype != pool.dtype:
        raise ValueError(
            f"pool: got {pool.dtype} on {pool.device}, expected {parameter.dtype} on {parameter.device} as the model"
        )
    requests = RequestSlots(pool.device)
    for name in specs:
        module: Any = model.get_submodule(name)
        activation, alpha, limit = _activation(name, module)
        module.lora_moe = LayerBinding(pool.lora(name), requests, activation, alpha, limit)
    for handle in getattr(model, "lora_moe_handles", ()):
        handle.remove()
    handles: list[Any] = []
    for name in pool.dense:
        linear = model.get_submodule(name)
        linear.lora_moe = DenseBinding(pool.dense_lora(name), pool.adapter_enabled, requests)
        handles.append(RouterPatch(linear) if _is_router(linear) else linear.register_forward_hook(add_dense))
    model.lora_moe_handles = handles  # type: ignore[assignment]
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    model.lora_moe_pool, model.lora_moe_requests = pool, requests  # type: ignore[assignment]


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Gives each request of the batch its adapter, for every ``forward`` or ``generate`` inside.

    Args:
        model: a model that `enable` prepared.
        names: one adapter name, or None, for each request (row of ``input_ids``).

    Raises:
        ValueError: the model is not enabled, there are no names, or more adapters than the pool can hold at once.
        KeyError: an adapter is not known to the pool.
    """
    pool, requests = getattr(model, "lora_moe_pool", None), getattr(model, "lora_moe_requests", None)
    if not isinstance(pool, AdapterPool) or not isinstance(requests, RequestSlots):
        raise ValueError("model: not enabled, call enable(model, pool) first")
    if not names:
        raise ValueError("names: got none, expected one for each request")
    before = requests.slots.clone()
    with pool.using(names) as slots:
        requests.set(slots)
        try:
            yield
        finally:
            requests.set(before)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function that Transformers calls: ``[T, H]`` in and out, ids and weights ``[T, K]``."""
    binding: LayerBinding = self.lora_moe
    w13 = self.gate_up_proj if self.has_gate else self.up_proj
    w2, biases = self.down_proj, (None, None)
    if self.has_bias:
        biases = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias)
    if self.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    return fused_experts(
        hidden_states,
        w13,
        w2,
        top_k_weights.contiguous(),
        top_k_index.contiguous(),
        binding.lora(),
        binding.requests.per_token(hidden_states.shape[0]),
        activation=binding.activation,
        is_gated=self.has_gate,
        w13_bias=biases[0],
        w2_bias=biases[1],
        interleaved=not self.is_concatenated,
        swiglu_alpha=binding.alpha,
        swiglu_limit=binding.limit,
    )


class RouterPatch:
    """Runs a router with its tokens' deltas until it is removed; its logits never leave it, so no hook can add them."""

    def __init__(self, router: nn.Module) -> None:
        self.router, self.forward = router, router.forward
        router.forward = MethodType(routed(self.forward), router)

    def remove(self) -> None:
        """Gives the router its own forward back."""
        self.router.forward = self.forward


class AddToLinear(TorchFunctionMode):
    """Adds ``delta`` to what `torch.nn.functional.linear` returns."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of ``func``."""
        out = func(*args, **(kwargs or {}))
        return out + self.delta.view(out.shape).to(out.dtype) if func is F.linear else out


def routed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a router with each token's delta added to its logits."""

    def run(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states.flatten(0, -2).contiguous()
        delta = _dense_delta(self.lora_moe, x, x.new_zeros(x.shape[0], self.weight.shape[0]))
        with AddToLinear(delta):
            return forward(hidden_states, *args, **kwargs)

    return run


def _dense_delta(binding: Any, x: Tensor, out: Tensor) -> Tensor:
    """``out`` with each token's delta added in place."""
    tokens = x.shape[0]
    virtual_experts_lora_add(
        out.unsqueeze(1),
        x,
        binding.a,
        binding.b,
        torch.zeros(tokens, 1, dtype=torch.int32, device=x.device),
        None,
        binding.requests.per_token(tokens),
        adapter_enabled=binding.adapter_enabled,
    )
    return out


def add_dense(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of a linear layer: adds each token's delta to its output."""
    x = inputs[0].flatten(0, -2).contiguous()
    return _dense_delta(module.lora_moe, x, output.flatten(0, -2)).view(output.shape)


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "_apply_gate"))


def _first_weight(module: Any) -> Tensor:
    weight: Tensor = module.gate_up_proj if module.has_gate else module.up_proj
    return weight


def _spec(name: str, module: Any) -> ExpertsSpec:
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"model: {name} ({type(module).__name__}) has a norm after its experts, which the ops have not"
        )
    weight = _first_weight(module)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"model: {name} ({type(module).__name__}) has {weight.dtype} weights, expected unquantized ones"
        )
    _activation(name, module)
    experts, out_features, in_features = weight.shape
    if module.is_transposed:
        in_features, out_features = out_features, in_features
    inner = out_features // 2 if module.has_gate else out_features
    return ExpertsSpec(
        experts, in_features, inner, bool(module.has_gate), bool(module.has_gate and not module.is_concatenated)
    )


def _activation(name: str, module: Any) -> tuple[str, float, float]:
    """The activation of a layer, found by running the module's own on random input; also alpha and limit of SwiGLU."""
    alpha, limit = float(getattr(module, "alpha", 1.702)), float(getattr(module, "limit", 7.0))
    gated, interleaved = bool(module.has_gate), bool(module.has_gate and not module.is_concatenated)
    probe = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 8
    with torch.no_grad():
        expected = module._apply_gate(probe) if gated else module.act_fn(probe)
        for candidate in ("silu", "gelu", "gelu_tanh", "relu2", *(("swigluoai",) if gated else ())):
            actual = reference.activate(probe, candidate, gated, interleaved, alpha, limit)
            if torch.allclose(actual, expected, rtol=1e-4, atol=1e-5):
                return candidate, alpha, limit
    raise ValueError(f"model: {name} ({type(module).__name__}) has an activation that the ops have not")
