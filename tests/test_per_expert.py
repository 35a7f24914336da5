"""Adapters with a LoRA pair for each expert's linear layers, written by PEFT and compared with PEFT's own outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from torch_lora_moe import AdapterPool, fused_experts
from torch_lora_moe.adapters import ExpertsSpec, read_adapter

HIDDEN, INNER, EXPERTS = 16, 12, 5
LAYER = "model.layers.0.mlp.experts"
SPEC = ExpertsSpec(EXPERTS, HIDDEN, INNER)
QWEN, MIXTRAL = ("mlp", "gate_proj", "up_proj", "down_proj"), ("block_sparse_moe", "w1", "w3", "w2")


class Expert(nn.Module):
    """One expert of linear layers of its own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)), strict=True):
            setattr(self, name, nn.Linear(*shape, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


def old_model(family: tuple[str, ...]) -> nn.Module:
    """A model whose modules are named as Transformers 4 names them."""
    parent, *names = family
    experts = nn.ModuleList(Expert(tuple(names)) for _ in range(EXPERTS))
    layer = nn.Module()
    layer.add_module(parent, nn.ModuleDict({"experts": experts}))
    model = nn.Module()
    model.add_module("model", nn.ModuleDict({"layers": nn.ModuleList([layer])}))
    return model


def saved(family: tuple[str, ...], folder: Path, **options: Any) -> PeftModel:
    """An adapter that PEFT made and saved, with random B."""
    torch.manual_seed(0)
    targets = options.pop("targets", list(family[1:]))
    model = get_peft_model(
        old_model(family), LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6, **options})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def stacked(model: PeftModel, family: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    experts = model.base_model.model.model["layers"][0].get_submodule(f"{family[0]}.experts")
    weights = [[getattr(e, name).weight for name in family[1:]] for e in experts]
    gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in weights])
    return gate_up.detach(), torch.stack([down for _, _, down in weights]).detach()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "only_up": {"subset": (2,)},
    "gate_and_down": {"subset": (1, 3)},
    "patterns": {"rank_pattern": {r"experts\.3\.{1}": 7, "{3}": 2}, "alpha_pattern": {r"experts\.1\.{2}": 20}},
    "some_experts": {"targets": r".*experts\.[02]\..*"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", [QWEN, MIXTRAL], ids=["qwen", "mixtral"])
def test_outputs_are_peft_s(family: tuple[str, ...], options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    if "subset" in options:
        options["targets"] = [family[i] for i in options.pop("subset")]
    for name in ("rank_pattern", "alpha_pattern"):
        if name in options:
            names = {"{1}": family[1], "{2}": family[2], "{3}": family[3]}
            options[name] = {_filled(pattern, names): value for pattern, value in options[name].items()}
    model = saved(family, tmp_path, **options)
    lora = read_adapter(tmp_path, {LAYER: SPEC}).layers[LAYER]
    pool = AdapterPool({LAYER: SPEC}, max_loras=2, max_lora_rank=8)
    pool.load("one", tmp_path)
    assert lora.rank == (7 if "rank_pattern" in options else 4)

    x, ids = torch.randn(EXPERTS, HIDDEN), torch.arange(EXPERTS)[:, None]
    w13, w2 = stacked(model, family)
    mapping = pool.token_lora_mapping(["one"] * EXPERTS)
    actual = fused_experts(x, w13, w2, torch.ones(EXPERTS, 1), ids, pool.lora(LAYER), mapping)
    experts = model.base_model.model.model["layers"][0].get_submodule(f"{family[0]}.experts")
    with torch.no_grad():
        expected = torch.stack([expert(row) for expert, row in zip(experts, x, strict=True)])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    plain = fused_experts(x, w13, w2, torch.ones(EXPERTS, 1), ids)
    assert (plain - expected).abs().max() > 0.01, "the adapter matters"


def _filled(pattern: str, names: dict[str, str]) -> str:
    for place, name in names.items():
        pattern = pattern.replace(place, name)
    return pattern


PREFIX = f"base_model.model.{LAYER}"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key.replace(old, new): tensors.pop(key) for key in list(tensors)})


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "half": (
        lambda t: t.pop(f"{PREFIX}.1.up_proj.lora_B.weight"),
        f"{PREFIX}.1.up_proj.lora_A.weight: its other half, lora_B, is missing",
    ),
    "expert": (renamed("experts.4", "experts.9"), f"9.down_proj.lora_A.weight: expert 9, but {LAYER} has 5"),
    "projection": (renamed("up_proj", "side_proj"), f"the experts of {LAYER} have no side_proj"),
    "layer": (renamed("layers.0", "layers.7"), "model.layers.7.mlp.experts is no MoE layer of the model"),
    "shape": (
        lambda t: t.update({f"{PREFIX}.1.up_proj.lora_A.weight": torch.ones(4, 17)}),
        "fit no projection with 16 input and 12 output features",
    ),
    "rank": (
        lambda t: t.update(
            {
                f"{PREFIX}.1.up_proj.lora_A.weight": torch.ones(3, 16),
                f"{PREFIX}.1.up_proj.lora_B.weight": torch.ones(12, 3),
            }
        ),
        f"{PREFIX}.1.up_proj.lora_A.weight: rank 3, but adapter_config.json says 4",
    ),
    "both formats": (
        lambda t: t.update(
            {f"{PREFIX}.lora_A.weight": torch.ones(20, 12), f"{PREFIX}.lora_B.weight": torch.ones(16, 20)}
        ),
        f"{LAYER} has matrices of single experts too",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    saved(QWEN, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter(tmp_path, {LAYER: SPEC})


def test_an_expert_without_gate_refuses_one(tmp_path: Path) -> None:
    saved(QWEN, tmp_path)
    with pytest.raises(ValueError, match="have no gate_proj"):
        read_adapter(tmp_path, {LAYER: ExpertsSpec(EXPERTS, HIDDEN, INNER, is_gated=False)})
