"""Calls made of several launches: noted at first, then made again from addresses alone.

Each call of an op allocates, works out and launches the same as the last one with arguments of the same shapes. So the
first one notes its launches and where in memory each of their tensors comes from; from then on a call writes down the
addresses of its arguments, takes one piece of memory for all that lies between its launches, and launches.
"""

from __future__ import annotations

import abc
import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_lora_moe.driver import WrittenLaunch
from torch_lora_moe.plans import profiled

# Where tensors start, as memory comes from torch's allocator at least.
ALIGNMENT = 256


class Launch(Protocol):
    """What a `Run` is given to launch: a `plans.Plan`, or what else knows its kernel."""

    @property
    def compiled(self) -> Any:
        """The kernel, None before a first launch that compiles it."""

    @property
    def aligned(self) -> int:
        """How many of its first tensors must be at multiples of 16 bytes."""

    def __call__(self, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        """Launches on the current stream."""

    def written(
        self, tensors: Sequence[Tensor], places: Sequence[int], sizes: tuple[float, ...]
    ) -> WrittenLaunch | None:
        """The launch through the driver, None where it cannot be one."""


class Run:
    """The memory and the launches of one call; ``given``: its arguments that are tensors."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self.given = given
        self.result: Tensor | None = None
        self.between: list[Tensor] = []
        self.launches: list[tuple[Launch, tuple[Tensor, ...], tuple[float, ...]]] = []

    def new_result(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory for what the call returns."""
        self.result = like.new_empty(tuple(shape), dtype=dtype or like.dtype)
        return self.result

    def new(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that nothing reads after the last launch."""
        self.between.append(like.new_empty(tuple(shape), dtype=dtype or like.dtype))
        return self.between[-1]

    @property
    def tensors(self) -> list[Tensor | None]:
        """All of them: the arguments, the result, and the memory between launches."""
        return [*self.given, self.result, *self.between]

    def __call__(self, plan: Launch, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        """Launches; the tensors are the call's arguments, or from `new_result` or `new`."""
        plan(tensors, *sizes)
        self.launches.append((plan, tensors, sizes))


class _Written:
    """A call as it was noted: launches that read the addresses of its tensors where they stand in one table."""

    def __init__(self, run: Run) -> None:
        self.num_given, num_tensors = len(run.given), len(run.tensors)
        self.addresses = (ctypes.c_uint64 * num_tensors)()
        self.write = struct.Struct(f"{num_tensors}Q").pack_into
        self.result = None if run.result is None else (run.result.shape, run.result.dtype)
        self.offsets, self.bytes = list[int](), 0
        for tensor in run.between:
            self.offsets.append(self.bytes)
            self.bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        # arguments whose data a kernel expects at multiples of 16 bytes
        self.aligned: set[int] = set()
        self.launches: list[WrittenLaunch] = []
        self.lock = threading.Lock()

    def add(self, plan: Launch, tensors: tuple[Tensor, ...], slots: list[int], sizes: tuple[float, ...]) -> bool:
        """Adds a launch if the driver can make it; ``slots``: where in the table its tensors stand."""
        places = [ctypes.addressof(self.addresses) + 8 * slot for slot in slots]
        launch = plan.written(tensors, places, sizes)
        if launch is None:
            return False
        self.aligned |= {slot for slot in slots[: plan.aligned] if slot < self.num_given}
        self.launches.append(launch)
        return True

    def takes(self, pointers: list[int]) -> bool:
        """Whether arguments at these addresses are as the compiled kernels expect them."""
        bits = 0
        for slot in self.aligned:
            bits |= pointers[slot]
        return bits % 16 == 0

    def __call__(self, like: Tensor, pointers: list[int]) -> Tensor | None:
        """Makes the call; ``like``: a tensor of its device."""
        result = None
        if self.result is not None:
            result = like.new_empty(self.result[0], dtype=self.result[1])
        pointers.append(0 if result is None else result.data_ptr())
        if self.offsets:
            between = like.new_empty(self.bytes, dtype=torch.uint8)
            start = between.data_ptr()
            pointers += [start + offset for offset in self.offsets]
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        with self.lock:
            self.write(self.addresses, 0, *pointers)
            for launch in self.launches:
                launch(stream)
        return result


def _told_apart(tensors: Sequence[Tensor | None]) -> bool:
    """Whether no tensor is there twice, of which nobody could tell which one a launch means."""
    there = [id(tensor) for tensor in tensors if tensor is not None]
    return len(set(there)) == len(there)


class Steps(abc.ABC):
    """A call for arguments of the same shapes, which `run` makes step by step."""

    _written: _Written | None = None
    # whether the driver cannot make it
    _refused = False

    @abc.abstractmethod
    def run(self, run: Run, *args: Any) -> None:
        """Makes the call, all memory and launches through ``run``."""

    def __call__(self, *given: Tensor | None) -> Tensor | None:
        """The call, of tensors alone."""
        return self.make(given, *given)

    def make(self, given: Sequence[Tensor | None], *args: Any) -> Tensor | None:
        """The call: what `run` does with ``args``, of which ``given`` are all tensors, the first one not None.

        All but the tensors' addresses must be as in the first call.
        """
        written = self._written
        if written is not None and not profiled():
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in given]
            if written.takes(pointers):
                return written(given[0], pointers)  # type: ignore[arg-type]
        run = Run(given)
        self.run(run, *args)
        if written is None and run.launches and not self._refused and _told_apart(given):
            self._write(run)
        return run.result

    def _write(self, run: Run) -> None:
        """Keeps a run that has been made."""
        if any(plan.compiled is None for plan, _, _ in run.launches):
            # its tensors were not aligned, or it went into a graph or to the interpreter
            return
        written, slots = _Written(run), {id(tensor): slot for slot, tensor in enumerate(run.tensors)}
        for plan, tensors, sizes in run.launches:
            if not written.add(plan, tensors, [slots[id(tensor)] for tensor in tensors], sizes):
                self._refused = True
                return
        self._written = written
