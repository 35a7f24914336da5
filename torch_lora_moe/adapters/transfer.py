"""Copies into the slots of a pool on a stream of their own, so that batches go on meanwhile; on a CPU, plain copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SlotTransfers:
    """The stream that slots are written on, and the events that order it with the streams of the batches.

    A slot is written after the batches that used what was in it, and a batch that uses it runs after it is written;
    nobody waits on the host.
    """

    def __init__(self, device: torch.device, max_loras: int) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # when a slot was written, and the streams that go on after it
        self._written: dict[int, tuple[torch.cuda.Event, set[int]]] = {}
        # the last use of a slot by each stream
        self._released: dict[int, dict[int, torch.cuda.Event]] = {slot: {} for slot in range(max_loras)}

    @contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """What is done inside happens to the slot when nobody reads it any more."""
        if self._stream is None:
            yield
            return
        # batches that this thread has launched, and those that gave the slot back
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for event in self._released[slot].values():
            self._stream.wait_event(event)
        self._released[slot].clear()
        with torch.cuda.stream(self._stream):
            yield
        self._written[slot] = self._stream.record_event(), set()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies a matrix; from the CPU to a GPU through pinned memory, which the host does not wait for."""
        if self._stream is not None and source.is_cuda:
            # its owner may free it before the copy is done
            source.record_stream(self._stream)
        source = source.to(target.dtype)
        if self._stream is not None and not source.is_cuda:
            source = source.contiguous().pin_memory()
        target.copy_(source, non_blocking=True)

    def wait(self, slot: int) -> None:
        """Lets the current stream go on when the slot is written."""
        if self._stream is None or slot not in self._written:
            return
        stream, (event, waited) = torch.cuda.current_stream(self._stream.device), self._written[slot]
        if stream.cuda_stream not in waited:
            stream.wait_event(event)
            waited.add(stream.cuda_stream)

    def release(self, slots: Iterable[int]) -> None:
        """Notes that the current stream has launched a batch with what is in the slots."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self._stream.device)
        event = stream.record_event()
        for slot in slots:
            self._released[slot][stream.cuda_stream] = event
