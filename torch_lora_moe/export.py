"""Ahead-of-time packages of models that call the ops, for processes without Python.

    export_package(block, (hidden_states, token_lora_mapping), "block.pt2", dynamic_shapes=...)

On the CPU the package calls the ops by name, and the C++ library of ``csrc_stubs/`` answers: a program links it, or
loads it, before it runs the package. Python's ``torch_lora_moe`` is not needed there. A package for a GPU holds the
Triton kernels themselves, chosen for one batch size and the GPU it was made on, and needs nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_lora_moe import ops


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
        module: a module in eval mode whose forward reaches the ops, all of it on the CPU or on one GPU.
        args: example inputs, tensors on the same device.
        path: the package to write, ending in ``.pt2``.
        kwargs: example keyword inputs.
        dynamic_shapes: as for ``torch.export.export``: which sizes may differ from the examples'. None on a GPU, where
            the kernels of a package are those for the examples' sizes.

    Returns:
        the path of the package.

    Raises:
        ValueError: the path has another ending, the module is in training mode, calls no op of this package, lies on
            several devices or on none of a CPU and a CUDA GPU, or is to have dynamic shapes on a GPU.
        torch._dynamo.exc.UserError: ``torch.export`` cannot export the module.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: got {path.name}, expected a name that ends in .pt2")
    if module.training:
        raise ValueError("module: is in training mode, call eval() first (there is no backward)")
    on_gpu = _device(module, (args, kwargs)).type == "cuda"
    if on_gpu and dynamic_shapes is not None:
        raise ValueError(
            f"dynamic_shapes: got {dynamic_shapes}, expected None on a GPU: export one package for each batch size"
        )
    with torch.no_grad(), _kernels_for_ops() if on_gpu else contextlib.nullcontext():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        if not any(call.startswith("lora_moe.") or "triton_kernel_wrapper" in call for call in calls):
            raise ValueError("module: its forward calls no lora_moe op, so there is nothing of this package to export")
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def _device(module: nn.Module, inputs: Any) -> torch.device:
    """The one device that everything is on; a CPU if there is nothing."""
    leaves = [(f"input {i}", value) for i, value in enumerate(pytree.tree_leaves(inputs))]
    tensors = [*module.named_parameters(), *module.named_buffers(), *leaves]
    found: dict[torch.device, str] = {}
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: is on {tensor.device}, packages can be exported for a CPU or a CUDA GPU only")
        found.setdefault(tensor.device, name)
    if len(found) > 1:
        (first, name), (second, other) = list(found.items())[:2]
        raise ValueError(f"{other}: is on {second}, expected {first} as {name}")
    return next(iter(found), torch.device("cpu"))


@contextlib.contextmanager
def _kernels_for_ops() -> Iterator[None]:
    """Inside, calls of the ops trace through to their Triton kernels instead of stopping at the op."""
    from torch_lora_moe import plans

    handles = {name: getattr(ops, name) for name in ops.SCHEMAS}
    with plans.traced_launches():
        try:
            for name in handles:
                setattr(ops, name, ops.cuda_kernel(name))
            yield
        finally:
            for name, handle in handles.items():
                setattr(ops, name, handle)
