"""Adapters as users have them: reading PEFT checkpoints and keeping several adapters ready in slots.

Nothing here is imported by the ops; `read_adapter` needs the ``[transformers]`` extra (safetensors).
"""

from torch_lora_moe.adapters.layout import Adapter, DenseLoRA, DenseSpec, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.adapters.peft import adopt_adapter, read_adapter
from torch_lora_moe.adapters.pool import AdapterPool

__all__ = [
    "Adapter",
    "AdapterPool",
    "DenseLoRA",
    "DenseSpec",
    "ExpertsLoRA",
    "ExpertsSpec",
    "adopt_adapter",
    "read_adapter",
]
