"""``python -m torch_lora_moe.bench``: a table of LoRA's cost through the hooks, and the same as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from torch_lora_moe.bench.hooks import environment, measure
from torch_lora_moe.bench.problems import SHAPES

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
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument(
        "--tokens", type=lambda text: [int(part) for part in text.split(",")], default="1,8,32,128,512,4096"
    )
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default="16")
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


if __name__ == "__main__":
    main()
