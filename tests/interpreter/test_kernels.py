"""The Triton kernels on CPU tensors, under the interpreter: every branch at small sizes, fp32 and fp16 (not bf16)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_lora_moe import (
    MoELoRA,
    config,
    cpu,
    launch,
    layer,
    plans,
    reference,
    routing,
    schedules,
    split,
    token_layer,
    vectors,
)
from torch_lora_moe.testing import Case, Inputs, assert_within_budget, check_layer, make_inputs

NAN = float("nan")


@pytest.fixture(params=["by_pair", "by_run", "unsorted"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways through a layer of more than one token: LoRA pair by pair or by runs, in tiles; nothing sorted."""
    take(monkeypatch, request.param == "by_run", request.param != "unsorted")
    if request.param == "unsorted":
        choose_gate_up(monkeypatch, _fewer_programs)
        monkeypatch.setattr(token_layer, "down_vector_config", _fewer_programs_of_down)


@pytest.fixture(params=[False, True], ids=["by_pair", "by_run"])
def sorts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    take(monkeypatch, request.param, True)
    shrink_at_once(monkeypatch)
    return request.param


def shrink_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair's rank vector in one program: the interpreter takes them one by one. `test_layer` has the rules' own."""
    choose = layer.layer_shrink_config

    def at_once(pairs: int, virtual_experts: int, rows: int, *how: Any) -> tuple[config.LaunchConfig, int, int]:
        chosen, *rest = choose(pairs, virtual_experts, rows, *how)
        if chosen.block_m == 1:
            chosen = dataclasses.replace(chosen, block_n=config.power_of_two(rows))
        return chosen, *rest

    monkeypatch.setattr(layer, "layer_shrink_config", at_once)


def take(monkeypatch: pytest.MonkeyPatch, sorts: bool, tiles: bool) -> None:
    for kept in (schedules._ROUTE_PLANS, launch._SHRINK_PLANS, launch._EXPAND_PLANS, launch._ADD_PLANS, layer._PLANS):
        kept.clear()
    monkeypatch.setattr(routing, "lora_sorts", lambda *sizes: sorts)
    monkeypatch.setattr(routing, "cuts_runs", lambda *sizes: sorts)
    monkeypatch.setattr(routing, "layer_sorts", lambda num_tokens, *sizes: tiles and num_tokens > 1)


def run(inputs: Inputs) -> Tensor:
    x, w13, w2, weights, ids, lora, mapping = inputs.args
    *parts, enabled = lora or (None,) * 5
    return layer.fused_experts(x, w13, w2, weights, ids, None, *parts, mapping, enabled, **inputs.kwargs)


LAYERS = {
    "gated": Case(),
    "fp16": Case(dtype=torch.float16, bias=True),
    "gpt_oss": Case(activation="swigluoai", interleaved=True, transposed=True, bias=True),
    "plain": Case(is_gated=False, activation="relu2", shared_outer=True),
    "gelu": Case(num_tokens=5, activation="gelu"),
    "gelu_tanh": Case(num_tokens=5, activation="gelu_tanh"),
    "disabled": Case(num_tokens=5, enabled=(False, False, False)),
    "some_disabled": Case(enabled=(True, False, True), ids_dtype=torch.int32, mapping_dtype=torch.int64),
    "rank_12": Case(num_tokens=3, rank=12, hidden_size=50),
    "rank_100": Case(num_tokens=3, rank=100),
    "one_token": Case(num_tokens=1),
    "no_tokens": Case(num_tokens=0),
    "no_lora": Case(adapted=()),
}


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.usefixtures("path")
def test_layer(case: Case) -> None:
    inputs = make_inputs(case)
    check_layer(inputs, run(inputs))


@pytest.mark.usefixtures("sorts")
def test_long_runs() -> None:
    inputs = make_inputs(Case(num_tokens=40, num_experts=2, mapping=(1,) * 40, odd_ids=False))
    check_layer(inputs, run(inputs))


_GATE_UP = vectors.gate_up_vector_config


def choose_gate_up(monkeypatch: pytest.MonkeyPatch, choose: Callable[..., vectors.VectorConfig]) -> None:
    """gate_up of few tokens as ``choose`` says, its rank vectors and what two launches share in large blocks."""
    monkeypatch.setattr(vectors, "gate_up_vector_config", choose)
    monkeypatch.setattr(vectors, "_gate_up_shrink", lambda inner, *how: vectors.VectorConfig(16, 512, 2, 1))
    programs = vectors.gate_up_programs
    fewer = {"finish_rows": 128}
    monkeypatch.setattr(token_layer, "gate_up_programs", lambda *how: dataclasses.replace(programs(*how), **fewer))


def _fewer_programs(*how: Any) -> vectors.VectorConfig:
    """A gate_up of large blocks: the interpreter takes programs one by one."""
    return dataclasses.replace(_GATE_UP(*how), block_n=64)


def _few_programs_of_down(*how: Any) -> vectors.VectorConfig:
    """The same for a down of short rows."""
    return vectors.VectorConfig(512, 16, 1, 4)


_DOWN = vectors.down_vector_config


def _fewer_programs_of_down(rows: int, inner: int, rank: int, contiguous: bool, *how: Any) -> vectors.VectorConfig:
    """The same, where neighbours in memory are a row."""
    return _few_programs_of_down() if contiguous else _DOWN(rows, inner, rank, contiguous, *how)


def _as_of_many(rows: int, *how: Any) -> vectors.VectorConfig:
    """A gate_up as one of many rows takes it."""
    return _GATE_UP(10**6, *how)


FEW_TOKENS = {
    "only_down": Case(1, adapted=("down",)),
    "only_gate_up": Case(1, adapted=("gate_up",)),
    "shared_outer": Case(1, shared_outer=True, bias=True),
    "disabled": Case(1, enabled=(False, False, False)),
    "no_adapter": Case(1, mapping=(-1,)),
    "gpt_oss": Case(1, activation="swigluoai", interleaved=True, transposed=True, bias=True, dtype=torch.float16),
    "plain": Case(1, is_gated=False, activation="relu2", routed_scaling_factor=2.5),
    "rank_3": Case(1, top_k=5, rank=3, mapping=(2,)),
    "rank_100": Case(1, rank=100, mapping=(1,)),
    "many_experts": Case(1, top_k=10, num_experts=12, mapping=(0,), dtype=torch.float16),
    # products in one turn and in several, of pairs whose weights are fetched early and of others
    "wide": Case(1, intermediate_size=1300, hidden_size=70, mapping=(1,), odd_ids=False),
    "wide_rank_40": Case(1, intermediate_size=1300, hidden_size=70, rank=40, mapping=(1,), odd_ids=False),
    "wider": Case(1, top_k=5, intermediate_size=2100, hidden_size=70, mapping=(1,), odd_ids=False, dtype=torch.float16),
    "one_expert": Case(
        2, top_k=1, num_experts=40, intermediate_size=2100, hidden_size=70, mapping=(1, 0), odd_ids=False
    ),
    "deep": Case(1, intermediate_size=40, hidden_size=2100, mapping=(1,), odd_ids=False),
    "deeper": Case(
        1, intermediate_size=40, hidden_size=3300, rank=40, mapping=(2,), odd_ids=False, dtype=torch.float16
    ),
    "two_tokens": Case(2, num_experts=40, mapping=(1, 0)),
    "seven_tokens": Case(7, top_k=3, num_experts=64, mapping=(1, 0, 2, -1, 1, 5, 0)),
    "three_tokens": Case(3, top_k=3, num_experts=90, rank=12, bias=True, mapping=(2, -1, 1), dtype=torch.float16),
}


@pytest.mark.parametrize("case", FEW_TOKENS.values(), ids=FEW_TOKENS.keys())
def test_few_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of their own that they have: nothing sorted, rank vectors made by the launch that needs them."""
    layer._PLANS.clear()
    if case.intermediate_size > 1000 or case.num_tokens * case.top_k > 4 or case.rank == 100:
        choose_gate_up(monkeypatch, _fewer_programs)
    if case.hidden_size > 1000:
        monkeypatch.setattr(token_layer, "down_vector_config", _few_programs_of_down)
    inputs = make_inputs(case)
    check_layer(inputs, run(inputs))
    assert all(isinstance(plan, token_layer.TokenPlan) for plan in layer._PLANS.values())


@pytest.mark.parametrize("case", ["deep", "deeper", "only_down", "gpt_oss", "two_tokens", "deep_plain"])
def test_few_tokens_in_small_programs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As experts with many rows take them."""
    layer._PLANS.clear()
    choose_gate_up(monkeypatch, _as_of_many)
    if case.startswith("deep"):
        monkeypatch.setattr(token_layer, "down_vector_config", _few_programs_of_down)
    deep_plain = Case(1, adapted=(), intermediate_size=40, hidden_size=2100, odd_ids=False)
    inputs = make_inputs({**FEW_TOKENS, "deep_plain": deep_plain}[case])
    check_layer(inputs, run(inputs))


# a row at once and in turns, two of them; B before the turns and, of more ranks, behind them
@pytest.mark.parametrize(
    ("rows", "rank", "hidden_size", "each"),
    [
        *[(100, 16, 300, 2), (100, 16, 900, 1), (9999, 16, 1100, 1), (9999, 72, 4000, 1), (100, 16, 4200, 1)],
        *[(2500, 16, 5000, 2), (9999, 16, 5000, 2), (9999, 72, 6100, 1)],
        *[(9999, 0, 2200, 1), (9999, 0, 3900, 2), (100, 0, 4200, 1), (9999, 0, 5000, 2), (9999, 0, 6000, 1)],
    ],
)
def test_few_tokens_row_by_row(
    rows: int, rank: int, hidden_size: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert's rows, one or two for each program, as of so many ``rows`` over all experts."""
    layer._PLANS.clear()
    choose_gate_up(monkeypatch, lambda _, *how: _GATE_UP(rows, *how))
    monkeypatch.setattr(token_layer, "down_vector_config", _few_programs_of_down)
    how: dict[str, Any] = {"rank": rank} if rank else {"adapted": ()}
    how |= {"hidden_size": hidden_size, "intermediate_size": 24, "bias": hidden_size % 200 == 0}
    inputs = make_inputs(Case(1, mapping=(1,), odd_ids=False, dtype=torch.float16, **how))
    # behind the end of each row there is nothing to be read
    wide = torch.full((*inputs.w13.shape[:2], hidden_size + 100), NAN, dtype=torch.float16)
    inputs.w13 = wide[:, :, :-100].copy_(inputs.w13)
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    assert plan.first == (8 if rank else 0)
    assert plan.gate_up.grid[1] == (plan.first > 0) + (24 - plan.first) // each


def test_the_count_stands_behind_all_rank_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Tensor, ...]] = []
    launched = plans.Plan.__call__

    def note(plan: plans.Plan, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        kept.append(tensors)
        launched(plan, tensors, *sizes)

    monkeypatch.setattr(plans.Plan, "__call__", note)
    layer._PLANS.clear()
    run(make_inputs(Case(1, top_k=5, rank=3, mapping=(2,))))
    rank_vectors = kept[-1][4]
    # so few entries are made by a program each; the count starts at the next multiple of eight
    assert rank_vectors.numel() == 24
    assert rank_vectors.view(torch.int32)[16] == 15


def test_router_weight_of_an_unknown_expert_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer._PLANS.clear()
    choose_gate_up(monkeypatch, _fewer_programs)
    inputs = make_inputs(Case(1, top_k=4, mapping=(1,), odd_ids=False))
    inputs.topk_ids[0, 2] = 99
    inputs.topk_weights[0, 2] = NAN
    out = run(inputs)
    assert not out.isnan().any()
    inputs.topk_weights[0, 2] = 0.5
    assert torch.equal(out, run(inputs))


def test_tokens_that_share_an_expert_need_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of few tokens, for a batch whose tokens all take the same experts."""
    layer._PLANS.clear()
    choose_gate_up(monkeypatch, _fewer_programs)
    inputs = make_inputs(Case(3, num_experts=60, mapping=(1, 1, 0), odd_ids=False))
    inputs.topk_ids[:] = inputs.topk_ids[:1].clone()
    check_layer(inputs, run(inputs))


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize(
    "case",
    [
        Case(num_tokens=60, num_experts=2, rank=16),
        Case(num_tokens=40, num_experts=2, rank=3),
        Case(num_tokens=30, num_experts=2, rank=40, hidden_size=130, intermediate_size=70, dtype=torch.float16),
        Case(num_tokens=50, num_experts=3, activation="swigluoai", interleaved=True, transposed=True, bias=True),
        Case(num_tokens=50, num_experts=3, is_gated=False, shared_outer=True, enabled=(True, False, True)),
        Case(num_tokens=40, num_experts=1, mapping=(-1,) * 40, odd_ids=False),
    ],
    ids=["gated", "rank_3", "odd_sizes", "interleaved", "plain", "no_adapter"],
)
def test_tall_tiles(case: Case, rows: int, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of every height, full ones, half empty ones and nearly empty ones."""
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: rows)
    inputs = make_inputs(case)
    check_layer(inputs, run(inputs))


def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA run by run, as where the copy engine brings B."""
    monkeypatch.setattr(layer.TilePlan, "_streamed", lambda plan, tile, b, *rest: 0 if b is None else 3)


@pytest.mark.parametrize(("rows", "sorts"), [(16, False), (32, True), (128, True)])
@pytest.mark.parametrize(
    "case",
    [
        Case(num_tokens=90, num_experts=1, max_loras=6, rank=16, hidden_size=72),
        Case(num_tokens=70, num_experts=2, max_loras=6, rank=24, hidden_size=50, interleaved=True, bias=True),
        Case(num_tokens=40, num_experts=1, rank=8, is_gated=False, activation="relu2", shared_outer=True),
        Case(num_tokens=40, num_experts=1, rank=64),
        Case(num_tokens=40, num_experts=2, rank=72),
        Case(num_tokens=40, num_experts=1, mapping=(-1,) * 40, odd_ids=False, rank=8),
    ],
    ids=["rank_16", "rank_24", "plain", "rank_64", "rank_72", "no_adapter"],
)
def test_lora_run_by_run(case: Case, rows: int, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, sorts, True)
    shrink_at_once(monkeypatch)
    stream(monkeypatch)
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: rows)
    monkeypatch.setattr(config, "_cut", lambda product, *limits: product)
    inputs = make_inputs(dataclasses.replace(case, dtype=torch.float16))
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    for product in (plan.gate_up[0].plan, plan.down[0].plan):
        constants = dict(zip(product.kernel.arg_names[-len(product.constants) :], product.constants, strict=True))
        assert (constants["STREAM"], constants["BLOCK_M"]) == (3, rows)


@pytest.mark.parametrize("rank", [8, 40])
def test_narrow_tiles_in_deep_steps(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they take their weight where programs are neither few nor many, here with columns that no step divides."""
    take(monkeypatch, False, True)
    shrink_at_once(monkeypatch)
    monkeypatch.setattr(config, "MULTIPROCESSORS", 0)
    sizes = {"hidden_size": 300, "intermediate_size": 40}
    inputs = make_inputs(Case(20, 2, 12, 4, rank, dtype=torch.float16, **sizes))
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    product = plan.gate_up[0].plan
    constants = dict(zip(product.kernel.arg_names[-len(product.constants) :], product.constants, strict=True))
    assert (constants["BLOCK_M"], constants["BLOCK_K"]) == (16, 256)


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("adapted", [("gate_up", "down"), ()], ids=["lora", "no_lora"])
def test_gate_and_up_as_one_product(
    rows: int, adapted: tuple[str, ...], sorts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tall tiles do where the copy engine brings both, here with columns that no block divides."""

    def joint(kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], *rest: Any, **more: Any) -> plans.Plan:
        if kernel.fn.__name__ == "gate_up_tiles":
            constants |= {"TMA": True, "JOINT": True}
            more["matrices"] = {1: [2, constants["BLOCK_N"], constants["BLOCK_K"]]}
        return plans.Plan(kernel, grid, constants, *rest, **more)

    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: rows)
    monkeypatch.setattr(layer, "Plan", joint)
    sizes = {"num_experts": 2, "hidden_size": 72, "intermediate_size": 88}
    inputs = make_inputs(Case(num_tokens=90, dtype=torch.float16, bias=True, adapted=adapted, **sizes))
    check_layer(inputs, run(inputs))


@pytest.mark.parametrize(("sorts", "grouped"), [(False, False), (True, False), (True, True)])
def test_tiles_in_parts(sorts: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 rows where LoRA is most of the work, so that several programs share their rows."""
    take(monkeypatch, sorts, True)
    shrink_at_once(monkeypatch)
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: 128)
    if grouped:
        monkeypatch.setattr(config, "KEPT_IN_L2", 0)
    sizes = {"num_experts": 2, "top_k": 1, "max_loras": 6, "rank": 40, "hidden_size": 70, "intermediate_size": 50}
    inputs = make_inputs(Case(num_tokens=150, dtype=torch.float16, **sizes))
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    for product, parts in ((plan.gate_up[0].plan, 2), (plan.down[0].plan, 4)):
        constants = dict(zip(product.kernel.arg_names[-len(product.constants) :], product.constants, strict=True))
        assert (constants["PARTS"], constants["BLOCK_M"]) == (parts, 128 // parts)


def test_tiles_side_by_side(sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of tiles that go through the columns together, the last group smaller than the others."""
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: 128)
    monkeypatch.setattr(config, "KEPT_IN_L2", 0)
    sizes = {"num_experts": 13, "top_k": 2, "hidden_size": 140, "intermediate_size": 200}
    inputs = make_inputs(Case(num_tokens=40, dtype=torch.float16, **sizes))
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    for product in (plan.gate_up[0].plan, plan.down[0].plan):
        names = product.kernel.arg_names[-len(product.constants) :]
        assert dict(zip(names, product.constants, strict=True))["GROUP_TILES"] == 8
        assert product.grid[0] > plan.tiles == 13


# with the tiles of the first launch: tiles of one expert and rows of one run on either side, none in the second
SPLIT_LAYERS = {
    "gated": (1, Case(30, 3, 6, 3, 12, bias=True)),
    "fp16": (4, Case(40, 2, 5, 4, 40, hidden_size=70, intermediate_size=50, dtype=torch.float16)),
    "long_runs": (3, Case(50, 2, 2, 2, 16, odd_ids=False)),
    "shared_outer": (5, Case(30, 3, 6, 3, 8, shared_outer=True, enabled=(True, False, True))),
    "only_gate_up": (2, Case(30, 3, 6, adapted=("gate_up",))),
    "only_down": (2, Case(30, 3, 6, adapted=("down",))),
    "no_adapter": (3, Case(30, 3, 6, mapping=(-1,) * 30)),
    "no_lora": (4, Case(30, 3, 6, adapted=())),
    "all_in_the_first": (7, Case(20, 2, 6)),
}


@pytest.mark.parametrize("name", SPLIT_LAYERS)
def test_products_in_two_launches(name: str, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, case = SPLIT_LAYERS[name]
    monkeypatch.setattr(split, "first_tiles", lambda *sizes: first)
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: 16)
    inputs = make_inputs(case)
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    assert [launch.first_tile for launch in plan.gate_up] == [0, first]
    assert len(plan.down) == (2 if sorts and inputs.lora is not None and inputs.lora.down_a is not None else 1)


def test_two_launches_without_a_tile(sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "first_tiles", lambda *sizes: 2)
    inputs = make_inputs(Case(30, 3, 6))
    inputs.topk_ids.fill_(-1)
    assert torch.equal(run(inputs), torch.zeros_like(inputs.args[0]))


@pytest.mark.parametrize(("first", "programs"), [(1, 2048), (3, 2), (2, 1)])
def test_first_launches_need_nothing_of_the_second(first: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of down and its rank vectors, those of the first tiles are launched before the second half of gate_up."""
    take(monkeypatch, True, True)
    monkeypatch.setattr(split, "first_tiles", lambda *sizes: first)
    monkeypatch.setattr(launch, "MOST_RUN_PROGRAMS", programs)
    # low tiles, so that some runs are on both sides
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: 16)
    launched = plans.Plan.__call__
    held: list[tuple[Any, ...]] = []

    def reordered(plan: plans.Plan, *args: Any) -> None:
        if plan is layer_plan.gate_up[1].plan:
            held.append((plan, *args))
            return
        if plan is layer_plan.down_shrink.plan.launches[1]:
            launched(*held.pop())
        launched(plan, *args)

    inputs = make_inputs(Case(60, 3, 3, 4, 24, hidden_size=72, dtype=torch.float16))
    expected = run(inputs)
    check_layer(inputs, expected)
    (layer_plan,) = layer._PLANS.values()
    monkeypatch.setattr(plans.Plan, "__call__", reordered)
    assert torch.equal(run(inputs), expected)
    assert not held


@pytest.mark.parametrize("programs", [1, 2048])
def test_few_long_runs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs share the rows of a run, and take turns at more runs than there are programs for."""
    monkeypatch.setattr(launch, "MOST_RUN_PROGRAMS", programs)
    layer._PLANS.clear()
    inputs = make_inputs(Case(num_tokens=300, num_experts=2, max_loras=1, mapping=(0,) * 300, intermediate_size=40))
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    assert plan.gate_up_shrink.plan.launches[0].grid[0] > launch.run_programs(plan.num_pairs, 2)


def test_few_short_runs() -> None:
    """Planes of a shrink inside the layer, more than two of them."""
    layer._PLANS.clear()
    inputs = make_inputs(Case(num_tokens=40, num_experts=3, max_loras=2, hidden_size=1100, intermediate_size=40))
    check_layer(inputs, run(inputs))
    (plan,) = layer._PLANS.values()
    assert plan.gate_up_shrink.planes > 2


@pytest.mark.parametrize("ranked", [True, False], ids=["one_launch", "three_launches"])
@pytest.mark.parametrize(
    "sizes",
    [
        (17, 2, 6, 3),
        (40, 3, 7, 2),
        (5, 8, 128, 8),
        (1, 8, 128, 8),
        (0, 2, 6, 3),
        (60, 6, 300, 4),
        (33, 1, 1, 2),
        (70, 2, 5, 32),
        (70, 2, 5, 33),
        (70, 8, 16, 300),
    ],
    ids=str,
)
def test_route(sizes: tuple[int, int, int, int], ranked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "RANKED_PAIRS", 4096 if ranked else 0)
    monkeypatch.setattr(routing, "cuts_runs", lambda *sizes: True)
    schedules._ROUTE_PLANS.clear()
    tokens, top_k, experts, slots = sizes
    flags = tuple(slot % 4 != 1 for slot in range(slots))
    inputs = make_inputs(Case(tokens, top_k, experts, slots, rank=1, hidden_size=2, intermediate_size=2, enabled=flags))
    assert inputs.lora is not None
    for mapping, enabled in ((inputs.token_lora_mapping, inputs.lora.adapter_enabled), (None, None)):
        args = (inputs.topk_ids, mapping, enabled, experts, slots)
        assert torch.equal(schedules.route(*args), cpu.route(*args))
    schedules._ROUTE_PLANS.clear()


@pytest.mark.parametrize("ranked", [True, False], ids=["one_launch", "three_launches"])
def test_runs_of_many_chunks(ranked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are numbered across programs, and the long ones are cut."""
    monkeypatch.setattr(schedules, "RANKED_PAIRS", 4096 if ranked else 0)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 2, (1000, 2), generator=generator)
    mapping = torch.randint(0, 4, (1000,), generator=generator).clamp(max=1) - 1
    schedules._ROUTE_PLANS.clear()
    schedule = schedules.route(ids, mapping, None, 2, 2)
    assert torch.equal(schedule, cpu.route(ids, mapping, None, 2, 2))
    assert schedule[routing.LORA_RUN_ROWS].max() == routing.RUN_ROWS
    schedules._ROUTE_PLANS.clear()


@pytest.mark.parametrize(("tokens", "top_k", "chunk"), [(900, 8, 128), (2100, 8, 256)])
def test_routes_of_longer_chunks(tokens: int, top_k: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 21, (tokens, top_k), generator=generator)
    mapping = torch.randint(-1, 6, (tokens,), generator=generator)
    enabled = torch.tensor([True, True, False, True, True])
    schedules._ROUTE_PLANS.clear()
    assert torch.equal(schedules.route(ids, mapping, enabled, 20, 5), cpu.route(ids, mapping, enabled, 20, 5))
    (plan,) = schedules._ROUTE_PLANS.values()
    assert plan.chunk == chunk


def test_ids_beyond_int32_do_not_wrap() -> None:
    """An int64 id whose low half looks valid is still out of range."""
    ids, mapping = torch.tensor([[2**32, 1], [1, 2**33 + 1]]), torch.tensor([2**32, 0])
    schedules._ROUTE_PLANS.clear()
    assert torch.equal(schedules.route(ids, mapping, None, 2, 2), cpu.route(ids, mapping, None, 4, 2))


# 64 columns are one block: further planes are empty
@pytest.mark.parametrize("hidden_size", [64, 70])
@pytest.mark.parametrize("split_k", [1, 3, 9])
def test_split_k(split_k: int, hidden_size: int, sorts: bool) -> None:
    inputs = make_inputs(Case(hidden_size=hidden_size))
    assert inputs.lora is not None
    args = (inputs.hidden_states, inputs.lora.gate_up_a, inputs.topk_ids, inputs.token_lora_mapping, None, None, 6)
    planes = launch.lora_shrink(*args, split_k)
    assert planes.shape[0] == split_k
    exact, low = (reference.lora_shrink(*args[:3], inputs.slots, 6, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(planes.sum(0), exact, low, torch.float32)


@pytest.mark.usefixtures("path")
def test_skipped_parts_are_never_read() -> None:
    inputs = make_inputs(Case(num_tokens=5, max_loras=4, mapping=(0, 2, 7, -1, 2), enabled=(True, True, False, True)))
    inputs.topk_ids[3] = -1
    assert inputs.lora is not None
    expected = run(inputs)
    parts = [part.clone() for part in inputs.lora[:4] if part is not None]
    for part in parts:
        part[1:] = NAN
    hidden = inputs.hidden_states.clone()
    hidden[3] = NAN
    lora = MoELoRA(*parts, inputs.lora.adapter_enabled)
    assert torch.equal(run(dataclasses.replace(inputs, hidden_states=hidden, lora=lora)), expected)


@pytest.mark.parametrize(
    ("rows", "sorts", "streams"),
    [(rows, sorts, False) for rows in (16, 32) for sorts in (False, True)]
    + [(16, False, True), (64, True, True), (128, True, True)],
)
def test_each_token_is_isolated_from_other_slots(
    rows: int, sorts: bool, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other slots NaN or infinite, in tiles and batches that they share, leaves every bit."""
    take(monkeypatch, sorts, True)
    shrink_at_once(monkeypatch)
    if streams:
        stream(monkeypatch)
    monkeypatch.setattr(routing, "expert_tile_rows", lambda *sizes: rows)
    mapping = (0, 1, 2, -1) * 6
    # more rows of an expert than half of the tallest tile has
    mapping *= max(1, rows // 32)
    inputs = make_inputs(Case(num_tokens=len(mapping), num_experts=2, mapping=mapping, odd_ids=False))
    assert inputs.lora is not None
    expected = run(inputs)
    # those behind it, and those on both sides
    for slot in (0, 1):
        parts = [part.clone() for part in inputs.lora[:4] if part is not None]
        for part in parts:
            part[[(slot + 1) % 3]] = NAN
            part[[(slot + 2) % 3]] = float("inf")
        actual = run(dataclasses.replace(inputs, lora=MoELoRA(*parts, None)))
        untouched = [token for token, used in enumerate(mapping) if used in (slot, -1)]
        if rows < 128:
            assert torch.equal(actual[untouched], expected[untouched])
        else:
            # computed again in halves, which numpy sums in another order
            torch.testing.assert_close(actual[untouched], expected[untouched], rtol=1e-5, atol=1e-6)
        others = [token for token, used in enumerate(mapping) if used not in (slot, -1)]
        assert not (actual[others] - expected[others]).abs().amax(1).lt(1.0).any()
