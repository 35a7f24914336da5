"""Whether calls from addresses tell the driver, byte for byte, what Triton's own launcher tells it.

``python compare_launches.py LIBRARY``: the driver is the one of ``cuda_driver.c``, which Triton must find through the
environment. Kernels are compiled for compute capability 9.0 and nothing runs.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.backends.nvidia.driver as tritons
from compiling import parameter_bytes, source
from torch import Tensor
from triton.backends.compiler import GPUTarget

from torch_lora_moe import driver, launch, layer, plans, schedules
from torch_lora_moe.checks import NUM_TENSORS, FusedArguments
from torch_lora_moe.steps import Run, Steps

STREAM = 4711
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
library.stub_take.restype = ctypes.c_size_t
compiled_kernels: list[Any] = []


def compile_instead(plan: plans.Plan, tensors: tuple[Tensor, ...], sizes: tuple[float, ...]) -> None:
    """Stands for a first launch: what it compiles is kept with Triton's own launcher."""
    what = source(plan, tensors, sizes)
    compiled = triton.compile(what, target=GPUTarget("cuda", 90, 32), options=plan.options)
    own = tritons.CudaLauncher(compiled.src, compiled.metadata)
    kept = SimpleNamespace(
        run=own, **{name: getattr(compiled, name) for name in ("packed_metadata", "src", "metadata")}
    )
    kept.function = id(kept)
    compiled_kernels.append(kept)
    for size in parameter_bytes(compiled.asm["ptx"]):
        library.stub_add_parameter(ctypes.c_void_p(kept.function), ctypes.c_size_t(size))
    plan.compiled = kept


def told() -> bytes:
    """All that the driver was told since the last time."""
    out = ctypes.create_string_buffer(1 << 20)
    length = library.stub_take(out)
    return out.raw[:length]


def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype)


def layer_call(num_tokens: int, rank: int, hidden: int, inner: int) -> FusedArguments:
    slots, experts, top_k = 4, 8, 2
    shapes = ((2 * rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank))
    lora = [empty(slots, experts, *shape) for shape in shapes]
    weights, ids = empty(num_tokens, top_k, dtype=torch.float32), empty(num_tokens, top_k, dtype=torch.int32)
    matrices = (empty(experts, 2 * inner, hidden), empty(experts, hidden, inner))
    call = (empty(num_tokens, hidden), *matrices, weights, ids, None, *lora, empty(num_tokens, dtype=torch.int32))
    return FusedArguments(*call, routed_scaling_factor=2.5)  # type: ignore[arg-type]


def compare(steps: Steps, given: tuple[Tensor | None, ...], *args: Any) -> int:
    """Bytes of the launches of a call, those of Triton and those from addresses being the same."""
    steps.make(given, *args)
    assert not told()
    assert steps._written is not None, "left to Triton"
    run = Run(given)
    steps.run(run, *args)
    by_triton = told()
    # where the same tensors stand
    written = steps._written
    written.write(written.addresses, 0, *[0 if tensor is None else tensor.data_ptr() for tensor in run.tensors])
    for one in written.launches:
        one(STREAM)
    assert told() == by_triton
    return len(by_triton)


def main() -> None:
    for module in (launch, layer, schedules):
        module.overlaps = lambda device: True  # type: ignore[attr-defined]
    layer.shared_memory = lambda device: 227 * 1024  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    torch._C._cuda_getDevice = lambda: 0
    active = tritons.CudaDriver.__new__(tritons.CudaDriver)
    active.utils, active.launcher_cls = tritons.CudaUtils(), tritons.CudaLauncher
    active.allocate_default_profile_scratch = lambda *sizes: None
    triton.runtime.driver.set_active(active)
    driver.cuda = lambda: library  # type: ignore[assignment]
    plans.Plan._launch_with_triton = compile_instead  # type: ignore[method-assign]
    # few tokens, sorted ones, and tall tiles with runs and three dimensions
    for sizes in ((1, 16, 256, 128), (40, 24, 200, 120), (3000, 16, 1024, 640)):
        call = layer_call(*sizes)
        plan = layer._plan(call)
        assert isinstance(plan, Steps)
        print(sizes, compare(plan, call[:NUM_TENSORS], call), "bytes")  # type: ignore[arg-type]
        if sizes[0] == 3000:
            assert isinstance(plan, layer.TilePlan)
            assert plan.has_runs
            assert any(len(block) == 3 for block in plan.gate_up[0].plan.matrices.values())
    x, ids, mapping = empty(41, 256), empty(41, 2, dtype=torch.int32), empty(41, dtype=torch.int32)
    given = (empty(41, 2, 512), x, empty(4, 8, 32, 256), empty(4, 8, 512, 16), ids, mapping, None, None, None)
    print("lora_add_", compare(launch.AddPlan(*given, 2), given, *given), "bytes")


if __name__ == "__main__":
    main()
