"""The pool of adapter slots: what is loaded is what a batch gets, and a failure changes nothing."""

from __future__ import annotations

import pytest
import torch

from torch_lora_moe import fused_experts
from torch_lora_moe.adapters import Adapter, AdapterPool, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.testing import Case, assert_within_budget, make_inputs

SPEC = ExpertsSpec(num_experts=6, hidden_size=40, intermediate_size=24)


def adapter(rank: int, seed: int, parts: str = "both") -> Adapter:
    inputs = make_inputs(Case(rank=rank, max_loras=1, seed=seed))
    assert inputs.lora is not None
    lora = ExpertsLoRA(*(part[0] for part in inputs.lora[:4] if part is not None))
    if parts == "down":
        lora = lora._replace(gate_up_a=None, gate_up_b=None)
    return Adapter({"experts": lora})


def test_slots_hold_what_was_loaded() -> None:
    """Ranks below the pool's are padded; a slot used before keeps nothing of its former adapter."""
    pool = AdapterPool({"experts": SPEC}, max_loras=3, max_lora_rank=12)
    pool.load("gone", adapter(12, seed=9))
    pool.unload("gone")
    sources = {"a": adapter(5, seed=1), "b": adapter(12, seed=2), "c": adapter(3, seed=3, parts="down")}
    for name, source in sources.items():
        pool.load(name, source)
    assert pool.names == ["a", "b", "c"]

    inputs = make_inputs(Case(adapted=()))
    weights = (inputs.hidden_states, inputs.w13, inputs.w2, inputs.topk_weights, inputs.topk_ids)
    for name, source in sources.items():
        mapping = pool.token_lora_mapping([name] * 17)
        lora = source.layers["experts"]
        alone = make_inputs(Case(adapted=(), mapping=(0,) * 17, max_loras=1))
        stacked = [None if part is None else part[None] for part in lora]
        alone.lora = pool.lora("experts")._replace(
            **dict(zip(lora._fields, stacked, strict=True)), adapter_enabled=None
        )
        actual = fused_experts(*weights, pool.lora("experts"), mapping)
        assert_within_budget(actual, alone.oracle(), alone.oracle(torch.float32), torch.float32)


def test_tensors_never_move() -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=1, max_lora_rank=8)
    before = [part.data_ptr() for part in pool.lora("experts") if part is not None]
    pool.load("a", adapter(8, seed=1))
    pool.unload("a")
    pool.load("b", adapter(4, seed=2))
    assert [part.data_ptr() for part in pool.lora("experts") if part is not None] == before
    assert pool.nbytes == 4 * 6 * 8 * (2 * 40 + 48 + 24 + 40)


def test_unloaded_slot_is_no_adapter() -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=1, max_lora_rank=8)
    inputs = make_inputs(Case(adapted=()))
    weights = (inputs.hidden_states, inputs.w13, inputs.w2, inputs.topk_weights, inputs.topk_ids)
    pool.load("a", adapter(8, seed=1))
    mapping = pool.token_lora_mapping(["a"] * 17)
    plain = fused_experts(*weights)
    assert not torch.equal(fused_experts(*weights, pool.lora("experts"), mapping), plain)
    pool.unload("a")
    assert torch.equal(fused_experts(*weights, pool.lora("experts"), mapping), plain)


def test_mapping_of_a_batch() -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=2, max_lora_rank=8)
    pool.load("a", adapter(8, seed=1))
    pool.load("b", adapter(8, seed=2))
    mapping = pool.token_lora_mapping(["b", None, "a"])
    assert mapping.dtype == torch.int32
    assert mapping.tolist() == [1, -1, 0]
    with pytest.raises(KeyError, match=r"no adapter named 'c' is loaded, there are \['a', 'b'\]"):
        pool.token_lora_mapping(["c"])


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("a", adapter(4, seed=3), "name: 'a' is loaded already"),
        ("big", adapter(16, seed=3), "source: rank 16 of 'big' is above max_lora_rank 8"),
        ("third", adapter(4, seed=3), "name: no slot is free for 'third', all 2 are taken by"),
    ],
)
def test_failed_load_changes_nothing(name: str, source: Adapter, message: str) -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=2, max_lora_rank=8)
    pool.load("a", adapter(8, seed=1))
    if name == "third":
        pool.load("b", adapter(8, seed=2))
    names = pool.names
    before = [part.clone() for part in pool.lora("experts") if part is not None]
    with pytest.raises(ValueError, match=message):
        pool.load(name, source)
    assert pool.names == names
    assert all(torch.equal(now, then) for now, then in zip(pool.lora("experts"), before, strict=True))


@pytest.mark.parametrize("sizes", [{"max_loras": 0, "max_lora_rank": 8}, {"max_loras": 2, "max_lora_rank": 0}])
def test_sizes_are_checked(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        AdapterPool({"experts": SPEC}, **sizes)
