"""Many LoRA adapters in one batch over Mixture-of-Experts layers, as PyTorch custom ops.

The ops are ``torch.ops.lora_moe.*``; the functions here check their arguments and call them.
"""

from torch_lora_moe.adapters import AdapterPool
from torch_lora_moe.api import MoELoRA, fused_experts, token_lora_mapping_from_segments, virtual_experts_lora_add
from torch_lora_moe.hooks import LoRAHooks, build_lora_hooks

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "LoRAHooks",
    "MoELoRA",
    "build_lora_hooks",
    "fused_experts",
    "token_lora_mapping_from_segments",
    "virtual_experts_lora_add",
]
