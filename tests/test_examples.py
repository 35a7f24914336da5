"""The example that no README command runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parents[1] / "examples" / "graph_decode.py"


def test_graph_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It checks its own tokens and exits with an error if they are wrong."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--requests", "12", "--batch", "4", "--slots", "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "requests alone in the batch: the same tokens" in out
    served, tokens = out.splitlines()[2].split()[:2]
    assert (int(served), int(tokens)) == (12, 144)
