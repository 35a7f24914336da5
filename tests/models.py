"""Tiny random Transformers models, and PEFT adapters for them, as fixtures for the adapter tests."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def qwen3_moe(**sizes: Any) -> PreTrainedModel:
    inner = {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2}
    return randomized(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**COMMON, **inner, **sizes})))


def mixtral() -> PreTrainedModel:
    inner = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    return randomized(MixtralForCausalLM(MixtralConfig(**COMMON, **inner)))


def gpt_oss() -> PreTrainedModel:
    inner = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    return randomized(GptOssForCausalLM(GptOssConfig(**COMMON, **inner)))


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


def with_peft(model: PreTrainedModel, adapters: dict[str, dict[str, Any]], folder: Path) -> PeftModel:
    """A copy of ``model`` with PEFT adapters of random weights, saved under ``folder`` by name."""
    peft_model: PeftModel | None = None
    for name, options in adapters.items():
        config = LoraConfig(
            **{"target_modules": [], "target_parameters": list(TARGETS), "task_type": "CAUSAL_LM", **options}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if peft_model is None:
                peft_model = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
            else:
                peft_model.add_adapter(name, config)
    assert peft_model is not None
    generator = torch.Generator().manual_seed(1)
    for key, parameter in peft_model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    peft_model.save_pretrained(str(folder), selected_adapters=list(adapters))
    return peft_model.eval()
