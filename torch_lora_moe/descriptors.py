"""What stands for a matrix in a launch whose kernel reads it through the copy engine, block by block."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Of cuda.h: what a tensor map is made of, and how.
MAP_BYTES = 128
_MAP_ALIGNMENT = 64
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_NOT_INTERLEAVED, _L2_LINES_OF_128_BYTES, _ZEROS_OUTSIDE = 0, 2, 0
# Maps kept for matrices of one shape: the layers of a model, and what torch's allocator hands out in turn.
MAX_MAPS = 256


class Address(NamedTuple):
    """Stands for a tensor where only its address is asked for."""

    pointer: int

    def data_ptr(self) -> int:
        """The address."""
        return self.pointer


# What a descriptor has beside its tensor and its sizes differs between versions of Triton.
_DESCRIPTOR_DEFAULTS = {field.name: field.default for field in fields(TensorDescriptor) if field.default is not MISSING}


def descriptor(tensor: Tensor, base: Any, block: Sequence[int]) -> SimpleNamespace:
    """A tensor ``[..., rows, columns]`` as Triton's launcher reads a tensor descriptor: all rows one by one.

    A block ``[slices, rows, columns]`` is taken from each of so many equal slices of the rows of a matrix.
    Triton's own class checks itself at each launch and keeps the tensor alive; ``base`` may be an `Address`.
    """
    columns, stride = tensor.shape[-1], tensor.stride(-2)
    shape, strides = [tensor.numel() // columns, columns], [stride, 1]
    if len(block) == 3:
        rows = tensor.shape[-2] // block[0]
        shape, strides = [shape[0] // rows, rows, columns], [rows * stride, *strides]
    sizes = {"shape": shape, "strides": strides, "block_shape": list(block)}
    return SimpleNamespace(base=base, **sizes, **_DESCRIPTOR_DEFAULTS)


class TensorMaps:
    """The driver's tensor maps of all matrices of one shape, made as Triton makes them and kept by their address."""

    def __init__(
        self,
        encode: Callable[..., int],
        dtype: torch.dtype,
        shape: Sequence[int],
        strides: Sequence[int],
        swizzle: int,
        box: Sequence[int],
    ) -> None:
        """As for `shaped_maps`."""
        rank, size = len(shape), dtype.itemsize
        self.encode, self.kind, self.shape, self.strides = encode, _DATA_TYPES[dtype], shape, strides
        # innermost first
        dimensions = (ctypes.c_uint64 * rank)(*reversed(shape))
        steps = (ctypes.c_uint64 * (rank - 1))(*(size * stride for stride in reversed(strides[:-1])))
        boxes, ones = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank)
        how = (_NOT_INTERLEAVED, swizzle, _L2_LINES_OF_128_BYTES, _ZEROS_OUTSIDE)
        self.rest = (dimensions, steps, boxes, ones, *how)
        self.kept: dict[int, tuple[int, Any]] = {}

    def __call__(self, pointer: int) -> tuple[int, Any]:
        """The address of the map of the matrix at ``pointer``, and what to keep as long as it is to stand there.

        Raises:
            RuntimeError: the driver takes no such matrix.
        """
        kept = self.kept.get(pointer)
        if kept is None:
            if len(self.kept) >= MAX_MAPS:
                self.kept.clear()
            kept = self.kept[pointer] = self._encoded(pointer)
        return kept

    def _encoded(self, pointer: int) -> tuple[int, Any]:
        memory = (ctypes.c_char * (MAP_BYTES + _MAP_ALIGNMENT))()
        place = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        rank = len(self.shape)
        result = self.encode(ctypes.c_void_p(place), self.kind, rank, ctypes.c_void_p(pointer), *self.rest)
        if result:
            raise RuntimeError(f"cuTensorMapEncodeTiled failed with CUDA error {result} for a matrix of {self.shape}")
        return place, memory


# The launches of many batches read the same weights.
_SHARED: WeakValueDictionary[Any, TensorMaps] = WeakValueDictionary()


def shaped_maps(
    encode: Callable[..., int],
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    swizzle: int,
    box: Sequence[int],
) -> TensorMaps:
    """The maps of all matrices of a shape, the same ones at every call.

    Args:
        encode: cuTensorMapEncodeTiled.
        dtype: of their elements.
        shape: theirs, the innermost dimension last.
        strides: elements from one to the next in each dimension, 1 in the last.
        swizzle: how a block stands in shared memory, as cuda.h numbers it and the kernel was compiled for.
        box: what is copied at once, in each dimension.
    """
    # functions of a library cannot be hashed; the maps hold theirs
    key = (id(encode), dtype, tuple(shape), tuple(strides), swizzle, tuple(box))
    maps = _SHARED.get(key)
    if maps is None:
        maps = _SHARED[key] = TensorMaps(encode, dtype, shape, strides, swizzle, box)
    return maps


def tensor_maps(
    encode: Callable[..., int], tensor: Tensor, block: Sequence[int], swizzle: int, box: Sequence[int]
) -> TensorMaps:
    """`shaped_maps` of what `descriptor` makes of ``tensor`` and ``block``."""
    whole = descriptor(tensor, None, block)
    return shaped_maps(encode, tensor.dtype, whole.shape, whole.strides, swizzle, box)
