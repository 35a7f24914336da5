"""What LoRA through the hooks costs on top of a base layer, beside LoRA in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_lora_moe.api import virtual_experts_lora_add
from torch_lora_moe.bench.baselines import TorchLoRA, torch_layer
from torch_lora_moe.bench.problems import Problem, Shape, make_problems
from torch_lora_moe.bench.timing import graph_time, host_time
from torch_lora_moe.hooks import build_lora_hooks

BYTES_PER_MICROSECOND = 4.3e6


def hooks_of(problem: Problem) -> Any:
    """Our hooks for one call."""
    return build_lora_hooks(problem.lora, problem.topk_ids, problem.topk_weights, problem.token_lora_mapping)


def check(problem: Problem) -> float:
    """Largest difference of the hooked layer from LoRA in plain torch, relative to the largest output."""
    ours, theirs = (
        torch_layer(problem, hooks_of(problem)).float(),
        torch_layer(problem, TorchLoRA(problem, False)).float(),
    )
    plain = torch_layer(problem, None).float()
    size = theirs.abs().max()
    error = ((ours - theirs).abs().max() / size).item()
    effect = ((plain - theirs).abs().max() / size).item()
    if not error < 0.03 or not effect > 0.1:
        raise AssertionError(f"hooks differ from plain torch by {error:.1e} of the largest output")
    return error


def measure(shape: Shape, num_tokens: int, max_loras: int, rank: int, baselines: bool) -> dict[str, float]:
    """One row of the table: microseconds a call."""
    problems = make_problems(shape, num_tokens, max_loras, rank, calls=4)
    row: dict[str, float] = {"tokens": num_tokens, "rank": rank, "max_loras": max_loras}
    row["relative_error"] = check(problems[0])
    row["floor"] = sum(p.lora_bytes() for p in problems) / len(problems) / BYTES_PER_MICROSECOND

    def layers(make_hooks: Callable[[Problem], Any] | None, overlap: bool = False) -> float:
        def call(problem: Problem) -> Callable[[], object]:
            return lambda: torch_layer(problem, make_hooks(problem) if make_hooks else None, overlap)

        return graph_time([call(problem) for problem in problems])

    base = layers(None)
    row["base"] = base
    row["hooks"] = layers(hooks_of) - base
    row["hooks_overlapped"] = layers(hooks_of, overlap=True) - base
    row["hooks_alone"] = graph_time([lora_only(problem) for problem in problems])
    if baselines:
        row["torch_grouped"] = layers(lambda problem: TorchLoRA(problem, False)) - base
        row["per_adapter_loop"] = layers(lambda problem: TorchLoRA(problem, True)) - base
    row["host_lora_add"] = host_time(one_add(problems[0]))
    row["host_torch_add"] = host_time(lambda: problems[0].x.add_(0))
    return row


def lora_only(problem: Problem) -> Callable[[], object]:
    """The LoRA launches of a layer without its base."""
    shape, pairs = problem.shape, problem.num_pairs
    cache1 = problem.x.new_zeros(pairs, 2 * shape.intermediate_size)
    h, cache3 = problem.x.new_ones(pairs, shape.intermediate_size), problem.x.new_zeros(pairs, shape.hidden_size)

    def call() -> None:
        hooks = hooks_of(problem)
        hooks.after_gate_up(problem.x, cache1)
        hooks.after_down(h, cache3)

    return call


def one_add(problem: Problem) -> Callable[[], object]:
    """One `virtual_experts_lora_add` with a warm routing cache."""
    shape, cache = problem.shape, {}  # type: ignore[var-annotated]
    out = problem.x.new_zeros(*problem.topk_ids.shape, 2 * shape.intermediate_size)

    def call() -> None:
        virtual_experts_lora_add(
            out,
            problem.x,
            problem.lora.gate_up_a,  # type: ignore[arg-type]
            problem.lora.gate_up_b,  # type: ignore[arg-type]
            problem.topk_ids,
            None,
            problem.token_lora_mapping,
            num_slices=2,
            routing_cache=cache,
        )

    return call


def environment() -> dict[str, str]:
    """What a result must say about where it was measured."""
    import datetime

    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
