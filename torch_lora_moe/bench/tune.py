"""``python -m torch_lora_moe.bench.tune``: picks tiles for the GPU it runs on and writes their JSON.

Times every candidate of every kernel over batch sizes, ranks and both projections of a shape, as CUDA-graph replays
with routing of their own for each call, and keeps the fastest. Candidates that do not fit the GPU are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from torch_lora_moe import launch, routing
from torch_lora_moe.bench.hooks import environment
from torch_lora_moe.bench.problems import SHAPES, Problem, Shape, make_problems
from torch_lora_moe.bench.timing import graph_time
from torch_lora_moe.config import LaunchConfig, power_of_two, shrink_planes

Measured = tuple[float, LaunchConfig, int]


def candidates(kernel: str, outer: int, inner: int) -> Iterator[LaunchConfig]:
    """Configurations worth a try for a problem of this size."""
    wide, deep = max(16, power_of_two(outer)), max(16, power_of_two(inner))
    if kernel == "shrink_pairs":
        for n, k, warps in itertools.product((8, 16, 32, 64), (128, 256, 512), (2, 4, 8)):
            if n <= wide and k <= deep and 1024 <= n * k <= 16384:
                yield LaunchConfig(1, n, k, warps, 3)
    elif kernel == "shrink_runs":
        for m, k, stages, warps in itertools.product((16, 32, 64), (64, 128, 256), (3, 4), (2, 4)):
            if k <= deep and m * k <= 8192:
                yield LaunchConfig(m, min(wide, 128 if m <= 32 else 64), k, warps, stages)
    elif kernel == "expand_pairs":
        for n, warps in itertools.product((64, 128, 256, 512), (2, 4, 8)):
            if n * deep <= 16384 and n <= wide:
                yield LaunchConfig(1, n, 0, warps, 1)
    else:
        for m, n, warps, stages in itertools.product((16, 32), (64, 128, 256), (1, 2, 4), (1, 2, 3)):
            if n <= wide and m * n <= 4096:
                yield LaunchConfig(m, n, min(64, deep), warps, stages)


class Job:
    """One kernel on one projection: the calls to time, for any configuration."""

    def __init__(self, kernel: str, projection: str, problems: list[Problem]) -> None:
        self.kernel, self.problems = kernel, problems
        self.sorts = not kernel.endswith("pairs")
        problem, shape = problems[0], problems[0].shape
        lora = problem.lora
        gate_up = projection == "gate_up"
        self.a, self.b = (lora.gate_up_a, lora.gate_up_b) if gate_up else (lora.down_a, lora.down_b)
        assert self.a is not None
        assert self.b is not None
        self.num_slices = 2 if gate_up else 1
        pairs = problem.num_pairs
        self.inputs = [
            p.x if gate_up else torch.randn_like(p.x.new_empty(pairs, shape.intermediate_size)) for p in problems
        ]
        self.schedules = [launch.route(*self._tokens(p), shape.num_experts, self.a.shape[0]) for p in problems]
        rank, width = self.b.shape[3], self.b.shape[2] // self.num_slices
        self.size = (self.a.shape[2], self.a.shape[3]) if kernel.startswith("shrink") else (width, rank)

    @staticmethod
    def _tokens(problem: Problem) -> tuple[Tensor, Tensor, None]:
        return problem.topk_ids, problem.token_lora_mapping, None

    def calls(self, config: LaunchConfig, split_k: int) -> list[Callable[[], object]]:
        """One launch for each problem."""
        make = self._shrink if self.kernel.startswith("shrink") else self._expand
        return [make(i, config, split_k) for i in range(len(self.problems))]

    def _shrink(self, i: int, config: LaunchConfig, split_k: int) -> Callable[[], object]:
        problem, x, schedule = self.problems[i], self.inputs[i], self.schedules[i]
        assert self.a is not None
        tokens, experts = self._tokens(problem), problem.shape.num_experts
        plan = launch.ShrinkPlan(x, self.a, *tokens, schedule, experts, split_k, config, self.sorts)
        args = (x, self.a, torch.empty(split_k, problem.num_pairs, self.a.shape[2], device="cuda"), *tokens, schedule)
        return lambda: plan(*args)

    def _expand(self, i: int, config: LaunchConfig, split_k: int) -> Callable[[], object]:
        problem = self.problems[i]
        assert self.b is not None
        # random numbers, not zeros: a GPU draws less power on zeros and runs faster
        shrunk = torch.randn(split_k, problem.num_pairs, self.num_slices * self.b.shape[3], device="cuda")
        output = torch.randn_like(problem.x.new_empty(*problem.topk_ids.shape, self.b.shape[2]))
        experts = problem.shape.num_experts
        plan = launch.ExpandPlan(output, self.b, None, None, experts, self.num_slices, split_k, config, self.sorts)
        args = (output, shrunk, self.b, *self._tokens(problem), self.schedules[i], None)
        return lambda: plan(*args)


def tune(job: Job, splits: list[int]) -> list[Measured]:
    """All candidates with their microseconds, fastest first."""
    configs = list(candidates(job.kernel, *job.size))
    measured = []
    for config, split_k in itertools.product(configs, splits):
        try:
            measured.append((graph_time(job.calls(config, split_k), replays=10), config, split_k))
        except OutOfResources:
            continue
    return sorted(measured, key=lambda row: row[0])


def splits_of(job: Job) -> list[int]:
    """Numbers of planes to try for a shrink; an expand takes what its shrink will use."""
    assert job.a is not None
    inner = job.a.shape[3]
    usual = shrink_planes(job.problems[0].num_pairs, inner, job.sorts)
    if not job.kernel.startswith("shrink"):
        return [usual]
    return sorted({1, 2, usual, max(1, min(8, inner // 256))})


def main() -> None:
    """Parses the command line, tunes and writes."""
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench.tune", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=_numbers, default="1,8,32,128,256,512,1024,4096")
    parser.add_argument("--ranks", type=_numbers, default="16,64")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--kernels", default="shrink_pairs,expand_pairs,shrink_runs,expand_runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, configs/<GPU>.json of the package")
    options = parser.parse_args()

    options.out.parent.mkdir(parents=True, exist_ok=True)
    shape: Shape = SHAPES[options.shape]
    kernels: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in options.kernels.split(",")}
    sizes = list(itertools.product(options.ranks, options.tokens))
    for rank, tokens in tqdm(sizes, unit="size"):
        problems = make_problems(shape, tokens, options.max_loras, rank, calls=4)
        for kernel, projection in itertools.product(kernels, ("gate_up", "down")):
            pairs = tokens * shape.top_k
            # both ways are timed around the size where one overtakes the other
            if not (routing.UNSORTED_PAIRS // 4 <= pairs <= 2 * routing.UNSORTED_PAIRS) and kernel.endswith(
                "pairs"
            ) == (pairs > routing.UNSORTED_PAIRS):
                continue
            job = Job(kernel, projection, problems)
            best = tune(job, splits_of(job))
            for time, config, split_k in best[:3]:
                tqdm.write(f"{kernel} {projection} r={rank} M={tokens}: {time:7.2f} us  split_k={split_k} {config}")
            usual = shrink_planes(pairs, job.a.shape[3], job.sorts)  # type: ignore[union-attr]
            chosen = next(row for row in best if row[2] == usual)
            kernels[kernel].append(
                {"shape": [pairs, *job.size], "config": asdict(chosen[1]), "us": round(chosen[0], 2)}
            )
            options.out.write_text(json.dumps({**environment(), "kernels": kernels}, indent=1) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
