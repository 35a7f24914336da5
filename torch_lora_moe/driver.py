"""Launches through the CUDA driver, from arguments that stay written.

Triton's own launch takes all arguments apart anew, constants and tensor descriptors among them, which takes several
times as long as the driver's call in which it ends. What is written here must be what the kernel reads: the driver
says which parameters it has, and where that is something else, Triton launches.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_lora_moe.descriptors import MAP_BYTES, TensorMaps, tensor_maps

# Of cuda.h: an attribute of a launch, and a result.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_INVALID_CONTEXT = 201
# How numbers are packed, by their types as Triton names them.
_PACKED = {"i32": "i", "i64": "q", "fp32": "f"}


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with a number as its value."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


_OVERLAPS = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)


@functools.cache
def cuda() -> Any:
    """The CUDA driver, None where there is none that tells a kernel's parameters (from 12.4 on it does)."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if hasattr(library, "cuFuncGetParamInfo") else None


def parameter_bytes(signature: Sequence[str], dimensions: Mapping[int, int]) -> list[int]:
    """Bytes of each parameter of a compiled kernel; none if there is a type that no launch here has.

    Args:
        signature: the types of its arguments, as Triton names them.
        dimensions: how many each tensor descriptor has, by the number of its argument.
    """
    sizes = []
    for index, kind in enumerate(signature):
        if index in dimensions:
            # the map, the shape and the strides
            sizes += [MAP_BYTES] + [4] * dimensions[index] + [8] * dimensions[index]
        elif kind[0] == "*":
            sizes.append(8)
        elif kind in _PACKED:
            sizes.append(struct.calcsize(_PACKED[kind]))
        elif kind != "constexpr":
            return []
    # addresses of memory that Triton provides, which no kernel here asks for
    return [*sizes, 8, 8]


def _told_parameters(driver: Any, function: int, most: int) -> list[int]:
    """Bytes of each parameter of a kernel by the driver, of one more than ``most`` at most."""
    offset, size, sizes = ctypes.c_size_t(), ctypes.c_size_t(), list[int]()
    while len(sizes) <= most:
        at = (ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size))
        # there is none of that number
        if driver.cuFuncGetParamInfo(ctypes.c_void_p(function), *at):
            break
        sizes.append(size.value)
    return sizes


def check(driver: Any, call: str, result: int) -> None:
    """Raises RuntimeError if a call of the driver failed."""
    if result:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{call} failed with CUDA error {result} ({(name.value or b'unknown').decode()})")


def make_context_current(driver: Any) -> None:
    """Gives this thread torch's context of the current device: a thread has none before it needs one."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver, "cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), torch._C._cuda_getDevice()))
    check(driver, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(driver, "cuCtxSetCurrent", driver.cuCtxSetCurrent(context))


# Of a kernel, in order: where an address will stand, a number as it is packed, or the maps of a matrix and where its
# address will stand.
Parameter = int | bytes | tuple[TensorMaps, int]


class WrittenLaunch:
    """A kernel with all of its arguments, but for tensors' addresses, which it reads where they will be written."""

    def __init__(
        self,
        driver: Any,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_memory: int,
        overlaps: bool,
        parameters: Sequence[Parameter],
        code: Any,
    ) -> None:
        """Writes a launch.

        Args:
            driver: the CUDA driver.
            function: its handle of the kernel.
            grid: programs in three dimensions.
            threads: of a program.
            shared_memory: bytes of a program.
            overlaps: whether it may start before the kernel before it has ended.
            parameters: all of the kernel's.
            code: what holds the kernel's code, kept as long as this launch.
        """
        self.launch, self.driver, self.code = driver.cuLaunchKernelEx, driver, code
        # the maps of an argument, its parameter, and its tensor's place
        self.maps: list[tuple[TensorMaps, int, Any]] = []
        written: list[int | None] = []
        numbers: list[bytes] = []
        for number, parameter in enumerate(parameters):
            if isinstance(parameter, bytes):
                # one behind the other, each from a multiple of 8 bytes on
                numbers.append(parameter.ljust(8, b"\0"))
                written.append(None)
            elif isinstance(parameter, tuple):
                # where a map stands is not known before a launch
                self.maps.append((parameter[0], number, ctypes.c_uint64.from_address(parameter[1])))
                written.append(0)
            else:
                written.append(parameter)
        self.numbers = (ctypes.c_uint64 * len(numbers)).from_buffer_copy(b"".join(numbers))
        standing = itertools.count(ctypes.addressof(self.numbers), 8)
        places = [next(standing) if place is None else place for place in written]
        self.parameters = (ctypes.c_void_p * len(places))(*places)
        self.used_maps: list[Any] = [None] * len(self.maps)
        attributes = (ctypes.addressof(_OVERLAPS), 1) if overlaps else (None, 0)
        self.config = _Config(grid, (threads, 1, 1), shared_memory, None, *attributes)
        self.arguments = (ctypes.byref(self.config), ctypes.c_void_p(function), self.parameters, None)

    def __call__(self, stream: int) -> None:
        """Launches on ``stream``; when it returns, the driver has read what is written."""
        for number, (maps, parameter, address) in enumerate(self.maps):
            used = self.used_maps[number] = maps(address.value)
            self.parameters[parameter] = used[0]
        self.config.stream = stream
        result = self.launch(*self.arguments)
        if result:
            if result == _INVALID_CONTEXT:
                make_context_current(self.driver)
                result = self.launch(*self.arguments)
            check(self.driver, "cuLaunchKernelEx", result)


def _tritons_parameters(
    signature: Sequence[str], places: Sequence[int], sizes: tuple[float, ...], maps: Mapping[int, TensorMaps]
) -> list[Parameter]:
    """All parameters of a kernel of Triton's; ``places``: of the first arguments, tensors; ``sizes``: the next ones."""
    written: list[Parameter] = []
    for index, kind in enumerate(signature):
        if index in maps:
            written.append((maps[index], places[index]))
            written += [struct.pack("i", size) for size in maps[index].shape]
            written += [struct.pack("q", stride) for stride in maps[index].strides]
        elif kind[0] == "*":
            written.append(places[index])
        elif kind != "constexpr":
            written.append(struct.pack(_PACKED[kind], sizes[index - len(places)]))
    # no memory of Triton's
    return [*written, bytes(8), bytes(8)]


def _is_plain(metadata: Any, num_matrices: int) -> bool:
    """Whether a kernel is launched as `WrittenLaunch` does: nothing but its arguments, programs each by itself."""
    noted = metadata.tensordesc_meta or ()
    if len(noted) != num_matrices or any(one["fp4_padded"] or one.get("is_im2col") for one in noted):
        return False
    # an instrumented kernel asks for memory
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    return metadata.num_ctas == 1 and not metadata.launch_cooperative_grid and not scratch


def written_launch(
    compiled: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    places: Sequence[int],
    sizes: tuple[float, ...],
    matrices: Mapping[int, list[int]],
) -> WrittenLaunch | None:
    """A launch of a compiled kernel through the driver, None where only Triton can be trusted with it.

    Args:
        compiled: what Triton returned of an earlier launch.
        grid: programs in three dimensions.
        tensors: the first arguments of an earlier launch, shaped as those of all that follow.
        places: where the address of each will stand.
        sizes: the arguments behind them, numbers.
        matrices: blocks of the tensors that go as tensor descriptors, by their number.
    """
    driver = cuda()
    if driver is None or not _is_plain(compiled.metadata, len(matrices)):
        return None
    noted = compiled.metadata.tensordesc_meta
    dimensions = {index: len(block) for index, block in matrices.items()}
    expected = parameter_bytes(list(compiled.src.signature.values()), dimensions)
    if not expected or expected != _told_parameters(driver, compiled.function, len(expected)):
        return None
    maps = {}
    for one, index in zip(noted or (), sorted(matrices), strict=True):
        how = (matrices[index], one["swizzle"], one["block_size"])
        maps[index] = tensor_maps(driver.cuTensorMapEncodeTiled, tensors[index], *how)
    metadata, signature = compiled.metadata, list(compiled.src.signature.values())
    parameters, threads = _tritons_parameters(signature, places, sizes, maps), 32 * metadata.num_warps
    memory, overlaps = metadata.shared, metadata.launch_pdl
    return WrittenLaunch(driver, compiled.function, grid, threads, memory, overlaps, parameters, compiled)
