"""The README's first example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_first_example() -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    out = names["out"]
    assert isinstance(out, torch.Tensor)
    assert out.shape == (5, 64)
    assert out.isfinite().all()
