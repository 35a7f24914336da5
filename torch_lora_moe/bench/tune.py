"""``python -m torch_lora_moe.bench.tune``: picks tiles for the GPU it runs on and writes their JSON.

Times every candidate of every kernel over batch sizes, ranks and both projections of a shape, as CUDA-graph replays
with routing of their own for each call, and keeps the fastest. Candidates that do not fit the GPU are skipped.
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

from torch_lora_moe import launch, routing
from torch_lora_moe.bench.hooks import environment
from torch_lora_moe.bench.problems import SHAPES, Problem, make_problems
from torch_lora_moe.bench.timing import graph_time
from torch_lora_moe.config import LaunchConfig, power_of_two, shrink_planes

Measured = tuple[float, LaunchConfig]
KERNELS = ("shrink_pairs", "expand_pairs", "shrink_runs", "expand_runs")


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
        for m, n, warps, stages in itertools.product((16, 32), (64, 128, 256), (1, 2, 4), (1, 3)):
            if n <= wide and 2048 <= m * n <= 4096:
                yield LaunchConfig(m, n, min(64, deep), warps, stages)


PROJECTIONS = ("gate_up", "down")


class Job:
    """One kernel on one projection: the calls to time, for any configuration.

    Every call has matrices of its own: those of one call may fit into the cache and would be found there by the next.
    """

    def __init__(self, kernel: str, projection: str, problems: list[Problem]) -> None:
        self.kernel, self.problems = kernel, problems
        problem, shape = problems[0], problems[0].shape
        gate_up = projection == "gate_up"
        a, b = problem.lora[:2] if gate_up else problem.lora[2:4]
        assert a is not None
        assert b is not None
        self.shrinks = kernel.startswith("shrink")
        self.matrices = [(a if self.shrinks else b).clone() for _ in problems]
        self.num_slices = 2 if gate_up else 1
        self.weights = [None if gate_up else p.topk_weights for p in problems]
        pairs, inner = problem.num_pairs, shape.intermediate_size
        self.inputs = [p.x if gate_up else torch.randn_like(p.x.new_empty(pairs, inner)) for p in problems]
        self.schedules = [launch.route(*self._tokens(p), shape.num_experts, a.shape[0]) for p in problems]
        sorts = not kernel.endswith("pairs")
        self.planes, self.rows = shrink_planes(pairs, a.shape[3], sorts), a.shape[2]
        self.size = (a.shape[2], a.shape[3]) if self.shrinks else (b.shape[2] // self.num_slices, b.shape[3])

    @staticmethod
    def _tokens(problem: Problem) -> tuple[Tensor, Tensor, None]:
        return problem.topk_ids, problem.token_lora_mapping, None

    def calls(self, config: LaunchConfig) -> list[Callable[[], object]]:
        """One launch for each problem."""
        make = self._shrink if self.shrinks else self._expand
        return [make(i, config) for i in range(len(self.problems))]

    def _shrink(self, i: int, config: LaunchConfig) -> Callable[[], object]:
        problem, x, a, schedule = self.problems[i], self.inputs[i], self.matrices[i], self.schedules[i]
        tokens, experts = self._tokens(problem), problem.shape.num_experts
        plan = launch.ShrinkPlan(x, a, *tokens, schedule, experts, self.planes, config, clear=False)
        args = (x, a, torch.empty(self.planes, problem.num_pairs, self.rows, device="cuda"), *tokens, schedule)
        return lambda: plan(*args)

    def _expand(self, i: int, config: LaunchConfig) -> Callable[[], object]:
        problem, b, weights = self.problems[i], self.matrices[i], self.weights[i]
        # random numbers, not zeros: a GPU draws less power on zeros and runs faster
        shrunk = torch.randn(self.planes, problem.num_pairs, self.num_slices * b.shape[3], device="cuda")
        output = torch.randn_like(problem.x.new_empty(*problem.topk_ids.shape, b.shape[2]))
        sizes = (problem.shape.num_experts, self.num_slices, self.planes)
        plan = launch.ExpandPlan(output, b, None, weights, *sizes, config)
        args = (output, shrunk, b, *self._tokens(problem), self.schedules[i], weights)
        return lambda: plan(*args)


def tune(job: Job) -> list[Measured]:
    """All candidates with their microseconds, fastest first."""
    measured = []
    for config in candidates(job.kernel, *job.size):
        try:
            measured.append((graph_time(job.calls(config), replays=10), config))
        except OutOfResources:
            continue
    return sorted(measured, key=lambda row: row[0])


def compile_share(shape: str, rank: int, max_loras: int, kernels: list[str], share: int, shares: int) -> None:
    """Runs every ``shares``-th candidate once, so that its kernel is in Triton's cache on disk."""
    for pairs_only, tokens in ((True, 4), (False, 2 * routing.UNSORTED_PAIRS)):
        problems = make_problems(SHAPES[shape], tokens, max_loras, rank, calls=1)
        for kernel, projection in itertools.product(kernels, PROJECTIONS):
            if kernel.endswith("pairs") != pairs_only:
                continue
            job = Job(kernel, projection, problems)
            for config in itertools.islice(candidates(kernel, *job.size), share, None, shares):
                with contextlib.suppress(OutOfResources):
                    job.calls(config)[0]()
    torch.cuda.synchronize()


def compile_all(options: argparse.Namespace, kernels: list[str]) -> None:
    """Compiles the candidates of all ranks in ``options.jobs`` processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context) as pool:
        shares = [
            pool.submit(compile_share, options.shape, rank, options.max_loras, kernels, share, options.jobs)
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
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, configs/<GPU>.json of the package")
    options = parser.parse_args()

    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = options.kernels.split(",")
    compile_all(options, names)
    kernels: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in names}
    sizes = list(itertools.product(options.ranks, options.tokens))
    for rank, tokens in tqdm(sizes, unit="size"):
        problems = make_problems(SHAPES[options.shape], tokens, options.max_loras, rank, calls=4)
        pairs = problems[0].num_pairs
        sorts = routing.lora_sorts(pairs, options.max_loras * problems[0].shape.num_experts)
        for kernel, projection in itertools.product(names, PROJECTIONS):
            if kernel.endswith("pairs") == sorts:
                continue
            job = Job(kernel, projection, problems)
            best = tune(job)
            for time, config in best[:3]:
                tqdm.write(f"{kernel} {projection} r={rank} M={tokens}: {time:7.2f} us  {config}")
            entry = {"shape": [pairs, *job.size], "config": asdict(best[0][1]), "us": round(best[0][0], 2)}
            kernels[kernel].append(entry)
            options.out.write_text(json.dumps({**environment(), "kernels": kernels}, indent=1) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
