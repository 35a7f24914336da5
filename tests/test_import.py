"""What importing the package costs and pulls in, in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import torch_lora_moe
new = set(sys.modules) - before
heavy = ("triton", "transformers", "peft", "safetensors", "torch._dynamo", "torch_lora_moe.reference")
print([module for module in heavy if module in new])
"""
    assert run(code) == "[]"


def test_ops_are_there_after_import() -> None:
    names = ("route", "lora_shrink", "lora_expand_add_", "fused_experts")
    code = f"import torch, torch_lora_moe; print(all(hasattr(torch.ops.lora_moe, n) for n in {names}))"
    assert run(code) == "True"


def test_every_public_name_has_a_docstring() -> None:
    code = "import torch_lora_moe as t; print([n for n in t.__all__ if not (getattr(t, n).__doc__ or '').strip()])"
    assert run(code) == "[]"
