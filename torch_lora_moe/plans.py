"""What one launch needs, made once and kept: grid, constants, options and the compiled kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from torch_lora_moe.config import has_dependent_launch
from torch_lora_moe.descriptors import Address, descriptor
from torch_lora_moe.driver import WrittenLaunch, written_launch

# Plans kept for one op; batches of many sizes must not fill the memory.
MAX_PLANS = 4096
_ALL_PLANS: list[dict[Any, Any]] = []
# Whether launches go into a graph.
_traced = False


class Plan:
    """One kernel with its grid and constants; the compiled kernel is kept after the first launch.

    The first ``aligned`` arguments are tensors whose data a compiled kernel expects at multiples of 16 bytes. Those of
    ``matrices``, by number, go as tensor descriptors with blocks of the shape given there. ``registers``: the most that
    a thread may take.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: dict[str, Any],
        config: tuple[int, int] = (4, 1),
        dependent: bool = False,
        aligned: int = 0,
        matrices: dict[int, list[int]] | None = None,
        registers: int | None = None,
    ) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, tuple(constants.values())
        self.options: dict[str, Any] = {"num_warps": config[0], "num_stages": config[1]}
        if dependent:
            self.options["launch_pdl"] = True
        if registers is not None:
            self.options["maxnreg"] = registers
        self.aligned, self.matrices = aligned, matrices or {}
        self.descriptors: dict[int, SimpleNamespace] = {}
        self.compiled: Any = None

    def __call__(self, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        """Launches on the current stream: ``tensors`` are the kernel's first arguments, ``sizes`` the next."""
        compiled = self.compiled
        if compiled is None or profiled():
            self._launch_with_triton(tensors, sizes)
            return
        # a launch from addresses spares Triton two calls for each tensor
        pointers: list[Any] = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers[: self.aligned]:
            bits |= pointer
        if bits % 16:
            self._launch_with_triton(tensors, sizes)
            return
        for index in self.matrices:
            pointers[index] = self._descriptor(index, tensors[index], pointers[index])
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

    def written(
        self, tensors: Sequence[Tensor], places: Sequence[int], sizes: tuple[float, ...]
    ) -> WrittenLaunch | None:
        """The launch through the driver, None where that is left to Triton; see `driver.written_launch`."""
        return written_launch(self.compiled, self.grid, tensors, places, sizes, self.matrices)

    def _descriptor(self, index: int, tensor: Tensor, pointer: int) -> SimpleNamespace:
        """The descriptor of an argument, the one of the launch before where it stands at the same address."""
        kept = self.descriptors.get(index)
        if kept is None or kept.base.pointer != pointer:
            kept = self.descriptors[index] = descriptor(tensor, Address(pointer), self.matrices[index])
        return kept

    def _launch_with_triton(self, tensors: tuple[Tensor, ...], sizes: tuple[float, ...]) -> None:
        """As Triton itself launches; the kernel is kept if the tensors are aligned. While traced, only noted."""
        if _traced:
            noted = torch.library.wrap_triton(self.kernel)[self.grid]
            noted(*tensors, *sizes, *self.constants, **self.options)
            return
        arguments: list[Any] = list(tensors)
        for index, block in self.matrices.items():
            arguments[index] = TensorDescriptor(**vars(descriptor(tensors[index], tensors[index], block)))
        # Triton 3.10 and later do not without being asked
        fused = {"enable_fp_fusion": True}
        compiled = self.kernel[self.grid](*arguments, *sizes, *self.constants, **self.options, **fused)
        if not misalignment(*tensors[: self.aligned]):
            self.compiled = compiled


def misalignment(*tensors: Tensor) -> int:
    """How far the data of each of the tensors is off a multiple of 16 bytes, in four bits each.

    0 where all are at one, and while traced: a package aligns them.
    """
    bits = 0
    for tensor in () if _traced else tensors:
        bits = bits << 4 | tensor.data_ptr() & 15
    return bits


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one it depends on has ended; packages made ahead of time cannot say so."""
    return has_dependent_launch(device) and not _traced


def profiled() -> bool:
    """Whether someone (a profiler) listens to Triton's launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def new_plans() -> dict[Any, Any]:
    """Where an op keeps its plans."""
    _ALL_PLANS.append({})
    return _ALL_PLANS[-1]


@contextlib.contextmanager
def traced_launches() -> Iterator[None]:
    """Inside, launches become nodes of the graph that is traced, with their kernels, instead of going to the GPU."""
    global _traced
    kept = [(plans, dict(plans)) for plans in _ALL_PLANS]
    for plans in _ALL_PLANS:
        plans.clear()
    _traced = True
    try:
        yield
    finally:
        _traced = False
        # those of modules that were first imported inside are of traced launches alone
        for plans in _ALL_PLANS:
            plans.clear()
        for plans, before in kept:
            plans.update(before)


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
