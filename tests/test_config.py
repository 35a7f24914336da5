"""Launch configurations: shipped tables, the nearest shape, and heuristics where a table says nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import torch_lora_moe
from torch_lora_moe import config
from torch_lora_moe.config import (
    HEURISTICS,
    LaunchConfig,
    Product,
    TileConfig,
    down_config,
    expected_tiles,
    fitted,
    fitted_shrink,
    gate_up_config,
    launch_config,
    layer_shrink_config,
    run_pieces,
    streamed_ranks,
    streamed_runs,
)
from torch_lora_moe.routing import RUN_ROWS

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


PRODUCTS = [
    Product(int(pairs * tiles), rows, tiles, columns, inner, itemsize, rank, has_runs, slots, pairs / slots)
    for rows, pairs in ((16, 1.2), (16, 5), (32, 18), (64, 40), (128, 100))
    for tiles in (2.0, 300.0)
    for columns, inner in ((768, 2048), (48, 100), (352, 2880), (14336, 4096))
    for itemsize in (2, 4)
    for rank, has_runs, slots in (
        (0, False, 1),
        (16, False, 8),
        (16, True, 8),
        (12, True, 1),
        (3, True, 1),
        (128, True, 4),
    )
]


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def legal(config: TileConfig) -> bool:
    sizes = (config.block_m, config.block_n, config.block_k, config.num_warps, config.lora_columns)
    return all(map(is_power_of_two, sizes)) and min(sizes[:3]) >= 16 and min(config.num_stages, config.lora_stages) >= 1


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_tiles_are_legal_and_fit(product: Product) -> None:
    for is_gated in (True, False):
        for tile, parts in ((gate_up_config(product, is_gated), 1 + is_gated), (down_config(product), 1)):
            assert legal(tile)
            assert product.rows % tile.block_m == 0
            assert tile.block_m == product.rows or (product.rank and tile.block_m >= 32)
            # little of the last block is wasted, and nothing is wider than it must be
            covered = -(-product.columns // tile.block_n) * tile.block_n
            assert covered <= max(1.125 * product.columns, product.columns + 31)
            row = (tile.block_m + parts * tile.block_n) * product.itemsize
            for limit in (227 * 1024, 163 * 1024, 99 * 1024):
                held = fitted(tile, parts * tile.block_n, product.rank, product.itemsize, limit)
                assert held.num_stages <= tile.num_stages
                assert held.num_stages == 1 or held.num_stages * row * held.block_k <= limit
                # one stage alone hides nothing
                assert held.num_stages > 1 or held.block_k <= 32
                assert held.lora_stages in (1, tile.lora_stages)
            # what was tuned on Hopper is not cut down there
            assert fitted(tile, parts * tile.block_n, product.rank, product.itemsize, 227 * 1024) == tile


@pytest.mark.parametrize("num_pairs", [1, 8, 100, 1024, 40000])
@pytest.mark.parametrize(("outer", "inner"), [(4, 16), (32, 2048), (24, 100), (512, 14336)])
@pytest.mark.parametrize("has_runs", [True, False])
def test_layer_shrinks_are_legal(num_pairs: int, outer: int, inner: int, has_runs: bool) -> None:
    chosen, planes, pieces = layer_shrink_config(num_pairs, 64, outer, inner, has_runs)
    assert all(map(is_power_of_two, (chosen.block_m, chosen.block_n, chosen.block_k, chosen.num_warps)))
    assert 1 <= planes <= max(1, inner // 256)
    assert has_runs or planes == pieces == 1
    assert 1 <= pieces <= max(1, RUN_ROWS // chosen.block_m)
    # what was tuned on Hopper is not cut down there
    assert fitted_shrink(chosen, 2, 227 * 1024) == chosen


def test_rank_vectors_of_a_few_pairs_wait_for_few_loads() -> None:
    def blocks(num_pairs: int, outer: int, inner: int) -> tuple[int, int]:
        chosen = layer_shrink_config(num_pairs, 1024, outer, inner, False)[0]
        # two vectors of sixteen bytes a thread
        assert chosen.block_n * chosen.block_k == 32 * chosen.num_warps * 16
        return chosen.block_n, chosen.block_k

    assert [blocks(8, 32, inner) for inner in (256, 1024, 2048, 14336)] == [(16, 256), (4, 1024), (2, 2048), (2, 2048)]
    # not in so many programs that they hold up the next kernel's
    assert [blocks(pairs, 256, 2880) for pairs in (4, 16, 32)] == [(2, 2048), (8, 512), (16, 256)]


@pytest.mark.parametrize("num_virtual_experts", [8, 128, 1024])
@pytest.mark.parametrize("per_run", [0.25, 1, 6, 8, 16, 40, 64, 128, 1000])
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_pieces_hold_nearly_all_runs(num_virtual_experts: int, per_run: float, block_m: int) -> None:
    num_pairs = int(num_virtual_experts * per_run)
    pieces = run_pieces(num_pairs, num_virtual_experts, block_m)
    random = torch.Generator().manual_seed(0)
    owners = torch.randint(num_virtual_experts, (num_pairs,), generator=random)
    rows = owners.bincount(minlength=num_virtual_experts).clamp(max=RUN_ROWS)
    assert (rows > pieces * block_m).float().mean() < 0.02
    # none of them is there for runs that do not occur even among many
    assert pieces == 1 or num_virtual_experts < 1024 or (rows > (pieces - 1) * block_m).any()


def test_shrinks_fit() -> None:
    wide, of_pairs = LaunchConfig(64, 128, 128, 8, 4), LaunchConfig(1, 16, 512, 4, 1)
    assert fitted_shrink(wide, 2, 227 * 1024) == wide
    assert fitted_shrink(wide, 2, 163 * 1024) == LaunchConfig(64, 128, 128, 8, 2)
    assert fitted_shrink(wide, 2, 99 * 1024) == LaunchConfig(64, 128, 64, 8, 2)
    assert fitted_shrink(wide, 4, 227 * 1024) == LaunchConfig(64, 128, 32, 8, 4)
    assert fitted_shrink(of_pairs, 4, 99 * 1024) == of_pairs


def test_few_runs_are_split() -> None:
    assert layer_shrink_config(4096, 8, 32, 4096, True)[1:] == (1, 4)
    assert layer_shrink_config(64, 8, 32, 4096, True)[1] > 1
    assert layer_shrink_config(4096, 1024, 32, 4096, True)[1:] == (1, 1)


def test_a_shrink_has_as_much_on_its_way_as_leaves_room_for_all_programs() -> None:
    def step(num_pairs: int, num_virtual_experts: int) -> tuple[int, int]:
        config = layer_shrink_config(num_pairs, num_virtual_experts, 32, 2048, True)[0]
        return config.block_k, config.num_stages

    assert (step(4096, 64), step(16384, 256), step(65536, 1024)) == ((128, 4), (64, 4), (64, 3))


def test_narrow_tiles_take_their_weight_in_deeper_steps_where_lora_is_little() -> None:
    def block_k(tiles: int, rank: int, inner: int = 2048, has_runs: bool = False, columns: int = 768) -> int:
        return gate_up_config(Product(256, 16, tiles, columns, inner, 2, rank, has_runs, 8, 0.2), True).block_k

    assert [block_k(50, rank) for rank in (0, 16)] == [256, 256]
    assert [block_k(12, rank) for rank in (0, 16)] == [256, 128], "few programs"
    assert block_k(50, 16, columns=14336) == 128 == block_k(7, 16, columns=14336), "many"
    assert block_k(50, 16, has_runs=True) == 128
    assert block_k(200, 16) == 128, "tiles of 64 columns"
    assert block_k(50, 16, 100) == 128


def test_two_programs_of_a_multiprocessor_take_turns_at_short_sums_and_at_lora() -> None:
    def tile(inner: int, rank: int) -> tuple[int, int]:
        config = down_config(Product(32768, 128, 300.0, 2048, inner, 2, rank, rank > 0, 8, 32.0))
        return config.block_n, config.num_warps

    assert [tile(inner, 0) for inner in (256, 768, 14336)] == [(128, 4), (256, 8), (256, 8)]
    assert [tile(inner, 16) for inner in (256, 768, 14336)] == [(128, 4), (128, 4), (256, 8)]
    few = Product(1024, 128, 8.0, 4096, 14336, 2, 16, True, 4, 32.0)
    assert (down_config(few).block_n, down_config(few).num_warps) == (128, 4)


def test_tiles_with_much_lora_are_cut() -> None:
    """Qwen3-30B-A3B, 4,096 tokens: by the work of LoRA beside that of the base product."""

    def rows(slots: int, rank: int, streams: bool = False, has_runs: bool = True) -> tuple[int, int]:
        sizes = (32768, 128, 256.0)
        lora = (2, rank, rank > 0 and has_runs, slots, 256 / slots, streams)
        return gate_up_config(Product(*sizes, 768, 2048, *lora), True).block_m, down_config(
            Product(*sizes, 2048, 768, *lora)
        ).block_m

    assert [rows(8, rank) for rank in (0, 16, 64, 128)] == [(128, 128)] * 4
    assert [rows(32, rank) for rank in (16, 64)] == [(128, 128), (64, 64)]
    assert rows(16, 96) == (64, 64)
    # hardly two rows of a tile share a slot
    assert rows(256, 64) == (64, 32)
    # what streams is bound by the bytes of B
    assert rows(32, 64, True) == rows(256, 64, True) == (128, 128)
    assert rows(256, 64, True, False) == (64, 32)


def test_tiles_with_much_lora_leave_room_for_others() -> None:
    def stages(slots: int, streams: bool = False) -> int:
        lora = (64, True, slots, 24 / slots, streams)
        return gate_up_config(Product(960, 32, 40.0, 512, 1536, 2, *lora), True).num_stages

    assert (stages(8), stages(64), stages(64, True)) == (3, 2, 3)


def test_a_step_of_lora_is_no_wider_than_the_slots_are_many() -> None:
    def columns(slots: int, has_runs: bool) -> int:
        return gate_up_config(Product(64, 16, 8.0, 14336, 4096, 2, 16, has_runs, slots, 8 / slots), True).lora_columns

    assert [columns(slots, True) for slots in (1, 3, 8, 64)] == [16, 64, 128, 128]
    assert columns(1, False) == 128


def test_lora_streams_but_in_the_lowest_tiles() -> None:
    def streams(rows: int, rank: int, has_runs: bool = True, can: bool = True) -> list[bool]:
        lora = (2, rank, has_runs, 8, 32.0, can)
        up = gate_up_config(Product(32768, rows, 300.0, 768, 2048, *lora), True)
        down = down_config(Product(32768, rows, 300.0, 2048, 768, *lora))
        assert not any(tile.lora_streams and tile.lora_preload for tile in (up, down))
        return [up.lora_streams, down.lora_streams]

    assert all(streams(rows, rank) == [True, True] for rows in (32, 64, 128) for rank in (8, 16, 64, 128))
    # of the lowest tiles only down's of high ranks, with runs or where each row is one
    for has_runs in (False, True):
        assert [streams(16, rank, has_runs) for rank in (16, 32, 64)] == [[False] * 2, [False] * 2, [False, True]]
    assert streams(32, 64, False) == [False, False]
    assert not any(any(streams(rows, 64, has_runs, False)) for rows in (16, 64) for has_runs in (False, True))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_runs_on_their_way_fit_where_the_base_product_has_its_stages(product: Product) -> None:
    product = replace(product, streams=True)
    for slices, chosen in ((2, gate_up_config(product, True)), (1, down_config(product))):
        runs, ranks = streamed_runs(chosen, slices, product.rank), streamed_ranks(product.rank)
        held = runs * slices * (chosen.block_m + chosen.block_n) * ranks
        stages = chosen.num_stages * (chosen.block_m + slices * chosen.block_n) * chosen.block_k
        assert ranks % 16 == 0
        assert runs in (0, 2, 3, 4, 5)
        assert held <= stages


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_b_of_down_waits_in_few_registers(product: Product) -> None:
    tile = down_config(product)
    registers = tile.block_n * tile.lora_columns * product.itemsize // (4 * 32 * tile.num_warps)
    assert not tile.lora_preload or registers <= 32


def test_low_tiles_of_long_rows_are_deep() -> None:
    def depth(inner: int, rank: int, columns: int = 4096) -> int:
        return down_config(Product(32, 16, 8.0, columns, inner, 2, rank, False, 4, 1.0)).block_k

    assert [depth(inner, 0) for inner in (1536, 1792, 14336)] == [128, 256, 256]
    # beside LoRA there is less room
    assert [depth(inner, 16) for inner in (1792, 2880, 3584)] == [128, 128, 256]
    assert depth(14336, 0, 65536) == 128


def test_tiles_share_blocks_of_weights_that_l2_does_not_hold() -> None:
    def group(columns: int, inner: int) -> int:
        return gate_up_config(Product(8192, 128, 64.0, columns, inner, 2, 0, False, 1, 128.0), True).group_tiles

    assert (group(768, 2048), group(2880, 2880), group(14336, 4096)) == (1, 1, 8)


def test_few_programs_hold_the_slots_of_nearly_all_tiles() -> None:
    """Those of twelve or of 64 pairs, hardly two of which share one of 16 or 256 experts."""

    def columns(pairs: int, experts: int, rank: int) -> int:
        product = Product(pairs, 16, expected_tiles(pairs, experts, 16), 256, 5120, 2, rank, False, 16, 0.1)
        return gate_up_config(product, True).lora_columns

    assert [columns(12, 16, rank) for rank in (8, 16)] == [64, 128]
    assert columns(64, 256, 16) == 128


def test_expected_tiles() -> None:
    assert expected_tiles(8, 128, 16) == pytest.approx(7.75, abs=0.1)
    assert expected_tiles(10**6, 128, 128) == pytest.approx(10**6 / 128)
