"""The example whose README command needs a GPU, small and on a CPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parents[1] / "examples" / "graph_decode.py"


def test_graph_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It checks its own tokens and exits with an error if they are wrong."""
    result = tmp_path / "step.json"
    options = ["--requests", "12", "--batch", "4", "--slots", "2", "--out", str(result)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "requests alone in the batch: the same tokens" in out
    served, tokens = out.splitlines()[2].split()[:2]
    assert (int(served), int(tokens)) == (12, 144)
    times = json.loads(result.read_text())["milliseconds"]
    assert list(times) == ["without adapters", "1 adapters", "while loading", "load"]
    assert all(0 < times[name]["median"] <= times[name]["longest"] for name in list(times)[:3])
