"""``python -m torch_lora_moe.bench.tune``: picks tiles for the GPU it runs on and writes their JSON.

Times LoRA on both projections of a shape with every candidate of every kernel, over batch sizes and ranks, as
CUDA-graph replays with routing and matrices of their own for each call, and keeps the fastest where it beats the
heuristics. Candidates that do not fit the GPU are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from torch_lora_moe import launch, routing, schedules
from torch_lora_moe.bench.problems import SHAPES, Problem, make_problems
from torch_lora_moe.bench.timing import environment, graph_time
from torch_lora_moe.config import HEURISTICS, LaunchConfig, power_of_two

Measured = tuple[float, LaunchConfig]
PROJECTIONS = ("gate_up", "down")
LEAST_GAIN = 0.02


def candidates(kernel: str, outer: int, inner: int) -> Iterator[LaunchConfig]:
    """Configurations worth a try for a problem of this size."""
    wide, deep = max(16, power_of_two(outer)), max(16, power_of_two(inner))
    if kernel == "shrink_pairs":
        for n, k, warps in itertools.product((8, 16, 32, 64), (128, 256, 512), (2, 4, 8)):
            if n <= wide and k <= deep and 2048 <= n * k <= 16384:
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
        for m, n, warps in itertools.product((16, 32), (64, 128, 256), (1, 2, 4)):
            if n <= wide and 2048 <= m * n <= 4096:
                yield LaunchConfig(m, n, min(64, deep), warps, 1)


class Job:
    """LoRA on one projection: both kernels as `lora_add_` launches them, each with any configuration.

    Every call has matrices of its own: those of one call may fit into the cache and would be found there by the next.
    """

    def __init__(self, projection: str, problems: list[Problem]) -> None:
        self.problems, problem = problems, problems[0]
        gate_up = projection == "gate_up"
        a, b = problem.lora[:2] if gate_up else problem.lora[2:4]
        assert a is not None
        assert b is not None
        self.matrices = [(a.clone(), b.clone()) for _ in problems]
        self.num_slices = 2 if gate_up else 1
        self.weights = [None if gate_up else p.topk_weights for p in problems]
        self.num_experts, pairs = problem.shape.num_experts, problem.num_pairs
        inner = problem.shape.intermediate_size
        # random numbers, not zeros: a GPU draws less power on zeros and runs faster
        self.inputs = [p.x if gate_up else torch.randn_like(p.x.new_empty(pairs, inner)) for p in problems]
        self.outputs = [torch.randn_like(p.x.new_empty(*p.topk_ids.shape, b.shape[2])) for p in problems]
        self.schedules = [schedules.route(*self._tokens(p), self.num_experts, a.shape[0]) for p in problems]
        self.sorts = routing.lora_sorts(pairs, self.num_experts * a.shape[0])
        self.kernels = ("shrink_runs", "expand_runs") if self.sorts else ("shrink_pairs", "expand_pairs")
        width = b.shape[2] // self.num_slices
        self.sizes = dict(zip(self.kernels, ((a.shape[2], a.shape[3]), (width, b.shape[3])), strict=True))
        self.configs = {kernel: HEURISTICS[kernel](pairs, *self.sizes[kernel]) for kernel in self.kernels}

    @staticmethod
    def _tokens(problem: Problem) -> tuple[Tensor, Tensor, None]:
        return problem.topk_ids, problem.token_lora_mapping, None

    def calls(self, configs: dict[str, LaunchConfig]) -> list[Callable[[], object]]:
        """One call for each problem."""
        return [self._call(i, *(configs[kernel] for kernel in self.kernels)) for i in range(len(self.problems))]

    def _call(self, i: int, shrink: LaunchConfig, expand: LaunchConfig) -> Callable[[], object]:
        tokens, x, (a, b), schedule = (
            self._tokens(self.problems[i]),
            self.inputs[i],
            self.matrices[i],
            self.schedules[i],
        )
        output, weights = self.outputs[i], self.weights[i]
        plan = launch.AddPlan(output, x, a, b, *tokens, schedule, weights, self.num_slices, shrink, expand)
        return lambda: plan(output, x, a, b, *tokens, schedule, weights)


def tune(job: Job, kernel: str) -> list[Measured]:
    """All candidates of one kernel beside what is chosen for the other, with their microseconds, fastest first."""
    measured = []
    for config in candidates(kernel, *job.sizes[kernel]):
        try:
            measured.append((graph_time(job.calls({**job.configs, kernel: config}), replays=15), config))
        except OutOfResources:
            continue
    return sorted(measured, key=lambda row: row[0])


def compile_share(shape: str, rank: int, max_loras: int, share: int, shares: int) -> None:
    """Runs every ``shares``-th candidate once, so that its kernel is in Triton's cache on disk."""
    for tokens in (4, 2 * routing.UNSORTED_PAIRS):
        problems = make_problems(SHAPES[shape], tokens, max_loras, rank, calls=1)
        for job in (Job(projection, problems) for projection in PROJECTIONS):
            for kernel in job.kernels:
                for config in itertools.islice(candidates(kernel, *job.sizes[kernel]), share, None, shares):
                    with contextlib.suppress(OutOfResources):
                        job.calls({**job.configs, kernel: config})[0]()
    torch.cuda.synchronize()


def compile_all(options: argparse.Namespace) -> None:
    """Compiles the candidates of all ranks in ``options.jobs`` processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context) as pool:
        shares = [
            pool.submit(compile_share, options.shape, rank, options.max_loras, share, options.jobs)
            for rank, share in itertools.product(options.ranks, range(options.jobs))
        ]
        for done in tqdm(as_completed(shares), total=len(shares), unit="share", desc="compile"):
            done.result()


def main() -> None:
    """Parses the command line, tunes and writes."""
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench.tune", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=_numbers, default="1,8,32,128,256,512,1024,4096")
    parser.add_argument("--ranks", type=_numbers, default="16,64")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, configs/<GPU>.json of the package")
    options = parser.parse_args()

    options.out.parent.mkdir(parents=True, exist_ok=True)
    compile_all(options)
    kernels: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in HEURISTICS}
    sizes = list(itertools.product(options.ranks, options.tokens))
    for rank, tokens in tqdm(sizes, unit="size"):
        problems = make_problems(SHAPES[options.shape], tokens, options.max_loras, rank, calls=4)
        for projection in PROJECTIONS:
            job = Job(projection, problems)
            usual = graph_time(job.calls(job.configs))
            for kernel in job.kernels:
                time, config = tune(job, kernel)[0]
                # a gain within the noise of a measurement is none
                if time < (1 - LEAST_GAIN) * usual:
                    job.configs[kernel], usual = config, time
                tqdm.write(f"{projection} r={rank} M={tokens}: {usual:7.2f} us  {kernel} {job.configs[kernel]}")
            for kernel, config in job.configs.items():
                entry = {"shape": [problems[0].num_pairs, *job.sizes[kernel]], "config": asdict(config)}
                kernels[kernel].append({**entry, "us_both": round(usual, 2)})
            options.out.write_text(json.dumps({**environment(), "kernels": kernels}, indent=1) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
