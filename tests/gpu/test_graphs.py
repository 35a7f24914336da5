"""CUDA graphs by hand and through ``mode="reduce-overhead"``: replay follows every change made in place; no syncs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from layers import Layer, make_layer
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe import build_lora_hooks, fused_experts


def fused(layer: Layer) -> Tensor:
    return fused_experts(
        layer.x, layer.w13, layer.w2, layer.weights, layer.ids, layer.lora, layer.mapping, routing_cache={}
    )


def hooked(layer: Layer, ahead: bool = False) -> Tensor:
    hooks = build_lora_hooks(layer.lora, layer.ids, layer.weights, layer.mapping)
    ids, inner = layer.ids.long(), layer.w2.shape[2]
    if ahead:
        hooks.before_gate_up(layer.x)
    cache1 = torch.einsum("mkoh,mh->mko", layer.w13[ids], layer.x)
    hooks.after_gate_up(layer.x, cache1)
    h = F.silu(cache1[..., :inner]) * cache1[..., inner:]
    if ahead:
        hooks.before_down(h.flatten(0, 1))
    cache3 = (torch.einsum("mkhi,mki->mkh", layer.w2[ids], h) * layer.weights[..., None]).to(layer.x.dtype)
    hooks.after_down(h.flatten(0, 1), cache3)
    return cache3.sum(1)


def overlapped(layer: Layer) -> Tensor:
    return hooked(layer, ahead=True)


def changes(layer: Layer) -> list[Callable[[], object]]:
    """Changes in place, from no adapter at all to every token adapted and back."""
    enabled = layer.lora.adapter_enabled
    assert enabled is not None
    other = make_layer(layer.x.shape[0], layer.ids.shape[1], seed=5, odd_ids=False)
    return [
        lambda: layer.mapping.fill_(-1),
        lambda: layer.mapping.copy_(torch.arange(layer.mapping.numel(), device="cuda") % 4),
        lambda: layer.x.copy_(other.x),
        lambda: layer.ids.copy_(other.ids),
        lambda: layer.weights.copy_(other.weights),
        lambda: enabled.fill_(False),
        lambda: enabled.fill_(True),
        lambda: [mine.copy_(theirs) for mine, theirs in zip(layer.lora[:4], other.lora[:4], strict=True)],
        lambda: layer.mapping.fill_(2),
        lambda: layer.mapping.fill_(-1),
    ]


# the plain layer around the hooks gathers a weight for every pair, too much memory for 1,500 tokens
@pytest.mark.parametrize(
    ("function", "tokens"),
    [
        *((fused, n) for n in (1, 9, 400, 1500)),
        *((function, n) for function in (hooked, overlapped) for n in (1, 9, 400)),
    ],
)
def test_captured_by_hand(function: Callable[[Layer], Tensor], tokens: int) -> None:
    layer = make_layer(tokens, odd_ids=False)
    function(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(layer)
    seen = []
    for change in changes(layer):
        change()
        graph.replay()
        assert torch.equal(captured, function(layer))
        seen.append(captured.clone())
    assert sum(not torch.equal(a, b) for a, b in pairwise(seen)) >= 8


@pytest.mark.parametrize("tokens", [2, 300])
def test_reduce_overhead(tokens: int) -> None:
    layer = make_layer(tokens, odd_ids=False)
    compiled = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        compiled(layer)
    for change in changes(layer):
        change()
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(layer), fused(layer))


@pytest.mark.parametrize("tokens", [3, 200, 1500])
def test_no_host_sync(tokens: int) -> None:
    layer = make_layer(tokens, odd_ids=False)
    cache1 = torch.zeros(tokens, 4, 256, dtype=torch.bfloat16, device="cuda")
    fused(layer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(layer)
        hooks = build_lora_hooks(layer.lora, layer.ids, layer.weights, layer.mapping)
        hooks.after_gate_up(layer.x, cache1)
        hooks.before_gate_up(layer.x)
        hooks.after_gate_up(layer.x, cache1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_overlapped_layers_share_memory_safely() -> None:
    """Layer after layer without a sync: what one frees, the next one's second stream may take at once."""
    layers = [make_layer(tokens, odd_ids=False, seed=seed) for seed, tokens in enumerate((300, 400, 350))]
    expected = [hooked(layer) for layer in layers]
    torch.cuda.synchronize()
    results = [overlapped(layer) for _ in range(20) for layer in layers]
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % len(layers)])


def test_another_stream_and_unaligned_inputs() -> None:
    layer = make_layer(30, odd_ids=False)
    expected = fused(layer)
    padded = torch.zeros(30, 257, dtype=torch.bfloat16, device="cuda")
    padded[:, 1:] = layer.x
    shifted = dataclasses.replace(layer, x=padded[:, 1:])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = fused(shifted)
    stream.synchronize()
    assert torch.equal(actual, expected)
