"""``python -m torch_lora_moe.bench.hooks``: what LoRA through the hooks costs on top of a base layer of plain torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torch_lora_moe.api import virtual_experts_lora_add
from torch_lora_moe.bench.baselines import TorchLoRA, torch_layer
from torch_lora_moe.bench.problems import BYTES_PER_MICROSECOND, SHAPES, Problem, Shape, make_problems
from torch_lora_moe.bench.timing import environment, graph_time, host_time
from torch_lora_moe.hooks import build_lora_hooks


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


COLUMNS = (
    "tokens",
    "rank",
    "floor",
    "hooks",
    "hooks_overlapped",
    "hooks_alone",
    "torch_grouped",
    "per_adapter_loop",
    "base",
    "host_lora_add",
    "host_torch_add",
    "relative_error",
)


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench.hooks", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=_numbers, default="1,8,32,128,512,4096")
    parser.add_argument("--ranks", type=_numbers, default="16")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--no-baselines", action="store_true", help="skip LoRA in plain torch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    rows = []
    sizes = [(tokens, rank) for rank in options.ranks for tokens in options.tokens]
    for tokens, rank in tqdm(sizes, unit="size"):
        rows.append(measure(SHAPES[options.shape], tokens, options.max_loras, rank, not options.no_baselines))
    print("microseconds a layer call, medians of CUDA-graph replays; host_*: eager, one projection, and one x.add_()")
    print("  ".join(f"{column:>14s}" for column in COLUMNS))
    for row in rows:
        print("  ".join(f"{row.get(column, float('nan')):14.4g}" for column in COLUMNS))
    if options.out:
        result = {**environment(), "shape": options.shape, "unit": "microseconds a layer call", "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
