"""Calls that are made again from addresses, with a driver that notes what it is told."""

from __future__ import annotations

import ctypes
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch_lora_moe import descriptors, driver, plans, steps
from torch_lora_moe.plans import Plan
from torch_lora_moe.steps import Run, Steps

STREAM = 77
MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [8, 64], "fp4_padded": False}


class Kernel:
    """Stands for a kernel that Triton compiles at its first launch; ``types``: those of its arguments."""

    def __init__(self, *types: str, maps: int = 0, **metadata: Any) -> None:
        self.tritons: list[tuple[Any, ...]] = []
        signature = {f"argument_{number}": kind for number, kind in enumerate(types)}
        noted = {"num_warps": 8, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "shared": 4096}
        noted |= {"global_scratch_size": 0, "profile_scratch_size": 0}
        self.compiled = SimpleNamespace(
            function=id(self),
            packed_metadata=None,
            src=SimpleNamespace(signature=signature),
            metadata=SimpleNamespace(**{**noted, **metadata}, tensordesc_meta=[MAP] * maps),
            run=lambda *arguments: self.tritons.append(arguments),
        )
        dimensions = {i: 2 for i, kind in enumerate(types) if kind.startswith("tensordesc")}
        self.told = driver.parameter_bytes(list(types), dimensions)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.tritons.append(arguments)
            return self.compiled

        return launch


class Function:
    """Stands for a function of a library, which cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> int:
        result: int = self.call(*arguments)
        return result


class Driver:
    """Stands for the CUDA driver: what it is told to launch, argument by argument, as the numbers that stand there."""

    def __init__(self, *kernels: Kernel) -> None:
        self.kernels = {kernel.compiled.function: kernel for kernel in kernels}
        self.launches: list[SimpleNamespace] = []
        self.encoded: list[tuple[Any, ...]] = []
        # of the next launches, from the last one on
        self.results: list[int] = []
        self.encoding = 0
        self.contexts = 0
        self.pause = 0.0
        self.cuFuncGetParamInfo = Function(self._tell_parameter)
        self.cuTensorMapEncodeTiled = Function(self._encode)
        self.cuLaunchKernelEx = Function(self._launch)
        self.cuGetErrorName = Function(self._name)
        self.cuDeviceGet = Function(lambda device, ordinal: 0)
        self.cuDevicePrimaryCtxRetain = Function(self._retain)
        self.cuCtxSetCurrent = Function(self._set_current)

    def _tell_parameter(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        told = self.kernels[function.value].told
        if index.value >= len(told):
            return 1
        size._obj.value = told[index.value]
        return 0

    def _encode(self, place: Any, *what: Any) -> int:
        kind, rank, pointer, sizes, strides, box, steps, *how = what
        assert place.value % 64 == 0
        ctypes.c_uint64.from_address(place.value).value = pointer.value
        self.encoded.append((kind, rank, pointer.value, *map(list, (sizes, strides, box, steps)), *how))
        return self.encoding

    def _launch(self, config: Any, function: Any, parameters: Any, extra: None) -> int:
        told, config = self.kernels[function.value].told, config._obj
        kinds = {4: ctypes.c_int32, 8: ctypes.c_int64, 128: ctypes.c_int64}
        before = [kinds[size].from_address(place).value for size, place in zip(told, parameters, strict=True)]
        time.sleep(self.pause)
        values = [kinds[size].from_address(place).value for size, place in zip(told, parameters, strict=True)]
        attribute = driver._Attribute.from_address(config.attributes) if config.num_attributes else None
        sizes = {"grid": tuple(config.grid), "block": tuple(config.block), "shared": config.shared_memory}
        how = {"stream": config.stream, "pdl": attribute and (attribute.id, attribute.value)}
        self.launches.append(
            SimpleNamespace(function=function.value, values=values, steady=before == values, **sizes, **how)
        )
        return self.results.pop() if self.results else 0

    def _name(self, result: int, name: Any) -> int:
        name._obj.value = {700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(result)
        return 0

    def _retain(self, context: Any, device: Any) -> int:
        context._obj.value = 5
        return 0

    def _set_current(self, context: Any) -> int:
        assert context.value == 5
        self.contexts += 1
        return 0


class Example(Steps):
    """Two launches with memory between them."""

    def __init__(self, **metadata: Any) -> None:
        self.first = Kernel("*bf16", "tensordesc<bf16[8, 64]>", "*bf16", "i32", "fp32", "constexpr", maps=1, **metadata)
        self.second = Kernel("*bf16", "*i32", "*bf16", "constexpr", launch_pdl=True, num_warps=1, shared=0)
        matrices = {1: [8, 64]}
        self.plans = (
            Plan(self.first, (3, 2, 1), {"BLOCK": 64}, aligned=3, matrices=matrices),
            Plan(self.second, (5, 1, 1), {"BLOCK": 16}, aligned=1),
        )

    def run(self, run: Run, x: Tensor, w: Tensor, ids: Tensor, bias: Tensor | None) -> None:
        h, unused = run.new(x, (7, 5)), run.new(x, (3,), torch.float32)
        out = run.new_result(x, (4, 2))
        run(self.plans[0], (x, w, h), 9, 2.5)
        run(self.plans[1], (h, ids, out))
        assert unused.dtype == torch.float32

    @property
    def by_triton(self) -> int:
        """Launches that Triton made."""
        return len(self.first.tritons) + len(self.second.tritons)


def arguments() -> tuple[Tensor, Tensor, Tensor, None]:
    x, w = torch.randn(4, 2).bfloat16(), torch.randn(3, 8, 64).bfloat16()
    return x, w, torch.randint(0, 9, (4,)).int(), None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver that knows the kernels of examples made with it."""
    fake = Driver()
    monkeypatch.setattr(driver, "cuda", lambda: fake)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return fake


def example(cuda: Driver, **metadata: Any) -> Example:
    made = Example(**metadata)
    cuda.kernels |= {kernel.compiled.function: kernel for kernel in (made.first, made.second)}
    return made


def test_later_calls_launch_from_addresses(cuda: Driver) -> None:
    steps_of = example(cuda)
    noted = arguments()
    assert steps_of(*noted).shape == (4, 2)  # type: ignore[union-attr]
    assert steps_of.by_triton == 2
    assert not cuda.launches
    for _ in range(3):
        x, w, ids, bias = arguments()
        out = steps_of(x, w, ids, bias)
        assert out is not None
        assert out.shape == (4, 2)
        assert out.dtype == torch.bfloat16
        first, second = cuda.launches[-2:]
        assert steps_of.by_triton == 2
        assert (first.function, second.function) == (id(steps_of.first), id(steps_of.second))
        assert (first.grid, first.block, first.shared, first.pdl) == ((3, 2, 1), (256, 1, 1), 4096, None)
        assert (second.grid, second.block, second.shared, second.pdl) == ((5, 1, 1), (32, 1, 1), 0, (6, 1))
        assert first.stream == second.stream == STREAM
        h = second.values[0]
        half = ctypes.c_int32.from_buffer(ctypes.c_float(2.5)).value
        # the map (of which the driver here writes the address), 24 rows of 64 columns, their strides
        weight = [w.data_ptr(), 24, 64, 64, 1]
        assert first.values == [x.data_ptr(), *weight, h, 9, half, 0, 0]
        assert second.values == [h, ids.data_ptr(), out.data_ptr(), 0, 0]
        assert h % 16 == 0
        assert h not in {tensor.data_ptr() for tensor in (x, w, ids, out)}


def test_tensors_between_launches_do_not_overlap() -> None:
    run = Run((torch.zeros(1),))
    sizes = [(7, 5), (1,), (0,), (1000,), (3,)]
    for size in sizes:
        run.new(torch.zeros(1, dtype=torch.int32), size, torch.bfloat16)
    written = steps._Written(run)
    ends = [offset + 2 * torch.Size(size).numel() for offset, size in zip(written.offsets, sizes, strict=True)]
    assert all(offset % 16 == 0 for offset in written.offsets)
    assert all(end <= start for end, start in zip(ends, [*written.offsets[1:], written.bytes], strict=True))


def other_parameters(made: Example) -> None:
    made.second.told[1] = 16


def one_parameter_more(made: Example) -> None:
    made.second.told.append(8)


def one_parameter_less(made: Example) -> None:
    made.first.told.pop()


def unknown_type(made: Example) -> None:
    made.second.compiled.src.signature["argument_1"] = "u16"


def several_programs_together(made: Example) -> None:
    made.first.compiled.metadata.num_ctas = 2


def cooperative(made: Example) -> None:
    made.first.compiled.metadata.launch_cooperative_grid = True


def instrumented(made: Example) -> None:
    made.second.compiled.metadata.profile_scratch_size = 128


def memory_of_its_own(made: Example) -> None:
    made.second.compiled.metadata.global_scratch_size = 128


def no_maps(made: Example) -> None:
    made.first.compiled.metadata.tensordesc_meta = []


CHANGES = [
    other_parameters,
    one_parameter_more,
    one_parameter_less,
    unknown_type,
    several_programs_together,
    cooperative,
    instrumented,
    memory_of_its_own,
    no_maps,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_expected_is_left_to_triton(cuda: Driver, change: Any) -> None:
    steps_of = example(cuda)
    change(steps_of)
    for calls in range(1, 4):
        assert steps_of(*arguments()) is not None
        assert steps_of.by_triton == 2 * calls
    assert not cuda.launches


def test_without_a_driver_triton_launches(cuda: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuda", lambda: None)
    steps_of = example(cuda)
    for _ in range(3):
        steps_of(*arguments())
    assert steps_of.by_triton == 6


def test_what_is_not_aligned_goes_step_by_step(cuda: Driver) -> None:
    steps_of = example(cuda)
    x, w, ids, _ = arguments()
    for _ in range(2):
        steps_of(x, w, ids, None)
    shifted = torch.empty(9, dtype=torch.bfloat16)[1:].view(4, 2)
    assert len(cuda.launches) == 2
    steps_of(shifted, w, ids, None)
    assert len(cuda.launches) == 2
    assert steps_of.by_triton == 4
    # only the kernels' first arguments must be aligned
    steps_of(x, w, torch.empty(5, dtype=torch.int32)[1:], None)
    assert len(cuda.launches) == 4
    assert steps_of.by_triton == 4


def test_a_profiler_sees_every_launch(cuda: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_of = example(cuda)
    for _ in range(2):
        steps_of(*arguments())
    monkeypatch.setattr(plans.triton.knobs.runtime, "launch_enter_hook", lambda data: None)
    steps_of(*arguments())
    assert len(cuda.launches) == 2
    assert steps_of.by_triton == 4


class Twice(Steps):
    """Which of its arguments the kernel reads cannot be seen of a call with one tensor for both."""

    def __init__(self) -> None:
        self.kernel = Kernel("*bf16", "*bf16")
        self.plan = Plan(self.kernel, (1, 1, 1), {})

    def run(self, run: Run, x: Tensor, y: Tensor) -> None:
        run(self.plan, (y, x))


def test_one_tensor_as_two_arguments_is_not_noted(cuda: Driver) -> None:
    steps_of = Twice()
    cuda.kernels[steps_of.kernel.compiled.function] = steps_of.kernel
    x, y = (torch.zeros(8) for _ in range(2))
    steps_of(x, x)
    steps_of(x, y)
    assert not cuda.launches
    steps_of(x, y)
    steps_of(y, y)
    assert [launch.values[:2] for launch in cuda.launches] == [[y.data_ptr(), x.data_ptr()], [y.data_ptr()] * 2]


def test_nothing_to_launch_is_not_noted(cuda: Driver) -> None:
    class Nothing(Steps):
        def run(self, run: Run, x: Tensor) -> None:
            run.new_result(x, (3,)).zero_()

    steps_of = Nothing()
    for _ in range(3):
        assert torch.equal(steps_of(torch.ones(1)), torch.zeros(3))  # type: ignore[arg-type]


def test_a_thread_without_a_context_gets_torchs(cuda: Driver) -> None:
    steps_of = example(cuda)
    steps_of(*arguments())
    cuda.results = [0, 201]
    steps_of(*arguments())
    assert cuda.contexts == 1
    assert len(cuda.launches) == 3
    cuda.results = [700]
    with pytest.raises(
        RuntimeError, match=r"cuLaunchKernelEx failed with CUDA error 700 \(CUDA_ERROR_ILLEGAL_ADDRESS\)"
    ):
        steps_of(*arguments())
    steps_of(*arguments())


def test_threads_do_not_mix_their_addresses(cuda: Driver) -> None:
    steps_of = example(cuda)
    steps_of(*arguments())
    cuda.pause = 1e-4
    own: list[tuple[int, int]] = []

    def call() -> None:
        for _ in range(20):
            x, w, ids, _ = arguments()
            steps_of(x, w, ids, None)
            own.append((x.data_ptr(), ids.data_ptr()))
            kept.append((x, ids))

    kept: list[Any] = []
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(launch.steady for launch in cuda.launches)
    seen = [(cuda.launches[i].values[0], cuda.launches[i + 1].values[1]) for i in range(0, len(cuda.launches), 2)]
    assert len(seen) == 80
    assert sorted(seen) == sorted(own)


def test_maps_are_those_that_triton_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told to the driver is what Triton's own launcher tells it of the same descriptor."""
    import inspect

    import triton.backends.nvidia.driver as tritons

    told: list[tuple[Any, ...]] = []

    def note(*what: Any) -> int:
        told.append(what)
        return 0

    utils = SimpleNamespace(fill_tma_descriptor=note, fill_tma_descriptor_tiled=note)
    monkeypatch.setattr(tritons.triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    cuda = Driver()
    weight = torch.zeros(3, 20, 64, dtype=torch.bfloat16)[:, :, :48]
    for block, swizzle, box in (([16, 32], 2, [16, 32]), ([2, 8, 64], 3, [2, 8, 64])):
        own = descriptors.descriptor(weight, weight, block)
        # how the compiler numbers bfloat16
        noted = {**MAP, "swizzle": swizzle, "block_size": box, "elem_type": 10}
        extra = [None] * (len(inspect.signature(tritons.make_tensordesc_arg).parameters) - 2)
        sizes = tritons.make_tensordesc_arg(own, noted, *extra)[1:]
        address, their_swizzle, size, kind, their_box, shape, strides, padding = told.pop()
        maps = descriptors.tensor_maps(cuda.cuTensorMapEncodeTiled, weight, block, swizzle, box)
        place, _ = maps(weight.data_ptr())
        rest = ([1] * len(box), 0, their_swizzle, 2, padding)
        strides_of_bytes = [size * stride for stride in reversed(strides[:-1])]
        whole = (list(reversed(shape)), strides_of_bytes, list(reversed(their_box)))
        assert cuda.encoded.pop() == (kind, len(box), address, *whole, *rest)
        assert [*maps.shape, *maps.strides] == sizes
        assert ctypes.c_int64.from_address(place).value == address


def test_maps_are_kept_by_address_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Driver()
    weight = torch.zeros(20, 64, dtype=torch.float16)
    how = (cuda.cuTensorMapEncodeTiled, weight, [16, 32], 2, [16, 32])
    maps = descriptors.tensor_maps(*how)
    assert maps is descriptors.tensor_maps(*how)
    assert maps is not descriptors.tensor_maps(*how[:3], 1, [16, 32])
    monkeypatch.setattr(descriptors, "MAX_MAPS", 3)
    first = maps(640)
    assert maps(640) is first
    assert len(cuda.encoded) == 1
    for pointer in (16, 32, 48, 64):
        maps(pointer)
        assert len(maps.kept) <= 3
    # what a launch holds stays where it is
    assert ctypes.c_int64.from_address(first[0]).value == 640
    cuda.encoding = 1
    with pytest.raises(RuntimeError, match=r"CUDA error 1 for a matrix of \[20, 64\]"):
        maps(128)
    assert 128 not in maps.kept
