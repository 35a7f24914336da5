"""The roofline plot of a result: time of the whole layer over batch size, one panel a rank, the floor shaded.

``python -m torch_lora_moe.bench.plot FILE.json`` draws it again beside the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# column of a row: label, colour, line style
LINES = {
    "per_adapter_loop": ("torch, one adapter after the other", "#b07aa1", ":"),
    "torch_grouped": ("torch, grouped products", "#9c755f", ":"),
    "hooks": ("LoRA through our hooks on a torch layer", "#f28e2b", "--"),
    "fused": ("fused layer with LoRA", "#d62728", "-"),
    "plain": ("fused layer, no LoRA", "#4e79a7", "-"),
}


def draw(result: dict[str, Any], prefix: Path) -> None:
    """Writes ``prefix.png`` and ``prefix.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = sorted({row["rank"] for row in result["rows"]})
    figure, panels = pyplot.subplots(
        1, len(ranks), figsize=(max(7.5, 5.4 * len(ranks)), 4.8), sharey=True, squeeze=False
    )
    for panel, rank in zip(panels[0], ranks, strict=True):
        rows = sorted((row for row in result["rows"] if row["rank"] == rank), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in rows]
        for column, (label, color, style) in LINES.items():
            if all(column in row for row in rows):
                times = [row[column] for row in rows]
                panel.plot(tokens, times, style, color=color, label=label, marker="o", ms=3)
        if all("floor" in row for row in rows):
            floor = [row["floor"] for row in rows]
            panel.fill_between(
                tokens, floor, [min(floor) / 2] * len(floor), color="#dddddd", label="below the floor with LoRA"
            )
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=f"rank {rank}")
        panel.set_xticks(tokens, [str(count) for count in tokens])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("microseconds a layer")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    where = result.get("gpu", result.get("cpu"))
    figure.suptitle(f"{result['shape']}, {rows[0]['max_loras']} adapters mixed, {where}", fontsize=11)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    for suffix, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        figure.savefig(prefix.with_suffix(f".{suffix}"), **options)
    pyplot.close(figure)


def main() -> None:
    """Parses the command line and draws."""
    parser = argparse.ArgumentParser(prog="python -m torch_lora_moe.bench.plot", description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file of python -m torch_lora_moe.bench")
    path = parser.parse_args().result
    draw(json.loads(path.read_text()), path.with_suffix(""))


if __name__ == "__main__":
    main()
