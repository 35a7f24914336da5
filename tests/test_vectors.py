"""How the products of few tokens are cut, in shapes that were measured and others."""

from __future__ import annotations

from itertools import product

import pytest

from torch_lora_moe.vectors import (
    MULTIPROCESSORS,
    REGISTERS,
    DownPrograms,
    down_programs,
    down_vector_config,
    gate_up_programs,
    gate_up_vector_config,
)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def down(inner: int, rank: int, top_k: int = 8, hidden: int = 2048, tokens: int = 1) -> tuple[DownPrograms, int, int]:
    """How a down product goes, the programs it has, and the threads of each."""
    chosen = down_vector_config(tokens * hidden, inner, rank, True, top_k, tokens * top_k)
    multiply, pairs = tokens * -(-hidden // chosen.block_n), tokens * top_k
    how = down_programs(chosen, multiply, pairs, inner, rank, 2, top_k)
    return how, multiply + pairs * -(-rank // how.shrink_rows), 32 * chosen.num_warps


@pytest.mark.parametrize("rank", [0, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("inner", [16, 768, 1408, 2048, 14336])
def test_steps_are_legal(rank: int, inner: int) -> None:
    for top_k, tokens, itemsize, contiguous in product((1, 2, 6, 8, 10), (1, 3, 6), (2, 4), (True, False)):
        check_steps(rank, inner, top_k, tokens, itemsize, contiguous)


def check_steps(rank: int, inner: int, top_k: int, tokens: int, itemsize: int, contiguous: bool) -> None:
    first = gate_up_vector_config(tokens * top_k * inner, 2048, rank, contiguous, itemsize)
    second = down_vector_config(tokens * 2048, inner, rank, contiguous, top_k, tokens * top_k)
    for chosen in (first, second):
        assert all(map(is_power_of_two, (chosen.block_n, chosen.block_k, chosen.num_warps)))
        assert 1 <= chosen.unroll <= 4
    multiply = tokens * -(-2048 // second.block_n)
    how = down_programs(second, multiply, tokens * top_k, inner, rank, itemsize, top_k)
    assert is_power_of_two(how.shrink_rows)
    assert is_power_of_two(how.shrink_columns)
    assert how.shrink_rows <= 16
    assert how.shrink_rows * how.shrink_columns <= 4096
    assert 1 <= how.preloaded <= top_k
    # what is fetched early fits into registers
    held = how.preloaded * second.unroll * second.block_n * second.block_k * itemsize / (4 * 32 * second.num_warps)
    assert held <= (how.registers or 216) or how.preloaded == 1
    if how.registers is not None:
        # and all programs onto the GPU
        total = multiply + tokens * top_k * -(-rank // how.shrink_rows)
        at_once = REGISTERS // (how.registers * 32 * second.num_warps)
        assert how.registers % 8 == 0
        assert total <= MULTIPROCESSORS * at_once


def test_one_token_takes_a_row_of_an_expert_at_once() -> None:
    def tile(inner: int, rank: int, top_k: int) -> tuple[int, int]:
        chosen = down_vector_config(2048, inner, rank, True, top_k, top_k)
        return chosen.block_n, chosen.block_k * chosen.unroll

    # up to 2048 columns; rows of B cost less where several share a program
    assert [tile(inner, 16, 8) for inner in (768, 1408, 2048, 2880)] == [(4, 768), (2, 2048), (2, 2048), (8, 1024)]
    assert tile(1408, 64, 8)[0] == 4
    # few experts have more rows on their way, in turns
    assert [tile(1408, 16, top_k) for top_k in (1, 2, 4)] == [(4, 1024), (4, 1024), (2, 2048)]
    assert [tile(2880, rank, 4) for rank in (0, 16)] == [(4, 1024), (4, 1024)]


def gate_up(inner: int, rank: int, rows: int, itemsize: int = 2) -> tuple[int, ...]:
    """Rows, columns, steps and warps of a gate_up product."""
    chosen = gate_up_vector_config(rows, inner, rank, True, itemsize)
    return chosen.block_n, chosen.block_k, chosen.unroll, chosen.num_warps


@pytest.mark.parametrize(
    ("rank", "inner", "chosen"),
    [
        # two short rows, one that is not
        (0, 512, [(2, 512, 1, 1), (2, 512, 1, 1)]),
        (16, 512, [(2, 512, 1, 1), (2, 512, 1, 1)]),
        (0, 900, [(1, 1024, 1, 1), (2, 1024, 1, 1)]),
        (16, 900, [(1, 1024, 1, 1), (2, 512, 2, 1)]),
        (0, 2048, [(1, 2048, 1, 1), (2, 1024, 1, 1)]),
        (16, 2048, [(1, 2048, 1, 1), (1, 2048, 1, 1)]),
        # all of it at once, or in turns that it nearly fills
        (0, 1440, [(1, 2048, 1, 1), (1, 2048, 1, 1)]),
        (0, 2240, [(1, 1024, 4, 1), (1, 1024, 4, 1)]),
        (16, 2240, [(1, 1024, 4, 1), (1, 1024, 4, 1)]),
        (0, 2880, [(1, 1024, 4, 1), (2, 1024, 1, 1)]),
        (16, 2880, [(1, 1024, 4, 1), (1, 1024, 4, 1)]),
        (0, 4096, [(1, 2048, 1, 1), (2, 2048, 1, 4)]),
        (16, 4096, [(1, 1024, 4, 1), (1, 1024, 4, 1)]),
        (0, 5120, [(1, 4096, 1, 2), (2, 1024, 1, 1)]),
        (16, 5120, [(1, 1024, 2, 1), (2, 512, 2, 1)]),
        (0, 7168, [(1, 4096, 1, 2), (1, 2048, 1, 1)]),
        (16, 7168, [(1, 1024, 2, 1), (1, 1024, 2, 1)]),
    ],
)
def test_few_rows_and_many(rank: int, inner: int, chosen: list[tuple[int, ...]]) -> None:
    assert [gate_up(inner, rank, rows) for rows in (768, 6144)] == chosen


@pytest.mark.parametrize("rows", [768, 6144])
def test_fp32_has_half_as_many_columns(rows: int) -> None:
    assert [gate_up(2048, rank, rows, 4) for rank in (0, 16)] == [(1, 1024, 1, 1), (1, 512, 4, 1)]


def test_no_second_round_of_few_rows() -> None:
    def rows_each(inner: int, rank: int, counts: tuple[int, ...]) -> list[int]:
        return [gate_up(inner, rank, rows)[0] for rows in counts]

    assert rows_each(1440, 0, (1536, 3696, 4608, 6144)) == [1, 1, 2, 1]
    assert rows_each(7168, 16, (1536, 2048, 2560, 3584)) == [1, 2, 2, 1]
    assert rows_each(5120, 0, (1056, 2048, 2304, 3584)) == [1, 1, 2, 2]
    assert rows_each(7168, 0, (1056, 2048, 2304, 3584)) == [1, 1, 2, 1]


def test_much_of_b_goes_with_small_programs() -> None:
    def rows_each(rank: int, hidden: int = 2048, tokens: int = 1, inner: int = 768) -> int:
        return down_vector_config(tokens * hidden, inner, rank, True, 8, tokens * 8).block_n

    assert [rows_each(rank) for rank in (0, 32, 64, 128)] == [4, 4, 2, 2]
    # of more rows they would take turns
    assert [rows_each(64, 2304), rows_each(64, inner=512)] == [4, 4]
    # as well they may where larger ones would be held at once in few registers
    assert [rows_each(rank, tokens=2) for rank in (0, 32, 64, 128)] == [4, 4, 2, 2]
    assert [down(768, rank, tokens=2)[0].preloaded for rank in (64, 128)] == [4, 4]
    assert [rows_each(64, tokens=3), rows_each(64, 4096)] == [4, 4]


@pytest.mark.parametrize("inner", [16, 130, 768, 1408, 2048, 2880, 7168])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("contiguous", [True, False])
def test_two_launches_of_gate_up(inner: int, itemsize: int, contiguous: bool) -> None:
    for pairs, columns, rank, slices in product((1, 8, 10, 32), (1, 24, 768, 14336), (0, 4, 12, 64, 256), (1, 2)):
        how = gate_up_programs(pairs, columns, inner, rank, slices, contiguous, itemsize)
        for chosen in (how.shrink, how.sums, how.rest):
            assert all(map(is_power_of_two, (chosen.block_n, chosen.block_k, chosen.num_warps)))
            assert 1 <= chosen.unroll <= 4
        # both make rank vectors and sums, in programs of as many threads
        assert how.shrink.num_warps == how.sums.num_warps
        assert is_power_of_two(how.finish_rows)
        # whole blocks, and something is left for the second launch
        assert how.first % how.sums.block_n == how.first % how.finish_rows == 0
        assert 0 <= how.first <= 0.625 * columns
        # without LoRA there is one launch, of all
        assert rank or (
            how.first == 0 and how.rest == gate_up_vector_config(pairs * columns, inner, 0, contiguous, itemsize)
        )


def test_the_first_launch_of_gate_up_has_what_the_gpu_holds() -> None:
    def programs(columns: int, inner: int, rank: int, pairs: int = 8, itemsize: int = 2) -> tuple[int, int, int]:
        how = gate_up_programs(pairs, columns, inner, rank, 2, True, itemsize)
        return how.first, how.sums.block_n, pairs * (-(-rank // how.shrink.block_n) + -(-how.first // how.sums.block_n))

    # rows in two turns, 16 programs to a multiprocessor; beside many rank vectors at once, 28 of them
    assert [programs(768, 2048, rank) for rank in (16, 32)] == [(480, 2, 2048), (464, 2, 2112)]
    assert [programs(768, 2048, rank) for rank in (64, 128)] == [(392, 1, 3648), (328, 1, 3648)]
    assert programs(2880, 2880, 32, pairs=4) == (992, 2, 2112)
    # a turn would be half empty
    assert programs(512, 1536, 16)[:2] == (320, 1)
    # so many rank vectors that they are all there is room for
    assert programs(768, 2048, 64, pairs=80)[0] == 0
    assert programs(768, 2048, 16, itemsize=4)[:2] == (224, 1)


def test_every_multiprocessor_has_as_many_programs() -> None:
    # rank vectors in so few programs that no multiprocessor has one more than the next
    assert [down(768, rank)[0].shrink_rows for rank in (8, 16, 32)] == [4, 8, 16]
    assert all(down(768, rank)[1] == 528 for rank in (8, 16, 32))
    assert down(14336, 16, 2, 4096)[1] == down(1792, 64, 2, 4096)[1] == 1056
    assert down(448, 32, 6, 4096)[1] == 1048
    # where that would take each of them long, two on each
    assert [(down(768, rank)[0].shrink_rows, down(768, rank)[1]) for rank in (64, 128)] == [(2, 1280), (4, 1280)]
    assert [(down(512, rank, 10)[0].shrink_rows, down(512, rank, 10)[1]) for rank in (64, 128)] == [(4, 672), (8, 672)]


def test_programs_that_take_turns_make_rank_vectors_as_they_come() -> None:
    assert [down(512, 16, 8, 7168)[0].shrink_rows, down(512, 4, 8, 7168)[0].shrink_rows] == [4, 1]
    assert down(512, 16, 8, 7168)[0].registers is None
    # long rows are spread over more programs
    assert [down(inner, 64, 2, 4096, 4)[0].shrink_rows for inner in (1792, 14336)] == [4, 1]


def test_registers_are_bound_where_one_more_program_would_not_fit() -> None:
    assert [down(768, rank)[0].registers for rank in (16, 64, 128)] == [None, 96, 96]
    assert [down(768, rank)[0].preloaded for rank in (16, 64, 128)] == [6, 4, 3]
    assert [down(14336, rank, 2, 4096)[0].registers for rank in (16, 64)] == [128, 128]
    # nor where a few are enough for what is fetched early
    assert down(768, 8, 1, 2048, 2)[0].registers is None
    assert down(1024, 16, 2)[0].registers is None


def test_weights_fetched_early_without_lora() -> None:
    # one token: hidden sizes of 2048, 7168 and 4096; then so many programs that they take turns anyway
    assert [down(768, 0)[0].preloaded, down(256, 0, 8, 7168)[0].preloaded] == [8, 3]
    assert down(6400, 0, 2, 4096)[0].preloaded == 2
    assert down(2560, 0, 8, 4096, 6)[0].preloaded == 3
