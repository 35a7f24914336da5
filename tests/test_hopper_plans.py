"""Where a layer takes the CUDA C++ of large batches, what it tells the driver, and what the compiler makes of it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.backends import nvidia

from torch_lora_moe import hopper, launch, layer, nvrtc, plans, schedules
from torch_lora_moe.checks import FusedArguments
from torch_lora_moe.steps import Run

SHARED_MEMORY = 227 * 1024


def layer_call(
    tokens: int = 300,
    rank: int = 16,
    hidden: int = 136,
    inner: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    experts: int = 4,
    **how: Any,
) -> FusedArguments:
    slots, top_k = 3, 2

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, w13, w2 = empty(tokens, hidden), empty(experts, 2 * inner, hidden), empty(experts, hidden, inner)
    weights, ids = empty(tokens, top_k, dtype=torch.float32), empty(tokens, top_k, dtype=torch.int32)
    lora = (
        empty(slots, experts, 2 * rank, hidden),
        empty(slots, experts, 2 * inner, rank),
        empty(slots, experts, rank, inner),
        empty(slots, experts, hidden, rank),
    )
    mapping = empty(tokens, dtype=torch.int32)
    return FusedArguments(x, w13, w2, weights, ids, None, *(lora if rank else [None] * 4), mapping, **how)


def product(call: FusedArguments, is_down: bool = False) -> hopper.Product:
    if is_down:
        h = torch.empty(call.topk_ids.numel(), call.w2.shape[2], dtype=call.w2.dtype)
        return hopper.Product(call, h, call.w2, call.down_b, call.w2_bias, True, call.down_b is not None)
    return hopper.Product(
        call, call.hidden_states, call.w13, call.gate_up_b, call.w13_bias, False, call.gate_up_b is not None
    )


def shifted(tensor: Tensor) -> Tensor:
    """A tensor of the same shape whose data is at no multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


REFUSED = {
    "fp32": layer_call(dtype=torch.float32),
    "a rank of no whole copies": layer_call(rank=12),
    "rows of no whole copies": layer_call(hidden=132),
    "columns of no whole copies": layer_call(inner=100),
    "one step": layer_call(hidden=64),
    "x at an odd address": layer_call()._replace(hidden_states=shifted(layer_call().hidden_states)),
    "a weight at an odd address": layer_call()._replace(w13=shifted(layer_call().w13)),
    "B at an odd address": layer_call()._replace(gate_up_b=shifted(layer_call().gate_up_b)),
    "a transposed weight": layer_call()._replace(w13=torch.empty(4, 136, 256, dtype=torch.bfloat16).mT),
    "one weight for all experts": layer_call()._replace(w13=layer_call().w13[:1].expand(4, -1, -1)),
    "rows inside each other": layer_call()._replace(w13=layer_call().w13.as_strided((4, 256, 136), (256 * 64, 64, 1))),
    "rows of x with gaps": layer_call()._replace(hidden_states=torch.empty(300, 140, dtype=torch.bfloat16)[:, :136]),
    "more experts than there is room for": layer_call(experts=900, hidden=72, inner=8, tokens=1),
}


@pytest.fixture(autouse=True)
def _as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hopper, layer):
        monkeypatch.setattr(module, "shared_memory", lambda device: SHARED_MEMORY)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    assert not hopper.takes(product(REFUSED[name]))


@pytest.mark.parametrize("rank", [0, 8, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_taken(rank: int, dtype: torch.dtype) -> None:
    call = layer_call(rank=rank, dtype=dtype)
    assert hopper.takes(product(call))
    assert hopper.takes(product(call, is_down=True))


class Noted:
    """Stands for `hopper.ProductPlan`: notes what it is given."""

    compiled, aligned = object(), 5

    def __init__(self, product: hopper.Product, most_tiles: int) -> None:
        self.product, self.most_tiles = product, most_tiles
        self.calls: list[tuple[tuple[Tensor, ...], tuple[float, ...]]] = []

    def __call__(self, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        self.calls.append((tensors, sizes))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels in Triton of the calls that are made, none of which runs."""
    launched: list[str] = []
    monkeypatch.setattr(plans.Plan, "__call__", lambda plan, *args: launched.append(plan.kernel.__name__))
    monkeypatch.setattr(hopper, "ProductPlan", Noted)
    monkeypatch.setattr(hopper, "available", lambda device: True)
    for module in (launch, layer, schedules):
        monkeypatch.setattr(module, "overlaps", lambda device: True)
    return launched


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_both_products_of_a_layer(lora: bool, biased: bool, order: list[str]) -> None:
    bias = torch.empty(4, 256), torch.empty(4, 136)
    call = layer_call(rank=16 if lora else 0, w13_bias=bias[0] if biased else None, w2_bias=bias[1] if biased else None)
    plan = layer.TilePlan(call)
    assert isinstance(plan.tall_gate_up, Noted)
    assert isinstance(plan.tall_down, Noted)
    assert plan.first_tiles == 0
    assert [tall.product.early for tall in (plan.tall_gate_up, plan.tall_down)] == [lora, lora]
    # an expert's last tile need not be full
    assert plan.tall_gate_up.most_tiles >= 4 + 600 // hopper.MOST
    run = Run(())
    plan.run(run, call)
    assert order.count("shrink_runs") == (2 if lora else 0)
    assert order[-1] == "sum_pairs"
    assert "gate_up_tiles" not in order
    assert "down_tiles" not in order
    (first, numbers), (second, others) = plan.tall_gate_up.calls[0], plan.tall_down.calls[0]
    x, w13, h, shrunk, b, bias13, weights, schedule = first
    assert x is call.hidden_states
    assert w13 is call.w13
    assert weights is call.topk_weights
    assert numbers == others == (600, call.swiglu_alpha, call.swiglu_limit)
    assert second[0] is h
    assert second[1] is call.w2
    assert second[2].shape == (600, 136)
    assert second[6:] == (weights, schedule)
    if lora:
        assert b is call.gate_up_b
        assert second[4] is call.down_b
        assert (shrunk.shape, second[3].shape) == ((1, 600, 32), (1, 600, 16))
        assert shrunk.dtype == second[3].dtype == call.w13.dtype
    if biased:
        assert bias13 is bias[0]
        assert second[5] is bias[1]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("few pairs of each expert", layer_call(tokens=100)),
        ("rank vectors in planes", layer_call(tokens=300, experts=2, hidden=1032)),
        ("fp32", REFUSED["fp32"]),
        ("ahead-of-time packages", layer_call()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_stay_in_triton(
    name: str, call: FusedArguments, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "rank vectors in planes":
        monkeypatch.setattr(layer, "layer_shrink_config", lambda *sizes: (layer.LaunchConfig(64, 16, 64, 4, 3), 2, 1))
    if name == "ahead-of-time packages":
        monkeypatch.setattr(layer, "overlaps", lambda device: False)
    plan = layer.TilePlan(call)
    assert plan.tall_gate_up is None
    assert plan.tall_down is None


def test_one_product_alone(order: list[str]) -> None:
    """Each of the two is taken by itself, and reads and writes what the other one in Triton does."""
    plan = layer.TilePlan(layer_call()._replace(w2=shifted(layer_call().w2)))
    assert plan.tall_gate_up is not None
    assert plan.tall_down is None
    assert plan.first_tiles == 0


def test_what_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters, in the order of the kernel's own."""
    told: list[tuple[Any, ...]] = []

    def launched(config: Any, function: Any, parameters: Any, extra: None) -> int:
        kinds = [ctypes.c_uint64] * 9 + [ctypes.c_int32] + [ctypes.c_float] * 2
        values = [kind.from_address(place).value for kind, place in zip(kinds, parameters, strict=True)]
        config = config._obj
        told.append((tuple(config.grid), config.block[0], config.shared_memory, config.num_attributes, values))
        return 0

    def encode(place: Any, kind: int, rank: int, pointer: Any, *rest: Any) -> int:
        ctypes.c_uint64.from_address(place.value).value = pointer.value
        return 0

    driver = SimpleNamespace(cuLaunchKernelEx=launched, cuTensorMapEncodeTiled=encode)
    kernel = SimpleNamespace(function=7, shared_memory=hopper.shared_bytes(4))
    monkeypatch.setattr(hopper, "cuda", lambda: driver)
    monkeypatch.setattr(hopper, "cuda_kernel", lambda *what: kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    call = layer_call(experts=4)
    made, schedule = product(call, is_down=True), torch.empty(9, 601, dtype=torch.int32)
    y, shrunk, bias = torch.empty(600, 136), torch.empty(600, 16), torch.empty(4, 136)
    assert made.b is not None
    plan = hopper.ProductPlan(made, 8)
    plan((made.x, made.w, y, shrunk, made.b, bias, call.topk_weights, schedule), 600, 1.5, 7.0)
    ((grid, threads, memory, attributes, values),) = told
    assert (grid, threads, memory, attributes) == ((8, 1, 1), 384, hopper.shared_bytes(4), 1)
    named = {"w_map": made.w, "b_map": made.b, "token_map": made.x, "tokens": made.x, "out": y, "shrunk": shrunk}
    named |= {"bias": bias, "topk_weights": call.topk_weights, "schedule": schedule}
    expected = {name: tensor.data_ptr() for name, tensor in named.items()}
    expected |= {"num_pairs": 600, "alpha": 1.5, "limit": 7.0}
    signature = re.search(r"void expert_product\((.*?)\)", hopper.sources()[1], re.DOTALL)
    assert signature is not None
    names = [one.split()[-1].lstrip("*") for one in signature[1].split(",")]
    assert values == [expected[name] for name in names]


def large_call(rank: int, **how: Any) -> FusedArguments:
    """Shapes alone, of Qwen3-30B-A3B."""
    with torch.device("meta"):
        return layer_call(64, rank, 2048, 768, experts=128, **how)


LARGE = {
    "gate_up": product(large_call(16)),
    "gate_up_of_many_ranks": product(large_call(128, activation="swigluoai", interleaved=True)),
    "down": hopper.Product(
        large_call(64),
        torch.empty(128, 768, device="meta").bfloat16(),
        large_call(64).w2,
        large_call(64).down_b,
        None,
        True,
        True,
    ),
}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def machine_code(source: str, folder: Path) -> Path:
    """Compiled with what is there."""
    folder.mkdir()
    code = folder / "kernel.cubin"
    if nvrtc.version() >= hopper.OLDEST_COMPILER:
        code.write_bytes(nvrtc.compile_cuda(source, hopper.ARCHITECTURE))
        return code
    (folder / "kernel.cu").write_text(source)
    target = "arch=compute_90a,code=sm_90a"
    command = ["nvcc", "-cubin", "-gencode", target, "-std=c++17", "-o", str(code), str(folder / "kernel.cu")]
    subprocess.run(command, check=True, capture_output=True)
    return code


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton brings no cuobjdump")
@pytest.mark.skipif(
    nvrtc.version() < hopper.OLDEST_COMPILER and shutil.which("nvcc") is None,
    reason="no CUDA compiler of 12.9 or later",
)
def test_products_run_beside_each_other(tmp_path: Path) -> None:
    """As compiled: no register is spilled, and few waits stand between many products."""

    def compiled(name: str) -> tuple[str, str]:
        code = machine_code(hopper.source(hopper.constants(LARGE[name])), tmp_path / name)
        told = [
            subprocess.run([CUOBJDUMP, what, code], check=True, capture_output=True, text=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        ]
        return told[0], told[1]

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(LARGE, pool.map(compiled, LARGE), strict=True))
    for name, (resources, code) in results.items():
        assert "STACK:0 " in resources, name
        products, waits = len(re.findall("HGMMA", code)), len(re.findall("WARPGROUP.DEPBAR", code))
        assert products >= 18 * 8
        # one for each width of a loop over stages, and one behind them
        assert waits <= 18 + 4 + 1, name
