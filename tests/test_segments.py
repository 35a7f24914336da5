"""``token_lora_mapping_from_segments`` against a loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_lora_moe import token_lora_mapping_from_segments


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    first=st.integers(0, 3),
    padding=st.integers(-4, 4),
    wide=st.booleans(),
)
def test_segments(lengths: list[int], first: int, padding: int, wide: bool) -> None:
    dtype = torch.int64 if wide else torch.int32
    bounds = torch.tensor([first, *lengths]).cumsum(0)
    slots = list(range(10, 10 + len(lengths)))
    num_tokens = max(int(bounds[-1]) + padding, 0)
    expected = [-1] * first + [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    expected = (expected + [-1] * 4)[:num_tokens]
    actual = token_lora_mapping_from_segments(bounds.to(dtype), torch.tensor(slots, dtype=dtype), num_tokens)
    assert actual.dtype == torch.int32
    assert actual.tolist() == expected
