"""Model families of Transformers: a mixed batch equals, request by request, the model with that adapter merged in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import COMMON, randomized
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from torch_lora_moe.adapters import Adapter, AdapterPool, DenseLoRA, DenseSpec, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.integrations.transformers import dense_layers, enable, expert_layers, use_adapters

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SHARED = {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_next": {
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "deepseek_v2": {"n_routed_experts": 6, "num_key_value_heads": 4, "topk_method": "greedy", **LATENT, **SHARED},
    "deepseek_v3": {"n_routed_experts": 8, "num_key_value_heads": 4, **LATENT, **SHARED},
    "glm4_moe": {"n_routed_experts": 8, **SHARED},
    "granitemoe": {"num_local_experts": 6},
    "phimoe": {"num_local_experts": 6},
    "minimax_m2": {"num_local_experts": 6},
    "nemotron_h": {
        "n_routed_experts": 6,
        "hybrid_override_pattern": "*E",
        "moe_shared_expert_intermediate_size": 24,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        **SHARED,
    },
}


def tiny(family: str) -> PreTrainedModel:
    sizes = {**COMMON, "intermediate_size": 48, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    return randomized(AutoModelForCausalLM.from_config(config))


# linear layers outside the experts that the adapters of a family have matrices for too
DENSE = {
    "qwen2_moe": ["o_proj", "shared_expert.up_proj"],
    "deepseek_v3": ["o_proj", "shared_experts.down_proj", "layers.0.mlp.up_proj"],
    "glm4_moe": ["q_proj", "shared_experts.gate_proj"],
}


def random_adapter(layers: dict[str, ExpertsSpec], dense: dict[str, DenseSpec], rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    found = {}
    for name, spec in layers.items():
        experts, slices = spec.num_experts, spec.num_slices
        found[name] = ExpertsLoRA(
            normal(experts, slices * rank, spec.hidden_size),
            normal(experts, spec.gate_up_size, rank),
            normal(experts, rank, spec.intermediate_size),
            normal(experts, spec.hidden_size, rank),
        )
    pairs = {name: DenseLoRA(normal(rank, s.in_features), normal(s.out_features, rank)) for name, s in dense.items()}
    return Adapter(found, pairs)


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model with the adapter's deltas in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, pair in adapter.dense.items():
            linear: Any = model.get_submodule(name)
            linear.weight += pair.b @ pair.a
        for name, lora in adapter.layers.items():
            experts: Any = model.get_submodule(name)
            first = experts.gate_up_proj if experts.has_gate else experts.up_proj
            for weight, a, b in (
                (first, lora.gate_up_a, lora.gate_up_b),
                (experts.down_proj, lora.down_a, lora.down_b),
            ):
                assert a is not None
                assert b is not None
                halves = a.shape[1] // b.shape[2]
                a_parts, b_parts = a.unflatten(1, (halves, -1)), b.unflatten(1, (halves, -1))
                weight += torch.einsum("ehor,ehri->ehoi", b_parts, a_parts).flatten(1, 2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_is_the_merged_models(family: str) -> None:
    model = tiny(family)
    routers = [name for name, module in model.named_modules() if "router" in type(module).__name__.lower()]
    assert routers
    layers, dense = expert_layers(model), dense_layers(model, [*DENSE.get(family, ["o_proj"]), *routers])
    adapters = {"a": random_adapter(layers, dense, 4, seed=1), "b": random_adapter(layers, dense, 6, seed=2)}
    alone = {None: model, **{name: merged(model, adapter) for name, adapter in adapters.items()}}
    names = ["a", None, "b"]
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = torch.stack([alone[name](input_ids=ids).logits[row] for row, name in enumerate(names)])
        plain = model(input_ids=ids).logits

    pool = AdapterPool(layers, dense=dense, max_loras=2, max_lora_rank=8)
    for name, adapter in adapters.items():
        pool.load(name, adapter)
    enable(model, pool)
    with torch.no_grad(), use_adapters(model, names):
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - plain[0]).abs().max() > 0.01, "the adapter matters"


def test_llama4_is_refused() -> None:
    """Its experts are not dispatched through the interface, and its router scales their input."""
    sizes = {"num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size": 48, "intermediate_size_mlp": 48}
    config = AutoConfig.for_model("llama4_text", **COMMON, **sizes)
    with pytest.raises(ValueError, match="Llama4ForCausalLM has no experts that Transformers dispatches"):
        expert_layers(AutoModelForCausalLM.from_config(config))
