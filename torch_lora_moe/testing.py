"""Random inputs and error budgets, for the tests, the benchmark and whoever checks a backend of their own.

Weights are random and differ per adapter, per expert and between gate and up, so that a dropped half or a swapped
index cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_lora_moe import reference
from torch_lora_moe.api import MoELoRA, fused_experts


@dataclass(frozen=True)
class Case:
    """Sizes and variant of one layer; the defaults are a small gated layer in its plainest form."""

    num_tokens: int = 17
    top_k: int = 2
    num_experts: int = 6
    max_loras: int = 3
    rank: int = 8
    hidden_size: int = 40
    intermediate_size: int = 24
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    is_gated: bool = True
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    shared_outer: bool = False
    adapted: tuple[str, ...] = ("gate_up", "down")
    enabled: tuple[bool, ...] | None = None
    enabled_dtype: torch.dtype = torch.bool
    ids_dtype: torch.dtype = torch.int64
    mapping_dtype: torch.dtype = torch.int32
    weights_dtype: torch.dtype = torch.float32
    routed_scaling_factor: float = 1.0
    odd_ids: bool = True
    mapping: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def num_slices(self) -> int:
        """2 when gated, else 1."""
        return 2 if self.is_gated else 1


@dataclass
class Inputs:
    """The tensors of a `Case`; ``args`` and ``kwargs`` are those of ``fused_experts``."""

    case: Case
    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    token_lora_mapping: Tensor
    lora: MoELoRA | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of ``fused_experts``."""
        weights = (self.hidden_states, self.w13, self.w2, self.topk_weights, self.topk_ids)
        return (*weights, self.lora, self.token_lora_mapping)

    @property
    def slots(self) -> list[int]:
        """Each token's effective slot."""
        enabled = self.lora.adapter_enabled if self.lora is not None else None
        return reference.effective_slots(
            self.token_lora_mapping.cpu(),
            None if enabled is None else enabled.cpu(),
            self.case.max_loras,
            self.case.num_tokens,
        )

    def run(self, **changes: Any) -> Tensor:
        """``fused_experts`` on these inputs."""
        return fused_experts(*self.args, **{**self.kwargs, **changes})

    def oracle(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``reference.fused_experts`` on these inputs, computed in ``dtype`` on the CPU."""
        on_cpu = [_cpu(arg) for arg in self.args]
        return reference.fused_experts(*on_cpu, **{k: _cpu(v) for k, v in self.kwargs.items()}, dtype=dtype)


def _cpu(value: Any) -> Any:
    if isinstance(value, MoELoRA):
        return MoELoRA(*(_cpu(part) for part in value))
    return value.cpu() if isinstance(value, Tensor) else value


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Random inputs of ``case``: drawn on the CPU, so every device gets the same, then moved.

    With ``odd_ids`` some expert ids are -1 or beyond the last expert, and some tokens have no slot or one beyond the
    last.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype).to(device)

    experts, hidden, inner = case.num_experts, case.hidden_size, case.intermediate_size
    margin = 1 if case.odd_ids else 0
    ids = integers(-margin, experts + margin, (case.num_tokens, case.top_k), case.ids_dtype)
    mapping = integers(-margin, case.max_loras + margin, (case.num_tokens,), case.mapping_dtype)
    if case.mapping is not None:
        mapping = torch.tensor(case.mapping, dtype=case.mapping_dtype, device=device)
    w13 = _stored(normal(experts, case.num_slices * inner, hidden, scale=hidden**-0.5), case.transposed)
    w2 = _stored(normal(experts, hidden, inner, scale=inner**-0.5), case.transposed)
    weights = torch.rand(case.num_tokens, case.top_k, generator=generator).to(case.weights_dtype).to(device)
    kwargs: dict[str, Any] = {
        "activation": case.activation,
        "is_gated": case.is_gated,
        "interleaved": case.interleaved,
        "routed_scaling_factor": case.routed_scaling_factor,
    }
    if case.bias:
        kwargs["w13_bias"] = normal(experts, case.num_slices * inner)
        kwargs["w2_bias"] = normal(experts, hidden)
    lora = _make_lora(case, normal, device) if case.adapted else None
    return Inputs(case, normal(case.num_tokens, hidden), w13, w2, weights, ids, mapping, lora, kwargs)


def _stored(weight: Tensor, transposed: bool) -> Tensor:
    """The same weight, kept as ``[E, in, out]`` and viewed as ``[E, out, in]`` if ``transposed``."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight


def _make_lora(case: Case, normal: Callable[..., Tensor], device: torch.device | str) -> MoELoRA:
    slots, experts, rank = case.max_loras, case.num_experts, case.rank
    hidden, inner = case.hidden_size, case.intermediate_size
    outer = 1 if case.shared_outer else experts
    gate_up_a = gate_up_b = down_a = down_b = enabled = None
    if "gate_up" in case.adapted:
        gate_up_a = normal(slots, outer, case.num_slices * rank, hidden, scale=hidden**-0.5)
        gate_up_b = normal(slots, experts, case.num_slices * inner, rank, scale=rank**-0.5)
    if "down" in case.adapted:
        down_a = normal(slots, experts, rank, inner, scale=inner**-0.5)
        down_b = normal(slots, outer, hidden, rank, scale=rank**-0.5)
    if case.enabled is not None:
        enabled = torch.tensor(case.enabled, device=device).to(case.enabled_dtype)
    return MoELoRA(gate_up_a, gate_up_b, down_a, down_b, enabled)


def error_budget(oracle: Tensor, low_precision: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest and the root-mean-square error allowed to a kernel that stores ``dtype``.

    Twice what the specification itself loses when run in that precision, plus the rounding band of the result:
    ``2 * (error of low_precision + eps * size of oracle)``, once for the maximum and once for the RMS.
    """
    oracle, error = oracle.double(), low_precision.double() - oracle.double()
    if oracle.numel() == 0:
        return 0.0, 0.0
    eps = torch.finfo(dtype).eps
    worst = 2 * (error.abs().max() + eps * oracle.abs().max())
    rms = 2 * (error.square().mean().sqrt() + eps * oracle.square().mean().sqrt())
    return worst.item(), rms.item()


def assert_within_budget(actual: Tensor, oracle: Tensor, low_precision: Tensor, dtype: torch.dtype) -> None:
    """Raises AssertionError unless ``actual`` is as near to ``oracle`` as `error_budget` allows; NaN never passes."""
    worst, rms = error_budget(oracle, low_precision, dtype)
    assert actual.shape == oracle.shape, f"shape {list(actual.shape)}, expected {list(oracle.shape)}"
    if oracle.numel() == 0:
        return
    error = actual.detach().cpu().double() - oracle.double()
    seen_worst, seen_rms = error.abs().max().item(), error.square().mean().sqrt().item()
    within = seen_worst <= worst and seen_rms <= rms
    assert within, f"max error {seen_worst:.3e} (budget {worst:.3e}), RMS error {seen_rms:.3e} (budget {rms:.3e})"


def check_layer(inputs: Inputs, actual: Tensor) -> None:
    """Asserts that ``actual`` is the layer's output on ``inputs`` within the error budget."""
    assert actual.dtype == inputs.case.dtype
    assert_within_budget(actual, inputs.oracle(), inputs.oracle(inputs.case.dtype), inputs.case.dtype)
