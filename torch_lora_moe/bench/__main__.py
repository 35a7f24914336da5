"""``python -m torch_lora_moe.bench``: the whole layer with mixed adapters beside its baselines and the floor.

Every way to compute the layer is checked against a float64 oracle first. A GPU is timed by CUDA-graph replays over four
batches with routing of their own; the active weights of the larger shapes exceed its cache. A CPU is timed by calls.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from torch_lora_moe.bench.layers import measure
from torch_lora_moe.bench.plot import draw
from torch_lora_moe.bench.problems import SHAPES
from torch_lora_moe.bench.timing import environment

COLUMNS = (
    "tokens",
    "rank",
    "floor",
    "fused",
    "times_floor",
    "floor_plain",
    "plain",
    "no_adapter",
    "hooks",
    "torch_grouped",
    "per_adapter_loop",
    "host_fused",
    "fused_error",
)


def main() -> None:
    """Parses the command line, measures, prints, writes and draws."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b" if on_gpu else "tiny")
    parser.add_argument("--tokens", type=_numbers, default="1,8,32,128,512,4096" if on_gpu else "1,8,32")
    parser.add_argument("--ranks", type=_numbers, default="16")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--no-baselines", action="store_true", help="skip LoRA in plain torch")
    parser.add_argument("--out", type=Path, help="JSON file to write; .png and .svg beside it")
    options = parser.parse_args()

    rows = []
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, options.dtype)
    sizes = [(tokens, rank) for rank in options.ranks for tokens in options.tokens]
    for tokens, rank in tqdm(sizes, unit="size"):
        shape = SHAPES[options.shape]
        rows.append(measure(shape, tokens, options.max_loras, rank, device, dtype, not options.no_baselines))
    print("microseconds a layer; floor, host and error columns where they exist")
    print("  ".join(f"{column:>12.12s}" for column in COLUMNS))
    for row in rows:
        print("  ".join(f"{row.get(column, float('nan')):12.4g}" for column in COLUMNS))
    if options.out:
        settings = {"shape": options.shape, "dtype": options.dtype, "unit": "microseconds a layer call"}
        result = {**environment(), **settings, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, options.out.with_suffix(""))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
