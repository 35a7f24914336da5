"""A layer in float64 for a few of its tokens: what every timed row is checked against first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe.bench.problems import Problem

# Largest relative error (Frobenius norm) of a layer whose intermediates are stored in a 16-bit type.
MOST_ERROR = 0.012


def some_tokens(problem: Problem, count: int = 24) -> Tensor:
    """Rows of the layer's output in float64 for tokens spread over the batch, each with its adapter: ``[count, H]``."""
    tokens = sample(problem, count)
    out = torch.zeros(tokens.numel(), problem.shape.hidden_size, dtype=torch.float64, device=problem.x.device)
    for row, token in enumerate(tokens.tolist()):
        slot = int(problem.token_lora_mapping[token])
        for k, expert in enumerate(problem.topk_ids[token].tolist()):
            out[row] += problem.topk_weights[token, k].double() * _pair(problem, token, expert, slot)
    return out


def sample(problem: Problem, count: int) -> Tensor:
    """At most ``count`` token numbers from the first to the last."""
    num_tokens = problem.x.shape[0]
    return torch.linspace(0, num_tokens - 1, min(count, num_tokens), device=problem.x.device).round().long()


def _pair(problem: Problem, token: int, expert: int, slot: int) -> Tensor:
    inner, x = problem.shape.intermediate_size, problem.x[token].double()
    gate, up = (problem.w13[expert].double() @ x).split(inner)
    if slot < 0:
        plain: Tensor = problem.w2[expert].double() @ (F.silu(gate) * up)
        return plain
    gate_up_a, gate_up_b, down_a, down_b = (part.double() for part in _matrices(problem, expert, slot))
    rank, s = down_b.shape[1], gate_up_a @ x
    gate, up = gate + gate_up_b[:inner] @ s[:rank], up + gate_up_b[inner:] @ s[rank:]
    h = F.silu(gate) * up
    y: Tensor = problem.w2[expert].double() @ h + down_b @ (down_a @ h)
    return y


def _matrices(problem: Problem, expert: int, slot: int) -> list[Tensor]:
    return [part[slot, expert] for part in problem.lora[:4] if part is not None]


def relative_error(out: Tensor, problem: Problem, exact: Tensor) -> float:
    """Relative error of a whole output on the sampled tokens.

    Raises:
        AssertionError: it is larger than `MOST_ERROR`, or not a number.
    """
    rows = out[sample(problem, exact.shape[0])].double()
    error = float((rows - exact).norm() / exact.norm())
    if not error < MOST_ERROR:
        raise AssertionError(f"a layer differs from the float64 oracle by {error:.1e}")
    return error
