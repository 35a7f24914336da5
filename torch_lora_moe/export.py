"""Ahead-of-time packages of models that call the ops, for processes without Python.

    export_package(block, (hidden_states, token_lora_mapping), "block.pt2", dynamic_shapes=...)

On the CPU the package calls the ops by name, and the C++ library of ``csrc_stubs/`` answers: a program links it, or
loads it, before it runs the package. Python's ``torch_lora_moe`` is not needed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def export_package(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Path:
    """Exports a module and compiles it ahead of time with AOTInductor.

    Args:
        module: a module in eval mode whose forward reaches the ops, on the CPU with all its buffers and parameters.
        args: example inputs, tensors on the CPU.
        path: the package to write, ending in ``.pt2``.
        kwargs: example keyword inputs.
        dynamic_shapes: as for ``torch.export.export``: which sizes may differ from the examples'.

    Returns:
        the path of the package.

    Raises:
        ValueError: the path has another ending, the module is in training mode or calls no op of this package.
        NotImplementedError: a parameter, buffer or input is not on the CPU.
        torch._dynamo.exc.UserError: ``torch.export`` cannot export the module.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: got {path.name}, expected a name that ends in .pt2")
    if module.training:
        raise ValueError("module: is in training mode, call eval() first (there is no backward)")
    inputs = [(f"input {i}", value) for i, value in enumerate(pytree.tree_leaves((args, kwargs)))]
    for name, tensor in [*module.named_parameters(), *module.named_buffers(), *inputs]:
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise NotImplementedError(f"{name}: is on {tensor.device}, packages can be exported for the CPU only")
    with torch.no_grad():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
        calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        if not any(call.startswith("lora_moe.") for call in calls):
            raise ValueError("module: its forward calls no lora_moe op, so there is nothing of this package to export")
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path
