"""The order of slot writes and batches, with streams that only note what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from torch_lora_moe.adapters.transfer import SlotTransfers


class Stream:
    """A stream whose log says what it waits for and what runs on it."""

    numbers = count()

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda_stream, self.log = device, next(self.numbers), []

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("after", other.record_event()))

    def wait_event(self, event: tuple[int, int]) -> None:
        self.log.append(("after", event))

    def record_event(self) -> tuple[int, int]:
        """The point that the stream has come to."""
        return self.cuda_stream, len(self.log)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[SlotTransfers, Stream, list[Stream]]:
    """Transfers, their own stream, and the current one as the last of a list."""
    device = torch.device("cuda", 0)
    current = [Stream(device)]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    transfers = SlotTransfers(device, 2)
    own = transfers._stream
    assert isinstance(own, Stream)
    return transfers, own, current


def write(transfers: SlotTransfers, current: list[Stream], slot: int) -> None:
    with transfers.writing(slot):
        current[-1].log.append(("write", slot))


def test_a_slot_is_written_after_its_batches_and_used_after_it_is_written(
    streams: tuple[SlotTransfers, Stream, list[Stream]],
) -> None:
    transfers, own, current = streams
    first = current[-1]
    write(transfers, current, 1)
    transfers.wait(1)
    assert first.log == [("after", (own.cuda_stream, len(own.log)))]
    second = Stream(own.device)
    current.append(second)
    transfers.wait(1)
    second.log.append("batch")
    transfers.release([1])
    current.pop()
    used = second.record_event()
    second.log.append("later batch")
    write(transfers, current, 1)
    assert own.log[-2:] == [("after", used), ("write", 1)]
    for slot in (0, 1):
        write(transfers, current, slot)
        assert ("after", used) not in own.log[-2:], "neither another slot nor the next writing waits for it"


def test_a_stream_waits_once_for_a_slot_and_keeps_one_note_of_its_use(
    streams: tuple[SlotTransfers, Stream, list[Stream]],
) -> None:
    transfers, own, current = streams
    first = current[-1]
    write(transfers, current, 0)
    for _ in range(5):
        transfers.wait(0)
        first.log.append("batch")
        transfers.release([0])
    assert first.log.count("batch") == len(first.log) - 1
    last = first.record_event()
    write(transfers, current, 0)
    assert own.log.count(("after", last)) == 2, "the current stream and the last batch, nothing older"
    transfers.wait(0)
    assert first.log[-1] == ("after", own.record_event()), "what is written anew is waited for anew"
