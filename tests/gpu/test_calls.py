"""Calls after the first one, which go to the driver from addresses alone: other tensors, threads, streams, ops."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from layers import Layer, make_layer
from torch import Tensor

from torch_lora_moe import fused_experts, launch, layer, schedules
from torch_lora_moe.steps import Steps

SIZES = [1, 6, 40, 130, 600, 2500]


def fused(weights: Layer) -> Tensor:
    own = (weights.x, weights.w13, weights.w2, weights.weights, weights.ids)
    return fused_experts(*own, weights.lora, weights.mapping)


def from_addresses(kept: dict[Any, Steps]) -> bool:
    return bool(kept) and all(plan._written is not None for plan in kept.values())


def layers_and_results(tokens: int, count: int, **sizes: Any) -> list[tuple[Layer, Tensor]]:
    """Layers of one shape, each with the result of a first call."""
    made = []
    for seed in range(count):
        layer._PLANS.clear()
        weights = make_layer(tokens, seed=seed, **sizes)
        made.append((weights, fused(weights)))
    return made


@pytest.mark.parametrize("sizes", [{}, {"hidden": 1544, "inner": 1096}, {"hidden": 100, "inner": 76}], ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_layers_of_one_shape_take_turns(tokens: int, sizes: dict[str, int]) -> None:
    made = layers_and_results(tokens, 3, **sizes)
    for _ in range(4):
        for weights, expected in made:
            assert torch.equal(fused(weights), expected)
    assert from_addresses(layer._PLANS)


@pytest.mark.parametrize("tokens", SIZES)
def test_tensors_that_move(tokens: int) -> None:
    """What stands where other tensors stood, and what stands elsewhere at each call."""
    (weights, expected), (others, result) = layers_and_results(tokens, 2)
    kept = []
    for turn in range(6):
        for source, wanted in ((weights, expected), (others, result)):
            own = [tensor.clone() for tensor in vars(source).values() if isinstance(tensor, Tensor)]
            lora = type(source.lora)(*(None if part is None else part.clone() for part in source.lora))
            assert torch.equal(fused(Layer(*own, lora)), wanted)
            if turn % 2:
                kept.append((own, lora))
    assert from_addresses(layer._PLANS)


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_threads_and_streams(tokens: int) -> None:
    """Threads that have not touched the GPU before, each with a layer and a stream of its own."""
    made = layers_and_results(tokens, 4)
    torch.cuda.synchronize()
    wrong: list[int] = []

    def run(number: int) -> None:
        weights, expected = made[number]
        try:
            # the first call on the stream that is current anyway
            same = torch.equal(fused(weights), expected)
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [fused(weights) for _ in range(50)]
            torch.cuda.synchronize()
            if not same or not all(torch.equal(result, expected) for result in results):
                wrong.append(number)
        except Exception:
            wrong.append(number)
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("tokens", [1, 6, 600])
def test_other_ops(tokens: int) -> None:
    made = [make_layer(tokens, seed=seed, slots=8, experts=32) for seed in range(2)]
    ops = torch.ops.lora_moe

    def calls(weights: Layer, schedule: Tensor | None) -> list[Tensor]:
        a, b, ids, mapping = weights.lora.gate_up_a, weights.lora.gate_up_b, weights.ids, weights.mapping
        enabled, out = weights.lora.adapter_enabled, torch.zeros(*ids.shape, b.shape[2], device="cuda")  # type: ignore[union-attr]
        out = out.to(weights.x.dtype)
        own = ops.route(ids, mapping, enabled, 32, 8)
        shrunk = ops.lora_shrink(weights.x, a, ids, mapping, enabled, schedule, 32, 2)
        ops.lora_expand_add_(out, shrunk, b, ids, mapping, enabled, schedule, weights.weights, 32, 2)
        added = torch.zeros_like(out)
        ops.lora_add_(added, weights.x, a, b, ids, mapping, enabled, schedule, None, 2)
        return [own, shrunk, out, added]

    for given in (False, True):
        kept = (schedules._ROUTE_PLANS, launch._SHRINK_PLANS, launch._EXPAND_PLANS, launch._ADD_PLANS)
        schedule = [ops.route(w.ids, w.mapping, w.lora.adapter_enabled, 32, 8) if given else None for w in made]
        expected = []
        for weights, order in zip(made, schedule, strict=True):
            for plans in kept:
                plans.clear()
            expected.append(calls(weights, order))
        for _ in range(3):
            for weights, order, wanted in zip(made, schedule, expected, strict=True):
                for result, once in zip(calls(weights, order), wanted, strict=True):
                    assert torch.equal(result, once)
        assert all(map(from_addresses, kept))
