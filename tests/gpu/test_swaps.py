"""The pool on a GPU: slots are written beside the batches, and in order with those that use them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_lora_moe import AdapterPool, fused_experts
from torch_lora_moe.adapters import Adapter, ExpertsLoRA, ExpertsSpec

LAYER, SPEC, TOKENS = "experts", ExpertsSpec(8, 512, 256), 1500
SIZES = {"max_lora_rank": 16, "dtype": torch.bfloat16, "device": "cuda"}


def adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((8, 32, 512), (8, 512, 16), (8, 16, 256), (8, 512, 16))
    return Adapter({LAYER: ExpertsLoRA(*(torch.randn(shape, generator=generator) * 0.1 for shape in shapes))})


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    x, w13, w2 = (
        (torch.randn(shape, generator=generator, device="cuda") * 0.1).bfloat16()
        for shape in ((TOKENS, 512), (8, 512, 512), (8, 512, 256))
    )
    ids = torch.randint(0, 8, (TOKENS, 2), generator=generator, device="cuda")
    return x, w13, w2, torch.ones(TOKENS, 2, device="cuda"), ids


def alone(batch: tuple[Tensor, ...], seed: int) -> Tensor:
    pool = AdapterPool({LAYER: SPEC}, max_loras=1, **SIZES)
    pool.load("it", adapter(seed))
    with pool.using(["it"] * TOKENS) as mapping:
        return fused_experts(*batch, pool.lora(LAYER), mapping)


def test_swapping_between_batches_that_nobody_waits_for(batch: tuple[Tensor, ...]) -> None:
    """Five adapters take turns in two slots; no batch sees half of one, or another's."""
    expected = [alone(batch, seed) for seed in range(5)]
    pool = AdapterPool({LAYER: SPEC}, max_loras=2, **SIZES)
    for seed in range(5):
        pool.add(str(seed), adapter(seed))
    order = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    results = []
    for seed in order:
        with pool.using([str(seed)] * TOKENS) as mapping:
            results.append(fused_experts(*batch, pool.lora(LAYER), mapping))
    for seed, result in zip(order, results, strict=True):
        assert torch.equal(result, expected[seed])


def test_loading_while_a_graph_decodes(batch: tuple[Tensor, ...]) -> None:
    """Replays with one adapter stay as they are while others come and go in the other slot."""
    expected = alone(batch, 0)
    pool = AdapterPool({LAYER: SPEC}, max_loras=2, **SIZES)
    pool.load("0", adapter(0), pin=True)
    mapping = pool.token_lora_mapping(["0"] * TOKENS)
    fused_experts(*batch, pool.lora(LAYER), mapping)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_experts(*batch, pool.lora(LAYER), mapping)
    for seed in range(1, 5):
        pool.load(str(seed), adapter(seed))
        for _ in range(5):
            graph.replay()
        assert torch.equal(out, expected)
        mapping.copy_(pool.token_lora_mapping([str(seed)] * TOKENS))
        graph.replay()
        assert torch.equal(out, alone(batch, seed))
        mapping.copy_(pool.token_lora_mapping(["0"] * TOKENS))


def test_notes_of_uses_do_not_pile_up(batch: tuple[Tensor, ...]) -> None:
    """A slot that is never given away keeps one event a stream, however many batches use it."""
    pool = AdapterPool({LAYER: SPEC}, max_loras=1, **SIZES)
    pool.load("0", adapter(0))
    for _ in range(50):
        with pool.using(["0"] * 3):
            pass
    assert len(pool._transfers._released[0]) == 1


def test_unloaded_adapter_is_gone_for_later_batches(batch: tuple[Tensor, ...]) -> None:
    pool = AdapterPool({LAYER: SPEC}, max_loras=1, **SIZES)
    pool.load("0", adapter(0))
    mapping = pool.token_lora_mapping(["0"] * TOKENS)
    pool.unload("0")
    out = fused_experts(*batch, pool.lora(LAYER), mapping)
    assert torch.equal(out, fused_experts(*batch))
