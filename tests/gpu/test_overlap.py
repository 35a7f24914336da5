"""Kernels that start before the one before them has ended read nothing that it has yet to write.

From one graph, whose buffers hold what the replay before left there; never filled in between, which would part the
kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from layers import Layer, make_layer
from torch import Tensor

from torch_lora_moe import MoELoRA, config, fused_experts, hopper, layer, routing, split, token_layer

pytestmark = pytest.mark.skipif(
    not config.has_dependent_launch(torch.device("cuda")), reason="each kernel starts when the one before has ended"
)

QWEN3 = {"top_k": 8, "experts": 128, "hidden": 2048, "inner": 768}
SMALL = {"top_k": 6, "experts": 64, "hidden": 1024, "inner": 704}


@pytest.fixture(autouse=True)
def _nothing_is_filled() -> Iterator[None]:
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def adapted(lora: MoELoRA, which: str) -> MoELoRA | None:
    """The adapters of one projection, of both or of none."""
    gate_up_a, gate_up_b, down_a, down_b, enabled = lora
    if which == "none":
        return None
    if which == "gate_up":
        return MoELoRA(gate_up_a, gate_up_b, None, None, enabled)
    return MoELoRA(None, None, down_a, down_b, enabled) if which == "down" else lora


@pytest.mark.parametrize(
    ("tokens", "slots", "rank", "sizes", "which"),
    [
        (8, 8, 16, QWEN3, "both"),
        (32, 8, 64, QWEN3, "both"),
        (32, 8, 16, QWEN3, "down"),
        (32, 8, 16, QWEN3, "none"),
        (128, 8, 16, QWEN3, "both"),
        (256, 32, 64, QWEN3, "both"),
        (512, 8, 16, QWEN3, "gate_up"),
        (512, 8, 16, QWEN3, "down"),
        (512, 8, 16, QWEN3, "none"),
        (1000, 4, 24, QWEN3, "both"),
        (5000, 8, 16, QWEN3, "both"),
        (60, 8, 16, SMALL, "both"),
        (2000, 3, 64, SMALL, "both"),
    ],
)
def test_replays_of_changing_batches(
    tokens: int, slots: int, rank: int, sizes: dict[str, int], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_layer(tokens, slots=slots, rank=rank, **sizes)
    call, batches = caller(weights, which), [batch(weights, seed) for seed in range(5)]
    monkeypatch.setattr(hopper, "available", lambda device: False)
    layer._PLANS.clear()
    with monkeypatch.context() as one_launch:
        one_launch.setattr(split, "first_tiles", lambda *sizes: 0)
        expected = []
        for tensors in batches:
            load(weights, tensors)
            expected.append(call())
    layer._PLANS.clear()
    replay = captured(call)
    (plan,) = layer._PLANS.values()
    assert plan.first_tiles > 0
    for _ in range(20):
        for tensors, wanted in zip(batches, expected, strict=True):
            load(weights, tensors)
            assert torch.equal(replay(), wanted)
    layer._PLANS.clear()


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize(
    ("rank", "sizes", "which"),
    [(16, QWEN3, "both"), (64, QWEN3, "both"), (128, SMALL, "both"), (16, QWEN3, "gate_up"), (64, SMALL, "down")],
)
def test_replays_of_changing_few_tokens(
    tokens: int, rank: int, sizes: dict[str, int], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers in a graph, the second on what the first has made: pair by pair, as one that waits for each kernel."""
    weights = make_layer(tokens, slots=5, rank=rank, **sizes)
    once, batches = caller(weights, which), [batch(weights, seed) for seed in range(5)]
    monkeypatch.setattr(routing, "layer_sorts", lambda *sizes: False)

    def call() -> Tensor:
        first = once()
        return caller(dataclasses.replace(weights, x=first / first.abs().amax().clamp(min=1)), which)()

    layer._PLANS.clear()
    with monkeypatch.context() as apart:
        apart.setattr(token_layer, "overlaps", lambda device: False)
        expected = []
        for tensors in batches:
            load(weights, tensors)
            expected.append(call())
    layer._PLANS.clear()
    replay = captured(call)
    assert all(isinstance(plan, token_layer.TokenPlan) for plan in layer._PLANS.values())
    for _ in range(20):
        for tensors, wanted in zip(batches, expected, strict=True):
            load(weights, tensors)
            assert torch.equal(replay(), wanted)
    layer._PLANS.clear()


@pytest.mark.skipif(not hopper.available(torch.device("cuda", 0)), reason="kernels of compute capability 9.0")
@pytest.mark.parametrize(
    ("tokens", "rank", "sizes", "which"),
    [
        (1000, 24, QWEN3, "both"),
        (4000, 16, QWEN3, "both"),
        (4000, 16, QWEN3, "gate_up"),
        (2000, 64, SMALL, "down"),
        (2000, 16, SMALL, "none"),
    ],
)
def test_replays_of_changing_large_batches(tokens: int, rank: int, sizes: dict[str, int], which: str) -> None:
    weights = make_layer(tokens, slots=5, rank=rank, **sizes)
    call, batches = caller(weights, which), [batch(weights, seed) for seed in range(5)]
    expected = []
    for tensors in batches:
        load(weights, tensors)
        expected.append(call())
        # nothing overlaps where the GPU has come to rest
        torch.cuda.synchronize()
    replay = captured(call)
    for _ in range(10):
        for tensors, wanted in zip(batches, expected, strict=True):
            load(weights, tensors)
            assert torch.equal(replay(), wanted)


def caller(weights: Layer, which: str) -> Callable[[], Tensor]:
    """A call of the layer with the adapters of some projections."""
    lora = adapted(weights.lora, which)
    mapping = None if lora is None else weights.mapping
    return lambda: fused_experts(weights.x, weights.w13, weights.w2, weights.weights, weights.ids, lora, mapping)


def batch(weights: Layer, seed: int) -> tuple[Tensor, ...]:
    """Other tokens, routes and slots; in some batches only a few experts, one slot, or hardly a route at all."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(weights.x.shape, generator=generator, device="cuda").to(weights.x.dtype)
    experts, slots = weights.w13.shape[0], weights.lora.down_a.shape[0]  # type: ignore[union-attr]
    ids = torch.rand(len(x), experts, generator=generator, device="cuda").topk(weights.ids.shape[1]).indices.int()
    mapping = torch.randint(-1, slots, (len(x),), generator=generator, device="cuda", dtype=torch.int32)
    if seed == 2:
        ids = torch.where(ids < experts // 2, ids, -1)
    if seed == 3:
        ids = torch.where(torch.arange(len(x), device="cuda")[:, None] < 3, ids, experts)
    return x, ids, mapping.clamp(max=0) if seed == 4 else mapping


def load(weights: Layer, tensors: tuple[Tensor, ...]) -> None:
    for target, values in zip((weights.x, weights.ids, weights.mapping), tensors, strict=True):
        target.copy_(values)


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` from a graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
