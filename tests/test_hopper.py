"""The CUDA C++ of large batches, on the emulated machine of `hopper_machine.h`, beside each pair by itself."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch_lora_moe import hopper, reference
from torch_lora_moe.checks import FusedArguments
from torch_lora_moe.testing import error_budget

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


@dataclass(frozen=True)
class Example:
    """One product; ``counts``: pairs of each expert and slot, slot -1 first."""

    counts: tuple[tuple[int, ...], ...]
    inner: int = 136
    columns: int = 200
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    is_down: bool = False
    activation: str = "silu"
    is_gated: bool = True
    interleaved: bool = False
    bias: torch.dtype | None = None
    weights: torch.dtype = torch.float32
    shared: bool = False
    early: bool = True
    programs: int = 2


# many runs in a tile, tiles of several widths, experts with one pair, none, and no adapter at all
FEW = ((3, 40, 1, 17), (0, 0, 0, 0), (0, 150, 1, 2), (20, 0, 0, 0), (0, 0, 1, 0))
EVEN = ((0, 144, 0), (10, 60, 74), (9, 72, 70))
EXAMPLES = {
    "gate_up": Example(FEW, bias=torch.bfloat16),
    "gate_up_interleaved": Example(EVEN, rank=40, interleaved=True, activation="swigluoai", bias=torch.float32),
    "gate_up_f16": Example(EVEN, inner=192, columns=128, rank=8, dtype=torch.float16, activation="gelu_tanh"),
    "not_gated": Example(FEW, rank=72, is_gated=False, activation="relu2", columns=328, bias=torch.bfloat16),
    "no_lora": Example(FEW, rank=0, activation="gelu", early=False, columns=64),
    "down": Example(FEW, is_down=True, columns=264, bias=torch.bfloat16, weights=torch.bfloat16, interleaved=True),
    "down_shared": Example(EVEN, is_down=True, rank=96, shared=True, dtype=torch.float16, columns=256, inner=128),
    # more runs in a tile than a warp has lanes
    "down_many_slots": Example(((5, *([1, 2] * 30)), (0, *([3] * 60))), is_down=True, rank=16, columns=120),
    "down_without_lora": Example(EVEN, is_down=True, rank=0, early=False, programs=3),
}


@dataclass
class Inputs:
    """Its tensors, and what they are to give."""

    call: FusedArguments
    product: hopper.Product
    schedule: Tensor
    shrunk: Tensor
    out: Tensor


def make_inputs(example: Example, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    experts, slots, top_k = len(example.counts), max(len(example.counts[0]) - 1, 1), 2
    slices = 2 if example.is_gated and not example.is_down else 1

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = example.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    pairs = [(e, s - 1) for e, row in enumerate(example.counts) for s, n in enumerate(row) for _ in range(n)]
    # a pair that nobody computes, and a token's two pairs have its slot in common
    tokens = [pair for s in range(-1, slots) for pair in pairs if pair[1] == s]
    ids, mapping = torch.full((len(pairs), top_k), -1), torch.zeros(len(pairs), dtype=torch.int32)
    for token, (e, s) in enumerate(tokens):
        ids[token, token % 2], mapping[token] = e, s
    order = torch.randperm(len(pairs), generator=generator)
    ids, mapping = ids[order].to(torch.int32), mapping[order]
    schedule = reference.route(ids, mapping.tolist(), experts, 32, 64 if example.rank else 0)
    known = int(schedule[0, -1])
    assert known == len(pairs)
    x = normal(known if example.is_down else len(pairs), example.inner)
    w = normal(experts, slices * example.columns, example.inner, scale=example.inner**-0.5)
    b = normal(slots, 1 if example.shared else experts, slices * example.columns, max(example.rank, 8), scale=0.3)
    bias = None if example.bias is None else normal(experts, slices * example.columns, dtype=example.bias)
    weights = normal(len(pairs), top_k, dtype=example.weights)
    how = {"activation": example.activation, "is_gated": example.is_gated, "interleaved": example.interleaved}
    call = FusedArguments(x, w, w, weights, ids, swiglu_alpha=1.702, swiglu_limit=2.0, **how)  # type: ignore[arg-type]
    lora = b if example.rank else None
    product = hopper.Product(call, x, w, lora, bias, example.is_down, example.early)
    shrunk = normal(ids.numel(), slices * max(example.rank, 8))
    out = torch.full((ids.numel(), example.columns), float("nan"), dtype=example.dtype)
    return Inputs(call, product, schedule, shrunk, out)


def expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The product of each pair by itself, in ``dtype``."""
    product, call = inputs.product, inputs.call
    experts, rank, slices = product.w.shape[0], product.rank, product.slices
    out = inputs.out.to(dtype)
    for row in range(int(inputs.schedule[0, -1])):
        pair, virtual = int(inputs.schedule[0, row]), int(inputs.schedule[1, row])
        expert = int(call.topk_ids.flatten()[pair])
        value = product.w[expert].to(dtype) @ product.x[row if product.is_down else pair // 2].to(dtype)
        if product.bias is not None:
            value = value + product.bias[expert].to(dtype)
        halves = [value[0::2], value[1::2]] if slices == 2 and call.interleaved else list(value.chunk(slices))
        if product.b is not None and virtual >= 0:
            b = product.b[virtual // experts, 0 if product.b.shape[1] == 1 else expert].to(dtype).chunk(slices)
            halves = [
                half + b[i] @ inputs.shrunk[pair, i * rank : (i + 1) * rank].to(dtype) for i, half in enumerate(halves)
            ]
        if product.is_down:
            out[pair] = halves[0] * call.topk_weights.flatten()[pair].to(dtype)
        else:
            out[row] = reference.activate(
                torch.cat(halves), call.activation, call.is_gated, False, call.swiglu_alpha, call.swiglu_limit
            )
    return out


def library(values: dict[str, Any], folder: Path) -> ctypes.CDLL:
    """The kernel for the emulated machine."""
    _, behind = hopper.sources()
    defined = [f"#define {name} {value}" for name, value in values.items()]
    machine, launch = ((HERE / name).read_text() for name in ("hopper_machine.h", "hopper_run.h"))
    text = "\n".join([*defined, machine, behind, launch])
    folder.mkdir(exist_ok=True)
    (folder / "kernel.cpp").write_text(text)
    command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, check=True, cwd=folder)
    made = ctypes.CDLL(str(folder / "kernel.so"))
    made.leaves_last.restype = ctypes.c_bool
    return made


class Map(ctypes.Structure):
    """What stands for a matrix on the emulated machine."""

    _fields_ = [
        ("pointer", ctypes.c_uint64),
        ("swizzled", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 4),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint64 * 4),
        ("unused", ctypes.c_uint64 * 2),
    ]


def encode(place: Any, kind: int, rank: int, pointer: Any, sizes: Any, strides: Any, box: Any, *rest: Any) -> int:
    """Stands for the driver's function."""
    made = Map.from_address(place.value)
    ones = [1] * (4 - rank)
    made.pointer, made.swizzled = pointer.value, 16 << rest[2]
    made.sizes[:], made.box[:] = [*sizes, *ones], [*box, *ones]
    made.strides[:] = [2, *strides, *ones]
    return 0


def run(kernel: ctypes.CDLL, example: Example, inputs: Inputs, seed: int = 0) -> Tensor:
    """The result of the kernel on the emulated machine, NaN where it stores nothing."""
    product, out = inputs.product, inputs.out.clone()
    late = inputs.shrunk if example.early else inputs.schedule
    early = torch.empty_like(late)
    shrunk, schedule = (early, inputs.schedule) if example.early else (inputs.shrunk, early)
    b = product.w if product.b is None else product.b
    maps = (Map * 3)()
    for number, (made, tensor) in enumerate(
        zip(hopper.tensor_maps(encode, product), (product.w, b, product.x), strict=True)
    ):
        place, _kept = made(tensor.data_ptr())
        ctypes.memmove(ctypes.addressof(maps) + 128 * number, place, 128)
    bias = product.w if product.bias is None else product.bias
    tensors = (product.x, out, shrunk, bias, inputs.call.topk_weights, schedule)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    numbers = (ctypes.c_int(inputs.call.topk_ids.numel()), ctypes.c_float(1.702), ctypes.c_float(2.0))
    how = (ctypes.c_int(example.programs), ctypes.c_uint(seed))
    copied = (ctypes.c_void_p(early.data_ptr()), ctypes.c_void_p(late.data_ptr()), ctypes.c_uint64(late.nbytes))
    kernel.emulate(ctypes.byref(maps), *pointers, *numbers, *how, *copied)
    return out


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """One for each example, two compilers at a time."""
    folder = tmp_path_factory.mktemp("hopper")
    values = [hopper.constants(make_inputs(example).product) for example in EXAMPLES.values()]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(library, values, [folder / name for name in EXAMPLES])
        return dict(zip(EXAMPLES, made, strict=True))


def assert_right(example: Example, inputs: Inputs, actual: Tensor) -> None:
    oracle, low = expected(inputs, torch.float64), expected(inputs, example.dtype)
    assert torch.equal(actual.isnan(), oracle.isnan())
    stored = ~oracle.isnan()
    worst, rms = error_budget(oracle[stored], low[stored], example.dtype)
    error = (actual[stored].double() - oracle[stored]).abs()
    assert error.max() <= worst
    assert error.square().mean().sqrt() <= rms


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", EXAMPLES)
def test_product(name: str, kernels: dict[str, ctypes.CDLL]) -> None:
    example, inputs = EXAMPLES[name], make_inputs(EXAMPLES[name])
    results = [run(kernels[name], example, inputs, seed) for seed in range(2)]
    assert_right(example, inputs, results[0])
    # however its threads take turns
    assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0))


@needs_compiler
@pytest.mark.parametrize("name", ["gate_up", "down", "down_without_lora"])
def test_l2_keeps_results_of_down_where_no_weight_is_read_again(name: str, kernels: dict[str, ctypes.CDLL]) -> None:
    example, inputs = EXAMPLES[name], make_inputs(EXAMPLES[name])
    out = run(kernels[name], example, inputs)
    pairs = inputs.schedule[0, : int(inputs.schedule[0, -1])].long()
    experts = inputs.call.topk_ids.flatten()[pairs]
    alone = experts.bincount()[experts] <= hopper.MOST
    assert alone.unique().numel() == 2
    rows = pairs if example.is_down else torch.arange(len(pairs))
    last = [kernels[name].leaves_last(ctypes.c_void_p(out[row].data_ptr())) for row in rows]
    assert last == (alone & example.is_down).tolist()


@needs_compiler
@pytest.mark.parametrize("name", ["gate_up", "gate_up_f16", "down"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_adapters_change_nothing(name: str, value: float, kernels: dict[str, ctypes.CDLL]) -> None:
    """Pairs of the other slots share tiles and stages with those of slot 0 and of none."""
    example, inputs = EXAMPLES[name], make_inputs(EXAMPLES[name])
    known, experts = int(inputs.schedule[0, -1]), inputs.product.w.shape[0]
    pairs, virtuals = inputs.schedule[0, :known].long(), inputs.schedule[1, :known]
    clean = run(kernels[name], example, inputs)
    assert inputs.product.b is not None
    inputs.product.b[1:] = value
    inputs.shrunk[pairs[virtuals >= experts]] = value
    result = run(kernels[name], example, inputs)
    own = virtuals < experts
    rows = pairs[own] if example.is_down else own.nonzero().flatten()
    assert len(rows) > 60
    assert torch.equal(result[rows], clean[rows])


@needs_compiler
def test_an_adapter_that_is_infinite_is_felt(kernels: dict[str, ctypes.CDLL]) -> None:
    example, inputs = EXAMPLES["down"], make_inputs(EXAMPLES["down"])
    own = inputs.schedule[0, :-1][inputs.schedule[1, :-1] >= inputs.product.w.shape[0]].long()
    clean = run(kernels["down"], example, inputs)
    assert inputs.product.b is not None
    inputs.product.b[1:] = float("inf")
    assert (run(kernels["down"], example, inputs)[own] != clean[own]).all()
