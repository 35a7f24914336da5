"""What one launch needs, made once and kept: grid, constants, options and the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Plans kept for one op; batches of many sizes must not fill the memory.
MAX_PLANS = 4096


class Address(NamedTuple):
    """Stands for a tensor where only its address is asked for."""

    pointer: int

    def data_ptr(self) -> int:
        """The address."""
        return self.pointer


# What a descriptor has beside its tensor and its sizes differs between versions of Triton.
_DESCRIPTOR_DEFAULTS = {field.name: field.default for field in fields(TensorDescriptor) if field.default is not MISSING}


def descriptor(weight: Tensor, base: Any, block: list[int]) -> SimpleNamespace:
    """A weight ``[experts, rows, columns]`` as Triton's launcher reads a tensor descriptor: all rows one by one.

    Triton's own class checks itself at each launch and keeps the tensor alive; ``base`` may be an `Address`.
    """
    experts, rows, columns = weight.shape
    sizes = {"shape": [experts * rows, columns], "strides": [weight.stride(1), 1], "block_shape": block}
    return SimpleNamespace(base=base, **sizes, **_DESCRIPTOR_DEFAULTS)


class Plan:
    """One kernel with its grid and constants; the compiled kernel is kept after the first launch.

    The first ``aligned`` arguments are tensors whose data a compiled kernel expects at multiples of 16 bytes. With
    ``matrix_block`` the second one, a weight, goes as a tensor descriptor with blocks of that shape.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: dict[str, Any],
        config: tuple[int, int] = (4, 1),
        dependent: bool = False,
        aligned: int = 0,
        matrix_block: list[int] | None = None,
    ) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, tuple(constants.values())
        self.options: dict[str, Any] = {"num_warps": config[0], "num_stages": config[1]}
        if dependent:
            self.options["launch_pdl"] = True
        self.aligned, self.matrix_block = aligned, matrix_block
        self.compiled: Any = None

    def __call__(self, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        """Launches on the current stream: ``tensors`` are the kernel's first arguments, ``sizes`` the next."""
        # a launch from addresses spares Triton two calls for each tensor
        pointers: list[Any] = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers[: self.aligned]:
            bits |= pointer
        compiled = self.compiled
        if compiled is None or bits % 16 or _profiled():
            arguments: list[Any] = list(tensors)
            if self.matrix_block is not None:
                arguments[1] = TensorDescriptor(**vars(descriptor(tensors[1], tensors[1], self.matrix_block)))
            compiled = self.kernel[self.grid](*arguments, *sizes, *self.constants, **self.options)
            if not bits % 16:
                self.compiled = compiled
            return
        if self.matrix_block is not None:
            pointers[1] = descriptor(tensors[1], Address(pointers[1]), self.matrix_block)
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        # the call that Triton's own launch ends in, without the binding of arguments before it
        compiled.run(
            *self.grid,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *pointers,
            *sizes,
            *self.constants,
        )


def _profiled() -> bool:
    """Whether someone (a profiler) listens to Triton's launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def remember(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    """Keeps a plan, all of them up to `MAX_PLANS`."""
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[key] = plan


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs ``function`` with the device of its first argument current."""

    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch._C._cuda_getDevice():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return run
