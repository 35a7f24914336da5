"""Adapters whose matrices are stacked over the experts, some shared by all, against weights they are merged into."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_lora_moe import AdapterPool, fused_experts
from torch_lora_moe.adapters import ExpertsSpec, read_adapter

HIDDEN, INNER, EXPERTS, RANK, ALPHA = 16, 12, 5, 4, 6
LAYER = "model.layers.0.mlp.experts"
PREFIX = f"base_model.model.{LAYER}"
SPEC = ExpertsSpec(EXPERTS, HIDDEN, INNER)
SHAPES = {"w1": (HIDDEN, INNER), "w3": (HIDDEN, INNER), "w2": (INNER, HIDDEN), "gate_up_proj": (HIDDEN, 2 * INNER)}


def save(folder: Path, sides: dict[str, tuple[int, int]], rank: int = RANK, seed: int = 0) -> dict[str, Tensor]:
    """Random matrices, by projection the experts of A and of B."""
    torch.manual_seed(seed)
    tensors = {}
    for name, (experts_a, experts_b) in sides.items():
        inputs, outputs = SHAPES[{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(name, name)]
        tensors[f"{PREFIX}.{name}.lora_A.weight"] = torch.randn(experts_a, rank, inputs) * inputs**-0.5
        tensors[f"{PREFIX}.{name}.lora_B.weight"] = torch.randn(experts_b, outputs, rank) * rank**-0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def delta(tensors: dict[str, Tensor], *names: str) -> Tensor:
    """``scaling * B @ A`` for each expert, zero where the adapter has no such projection."""
    for name in names:
        if f"{PREFIX}.{name}.lora_A.weight" in tensors:
            a, b = (tensors[f"{PREFIX}.{name}.lora_{side}.weight"] for side in "AB")
            return (ALPHA / a.shape[1] * b.expand(EXPERTS, -1, -1)) @ a.expand(EXPERTS, -1, -1)
    inputs, outputs = SHAPES[names[0]]
    return torch.zeros(EXPERTS, outputs, inputs)


ADAPTERS: dict[str, dict[str, tuple[int, int]]] = {
    "shared_outer": {"w1": (1, EXPERTS), "w3": (1, EXPERTS), "w2": (EXPERTS, 1)},
    "shared_outer_by_other_names": {"gate_proj": (1, EXPERTS), "up_proj": (1, EXPERTS), "down_proj": (EXPERTS, 1)},
    "own_for_each": {"w1": (EXPERTS, EXPERTS), "w3": (EXPERTS, EXPERTS), "w2": (EXPERTS, EXPERTS)},
    "all_shared": {"w1": (1, 1), "w3": (1, 1), "w2": (1, 1)},
    "mixed": {"w1": (1, EXPERTS), "w3": (EXPERTS, 1), "w2": (1, EXPERTS)},
    "fused": {"gate_up_proj": (1, EXPERTS), "down_proj": (EXPERTS, 1)},
    "only_up": {"w3": (1, EXPERTS)},
    "only_down": {"w2": (EXPERTS, 1)},
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sides", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("shared_outer", [False, True])
def test_outputs_are_those_of_merged_weights(
    sides: dict[str, tuple[int, int]], interleaved: bool, shared_outer: bool, tmp_path: Path
) -> None:
    tensors = save(tmp_path, sides)
    spec = ExpertsSpec(EXPERTS, HIDDEN, INNER, interleaved=interleaved)
    pool = AdapterPool({LAYER: spec}, max_loras=2, max_lora_rank=8, shared_outer=shared_outer)
    gate_and_up = [sides.get(name, (1, 1)) for name in ("w1", "gate_proj", "w3", "up_proj", "gate_up_proj")]
    down = [sides.get(name, (1, 1)) for name in ("w2", "down_proj")]
    if shared_outer and (any(a > 1 for a, _ in gate_and_up) or any(b > 1 for _, b in down)):
        with pytest.raises(ValueError, match=f"for each expert of {re.escape(LAYER)}"):
            pool.load("one", tmp_path)
        assert pool.names == []
        return
    pool.load("one", tmp_path)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5
    fused = delta(tensors, "gate_up_proj")
    merged = fused + _halves(delta(tensors, "w1", "gate_proj"), delta(tensors, "w3", "up_proj"), interleaved)
    x, ids, weights = torch.randn(EXPERTS, HIDDEN), torch.arange(EXPERTS)[:, None], torch.ones(EXPERTS, 1)
    mapping = pool.token_lora_mapping(["one"] * EXPERTS)
    actual = fused_experts(x, w13, w2, weights, ids, pool.lora(LAYER), mapping, interleaved=interleaved)
    w13_merged, w2_merged = w13 + merged, w2 + delta(tensors, "w2", "down_proj")
    expected = fused_experts(x, w13_merged, w2_merged, weights, ids, interleaved=interleaved)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (fused_experts(x, w13, w2, weights, ids, interleaved=interleaved) - expected).abs().max() > 0.01


def _halves(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    return torch.stack([gate, up], dim=2).flatten(1, 2) if interleaved else torch.cat([gate, up], dim=1)


def test_shared_sides_take_one_expert_s_room(tmp_path: Path) -> None:
    save(tmp_path, ADAPTERS["shared_outer"])
    lora = read_adapter(tmp_path, {LAYER: SPEC}).layers[LAYER]
    shapes = [None if part is None else tuple(part.shape) for part in lora]
    assert shapes == [(1, 2 * RANK, HIDDEN), (EXPERTS, 2 * INNER, RANK), (EXPERTS, RANK, INNER), (1, HIDDEN, RANK)]
    shared, own = (AdapterPool({LAYER: SPEC}, max_loras=3, max_lora_rank=8, shared_outer=s) for s in (True, False))
    gate_up_a = shared.lora(LAYER).gate_up_a
    assert gate_up_a is not None
    assert gate_up_a.shape == (3, 1, 16, HIDDEN)
    assert own.nbytes - shared.nbytes == 3 * (EXPERTS - 1) * (16 * HIDDEN + 8 * HIDDEN) * 4


def test_ranks_may_differ_between_gate_and_up(tmp_path: Path) -> None:
    tensors = save(tmp_path, {"w1": (1, EXPERTS)}, rank=2)
    other = save(tmp_path, {"w3": (1, EXPERTS)}, rank=3, seed=1)
    save_file({**tensors, **other}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": ALPHA, "rank_pattern": {"experts.w1": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read_adapter(tmp_path, {LAYER: SPEC}).layers[LAYER]
    assert lora.gate_up_a is not None
    assert lora.gate_up_b is not None
    product = torch.cat(
        [lora.gate_up_b[:, :INNER] @ lora.gate_up_a[:, :3], lora.gate_up_b[:, INNER:] @ lora.gate_up_a[:, 3:]], dim=1
    )
    torch.testing.assert_close(product, torch.cat([delta(tensors, "w1"), delta(other, "w3")], dim=1))


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "half": (lambda t: t.pop(f"{PREFIX}.w3.lora_B.weight"), "w3.lora_A.weight: its other half, lora_B, is missing"),
    "experts": (
        lambda t: t.update({f"{PREFIX}.w1.lora_B.weight": torch.ones(3, INNER, RANK)}),
        "fit no projection with 16 input and 12 output features of 5 experts, or of 1 for all",
    ),
    "two dimensions": (
        lambda t: t.update({f"{PREFIX}.w2.lora_A.weight": torch.ones(RANK, INNER)}),
        f"{PREFIX}.w2.lora_A.weight: shapes [4, 12] and",
    ),
    "rank": (
        lambda t: t.update(
            {
                f"{PREFIX}.w2.lora_A.weight": torch.ones(EXPERTS, 3, INNER),
                f"{PREFIX}.w2.lora_B.weight": torch.ones(1, HIDDEN, 3),
            }
        ),
        "rank 3, but adapter_config.json says 4",
    ),
    "two names": (
        lambda t: t.update({f"{PREFIX}.gate_proj.lora_A.weight": torch.ones(1, RANK, HIDDEN)}),
        "is the same matrix by another name",
    ),
    "fused and not": (
        lambda t: t.update(
            {
                f"{PREFIX}.gate_up_proj.lora_A.weight": torch.ones(1, RANK, HIDDEN),
                f"{PREFIX}.gate_up_proj.lora_B.weight": torch.ones(EXPERTS, 2 * INNER, RANK),
            }
        ),
        "has gate and up of their own too",
    ),
    "single experts": (
        lambda t: t.update(
            {
                f"{PREFIX}.0.up_proj.lora_A.weight": torch.ones(RANK, HIDDEN),
                f"{PREFIX}.0.up_proj.lora_B.weight": torch.ones(INNER, RANK),
            }
        ),
        "has matrices of single experts too",
    ),
    "layer": (
        lambda t: t.update({key.replace("layers.0", "layers.7"): t.pop(key) for key in list(t)}),
        "model.layers.7.mlp.experts is no MoE layer of the model",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    save(tmp_path, ADAPTERS["shared_outer"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter(tmp_path, {LAYER: SPEC})


def test_experts_without_gate_refuse_one(tmp_path: Path) -> None:
    save(tmp_path, ADAPTERS["shared_outer"])
    with pytest.raises(ValueError, match=re.escape(f"the experts of {LAYER} have no w1")):
        read_adapter(tmp_path, {LAYER: ExpertsSpec(EXPERTS, HIDDEN, INNER, is_gated=False)})
