"""Which products go in two launches, and where their tiles are parted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torch_lora_moe import config, routing, split
from torch_lora_moe.config import Product, TileConfig

TILE = TileConfig(16, 32, 128, 4, 3)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        *[(tokens, 128, 8) for tokens in (8, 32, 200, 512, 1500, 1927, 4096)],
        *[(64, 32, 4), (500, 8, 2), (30, 512, 10), (1000, 1, 1)],
    ],
)
def test_used_tiles_are_those_of_a_random_batch(tokens: int, experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    num_pairs, used = tokens * top_k, []
    rows = routing.expert_tile_rows(num_pairs, experts)
    for _ in range(20):
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        counts = ids.flatten().bincount(minlength=experts)
        used.append((-(-counts // rows)).sum().item())
    tiles = min(num_pairs, num_pairs // rows + experts)
    assert split.used_tiles(num_pairs, experts, rows, tiles) == pytest.approx(sum(used) / len(used), rel=0.05)


def test_rounds() -> None:
    product = Product(1024, 16, 128, 768, 2048, 2, 16, True, 8, 1.0)
    # 24 programs a tile; two stages of 80 rows of 128 elements leave room for more than four on a multiprocessor
    assert split.rounds(product, TILE, 2, 44) == 24 * 44 / (132 * 4)
    deep = dataclasses.replace(TILE, block_k=256)
    assert split.rounds(product, deep, 2, 44) == 24 * 44 / (132 * 2)
    # parts of a tile
    assert split.rounds(dataclasses.replace(product, rows=32), deep, 2, 44) == 2 * 24 * 44 / (132 * 2)
    tall = TileConfig(128, 128, 64, 8, 4)
    assert split.rounds(dataclasses.replace(product, rows=128), tall, 2, 44) == 6 * 44 / 132
    # narrow tiles of eight warps leave room for two
    narrow = dataclasses.replace(tall, block_n=32)
    assert split.rounds(dataclasses.replace(product, rows=128), narrow, 2, 44) == 24 * 44 / (132 * 2)


def test_few_rounds_go_in_one_launch() -> None:
    assert split.first_tiles(True, TILE, 100.0, 2.9, None) == 0
    assert split.first_tiles(False, TILE, 100.0, 5.0, None) == 0
    assert split.first_tiles(True, dataclasses.replace(TILE, group_tiles=8), 100.0, 5.0, None) == 0
    assert split.first_tiles(True, TILE, 100.0, 5.0, 1.7) == 0
    assert split.first_tiles(True, TILE, 100.0, 5.0, 12.6) == 0


@pytest.mark.parametrize(("rounds", "first"), [(3.0, 50), (4.0, 50), (5.0, 60), (20.0, 90)])
@pytest.mark.parametrize("down_rounds", [None, 1.8, 7.5])
def test_two_rounds_or_half_are_left(rounds: float, first: int, down_rounds: float | None) -> None:
    assert split.first_tiles(True, TILE, 100.0, rounds, down_rounds) == first


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("first", [0, 1, 30, 99])
def test_launches_take_each_tile_once(first: int, waits: bool) -> None:
    parts = split.launches(100, first, 90.0, waits)
    assert [tile for part in parts for tile in range(part.first, part.first + part.tiles)] == list(range(100))
    # of two, one starts beside the launch before it
    assert [part.waits_from >= 0 for part in parts] == ([False] if not first else [waits, not waits])
    assert all(part.waits_from < part.tiles for part in parts)


@pytest.mark.parametrize("rounds", [3.0, 100.0, 1e6])
def test_the_second_launch_has_a_tile(rounds: float) -> None:
    """Also of one expert, whose last tile is nearly full: half a tile more than there are would be used on average."""
    used = split.used_tiles(128 * 11 - 1, 1, 128, 11)
    assert split.first_tiles(True, TILE, used, rounds, None) <= 10


@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("num_pairs", [2**k for k in range(5, 18)])
def test_of_the_rules_no_launch_is_empty(num_pairs: int, rank: int) -> None:
    rows = routing.expert_tile_rows(num_pairs, 128)
    tiles = min(num_pairs, num_pairs // rows + 128)
    used = split.used_tiles(num_pairs, 128, rows, tiles)
    product = Product(num_pairs, rows, used, 768, 2048, 2, rank, num_pairs > 1000, 8, num_pairs / 1024, True)
    tile = config.gate_up_config(product, True)
    first = split.first_tiles(True, tile, used, split.rounds(product, tile, 2, used), None)
    assert 0 <= first < tiles
    assert first > 0 or num_pairs < 64
