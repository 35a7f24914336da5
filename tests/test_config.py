"""Launch configurations: shipped tables, the nearest shape, and heuristics where a table says nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import torch_lora_moe
from torch_lora_moe import config
from torch_lora_moe.config import HEURISTICS, LaunchConfig, launch_config

CPU = torch.device("cpu")
TABLES = sorted((Path(torch_lora_moe.__file__).parent / "configs").glob("*.json"))
TUNED = LaunchConfig(16, 128, 64, 1, 1)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with one tuned shape, for a GPU that this machine pretends to have."""
    entries = [{"shape": [4096, 768, 64], "config": asdict(TUNED)}]
    monkeypatch.setattr(config, "_table", lambda name: {"expand_runs": entries})
    config._nearest.cache_clear()
    yield
    config._nearest.cache_clear()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables(path: Path) -> None:
    table = json.loads(path.read_text())
    assert path.stem == table["gpu"].replace(" ", "_")
    assert set(table["kernels"]) == set(HEURISTICS)
    for entries in table["kernels"].values():
        assert len(entries) == len({tuple(entry["shape"]) for entry in entries}) > 0
        for entry in entries:
            sizes = asdict(LaunchConfig(**entry["config"]))
            assert all(size & (size - 1) == 0 for name, size in sizes.items() if name.startswith(("block", "num_w")))


def test_tables_are_shipped() -> None:
    assert "NVIDIA_H200" in [path.stem for path in TABLES]


@pytest.mark.parametrize("kernel", HEURISTICS)
@pytest.mark.parametrize("sizes", [(1, 4, 16), (1000, 100, 100), (5000, 256, 4096), (10**6, 32, 768)])
def test_heuristics_give_legal_tiles(kernel: str, sizes: tuple[int, int, int]) -> None:
    chosen = launch_config(kernel, *sizes, CPU)
    assert chosen == HEURISTICS[kernel](*sizes)
    assert all(size == 0 or size & (size - 1) == 0 for size in (chosen.block_m, chosen.block_n, chosen.block_k))


@pytest.mark.usefixtures("table")
def test_the_nearest_shape_decides() -> None:
    assert launch_config("expand_runs", 4096, 768, 64, CPU) == TUNED
    assert launch_config("expand_runs", 2500, 1024, 64, CPU) == TUNED


@pytest.mark.usefixtures("table")
def test_a_tile_is_no_larger_than_the_problem() -> None:
    smaller = launch_config("expand_runs", 4096, 768, 24, CPU)
    assert (smaller.block_n, smaller.block_k) == (128, 32)


@pytest.mark.usefixtures("table")
def test_far_shapes_and_other_kernels_take_the_heuristics() -> None:
    assert launch_config("expand_runs", 64, 768, 64, CPU) == HEURISTICS["expand_runs"](64, 768, 64)
    assert launch_config("shrink_runs", 4096, 128, 2048, CPU) == HEURISTICS["shrink_runs"](4096, 128, 2048)
