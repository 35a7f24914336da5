"""The benchmark as users run it, where it can run without a GPU: checked against the oracle, written, drawn."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from torch_lora_moe.bench import __main__ as bench
from torch_lora_moe.bench import layers, timing
from torch_lora_moe.bench.oracle import relative_error, sample, some_tokens
from torch_lora_moe.bench.plot import draw
from torch_lora_moe.bench.problems import Problem, Shape, make_problems
from torch_lora_moe.bench.timing import call_time, graph_times

SMALL = Shape(hidden_size=48, intermediate_size=32, num_experts=6, top_k=3)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture
def problem() -> Problem:
    return make_problems(SMALL, 7, 3, 8, 1, torch.bfloat16, "cpu")[0]


@pytest.mark.parametrize("name", layers.WITH_LORA)
def test_every_way_agrees_with_the_oracle(problem: Problem, name: str) -> None:
    error = relative_error(layers.WITH_LORA[name](problem), problem, some_tokens(problem))
    assert 0 < error < 0.012


def test_layers_without_adapters_are_checked_too(problem: Problem) -> None:
    bare = layers.without_adapters(problem)
    exact = some_tokens(bare)
    assert 0 < relative_error(layers.fused(bare), bare, exact) < 0.012
    assert 0 < relative_error(layers.fused(bare, with_lora=False), bare, exact) < 0.012
    with pytest.raises(AssertionError, match="float64 oracle"):
        relative_error(layers.fused(problem), bare, exact)


def test_a_wrong_layer_is_not_timed(problem: Problem) -> None:
    exact = some_tokens(problem)
    without = layers.fused(problem, with_lora=False)
    for wrong in (without, torch.zeros_like(without), torch.full_like(without, float("nan"))):
        with pytest.raises(AssertionError, match="float64 oracle"):
            relative_error(wrong, problem, exact)


def test_no_adapter_means_none(problem: Problem) -> None:
    assert torch.equal(layers.fused(layers.without_adapters(problem)), layers.fused(problem, with_lora=False))


def test_floor(problem: Problem) -> None:
    """One expert and one slot for all: one matrix each, 2 bytes a number, and the work of all pairs beside it."""
    problem.topk_ids.fill_(2)
    problem.token_lora_mapping.fill_(1)
    base, lora, rows = 3 * 48 * 32, 3 * 8 * (48 + 32), 2 * 7 * 48
    assert problem.floor(True) == pytest.approx((base + lora + rows) * 2 / 4.3e6)
    assert problem.floor(False) == pytest.approx((base + rows) * 2 / 4.3e6)
    wide = make_problems(Shape(48, 4096, 1, 1), 4096, 1, 8, 1, torch.bfloat16, "cpu")[0]
    assert wide.floor(False) == pytest.approx(2 * 4096 * (3 * 48 * 4096) / 7.8e8)


def test_command_writes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(layers, "call_time", lambda calls: call_time(calls, seconds=0.01))
    out = tmp_path / "result.json"
    options = ["--shape", "tiny", "--tokens", "1,3", "--ranks", "12,8", "--max-loras", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    bench.main()
    result = json.loads(out.read_text())
    assert [(row["rank"], row["tokens"]) for row in result["rows"]] == [(12, 1), (12, 3), (8, 1), (8, 3)]
    assert all(
        row[name] > 0 for row in result["rows"] for name in ("fused", "hooks", "plain", "no_adapter", "plain_error")
    )
    # rows of 24 bytes are none that torch's grouped product takes
    assert all((name in row) == (row["rank"] == 8) for row in result["rows"] for name in layers.BASELINES)
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "result.svg").read_text()


def test_shipped_plot_is_drawn_from_the_shipped_result(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "layer-h200.json").read_text())
    draw(result, tmp_path / "again")
    assert _heights(tmp_path / "again.svg") == pytest.approx(_heights(RESULTS / "layer-h200.svg"), abs=1e-4)


def _heights(path: Path) -> list[float]:
    """Of all points drawn inside the panels, as parts of a panel's height; where it stands differs between versions."""
    paths = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}path")
    drawn = [path.attrib["d"] for path in paths if "clip-path" in path.attrib]
    heights = [float(y) for points in drawn for y in re.findall(r"[ML] \S+ (\S+)", points)]
    top, bottom = min(heights), max(heights)
    return [(bottom - y) / (bottom - top) for y in heights]


def test_ways_take_turns_in_changing_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[object] = []

    class Graph:
        def __init__(self, calls: Sequence[object]) -> None:
            self.calls = calls

        def replay(self) -> None:
            replayed.append(self.calls[0])

    class Event:
        """Two of them are as many milliseconds apart as the name of the way between them is long."""

        def __init__(self, enable_timing: bool) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return float(len(str(replayed[-1])))

        record = synchronize = lambda self: None

    monkeypatch.setattr(timing, "_captured", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ways: dict[str, Any] = {name: [name, name] for name in ("a", "bb", "ccc")}
    assert graph_times(ways, replays=20) == {"a": 500.0, "bb": 1000.0, "ccc": 1500.0}
    assert replayed[::2] == replayed[1::2]
    turns = [tuple(replayed[i : i + 6 : 2]) for i in range(0, len(replayed), 6)]
    assert len(turns) == 23
    assert all(set(turn) == set(ways) for turn in turns)
    assert len(set(turns)) == 6


def test_oracle_samples_first_and_last(problem: Problem) -> None:
    assert sample(problem, 3).tolist() == [0, 3, 6]
    assert sample(problem, 100).tolist() == list(range(7))
