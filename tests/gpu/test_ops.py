"""The CUDA kernels against the oracle: every variant, both LoRA paths, isolation, determinism, large offsets."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layers import Layer, by_adapter, make_layer
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from torch_lora_moe import (
    MoELoRA,
    build_lora_hooks,
    config,
    fused_experts,
    hopper,
    launch,
    layer,
    reference,
    routing,
    schedules,
    virtual_experts_lora_add,
)
from torch_lora_moe.testing import Case, Inputs, assert_within_budget, check_layer, make_inputs

ops = torch.ops.lora_moe
NAN = float("nan")


@pytest.fixture(params=["by_pair", "by_run", "unsorted"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ways through a layer of more than one token: LoRA pair by pair or by runs, in tiles; nothing sorted."""
    with taken(monkeypatch, request.param == "by_run", request.param != "unsorted"):
        yield


@pytest.fixture(params=[False, True], ids=["by_pair", "by_run"])
def sorts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Runs a test on both LoRA paths, whatever the batch."""
    with taken(monkeypatch, request.param, True):
        yield request.param


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test on the kernels in Triton, whatever the batch."""
    monkeypatch.setattr(hopper, "available", lambda device: False)
    layer._PLANS.clear()
    yield
    layer._PLANS.clear()


@contextlib.contextmanager
def taken(monkeypatch: pytest.MonkeyPatch, sorts: bool, tiles: bool) -> Iterator[None]:
    plans = (schedules._ROUTE_PLANS, launch._SHRINK_PLANS, launch._EXPAND_PLANS, launch._ADD_PLANS, layer._PLANS)
    for plan in plans:
        plan.clear()
    monkeypatch.setattr(routing, "lora_sorts", lambda *sizes: sorts)
    monkeypatch.setattr(routing, "cuts_runs", lambda *sizes: sorts)
    monkeypatch.setattr(routing, "layer_sorts", lambda num_tokens, *sizes: tiles and num_tokens > 1)
    yield
    for plan in plans:
        plan.clear()


@pytest.mark.usefixtures("path")
def test_layer(variant: Case) -> None:
    inputs = make_inputs(variant, "cuda")
    check_layer(inputs, inputs.run())


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 8, 12, 16, 64, 128, 256])
@pytest.mark.usefixtures("path")
def test_sizes(tokens: int, dtype: torch.dtype, rank: int) -> None:
    inputs = make_inputs(Case(num_tokens=tokens, rank=rank, dtype=dtype, hidden_size=100, intermediate_size=72), "cuda")
    check_layer(inputs, inputs.run())


@pytest.mark.parametrize("tokens", [150, 700, 3000])
@pytest.mark.parametrize(
    "shape", [(16, 4, 16), (128, 64, 8), (8, 3, 64)], ids=lambda shape: "E{}_L{}_r{}".format(*shape)
)
def test_batches_of_every_route(tokens: int, shape: tuple[int, int, int]) -> None:
    experts, slots, rank = shape
    layer = make_layer(tokens, experts=experts, slots=slots, rank=rank)
    actual = fused_experts(layer.x, layer.w13, layer.w2, layer.weights, layer.ids, layer.lora, layer.mapping)
    assert_within_budget(
        actual, by_adapter(layer, torch.float64).cpu(), by_adapter(layer, torch.bfloat16).cpu(), torch.bfloat16
    )


def whole_layer(layer: Layer) -> Tensor:
    return fused_experts(layer.x, layer.w13, layer.w2, layer.weights, layer.ids, layer.lora, layer.mapping)


def check_by_adapter(layer: Layer) -> None:
    dtype, result = layer.x.dtype, whole_layer(layer)
    assert_within_budget(result, by_adapter(layer, torch.float64).cpu(), by_adapter(layer, dtype).cpu(), dtype)
    # the second call goes to the driver from addresses
    assert torch.equal(whole_layer(layer), result)


# weights as tensor descriptors, with rows that are no multiple of the tile, and with strides no descriptor can have
@pytest.mark.parametrize("sizes", [(256, 128), (200, 120), (100, 76)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 24, 64, 128])
@pytest.mark.parametrize("tokens", [1, 40, 90, 150, 330, 3000])
def test_tiles_of_every_height(tokens: int, rank: int, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    check_by_adapter(make_layer(tokens, rank=rank, hidden=sizes[0], inner=sizes[1], dtype=dtype))


@pytest.mark.parametrize("rank", [8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize(("tokens", "slots"), [(600, 3), (3000, 8), (3000, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("in_triton")
def test_tallest_tiles(tokens: int, slots: int, rank: int, dtype: torch.dtype) -> None:
    """LoRA in a small part of the product, so that tiles stay tall."""
    check_by_adapter(make_layer(tokens, slots=slots, rank=rank, hidden=1544, inner=1096, dtype=dtype))
    (plan,) = layer._PLANS.values()
    for product in (plan.gate_up[0].plan, plan.down[0].plan):
        constants = dict(zip(product.kernel.arg_names[-len(product.constants) :], product.constants, strict=True))
        assert constants["BLOCK_M"] == 128
        assert (constants["STREAM"] > 0) == (config.has_dependent_launch(torch.device("cuda")) and rank % 8 == 0)


@pytest.mark.parametrize(
    "kind",
    [{"bias": True}, {"interleaved": True, "bias": True}, {"is_gated": False, "activation": "relu2"}, {"rank": 3}],
    ids=lambda kind: "_".join(kind),
)
@pytest.mark.parametrize("adapted", [("gate_up", "down"), ()], ids=["lora", "no_lora"])
@pytest.mark.parametrize("tokens", [100, 300])
def test_tall_tiles_of_each_kind(tokens: int, adapted: tuple[str, ...], kind: dict[str, Any]) -> None:
    sizes = {"num_experts": 2, "hidden_size": 200, "intermediate_size": 104}
    inputs = make_inputs(Case(num_tokens=tokens, dtype=torch.bfloat16, adapted=adapted, **sizes, **kind), "cuda")
    check_layer(inputs, inputs.run())


@pytest.mark.parametrize("rank", [16, 100, 128])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("tokens", [40, 256, 2000])
def test_few_experts(tokens: int, slots: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks in planes or with shared runs, and tiles side by side as where L2 does not hold a weight."""
    monkeypatch.setattr(config, "KEPT_IN_L2", 0)
    layer._PLANS.clear()
    check_by_adapter(make_layer(tokens, top_k=2, experts=8, slots=slots, rank=rank, hidden=1032, inner=1032))
    layer._PLANS.clear()


# products that take an expert's row at once or in turns, and down products of one expert
@pytest.mark.parametrize(("hidden", "inner"), [(520, 1000), (520, 1300), (520, 2100), (2100, 130), (4100, 130)])
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("rank", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_of_large_experts(hidden: int, inner: int, top_k: int, rank: int, dtype: torch.dtype) -> None:
    check_by_adapter(make_layer(1, top_k=top_k, rank=rank, hidden=hidden, inner=inner, dtype=dtype, odd_ids=False))


@pytest.mark.parametrize(
    ("hidden", "inner"),
    [
        (500, 300),
        (1000, 300),
        (1000, 2600),
        (2100, 2600),
        (2900, 300),
        (4000, 1300),
        (4100, 700),
        (6100, 90),
        (6100, 2000),
    ],
)
@pytest.mark.parametrize(
    "adapted", [("gate_up", "down"), ("gate_up",), ("down",), ()], ids=lambda names: "_".join(names)
)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_one_token_in_small_programs(hidden: int, inner: int, top_k: int, adapted: tuple[str, ...]) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_experts": 8, "top_k": top_k}
    inputs = make_inputs(Case(1, mapping=(1,), adapted=adapted, dtype=torch.bfloat16, odd_ids=False, **sizes), "cuda")
    result = inputs.run()
    check_layer(inputs, result)
    assert torch.equal(inputs.run(), result)


# down products whose programs are all on the GPU at once, evenly spread, some with a bound on their registers
@pytest.mark.parametrize(
    ("hidden", "inner", "top_k"),
    [(2048, 768, 8), (4096, 1792, 2), (4096, 448, 6), (2880, 2880, 4), (1024, 512, 8), (7168, 256, 8), (5120, 200, 8)],
)
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_that_fill_the_gpu(hidden: int, inner: int, top_k: int, rank: int, tokens: int) -> None:
    check_by_adapter(make_layer(tokens, top_k=top_k, experts=16, rank=rank, hidden=hidden, inner=inner))


# all but the smallest in tiles, with rank vectors that programs make pair by pair
@pytest.mark.parametrize(("tokens", "top_k"), [(2, 2), (8, 4), (15, 4)])
@pytest.mark.parametrize("rank", [16, 64, 128])
@pytest.mark.parametrize("inner", [200, 1792, 3600])
def test_few_tokens_of_large_experts(tokens: int, top_k: int, rank: int, inner: int) -> None:
    check_by_adapter(make_layer(tokens, top_k=top_k, experts=4, rank=rank, hidden=4104, inner=inner))


@pytest.mark.parametrize("rank", [60, 64])
@pytest.mark.parametrize("slots", [24, 64])
@pytest.mark.parametrize("tokens", [200, 1000, 3000])
@pytest.mark.usefixtures("in_triton")
def test_tiles_in_parts(tokens: int, slots: int, rank: int) -> None:
    """Where LoRA is most of the work, several programs share the rows of a tile, unless it streams."""
    check_by_adapter(make_layer(tokens, slots=slots, rank=rank, hidden=264, inner=136))
    (plan,) = layer._PLANS.values()
    # hardly two of 800 pairs share one of 1,024 virtual experts
    streams = rank == 64 and (tokens, slots) != (200, 64) and config.has_dependent_launch(torch.device("cuda"))
    low = tokens == 200
    for product, parts in (
        (plan.gate_up[0].plan, 1 if low or streams else 2),
        (plan.down[0].plan, 1 if streams else 2 if low or (slots, tokens) == (24, 3000) else 4),
    ):
        constants = dict(zip(product.kernel.arg_names[-len(product.constants) :], product.constants, strict=True))
        assert constants["PARTS"] == parts
        assert (constants["STREAM"] > 0) == streams


def shifted(tensor: Tensor) -> Tensor:
    """The same values at addresses that are no multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("names", [("w13", "w2"), ("w13",), ("w2",), ("lora",)], ids="_".join)
@pytest.mark.parametrize("tokens", [1, 20, 3000])
def test_weights_that_start_anywhere(tokens: int, names: tuple[str, ...]) -> None:
    layer = make_layer(tokens)
    expected = whole_layer(layer)
    parts = {name: shifted(getattr(layer, name)) for name in names if name != "lora"}
    if "lora" in names:
        parts["lora"] = MoELoRA(*map(shifted, layer.lora[:4]), layer.lora.adapter_enabled)
    moved = dataclasses.replace(layer, **parts)
    assert (whole_layer(moved) - expected).abs().max() <= 0.01 * expected.abs().max()
    check_by_adapter(moved)


@pytest.mark.parametrize("tokens", [1, 20, 90, 150, 3000])
def test_layers_of_one_shape_take_turns(tokens: int) -> None:
    """They share what a launch keeps, and each is computed from its own tensors."""
    layers = [make_layer(tokens, seed=seed) for seed in (0, 1)]
    for _ in range(3):
        for mine in layers:
            check_by_adapter(mine)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("tokens", [12, 13, 150, 600, 3000])
def test_each_token_is_isolated_from_other_slots(tokens: int, rank: int) -> None:
    """Another adapter of the batch being NaN or infinite leaves every bit of the rest."""
    layer = make_layer(tokens, rank=rank)
    expected = whole_layer(layer)
    parts = [part.clone() for part in layer.lora[:4]]
    for part in parts:
        part[1], part[2] = NAN, float("inf")
    actual = whole_layer(dataclasses.replace(layer, lora=MoELoRA(*parts, layer.lora.adapter_enabled)))
    rest = (layer.mapping != 1) & (layer.mapping != 2)
    assert torch.equal(actual[rest], expected[rest])
    assert rest.any()


@pytest.mark.parametrize("tokens", [1, 3, 40, 600, 3000])
def test_many_slots_and_experts(tokens: int) -> None:
    check_by_adapter(make_layer(tokens, top_k=10, experts=300, slots=64, rank=16, hidden=64, inner=32))


@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 300, 3000])
@pytest.mark.parametrize("experts", [1, 6, 128, 512])
@pytest.mark.parametrize("slots", [1, 8, 300])
@pytest.mark.parametrize("skew", ["random", "one_expert", "one_adapter", "disabled"])
def test_route(tokens: int, experts: int, slots: int, skew: str) -> None:
    check_route(tokens, experts, slots, skew)


@pytest.mark.parametrize("tokens", [512, 513, 2048, 2049, 16384, 16385])
def test_routes_on_both_sides_of_where_their_launches_change(tokens: int) -> None:
    check_route(tokens, 128, 8, "random")


def check_route(tokens: int, experts: int, slots: int, skew: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, 8), generator=generator)
    mapping = torch.randint(-1, slots + 1, (tokens,), generator=generator, dtype=torch.int32)
    enabled = torch.rand(slots, generator=generator) < 0.7
    if skew == "one_expert":
        ids.fill_(experts - 1)
    elif skew == "one_adapter":
        mapping.fill_(slots - 1)
    elif skew == "disabled":
        enabled.zero_()
    expected = torch.ops.lora_moe.route(ids, mapping, enabled, experts, slots)
    actual = torch.ops.lora_moe.route(ids.cuda(), mapping.cuda(), enabled.cuda(), experts, slots)
    assert torch.equal(actual.cpu(), expected)
    actual = torch.ops.lora_moe.route(ids.int().cuda(), None, None, experts, 0)
    assert torch.equal(actual.cpu(), torch.ops.lora_moe.route(ids, None, None, experts, 0))


def expected_add(
    inputs: Inputs, output: Tensor, x: Tensor, a: Tensor, b: Tensor, slices: int, weighted: bool, dtype: torch.dtype
) -> Tensor:
    ids, experts = inputs.topk_ids.cpu(), inputs.case.num_experts
    shrunk = reference.lora_shrink(x.cpu(), a.cpu(), ids, inputs.slots, experts, dtype)
    delta = reference.lora_expand(shrunk, b.cpu(), ids, inputs.slots, experts, slices, dtype)
    if weighted:
        delta = delta * inputs.topk_weights.cpu().reshape(-1, 1).to(dtype)
    return output.cpu().to(dtype) + delta.view(output.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared_outer", [False, True])
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_lora_add(projection: str, shared_outer: bool, dtype: torch.dtype, sorts: bool) -> None:
    case = Case(dtype=dtype, shared_outer=shared_outer, enabled=(True, False, True), hidden_size=300, rank=12)
    inputs = make_inputs(case, "cuda")
    assert inputs.lora is not None
    a, b = inputs.lora[:2] if projection == "gate_up" else inputs.lora[2:4]
    slices = 2 if projection == "gate_up" else 1
    rows = case.num_tokens * (1 if projection == "gate_up" else case.top_k)
    x = torch.randn(rows, a.shape[3], device="cuda").to(dtype)
    wide = torch.randn(case.num_tokens, case.top_k, b.shape[2] + 10, device="cuda").to(dtype)
    for view in (wide[:, :, 3:-7], wide.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 8:-2]):
        before = view.clone()
        virtual_experts_lora_add(
            view,
            x,
            a,
            b,
            inputs.topk_ids,
            inputs.topk_weights,
            inputs.token_lora_mapping,
            mul_routed_weight=True,
            adapter_enabled=inputs.lora.adapter_enabled,
            num_slices=slices,
        )
        exact, low = (expected_add(inputs, before, x, a, b, slices, True, kind) for kind in (torch.float64, dtype))
        assert_within_budget(view, exact, low, dtype)


# 512 columns are few full blocks: further planes are empty
@pytest.mark.parametrize("hidden_size", [512, 520])
@pytest.mark.parametrize("split_k", [1, 2, 5, 64])
def test_split_k(split_k: int, hidden_size: int, sorts: bool) -> None:
    inputs = make_inputs(Case(hidden_size=hidden_size), "cuda")
    assert inputs.lora is not None
    tokens = (inputs.topk_ids, inputs.token_lora_mapping, None, None)
    planes = ops.lora_shrink(inputs.hidden_states, inputs.lora.gate_up_a, *tokens, 6, split_k)
    exact, low = (
        reference.lora_shrink(
            inputs.hidden_states.cpu(), inputs.lora.gate_up_a.cpu(), inputs.topk_ids.cpu(), inputs.slots, 6, dtype
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(planes.sum(0), exact, low, torch.float32)


@pytest.mark.parametrize("hidden_size", [2560, 2880, 3072])
def test_hidden_sizes_that_planes_do_not_divide(hidden_size: int, sorts: bool) -> None:
    inputs = make_inputs(Case(num_tokens=3, hidden_size=hidden_size, intermediate_size=16), "cuda")
    check_layer(inputs, inputs.run())


def poison(inputs: Inputs) -> Inputs:
    """NaN in all that no result may depend on."""
    case, lora = inputs.case, inputs.lora
    assert lora is not None
    skipped = (inputs.topk_ids < 0) | (inputs.topk_ids >= case.num_experts)
    used = {slot for slot, row in zip(inputs.slots, skipped.tolist(), strict=True) if slot >= 0 and not all(row)}
    weights = inputs.topk_weights.masked_fill(skipped, NAN)
    hidden = inputs.hidden_states.masked_fill(skipped.all(1, keepdim=True), NAN)
    parts = [part.clone() for part in lora[:4] if part is not None]
    for part in parts:
        part[[slot for slot in range(case.max_loras) if slot not in used]] = NAN
    lora = MoELoRA(*parts, lora.adapter_enabled)
    return dataclasses.replace(inputs, hidden_states=hidden, topk_weights=weights, lora=lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("path")
def test_skipped_parts_are_never_read(dtype: torch.dtype) -> None:
    mapping = (0, 2, 7, -1, 2)
    inputs = make_inputs(
        Case(num_tokens=5, max_loras=4, mapping=mapping, enabled=(True, True, False, True), dtype=dtype), "cuda"
    )
    inputs.topk_ids[3] = -1
    expected = inputs.run()
    assert torch.equal(poison(inputs).run(), expected)
    assert not expected[3].any()


def test_runs_are_bit_identical(sorts: bool) -> None:
    layer = make_layer(200)
    args = (layer.x, layer.w13, layer.w2, layer.weights, layer.ids, layer.lora, layer.mapping)
    first = fused_experts(*args)
    assert all(torch.equal(fused_experts(*args), first) for _ in range(5))


@pytest.mark.parametrize(("tokens", "rank"), [(600, 16), (4096, 16), (4096, 64)])
def test_lora_add_is_its_two_halves(tokens: int, rank: int) -> None:
    """The expand starts before its shrink has ended, here in sizes that fill the GPU more than once."""
    layer = make_layer(tokens, 8, 128, 8, rank, 2048, 768)
    a, b, routed = layer.lora.gate_up_a, layer.lora.gate_up_b, (layer.ids, layer.mapping, None)
    assert a is not None
    assert b is not None
    schedule = ops.route(*routed, 128, 8)
    before = torch.randn(tokens, 8, b.shape[2], device="cuda").to(b.dtype)
    apart, planes = before.clone(), config.shrink_planes(8 * tokens, 2048, True)
    shrunk = ops.lora_shrink(layer.x, a, *routed, schedule, 128, planes)
    torch.cuda.synchronize()
    ops.lora_expand_add_(apart, shrunk, b, *routed, schedule, None, 128, 2)
    for _ in range(10):
        output = before.clone()
        ops.lora_add_(output, layer.x, a, b, *routed, schedule, None, 2)
        assert torch.equal(output, apart)


@pytest.mark.parametrize("tokens", [4, 700])
def test_offsets_beyond_int32(tokens: int) -> None:
    """More than 2**31 elements in one stack of matrices; the last slot and expert are used."""
    slots, experts, rank, hidden = 33, 128, 128, 4096
    a = torch.zeros(slots, experts, rank, hidden, dtype=torch.bfloat16, device="cuda")
    b = torch.zeros(slots, experts, hidden, rank, dtype=torch.bfloat16, device="cuda")
    assert a.numel() > 2**31
    a[-1, -1], b[-1, -1] = torch.randn_like(a[-1, -1]) / 64, torch.randn_like(b[-1, -1]) / 11
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.full((tokens, 2), experts - 1, device="cuda")
    mapping = torch.full((tokens,), slots - 1, device="cuda", dtype=torch.int32)
    output = torch.zeros(tokens, 2, hidden, device="cuda", dtype=torch.bfloat16)
    virtual_experts_lora_add(output, x, a, b, ids, None, mapping)
    exact = (x.double() @ a[-1, -1].double().T @ b[-1, -1].double().T).cpu()[:, None].expand(-1, 2, -1)
    low = (x @ a[-1, -1].T @ b[-1, -1].T).cpu()[:, None].expand(-1, 2, -1)
    assert_within_budget(output, exact, low, torch.bfloat16)


@pytest.mark.parametrize("virtual", [(128, 8), (128, 64), (512, 64)], ids=str)
def test_no_limit_on_virtual_experts(virtual: tuple[int, int]) -> None:
    layer = make_layer(700, experts=virtual[0], slots=virtual[1], hidden=64, inner=32)
    actual = fused_experts(layer.x, layer.w13, layer.w2, layer.weights, layer.ids, layer.lora, layer.mapping)
    assert_within_budget(
        actual, by_adapter(layer, torch.float64).cpu(), by_adapter(layer, torch.bfloat16).cpu(), torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(dtype=dtype, enabled=(True, False, True)), "cuda")
    lora = inputs.lora
    assert lora is not None
    tokens = (inputs.topk_ids, inputs.token_lora_mapping, lora.adapter_enabled)
    opcheck(ops.route.default, (*tokens, 6, 3))
    schedule = ops.route(*tokens, 6, 3)
    for planes, given in ((1, None), (4, schedule)):
        opcheck(ops.lora_shrink.default, (inputs.hidden_states, lora.gate_up_a, *tokens, given, 6, planes))
        output = torch.randn(17, 2, 48, device="cuda").to(dtype)
        shrunk = torch.randn(planes, 34, 16, device="cuda")
        args = (output, shrunk, lora.gate_up_b, *tokens, given, inputs.topk_weights, 6, 2)
        opcheck(ops.lora_expand_add_.default, args)
        args = (output, inputs.hidden_states, lora.gate_up_a, lora.gate_up_b, *tokens)
        opcheck(ops.lora_add_.default, (*args, given, inputs.topk_weights, 2))
    weights = (inputs.hidden_states, inputs.w13, inputs.w2, inputs.topk_weights, inputs.topk_ids)
    opcheck(ops.fused_experts.default, (*weights, None, *lora[:4], *tokens[1:]), inputs.kwargs)


def int4_quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int4 with a scale per output row, two values a byte."""
    scale = weight.float().abs().amax(-1, keepdim=True) / 7
    values = (weight.float() / scale).round().clamp(-8, 7).to(torch.int8) + 8
    return (values[..., 0::2] | (values[..., 1::2] << 4)).to(torch.uint8), scale


def dequantized(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
    return (values * scale).to(dtype)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int4"])
def test_hooks_around_a_foreign_layer(quantized: bool, sorts: bool) -> None:
    """Two plain GEMMs and an activation, or int4 weights behind a dequantizing GEMM, with the hooks in between."""
    layer = make_layer(20, odd_ids=False)
    if quantized:
        packed = [int4_quantized(weight) for weight in (layer.w13, layer.w2)]
        layer.w13, layer.w2 = (dequantized(*pair, torch.bfloat16) for pair in packed)
        w13, w2 = (dequantized(*pair, torch.bfloat16) for pair in packed)
    else:
        w13, w2 = layer.w13, layer.w2
    hooks = build_lora_hooks(layer.lora, layer.ids, layer.weights, layer.mapping)
    ids = layer.ids.long()
    cache1 = torch.einsum("mkoh,mh->mko", w13[ids], layer.x)
    hooks.after_gate_up(layer.x, cache1)
    h = F.silu(cache1[..., :128]) * cache1[..., 128:]
    cache3 = (torch.einsum("mkhi,mki->mkh", w2[ids], h) * layer.weights[..., None]).to(torch.bfloat16)
    hooks.after_down(h.flatten(0, 1), cache3)
    actual = cache3.float().sum(1).to(torch.bfloat16)
    assert_within_budget(
        actual, by_adapter(layer, torch.float64).cpu(), by_adapter(layer, torch.bfloat16).cpu(), torch.bfloat16
    )
