"""``python -m torch_lora_moe.bench.cpu``: the layer on the CPU, by the torch kernels and by the C++ library."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from torch_lora_moe import native
from torch_lora_moe.api import fused_experts
from torch_lora_moe.bench.problems import Problem, Shape, make_problems

SHAPES = {"tiny": Shape(64, 32, 8, 2), "olmoe": Shape(2048, 1024, 64, 8)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def median_time(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Milliseconds of one call: the median over ``seconds``, of three calls at least."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def run(problem: Problem) -> torch.Tensor:
    """The whole layer with LoRA."""
    weights = (problem.x, problem.w13, problem.w2, problem.topk_weights, problem.topk_ids)
    return fused_experts(*weights, problem.lora, problem.token_lora_mapping)


def measure(problem: Problem, library: Path) -> dict[str, float]:
    """Milliseconds of both, and how far their results are apart, relative to the largest output."""
    native.KERNELS.clear()
    theirs, torch_ms = run(problem), median_time(lambda: run(problem))
    native.load(library)
    ours, native_ms = run(problem), median_time(lambda: run(problem))
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference < 0.02:
        raise AssertionError(f"the kernels differ by {difference:.1e} of the largest output")
    return {"torch_ms": torch_ms, "native_ms": native_ms, "ratio": torch_ms / native_ms, "difference": difference}


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench.cpu", description=__doc__)
    parser.add_argument("--library", type=Path, default=native.built_library(), help="the C++ library")
    parser.add_argument("--tokens", default="1,4,8,32")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.library is None:
        parser.error("--library: none was built into the package, name one")
    tokens = [int(part) for part in options.tokens.split(",")]
    sizes = [(shape, dtype, count) for shape in SHAPES for dtype in DTYPES for count in tokens]
    rows = []
    for shape, dtype, count in tqdm(sizes, unit="size"):
        problem = make_problems(SHAPES[shape], count, 4, 16, calls=1, dtype=DTYPES[dtype], device="cpu")[0]
        rows.append({"shape": shape, "dtype": dtype, "tokens": count, **measure(problem, options.library)})
    for row in rows:
        print("  ".join(f"{value:>10.4g}" if isinstance(value, float) else f"{value:>6}" for value in row.values()))
    if options.out:
        about = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        result = {**about, "date": time.strftime("%Y-%m-%d"), "unit": "milliseconds a layer call", "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
