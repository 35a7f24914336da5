"""The whole layer against the float64 oracle: every variant, skipping, isolation, determinism."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torch_lora_moe import MoELoRA, fused_experts
from torch_lora_moe.testing import Case, Inputs, check_layer, make_inputs

NAN = float("nan")


def test_variants(variant: Case) -> None:
    inputs = make_inputs(variant)
    check_layer(inputs, inputs.run())


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 8, 12, 16, 64, 128])
def test_sizes(tokens: int, dtype: torch.dtype, rank: int) -> None:
    inputs = make_inputs(Case(num_tokens=tokens, rank=rank, dtype=dtype, hidden_size=50, intermediate_size=34))
    check_layer(inputs, inputs.run())


@pytest.mark.parametrize("shape", [(64, 96), (130, 70)])
def test_gathered_and_grouped_products_agree(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case(hidden_size=shape[0], intermediate_size=shape[1], bias=True, interleaved=True))
    for limit in (0, 1 << 40):
        monkeypatch.setattr("torch_lora_moe.cpu.GATHER_LIMIT", limit)
        check_layer(inputs, inputs.run())


def test_hidden_states_may_be_a_row_slice() -> None:
    inputs = make_inputs(Case())
    padded = torch.full((17, 64), NAN)
    padded[:, :40] = inputs.hidden_states
    expected = inputs.run()
    inputs.hidden_states = padded[:, :40]
    assert torch.equal(inputs.run(), expected)
    assert expected.is_contiguous()


def test_routing_cache_changes_nothing() -> None:
    inputs, cache = make_inputs(Case(enabled=(True, False, True))), {}
    expected = inputs.run()
    assert torch.equal(inputs.run(routing_cache=cache), expected)
    assert torch.equal(inputs.run(routing_cache=cache), expected)


def test_mapping_without_lora_is_the_plain_layer() -> None:
    inputs = make_inputs(Case())
    weights = (inputs.hidden_states, inputs.w13, inputs.w2, inputs.topk_weights, inputs.topk_ids)
    assert torch.equal(fused_experts(*weights, None, inputs.token_lora_mapping), fused_experts(*weights))


def test_deterministic(variant: Case) -> None:
    inputs = make_inputs(variant)
    assert torch.equal(inputs.run(), inputs.run())


def poisoned(inputs: Inputs) -> Inputs:
    """NaN in everything that no result may depend on."""
    case, lora = inputs.case, inputs.lora
    assert lora is not None
    skipped = (inputs.topk_ids < 0) | (inputs.topk_ids >= case.num_experts)
    used_slots = {slot for slot, row in zip(inputs.slots, skipped, strict=True) if slot >= 0 and not row.all()}
    weights = inputs.topk_weights.masked_fill(skipped, NAN)
    hidden = inputs.hidden_states.masked_fill(skipped.all(1, keepdim=True), NAN)
    parts = [None if part is None else part.clone() for part in lora[:4]]
    for part in parts:
        for slot in set(range(case.max_loras)) - used_slots:
            if part is not None:
                part[slot] = NAN
    used_experts = set(inputs.topk_ids[~skipped].tolist())
    w13, w2 = inputs.w13.clone(), inputs.w2.clone()
    for expert in set(range(case.num_experts)) - used_experts:
        w13[expert], w2[expert] = NAN, NAN
    new_lora = MoELoRA(*parts, lora.adapter_enabled)
    return dataclasses.replace(inputs, hidden_states=hidden, topk_weights=weights, lora=new_lora, w13=w13, w2=w2)


SPARSE = Case(num_tokens=5, num_experts=12, max_loras=4, mapping=(0, 2, 7, -1, 2), enabled=(True, True, False, True))


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["grouped", "gathered"])
@pytest.mark.parametrize("shared_outer", [False, True])
def test_nan_in_what_is_skipped_changes_nothing(
    limit: int, shared_outer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_lora_moe.cpu.GATHER_LIMIT", limit)
    inputs = make_inputs(dataclasses.replace(SPARSE, shared_outer=shared_outer))
    inputs.topk_ids[3] = -1
    inputs.topk_ids[4, 0] = 12
    expected, actual = inputs.run(), poisoned(inputs).run()
    assert torch.equal(actual, expected)
    assert not expected[3].any()


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["grouped", "gathered"])
def test_each_token_is_isolated_from_other_slots(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_lora_moe.cpu.GATHER_LIMIT", limit)
    inputs = make_inputs(Case())
    expected = inputs.run()
    assert inputs.lora is not None
    for slot in range(inputs.case.max_loras):
        parts = [part.clone() for part in inputs.lora[:4] if part is not None]
        for part in parts:
            part[[other for other in range(inputs.case.max_loras) if other != slot]] = NAN
        rows = torch.tensor([used in (slot, -1) for used in inputs.slots])
        actual = dataclasses.replace(inputs, lora=MoELoRA(*parts)).run()
        assert torch.equal(actual[rows], expected[rows])
        assert rows.any()


def test_disabled_slot_is_no_adapter() -> None:
    inputs = make_inputs(Case(enabled=(True, False, True)))
    without = dataclasses.replace(
        inputs, token_lora_mapping=inputs.token_lora_mapping.masked_fill(inputs.token_lora_mapping == 1, -1)
    )
    assert torch.equal(inputs.run(), without.run())
    everyone = dataclasses.replace(inputs, lora=MoELoRA(*inputs.lora[:4], None))  # type: ignore[index]
    assert not torch.equal(inputs.run(), everyone.run())


def test_padding_of_the_rank_is_free() -> None:
    """An adapter of rank 5 in slots of rank 8: each half of A at its own offset."""
    small, inputs = make_inputs(Case(rank=5)), make_inputs(Case(rank=8))
    assert small.lora is not None
    assert inputs.lora is not None
    padded = [torch.zeros_like(part) for part in inputs.lora[:4] if part is not None]
    padded[0].unflatten(2, (2, 8))[..., :5, :] = small.lora.gate_up_a.unflatten(2, (2, 5))
    padded[1][..., :5], padded[3][..., :5] = small.lora.gate_up_b, small.lora.down_b
    padded[2][..., :5, :] = small.lora.down_a
    check_layer(small, dataclasses.replace(small, lora=MoELoRA(*padded)).run())
