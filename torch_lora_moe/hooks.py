"""LoRA for a MoE backend that is not ours: hooks between its two GEMMs, and work beside them on a second stream."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torch_lora_moe import ops, routing
from torch_lora_moe.api import MoELoRA, virtual_experts_lora_add
from torch_lora_moe.config import shrink_planes
from torch_lora_moe.routing import RoutingCache


@functools.cache
def _side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """The stream that works beside the stream ``main``; it goes first where both have blocks to place."""
    return torch.cuda.Stream(device, priority=-1)


class LoRAHooks:
    """Adds LoRA to a MoE backend that is not ours, between its two GEMMs; made by `build_lora_hooks`."""

    def __init__(
        self,
        lora: MoELoRA,
        topk_ids: Tensor,
        topk_weights: Tensor,
        token_lora_mapping: Tensor,
        mul_routed_weight: bool = True,
    ) -> None:
        self.lora = lora
        self.topk_ids = topk_ids
        self.topk_weights = topk_weights
        self.token_lora_mapping = token_lora_mapping
        self.mul_routed_weight = mul_routed_weight
        self.routing_cache: RoutingCache = {}
        self._started: dict[str, Tensor] = {}

    def before_gate_up(self, hidden_states: Tensor) -> None:
        """Optional, right before the first GEMM is launched: does what LoRA can do without its output beside it.

        On a GPU, and for batches long enough to gain by it, the schedule and the rank vectors are made on a stream of
        their own while the GEMM runs; elsewhere this does nothing. `after_gate_up` must follow on the same stream: it
        waits for them, and a CUDA graph cannot be captured around work that nobody waits for.

        Args:
            hidden_states: what `after_gate_up` will get, unchanged until then.
        """
        self._start("gate_up", hidden_states, self.lora.gate_up_a, self.lora.gate_up_b)

    def after_gate_up(self, hidden_states: Tensor, gate_up_output: Tensor) -> None:
        """Adds the gate_up delta; call it after the first GEMM, before the activation.

        Args:
            hidden_states: ``[M, H]`` or ``[M * K, H]``, the unquantized input of the layer.
            gate_up_output: ``[M, K, G * I]`` or ``[M * K, G * I]``, gate columns first, changed in place.
        """
        a, b = self.lora.gate_up_a, self.lora.gate_up_b
        if a is not None and b is not None:
            slices = max(a.shape[-2] // max(b.shape[-1], 1), 1)
            self._add("gate_up", hidden_states, gate_up_output, a, b, slices, False)

    def before_down(self, intermediate: Tensor) -> None:
        """As `before_gate_up`, right before the second GEMM; `after_down` must follow.

        Args:
            intermediate: what `after_down` will get, unchanged until then.
        """
        self._start("down", intermediate, self.lora.down_a, self.lora.down_b)

    def after_down(self, intermediate: Tensor, down_output: Tensor) -> None:
        """Adds the down delta; call it after the second GEMM, before the sum over experts.

        Args:
            intermediate: ``[M * K, I]``, the unquantized activations.
            down_output: ``[M, K, H]`` or ``[M * K, H]``, changed in place. It must already carry the router weight if
                the hooks were built with ``mul_routed_weight`` (the default).
        """
        a, b = self.lora.down_a, self.lora.down_b
        if a is not None and b is not None:
            self._add("down", intermediate, down_output, a, b, 1, self.mul_routed_weight)

    def _start(self, projection: str, x: Tensor, a: Tensor | None, b: Tensor | None) -> None:
        if a is None or b is None or torch.compiler.is_compiling() or not x.is_cuda:
            return
        tokens = (self.topk_ids, self.token_lora_mapping, self.lora.adapter_enabled)
        num_pairs, num_experts = self.topk_ids.numel(), max(a.shape[1], b.shape[1])
        if not routing.lora_sorts(num_pairs, num_experts * a.shape[0]):
            return
        main = torch.cuda.current_stream(x.device)
        side = _side_stream(x.device, main.cuda_stream)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            schedule = routing.cached_schedule(self.routing_cache, ops.route, *tokens, num_experts, a.shape[0])
            planes = shrink_planes(num_pairs, x.shape[1], True)
            self._started[projection] = ops.lora_shrink(x, a, *tokens, schedule, num_experts, planes)

    def _add(
        self, projection: str, x: Tensor, output: Tensor, a: Tensor, b: Tensor, num_slices: int, weighted: bool
    ) -> None:
        if output.dim() == 2:
            output = output.unflatten(0, self.topk_ids.shape)
        shrunk = self._started.pop(projection, None)
        if shrunk is not None:
            self._finish(shrunk, output, b, max(a.shape[1], b.shape[1]), num_slices, weighted)
            return
        virtual_experts_lora_add(
            output,
            x,
            a,
            b,
            self.topk_ids,
            self.topk_weights,
            self.token_lora_mapping,
            mul_routed_weight=weighted,
            adapter_enabled=self.lora.adapter_enabled,
            num_slices=num_slices,
            routing_cache=self.routing_cache,
        )

    def _finish(
        self, shrunk: Tensor, output: Tensor, b: Tensor, num_experts: int, num_slices: int, weighted: bool
    ) -> None:
        """Waits for what was started and adds it."""
        main, schedule = torch.cuda.current_stream(output.device), self.routing_cache["schedule"]
        main.wait_stream(_side_stream(output.device, main.cuda_stream))
        if not torch.cuda.is_current_stream_capturing():
            # under capture the next fork orders the reuse of their memory; in between others may use the side stream
            shrunk.record_stream(main)
            schedule.record_stream(main)
        tokens = (self.topk_ids, self.token_lora_mapping, self.lora.adapter_enabled)
        weights = self.topk_weights if weighted else None
        ops.lora_expand_add_(output, shrunk, b, *tokens, schedule, weights, num_experts, num_slices)


def build_lora_hooks(
    lora: MoELoRA,
    topk_ids: Tensor,
    topk_weights: Tensor,
    token_lora_mapping: Tensor,
    *,
    mul_routed_weight: bool = True,
) -> LoRAHooks:
    """Hooks that inject LoRA into any MoE backend (quantized ones too), for one layer call.

    Args:
        lora: adapter weights of the layer.
        topk_ids: ``[M, K]`` int32 or int64 expert ids.
        topk_weights: ``[M, K]`` router weights.
        token_lora_mapping: ``[M]`` int32 or int64 adapter slot of each token; outside ``[0, L)`` means no adapter.
        mul_routed_weight: the backend's second GEMM multiplies by the router weight, so the down delta must too.

    Returns:
        an object with ``after_gate_up(x, cache1)`` and ``after_down(h, cache3)``, which share one schedule, and the
        optional ``before_gate_up(x)`` and ``before_down(h)``, which start LoRA's work while the backend's GEMMs run.
    """
    return LoRAHooks(lora, topk_ids, topk_weights, token_lora_mapping, mul_routed_weight)
