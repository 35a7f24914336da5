"""Exports a MoE block with LoRA adapters ahead of time, and writes inputs and the expected result beside it.

    python examples/export_aot.py FOLDER

``examples/aot_cpp`` runs the package in a C++ program.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_lora_moe import MoELoRA, fused_experts
from torch_lora_moe.export import export_package

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, SLOTS, RANK = 9, 64, 32, 8, 2, 4, 8


class Block(nn.Module):
    """A router and a MoE layer; each token names its adapter slot."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "router": (EXPERTS, HIDDEN),
            "w13": (EXPERTS, 2 * INTERMEDIATE, HIDDEN),
            "w2": (EXPERTS, HIDDEN, INTERMEDIATE),
            "gate_up_a": (SLOTS, EXPERTS, 2 * RANK, HIDDEN),
            "gate_up_b": (SLOTS, EXPERTS, 2 * INTERMEDIATE, RANK),
            "down_a": (SLOTS, EXPERTS, RANK, INTERMEDIATE),
            "down_b": (SLOTS, EXPERTS, HIDDEN, RANK),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape, generator=generator) * shape[-1] ** -0.5)

    def forward(self, hidden_states: Tensor, token_lora_mapping: Tensor) -> Tensor:
        """``[M, H]`` and ``[M]`` to ``[M, H]``."""
        weights, ids = (hidden_states @ self.router.T).softmax(-1).topk(TOP_K)
        lora = MoELoRA(self.gate_up_a, self.gate_up_b, self.down_a, self.down_b)
        return fused_experts(hidden_states, self.w13, self.w2, weights, ids, lora, token_lora_mapping)


def main() -> None:
    """Exports for any number of tokens, then computes a batch of another size than the example's."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    block = Block().eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = (torch.randn(5, HIDDEN), torch.zeros(5, dtype=torch.int32))
    package = export_package(block, example, folder / "block.pt2", dynamic_shapes=({0: tokens}, {0: tokens}))

    hidden_states = torch.randn(TOKENS, HIDDEN)
    mapping = torch.arange(TOKENS, dtype=torch.int32) % (SLOTS + 1) - 1
    with torch.no_grad():
        expected = block(hidden_states, mapping)
    for name, tensor in (("hidden_states", hidden_states), ("mapping", mapping), ("expected", expected)):
        tensor.numpy().tofile(folder / f"{name}.bin")
    print(f"wrote {package} and a batch of {TOKENS} tokens")


if __name__ == "__main__":
    main()
