"""A launch as Triton's compiler takes it, without a GPU, and what the compiled code says of its parameters."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from triton.compiler import ASTSource

from torch_lora_moe.plans import Plan

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def source(plan: Plan, tensors: tuple[Tensor, ...], sizes: tuple[float, ...], fixed: tuple[str, ...] = ()) -> ASTSource:
    """What a launch would compile; the values of ``fixed`` arguments are compiled in."""
    names = plan.kernel.arg_names
    types = [f"*{TYPES[tensor.dtype]}" for tensor in tensors]
    for index, block in plan.matrices.items():
        types[index] = f"tensordesc<{TYPES[tensors[index].dtype]}{block}>"
    types += ["fp32" if isinstance(size, float) else "i32" for size in sizes]
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(names[len(types) :], "constexpr")
    constants = {(len(types) + i,): value for i, value in enumerate(plan.constants)}
    for i, value in enumerate(sizes, len(tensors)):
        if names[i] in fixed:
            signature[names[i]], constants[i,] = "constexpr", value
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(plan.aligned) if i not in plan.matrices}
    return ASTSource(plan.kernel, signature, constants, aligned)


def parameter_bytes(ptx: str) -> list[int]:
    """Bytes of each parameter that a kernel declares: as an array of bytes, or by its type."""
    entry = re.search(r"\.entry [^(]*\(([^)]*)\)", ptx)
    assert entry is not None
    found = [re.search(r"\[(\d+)\]", line) or re.search(r"\.[bufs](\d+)", line) for line in entry[1].split(",")]
    return [int(one[1]) if one[0][0] == "[" else int(one[1]) // 8 for one in found if one is not None]
