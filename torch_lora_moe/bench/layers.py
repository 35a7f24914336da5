"""One size of the benchmark: the whole layer in all the ways there are, each checked before it is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_lora_moe.api import fused_experts
from torch_lora_moe.bench.baselines import TorchLoRA, torch_layer
from torch_lora_moe.bench.oracle import relative_error, some_tokens
from torch_lora_moe.bench.problems import Problem, Shape, make_problems
from torch_lora_moe.bench.timing import call_time, graph_times, host_time
from torch_lora_moe.hooks import build_lora_hooks

Layer = Callable[[Problem], Tensor]


def fused(problem: Problem, with_lora: bool = True) -> Tensor:
    """The fused layer."""
    lora, mapping = (problem.lora, problem.token_lora_mapping) if with_lora else (None, None)
    return fused_experts(problem.x, problem.w13, problem.w2, problem.topk_weights, problem.topk_ids, lora, mapping)


def hooked(problem: Problem) -> Tensor:
    """Our hooks on a base layer of plain torch."""
    hooks = build_lora_hooks(problem.lora, problem.topk_ids, problem.topk_weights, problem.token_lora_mapping)
    return torch_layer(problem, hooks)


# what computes the layer with LoRA; the last two are torch's own
WITH_LORA: dict[str, Layer] = {
    "fused": fused,
    "hooks": hooked,
    "torch_grouped": lambda problem: torch_layer(problem, TorchLoRA(problem, by_adapter=False)),
    "per_adapter_loop": lambda problem: torch_layer(problem, TorchLoRA(problem, by_adapter=True)),
}
BASELINES = ("torch_grouped", "per_adapter_loop")


def without_adapters(problem: Problem) -> Problem:
    """The same call with all tokens at slot -1."""
    return dataclasses.replace(problem, token_lora_mapping=torch.full_like(problem.token_lora_mapping, -1))


def measure(
    shape: Shape, num_tokens: int, max_loras: int, rank: int, device: str, dtype: torch.dtype, baselines: bool
) -> dict[str, Any]:
    """One row of the table, in microseconds a call; on a GPU with the floor and the host's time beside them.

    Torch's own ways are left out at ranks whose rows ``torch._grouped_mm`` does not take (no multiple of 16 bytes).
    """
    on_gpu = device == "cuda"
    baselines = baselines and rank * dtype.itemsize % 16 == 0
    problems = make_problems(shape, num_tokens, max_loras, rank, 4 if on_gpu else 1, dtype, device)
    row: dict[str, Any] = {"tokens": num_tokens, "rank": rank, "max_loras": max_loras}

    def calls(layer: Layer, batch: list[Problem]) -> list[Callable[[], Tensor]]:
        return [lambda problem=problem: layer(problem) for problem in batch]  # type: ignore[misc]

    ways = {name: (layer, problems) for name, layer in WITH_LORA.items() if baselines or name not in BASELINES}
    bare = [without_adapters(problem) for problem in problems]
    ways |= {"plain": (lambda problem: fused(problem, with_lora=False), bare), "no_adapter": (fused, bare)}
    exact = {id(batch): some_tokens(batch[0]) for batch in (problems, bare)}
    for name, (layer, batch) in ways.items():
        row[f"{name}_error"] = relative_error(layer(batch[0]), batch[0], exact[id(batch)])
    timed = {name: calls(*way) for name, way in ways.items()}
    row |= graph_times(timed) if on_gpu else {name: call_time(batch) for name, batch in timed.items()}
    if on_gpu:
        row["floor"] = sum(problem.floor(True) for problem in problems) / len(problems)
        row["floor_plain"] = sum(problem.floor(False) for problem in problems) / len(problems)
        row["times_floor"] = row["fused"] / row["floor"]
        row["host_fused"] = host_time(lambda: fused(problems[0]))
        row["host_torch_add"] = host_time(lambda: problems[0].x.add_(0))
    return row
