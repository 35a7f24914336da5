"""Packages for this GPU: the Triton kernels are inside, and a process that never imports the package runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layers import Layer, make_layer
from stubs import run
from torch import Tensor, nn
from torch.nn import functional as F

from torch_lora_moe import MoELoRA, build_lora_hooks, fused_experts
from torch_lora_moe.export import export_package

SCRIPT = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
for actual, wanted in zip(package(*inputs), expected, strict=True):
    print((actual.float() - wanted.float()).abs().max().item() / wanted.float().abs().max().item())
assert not any(name.startswith("torch_lora_moe") for name in sys.modules)
"""


class Block(nn.Module):
    """A layer with the fused op, and again with the hooks around plain products."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        for name, value in zip(MoELoRA._fields, layer.lora, strict=True):
            self.register_buffer(name, value)
        self.register_buffer("w13", layer.w13)
        self.register_buffer("w2", layer.w2)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, mapping: Tensor) -> tuple[Tensor, Tensor]:
        lora = MoELoRA(*(getattr(self, name) for name in MoELoRA._fields))
        fused = fused_experts(x, self.w13, self.w2, weights, ids, lora, mapping)
        hooks = build_lora_hooks(lora, ids, weights, mapping)
        cache1 = torch.einsum("mkoh,mh->mko", self.w13[ids], x)
        hooks.after_gate_up(x, cache1)
        gate, up = cache1.chunk(2, -1)
        h = F.silu(gate) * up
        cache3 = (torch.einsum("mkhi,mki->mkh", self.w2[ids], h) * weights[..., None]).to(x.dtype)
        hooks.after_down(h.flatten(0, 1), cache3)
        return fused, cache3.sum(1)


@pytest.mark.parametrize("tokens", [1, 400])
def test_a_package_runs_without_this_one(tokens: int, tmp_path: Path) -> None:
    layer = make_layer(tokens, odd_ids=False)
    block = Block(layer).eval()
    batch = (layer.x, layer.weights, layer.ids, layer.mapping)
    # the compiler on the path is the one whose C++ library this process has loaded, CXX may name another
    with torch._inductor.config.patch({"cpp.cxx": (None, "g++")}):
        package = export_package(block, batch, tmp_path / "block.pt2")
    other = make_layer(tokens, odd_ids=False, seed=3)
    inputs = (other.x, other.weights, other.ids, other.mapping)
    torch.save((inputs, block(*inputs)), tmp_path / "expected.pt")
    differences = [float(line) for line in run(SCRIPT, package, tmp_path / "expected.pt").stdout.split()]
    assert len(differences) == 2
    assert differences[0] == 0, "the same kernels give the same bits"
    # Inductor fuses the plain products around the hooks and rounds them less often
    assert differences[1] < 0.02


def test_refusals(tmp_path: Path) -> None:
    layer = make_layer(5, odd_ids=False)
    block = Block(layer).eval()
    batch = (layer.x, layer.weights, layer.ids, layer.mapping)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with pytest.raises(ValueError, match=r"dynamic_shapes: got .*, expected None on a GPU"):
        export_package(block, batch, tmp_path / "block.pt2", dynamic_shapes=tuple({0: tokens} for _ in batch))
    with pytest.raises(ValueError, match=r"input 3: is on cpu, expected cuda:0 as gate_up_a"):
        export_package(block, (*batch[:3], layer.mapping.cpu()), tmp_path / "block.pt2")
    with pytest.raises(ValueError, match=r"module: its forward calls no lora_moe op"):
        export_package(nn.Linear(4, 4).cuda().eval(), (torch.zeros(2, 4, device="cuda"),), tmp_path / "block.pt2")
    assert not list(tmp_path.iterdir())
