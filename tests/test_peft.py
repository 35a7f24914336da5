"""Reading PEFT checkpoints: the deltas are PEFT's own, and what cannot be served is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import gpt_oss, mixtral, qwen3_moe, with_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from torch_lora_moe.adapters import ExpertsLoRA, adopt_adapter, read_adapter
from torch_lora_moe.integrations.transformers import expert_layers

LAYER = "model.layers.1.mlp.experts"


def peft_delta(model: PeftModel, parameter: str, adapter: str) -> Tensor | None:
    """The weight delta that PEFT itself computes for an expert parameter of `LAYER`."""
    wrapper = model.get_submodule(f"base_model.model.{LAYER}")
    while hasattr(wrapper, "parameter_name"):
        if wrapper.parameter_name == parameter:
            return wrapper.get_delta_weight(adapter).detach()
        wrapper = wrapper.base_layer
    return None


def our_delta(a: Tensor | None, b: Tensor | None, halves: int) -> Tensor | None:
    if a is None or b is None:
        return None
    a, b = a.unflatten(1, (halves, -1)), b.unflatten(1, (halves, -1))
    return torch.einsum("ehor,ehri->ehoi", b, a).flatten(1, 2)


@pytest.mark.parametrize(
    "build", [qwen3_moe, mixtral, lambda: qwen3_moe(moe_intermediate_size=16)], ids=["qwen3_moe", "mixtral", "square"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"r": 4, "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"r": 4, "target_parameters": ["mlp.experts.down_proj"]},
        {"r": 4, "rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {"layers.1.mlp.experts.down_proj": 3}},
    ],
    ids=["plain", "rslora", "gate_up", "down", "patterns"],
)
def test_deltas_are_peft_s(build: Callable[[], PreTrainedModel], options: dict[str, Any], tmp_path: Path) -> None:
    model = build()
    peft_model = with_peft(model, {"one": options}, tmp_path)
    adapter = read_adapter(tmp_path / "one", expert_layers(model))
    assert set(adapter.layers) == {LAYER, LAYER.replace("1", "0")}
    lora = adapter.layers[LAYER]
    for parameter, a, b, halves in (
        ("gate_up_proj", lora.gate_up_a, lora.gate_up_b, 2),
        ("down_proj", lora.down_a, lora.down_b, 1),
    ):
        expected, actual = peft_delta(peft_model, parameter, "one"), our_delta(a, b, halves)
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert expected.abs().max() > 0.01
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss], ids=["qwen3_moe", "gpt_oss"])
def test_a_live_model_gives_what_it_would_save(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = build()
    peft_model = with_peft(model, {"one": {"r": 4}, "two": {"r": 6, "use_rslora": True}}, tmp_path)
    layers = expert_layers(model)
    for name in ("one", "two"):
        saved, live = read_adapter(tmp_path / name, layers), adopt_adapter(peft_model, name, layers)
        assert saved.layers.keys() == live.layers.keys()
        for layer, lora in saved.layers.items():
            for part, live_part in zip(lora, live.layers[layer], strict=True):
                assert torch.equal(part, live_part)
    with pytest.raises(KeyError, match=r"no adapter named 'three' in the PeftModel, there are \['one', 'two'\]"):
        adopt_adapter(peft_model, "three", layers)


def test_interleaved_transposed_storage(tmp_path: Path) -> None:
    """gpt-oss keeps ``[E, in, out]`` with gate and up columns alternating; here B holds the gate first."""
    model = gpt_oss()
    peft_model = with_peft(model, {"one": {"r": 4}}, tmp_path)
    lora = read_adapter(tmp_path / "one", expert_layers(model)).layers[LAYER]
    gate_up, down = (peft_delta(peft_model, name, "one") for name in ("gate_up_proj", "down_proj"))
    assert gate_up is not None
    assert down is not None
    columns = torch.cat([gate_up[..., 0::2], gate_up[..., 1::2]], dim=-1)
    torch.testing.assert_close(
        our_delta(lora.gate_up_a, lora.gate_up_b, 2), columns.transpose(1, 2), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(our_delta(lora.down_a, lora.down_b, 1), down.transpose(1, 2), rtol=1e-5, atol=1e-6)


def swap(folder: Path) -> None:
    """Rewrites a checkpoint as versions before 0.19.1 wrote it: A holds the output features."""
    tensors = load_file(folder / "adapter_model.safetensors")
    swapped = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            a3, b3 = a.view(6, 4, -1), b.view(b.shape[0], 4, 6).permute(2, 0, 1)
            swapped[key] = b3.transpose(1, 2).reshape(24, -1)
            swapped[key.replace("lora_A", "lora_B")] = a3.transpose(1, 2).permute(1, 2, 0).reshape(a.shape[1], 24)
    save_file({key: tensor.contiguous() for key, tensor in swapped.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("inner", [24, 16], ids=["oblong", "square"])
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["gate_up_proj"]], ids=["both", "gate_up"])
def test_swapped_orientation(inner: int, targets: list[str], tmp_path: Path) -> None:
    model = qwen3_moe(moe_intermediate_size=inner)
    options = {"r": 4, "target_parameters": [f"mlp.experts.{name}" for name in targets]}
    with_peft(model, {"one": options}, tmp_path)
    folder = tmp_path / "one"
    expected = read_adapter(folder, expert_layers(model))
    swap(folder)
    edit_config(folder, peft_version="0.18.1")
    actual = read_adapter(folder, expert_layers(model))
    for layer, lora in expected.layers.items():
        for part, swapped_part in zip(lora, actual.layers[layer], strict=True):
            assert (part is None) == (swapped_part is None)
            if part is not None:
                torch.testing.assert_close(swapped_part, part)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = f"base_model.model.{LAYER}.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (lambda f: edit_config(f, use_dora=True), "use_dora=True is not served, only plain LoRA matrices are"),
    "lora_bias": (lambda f: edit_config(f, lora_bias=True), "lora_bias=True is not served"),
    "peft_type": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type is 'LOHA', only LORA is served"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json not found"),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin") and None,
        "adapter_model.bin is a pickle and is never read",
    ),
    "magnitude": (
        lambda f: edit_tensors(
            f, lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)})
        ),
        "lora_magnitude_vector: is no LoRA matrix",
    ),
    "dense": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)})
        ),
        "q_proj.lora_A.weight: model.layers.0.self_attn.q_proj is no MoE layer of the model",
    ),
    "half": (lambda f: edit_tensors(f, lambda t: t.pop(KEY) is None), "its other half, lora_A, is missing"),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t[KEY].view(-1)[3].fill_(float("nan")) is None),
        f"{KEY}: holds non-finite values",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY: torch.ones(24, 33)})),
        f"({KEY.replace('lora_A', 'lora_B')}) fit no projection with 24 input and 32 output features of 6 experts",
    ),
    "experts": (
        lambda f: edit_tensors(
            f, lambda t: t.update({KEY: torch.ones(20, 24), KEY.replace("lora_A", "lora_B"): torch.ones(32, 20)})
        ),
        "are no LoRA of 6 experts",
    ),
    "rank": (lambda f: edit_config(f, r=5), "rank 4, but adapter_config.json says 5"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    model = qwen3_moe()
    with_peft(model, {"one": {"r": 4}}, tmp_path)
    damage(tmp_path / "one")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_adapter(tmp_path / "one", expert_layers(model))
    assert message in str(caught.value)


def test_layout_reports_its_rank() -> None:
    assert ExpertsLoRA().rank == 0
    assert ExpertsLoRA(None, None, torch.ones(6, 5, 24), torch.ones(6, 32, 5)).rank == 5
