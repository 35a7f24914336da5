"""``lora_moe::route`` against the oracle, entry for entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_lora_moe import reference, routing
from torch_lora_moe.testing import Case, Inputs, make_inputs


def oracle(inputs: Inputs) -> torch.Tensor:
    case, pairs = inputs.case, inputs.topk_ids.numel()
    tile_rows = routing.expert_tile_rows(pairs, case.num_experts)
    run_rows = routing.RUN_ROWS if routing.cuts_runs(pairs, case.num_experts * case.max_loras) else 0
    return reference.route(inputs.topk_ids, inputs.slots, case.num_experts, tile_rows, run_rows)


def routed(inputs: Inputs) -> torch.Tensor:
    enabled = inputs.lora.adapter_enabled if inputs.lora is not None else None
    case = inputs.case
    return torch.ops.lora_moe.route(
        inputs.topk_ids, inputs.token_lora_mapping, enabled, case.num_experts, case.max_loras
    )


def test_variants(variant: Case) -> None:
    inputs = make_inputs(variant)
    assert torch.equal(routed(inputs), oracle(inputs))


def test_groups_of_many_tiles() -> None:
    inputs = make_inputs(Case(num_tokens=1200, num_experts=3, max_loras=8, mapping=(1,) * 1200))
    schedule = routed(inputs)
    assert torch.equal(schedule, oracle(inputs))
    ids = schedule[routing.EXPERT_TILE_IDS, :-1]
    assert (ids >= 0).sum() > ids[ids >= 0].unique().numel()
    runs = schedule[routing.LORA_RUN_ROWS]
    assert runs[-1] > 3, "long runs are cut"
    assert runs[:-1].max() == routing.RUN_ROWS


def test_runs_are_left_out_where_nobody_reads_them() -> None:
    inputs = make_inputs(Case(num_tokens=9, num_experts=8, max_loras=8, odd_ids=False))
    assert routed(inputs)[routing.LORA_RUN_IDS].tolist() == [-1] * inputs.topk_ids.numel() + [0]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    experts=st.integers(1, 9),
    slots=st.integers(1, 5),
    enabled=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_any_batch(tokens: int, top_k: int, experts: int, slots: int, enabled: list[bool], seed: int) -> None:
    inputs = make_inputs(
        Case(
            num_tokens=tokens,
            top_k=top_k,
            num_experts=experts,
            max_loras=slots,
            enabled=tuple(enabled[:slots]),
            rank=1,
            hidden_size=2,
            intermediate_size=2,
            seed=seed,
        )
    )
    assert torch.equal(routed(inputs), oracle(inputs))


def test_no_mapping_means_no_adapter() -> None:
    inputs = make_inputs(Case(mapping=(-1,) * 17))
    args = (inputs.topk_ids, None, None, inputs.case.num_experts)
    assert torch.equal(torch.ops.lora_moe.route(*args, inputs.case.max_loras), oracle(inputs))
    assert (torch.ops.lora_moe.route(*args, 0)[routing.SORTED_VIRTUAL_IDS, :-1] == -1).all()


def test_worked_example_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "cuts_runs", lambda *sizes: True)
    topk_ids, mapping = torch.tensor([[1], [0], [1], [1]]), torch.tensor([0, -1, -1, 0])
    rows = [
        line.split()
        for line in (routing.__doc__ or "").splitlines()
        if line.strip().startswith(("SORTED", "EXPERT_T", "LORA"))
    ]
    expected = [[*map(int, row[1:5]), int(row[6])] for row in rows]
    assert torch.ops.lora_moe.route(topk_ids, mapping, None, 2, 1).tolist() == expected


@pytest.mark.parametrize("pairs", [0, 1, 17, 1472, 1473, 3584, 3585, 5000, 7680, 7681, 10**6])
def test_tile_rows_fit_a_tensor_core_and_an_average_expert(pairs: int) -> None:
    rows = routing.expert_tile_rows(pairs, 128)
    assert rows in (16, 32, 64, 128)
    average = pairs / 128
    most = {8: 0.0, 16: 11.5, 32: 28.0, 64: 60.0, 128: float("inf")}
    assert most[rows // 2] < average <= most[rows] or (pairs, rows) == (0, 16)


class TestCache:
    """The routing cache: one schedule a layer call, refused where it does not belong."""

    def test_hit_and_miss(self) -> None:
        inputs, calls, cache = make_inputs(Case()), [], {}

        def route(*args: object) -> torch.Tensor:
            calls.append(args)
            return torch.ops.lora_moe.route(*args)

        args = (inputs.topk_ids, inputs.token_lora_mapping, None, inputs.case.num_experts, inputs.case.max_loras)
        first, second = (routing.cached_schedule(cache, route, *args) for _ in range(2))
        assert first is second
        assert len(calls) == 1
        assert all(isinstance(key, str) for key in cache)

    def test_another_batch_is_refused(self) -> None:
        cache: routing.RoutingCache = {}
        make_inputs(Case()).run(routing_cache=cache)
        with pytest.raises(
            ValueError,
            match=r"routing_cache: holds .* \(pairs, experts, slots\) = \(34, 6, 3\), this call has \(6, 6, 3\)",
        ):
            make_inputs(Case(num_tokens=3)).run(routing_cache=cache)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "expert_megabytes", "sorts"),
    [
        (1, 8, 8, 1000, False),
        # many shared experts, or so many bytes that the pace counts
        (4, 8, 128, 9.4, False),
        (6, 8, 128, 9.4, False),
        (7, 8, 128, 9.4, True),
        (6, 8, 40, 4.7, False),
        (7, 8, 40, 4.7, True),
        (2, 2, 16, 157, True),
        (4, 10, 512, 6.3, False),
        (7, 9, 512, 0.1, False),
        (8, 8, 512, 0.1, True),
        (9, 8, 128, 0.001, True),
        (0, 8, 128, 9.4, False),
    ],
)
def test_layers_go_pair_by_pair_where_that_reads_little_more(
    tokens: int, top_k: int, experts: int, expert_megabytes: float, sorts: bool
) -> None:
    sizes = (tokens, top_k, experts, int(1e6 * expert_megabytes))
    assert routing.layer_sorts(*sizes) is sorts
    assert routing.layer_needs_schedule(*sizes, "cuda") is sorts
    assert routing.layer_needs_schedule(*sizes, "cpu")
