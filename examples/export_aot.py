"""Exports a MoE block with LoRA adapters ahead of time, and writes inputs and the expected result beside it.

    python examples/export_aot.py FOLDER                  # for a CPU: any number of tokens
    python examples/export_aot.py FOLDER --device cuda    # for this GPU: one number of tokens

``examples/aot_cpp`` runs the package for a CPU in a C++ program. That for a GPU is run here, in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_lora_moe import MoELoRA, fused_experts
from torch_lora_moe.export import export_package

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, SLOTS, RANK = 9, 64, 32, 8, 2, 4, 8

RUN = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1] + "/block.pt2")
hidden_states, mapping, expected = torch.load(sys.argv[1] + "/batch.pt")
actual = package(hidden_states, mapping)
assert "torch_lora_moe" not in sys.modules
torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
print("as the eager result, largest difference", (actual - expected).abs().max().item())
"""


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


def example_batch(device: str) -> tuple[Tensor, Tensor]:
    """Hidden states and adapter slots of `TOKENS` tokens."""
    mapping = torch.arange(TOKENS, dtype=torch.int32) % (SLOTS + 1) - 1
    return torch.randn(TOKENS, HIDDEN).to(device), mapping.to(device)


def export_for_cpu(folder: Path, block: Block) -> None:
    """Exports for any number of tokens, then computes a batch of another size than the example's."""
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = (torch.randn(5, HIDDEN), torch.zeros(5, dtype=torch.int32))
    package = export_package(block, example, folder / "block.pt2", dynamic_shapes=({0: tokens}, {0: tokens}))
    hidden_states, mapping = example_batch("cpu")
    expected = block(hidden_states, mapping)
    for name, tensor in (("hidden_states", hidden_states), ("mapping", mapping), ("expected", expected)):
        tensor.numpy().tofile(folder / f"{name}.bin")
    print(f"wrote {package} and a batch of {TOKENS} tokens")


def export_for_gpu(folder: Path, block: Block) -> None:
    """Exports for batches of the example's size, then runs the package on another batch in a new process."""
    # the compiler on the path is the one whose C++ library Python has loaded, CXX may name another
    with torch._inductor.config.patch({"cpp.cxx": (None, "g++")}):
        package = export_package(block, example_batch("cuda"), folder / "block.pt2")
    print(f"wrote {package} for batches of {TOKENS} tokens")
    batch = example_batch("cuda")
    torch.save((*batch, block(*batch)), folder / "batch.pt")
    subprocess.run([sys.executable, "-c", RUN, str(folder.resolve())], cwd=folder, check=True)


def main() -> None:
    """Exports for the device that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        block = Block().eval().to(options.device)
        (export_for_gpu if options.device == "cuda" else export_for_cpu)(options.folder, block)


if __name__ == "__main__":
    main()
