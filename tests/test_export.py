"""Ahead-of-time packages: one runs in a process that never imports the package; what cannot be exported is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stubs import run
from torch import Tensor, nn

from torch_lora_moe import MoELoRA, build_lora_hooks, fused_experts
from torch_lora_moe.export import export_package
from torch_lora_moe.testing import Case, make_inputs


class Block(nn.Module):
    """A layer whose adapters are added by the fused op, and again through the hooks around plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = make_inputs(Case(odd_ids=False))
        assert self.inputs.lora is not None
        self.lora = MoELoRA(*self.inputs.lora)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, mapping: Tensor) -> tuple[Tensor, Tensor]:
        w13, w2 = self.inputs.w13, self.inputs.w2
        fused = fused_experts(x, w13, w2, weights, ids, self.lora, mapping)
        hooks = build_lora_hooks(self.lora, ids, weights, mapping)
        cache1 = torch.einsum("mkoh,mh->mko", w13[ids], x)
        hooks.after_gate_up(x, cache1)
        gate, up = cache1.chunk(2, -1)
        h = nn.functional.silu(gate) * up
        cache3 = torch.einsum("mkhi,mki->mkh", w2[ids], h) * weights[..., None]
        hooks.after_down(h.flatten(0, 1), cache3)
        return fused, cache3.sum(1)


SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
package = torch._inductor.aoti_load_package(sys.argv[2])
inputs, expected = torch.load(sys.argv[3])
for actual, wanted in zip(package(*inputs), expected, strict=True):
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
assert not any(name.startswith("torch_lora_moe") for name in sys.modules)
print("equal")
"""


def test_a_package_runs_without_this_one(library: Path, tmp_path: Path) -> None:
    block = Block().eval()
    i = block.inputs
    batch = (i.hidden_states, i.topk_weights, i.topk_ids, i.token_lora_mapping)
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    package = export_package(block, batch, tmp_path / "block.pt2", dynamic_shapes=tuple({0: tokens} for _ in batch))
    fewer = tuple(value[:6].clone() for value in batch)
    torch.save((fewer, block(*fewer)), tmp_path / "expected.pt")
    assert run(SCRIPT, library, package, tmp_path / "expected.pt").stdout.strip() == "equal"


def test_refusals(tmp_path: Path) -> None:
    plain, x = nn.Linear(4, 4).eval(), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"path: got block.zip, expected a name that ends in .pt2"):
        export_package(plain, (x,), tmp_path / "block.zip")
    with pytest.raises(ValueError, match=r"module: is in training mode"):
        export_package(nn.Linear(4, 4), (x,), tmp_path / "block.pt2")
    with pytest.raises(ValueError, match=r"module: its forward calls no lora_moe op"):
        export_package(plain, (x,), tmp_path / "block.pt2")
    wanted = r"weight: is on meta, packages can be exported for a CPU or a CUDA GPU only"
    with pytest.raises(ValueError, match=wanted):
        export_package(plain.to("meta"), (x,), tmp_path / "block.pt2")
    assert not list(tmp_path.iterdir())
