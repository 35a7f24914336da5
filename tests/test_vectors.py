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
    gate_up_vector_config,
)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def down(inner: int, rank: int, top_k: int = 8, hidden: int = 2048, tokens: int = 1) -> tuple[DownPrograms, int, int]:
    """How a down product goes, the programs it has, and the threads of each."""
    chosen = down_vector_config(inner, rank, True, top_k)
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
    second = down_vector_config(inner, rank, contiguous, top_k)
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
        chosen = down_vector_config(inner, rank, True, top_k)
        return chosen.block_n, chosen.block_k * chosen.unroll

    # up to 2048 columns; rows of B cost less where several share a program
    assert [tile(inner, 16, 8) for inner in (768, 1408, 2048, 2880)] == [(4, 768), (2, 2048), (2, 2048), (4, 1024)]
    assert tile(1408, 64, 8)[0] == 4
    # few experts have more rows on their way, in turns that are alike
    assert [tile(1408, 16, top_k) for top_k in (1, 2, 4)] == [(4, 768), (4, 768), (2, 2048)]


def test_few_tokens_stream_through_many_small_programs() -> None:
    def tile(inner: int, rank: int = 16, itemsize: int = 2, rows: int = 6144) -> tuple[int, ...]:
        chosen = gate_up_vector_config(rows, inner, rank, True, itemsize)
        return chosen.block_n, chosen.block_k, chosen.unroll, chosen.num_warps

    # beside LoRA a row at once or in nearly full turns, else two of them
    row = (1, 2048, 1, 1)
    assert [tile(inner) for inner in (1536, 2048, 4096, 7168)] == [row] * 4
    assert [tile(inner) for inner in (768, 2880, 3072)] == [(2, 512, 2, 1)] * 3
    assert tile(2048, 16, 4) == (1, 512, 4, 1)
    # without LoRA the same bytes in one step
    assert [tile(inner, 0) for inner in (768, 2048, 7168)] == [(2, 1024, 1, 1)] * 3
    # so few rows that many programs would be none
    assert [tile(inner, rank, 2, 1024) for inner, rank in ((300, 16), (2048, 0))] == [(8, 512, 1, 4), (8, 512, 2, 4)]


def test_no_second_round_of_few_rows() -> None:
    def goes_by_rows(rows: int, inner: int) -> bool:
        return gate_up_vector_config(rows, inner, 16, True, 2).block_n == 1

    assert [goes_by_rows(rows, 2048) for rows in (1536, 3696, 4608, 6144)] == [True, True, False, True]
    assert [goes_by_rows(rows, 4096) for rows in (1536, 2688, 3584)] == [False, False, True]


def test_every_multiprocessor_has_as_many_programs() -> None:
    # rank vectors in so few programs that no multiprocessor has one more than the next
    assert [down(768, rank)[0].shrink_rows for rank in (8, 16, 32)] == [4, 8, 16]
    assert all(down(768, rank)[1] == 528 for rank in (8, 16, 32))
    assert down(14336, 16, 2, 4096)[1] == down(1792, 64, 2, 4096)[1] == 1056
    assert down(448, 32, 6, 4096)[1] == 1048
    # where that would take each of them long, two on each
    assert [(down(768, rank)[0].shrink_rows, down(768, rank)[1]) for rank in (64, 128)] == [(2, 768), (4, 768)]


def test_programs_that_take_turns_make_rank_vectors_as_they_come() -> None:
    assert [down(512, 16, 8, 7168)[0].shrink_rows, down(512, 4, 8, 7168)[0].shrink_rows] == [4, 1]
    assert down(512, 16, 8, 7168)[0].registers is None
    # long rows are spread over more programs
    assert [down(inner, 64, 2, 4096, 4)[0].shrink_rows for inner in (1792, 14336)] == [4, 1]


def test_registers_are_bound_where_one_more_program_would_not_fit() -> None:
    assert [down(768, rank)[0].registers for rank in (16, 64, 128)] == [None, 168, 168]
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
