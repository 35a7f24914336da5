"""The pool of adapter slots: what is loaded is what a batch gets, and a failure changes nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
        ("a", adapter(4, seed=3), "name: 'a' is taken already"),
        ("big", adapter(16, seed=3), "source: rank 16 of 'big' is above max_lora_rank 8"),
        ("third", adapter(4, seed=3), "name: no slot is free for 'third': all 2 are pinned"),
    ],
)
def test_failed_load_changes_nothing(name: str, source: Adapter, message: str) -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=2, max_lora_rank=8)
    pool.load("a", adapter(8, seed=1))
    if name == "third":
        pool.load("b", adapter(8, seed=2))
        pool.pin("a")
        pool.pin("b")
    names = pool.names
    before = [part.clone() for part in pool.lora("experts") if part is not None]
    with pytest.raises(ValueError, match=message):
        pool.load(name, source)
    assert pool.names == names
    assert all(torch.equal(now, then) for now, then in zip(pool.lora("experts"), before, strict=True))


def test_many_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=3, max_lora_rank=8)
    pool.load("first", adapter(8, seed=1))
    sources = {name: adapter(4, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    pool.load_many(sources, pin=True, progress=True)
    assert "3/3" in capsys.readouterr().err
    assert pool.names == ["a", "b", "c"]  # the first one made room
    single = AdapterPool({"experts": SPEC}, max_loras=3, max_lora_rank=8)
    for name, source in sources.items():
        single.load(name, source)
    for name in sources:
        for part, other in zip(pool.lora("experts")[:4], single.lora("experts")[:4], strict=True):
            assert torch.equal(part[pool.slot(name)], other[single.slot(name)])
    with pytest.raises(ValueError, match="no slot is free"):
        pool.load("late", adapter(4, seed=9))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"x": adapter(4, seed=3), "a": adapter(4, seed=4)}, "sources: 'a' taken already"),
        ({"x": adapter(4, seed=3), "big": adapter(16, seed=4)}, "source: rank 16 of 'big'"),
        ({name: adapter(4, seed=3) for name in "xyz"}, "name: no slot is free for 'x', 'y', 'z'"),
    ],
)
def test_all_or_none(sources: dict[str, Adapter], message: str) -> None:
    pool = AdapterPool({"experts": SPEC}, max_loras=2, max_lora_rank=8)
    pool.load("a", adapter(8, seed=1))
    before = [part.clone() for part in pool.lora("experts") if part is not None]
    with pytest.raises(ValueError, match=message):
        pool.load_many(sources)
    assert pool.names == pool.known == ["a"]
    assert all(torch.equal(now, then) for now, then in zip(pool.lora("experts"), before, strict=True))


@pytest.mark.parametrize("sizes", [{"max_loras": 0, "max_lora_rank": 8}, {"max_loras": 2, "max_lora_rank": 0}])
def test_sizes_are_checked(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        AdapterPool({"experts": SPEC}, **sizes)


def held(pool: AdapterPool, name: str, source: Adapter) -> bool:
    """Whether the slot of ``name`` is enabled and holds that adapter's down projection."""
    slot, a = pool.slot(name), source.layers["experts"].down_a
    stored = pool.lora("experts").down_a
    assert a is not None
    assert stored is not None
    return bool(pool.adapter_enabled[slot]) and torch.equal(stored[slot][:, : a.shape[1]], a)


class TestSwapping:
    """More adapters than slots."""

    def pool(self, slots: int = 2, known: int = 5) -> tuple[AdapterPool, dict[str, Adapter]]:
        pool = AdapterPool({"experts": SPEC}, max_loras=slots, max_lora_rank=8)
        sources = {name: adapter(4, seed=seed) for seed, name in enumerate("abcdefgh"[:known])}
        for name, source in sources.items():
            pool.add(name, source)
        return pool, sources

    def test_a_batch_gets_what_it_asks_for(self) -> None:
        pool, sources = self.pool()
        for batch in (["a", "b"], ["c", None, "c"], ["b", "c"], ["d", "e"], ["a", None]):
            with pool.using(batch) as mapping:
                assert mapping.tolist() == [-1 if name is None else pool.slot(name) for name in batch]
                assert all(held(pool, name, sources[name]) for name in batch if name is not None)
        assert pool.known == list("abcde")

    def test_the_least_recently_used_goes(self) -> None:
        pool, _ = self.pool(slots=3)
        for name in "abc":
            with pool.using([name]):
                pass
        with pool.using(["a"]):
            pass
        with pool.using(["d"]):
            assert pool.names == ["c", "a", "d"]

    def test_the_pinned_stay(self) -> None:
        pool, _ = self.pool()
        with pool.using(["a", "b"]):
            pool.pin("a")
        for name in "cde":
            with pool.using([name]):
                assert "a" in pool.names
        pool.unpin("a")
        with pool.using(["b", "c"]):
            assert "a" not in pool.names

    def test_a_running_batch_keeps_its_adapters(self) -> None:
        pool, sources = self.pool()
        with pool.using(["a"]):
            with (
                pool.using(["b"]),
                pytest.raises(ValueError, match="no slot is free for 'c': all 2 are pinned, in use"),
                pool.using(["c"]),
            ):
                pass
            with pool.using(["c"]):
                assert held(pool, "a", sources["a"])
            with pytest.raises(ValueError, match="name: 'a' is in use by a running batch"):
                pool.unload("a")
        pool.unload("a")
        assert "a" not in pool.known

    def test_too_large_a_batch_evicts_nothing(self) -> None:
        pool, _ = self.pool()
        with pool.using(["a", "b"]):
            pass
        with pytest.raises(ValueError, match="no slot is free for 'c', 'd', 'e'"), pool.using(["c", "d", "e"]):
            pass
        assert pool.names == ["a", "b"]
        with pytest.raises(KeyError, match="no adapter named 'x' is known"), pool.using(["c", "x"]):
            pass
        assert pool.names == ["a", "b"]

    def test_a_source_that_fails_evicts_nothing(self, tmp_path: Path) -> None:
        pool, _ = self.pool()
        with pool.using(["a", "b"]):
            pass
        pool.add("gone", tmp_path / "gone")
        with pytest.raises(FileNotFoundError), pool.using(["gone"]):
            pass
        assert pool.names == ["a", "b"]
        with pool.using(["a"]):
            assert pool.adapter_nbytes * 2 == pool.nbytes

    def test_threads(self) -> None:
        """Three threads with batches of two out of eight adapters, in six slots: there is always just enough room."""
        pool, sources = self.pool(slots=6, known=8)
        start = threading.Barrier(3)

        def serve(seed: int) -> int:
            order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
            start.wait()
            served = 0
            for i in range(60):
                batch = [list(sources)[order[(i + k) % 8]] for k in range(2)]
                with pool.using(batch) as mapping:
                    assert mapping.tolist() == [pool.slot(name) for name in batch]
                    assert all(held(pool, name, sources[name]) for name in batch)
                    served += 1
            return served

        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(serve, range(3))) == [60] * 3
