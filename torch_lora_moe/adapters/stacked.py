"""Checkpoints whose matrices are stacked over the experts, one side of a projection shared by all of them or not.

On disk ``<path>.experts.<projection>.lora_{A,B}.weight``, three-dimensional: ``A`` is ``[E or 1, r, in]``, ``B`` is
``[E or 1, out, r]``; 1 where all experts share it. Projections are ``gate_proj``, ``up_proj`` and ``down_proj``, or
``w1``, ``w3`` and ``w2``, or ``gate_up_proj`` with one A for both halves and B as the base weight stores them.
*Shared-outer* adapters, which Tinker and Megatron-Bridge write and SGLang serves, share A of gate and up and B of down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_lora_moe.adapters.layout import AdapterFormatError, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.adapters.per_expert import PROJECTIONS, Half, both_halves, layer_of, scaling_of

NAMES = {**PROJECTIONS, "gate_up_proj": "gate_up"}
KEY = re.compile(rf"(?P<experts>.+\.experts)\.(?P<projection>{'|'.join(NAMES)})\.lora_(?P<side>[AB])\.weight")


class Place(NamedTuple):
    """Where a key belongs: the MoE layer, the projection (``gate``, ``up``, ``down`` or ``gate_up``) and the side."""

    layer: str
    projection: str
    side: str


def parse(key: str, name: str, layers: Mapping[str, ExpertsSpec]) -> Place | None:
    """The place of ``key``, whose name without PEFT's prefix is ``name``; None if it is of no stacked projection.

    Raises:
        AdapterFormatError: it is of a layer or a projection that the model has not.
    """
    match = KEY.fullmatch(name)
    if match is None:
        return None
    layer, projection = layer_of(key, match["experts"], layers), NAMES[match["projection"]]
    if projection in ("gate", "gate_up") and not layers[layer].is_gated:
        raise AdapterFormatError(f"{key}: the experts of {layer} have no {match['projection']}")
    return Place(layer, projection, match["side"])


def experts_lora(
    layer: str, pairs: Mapping[str, Mapping[str, Half]], spec: ExpertsSpec, config: Mapping[str, Any]
) -> ExpertsLoRA:
    """The matrices of one layer from its pairs by projection, the scaling in B; shared sides stay shared.

    Raises:
        AdapterFormatError: half a pair, two pairs for one projection, or shapes that do not fit the model or the
            configuration.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "gate_up": (hidden, 2 * inner), "down": (inner, hidden)}
    found = {projection: _pair(halves, sizes[projection], spec, config) for projection, halves in pairs.items()}
    if "gate_up" in found:
        if "gate" in found or "up" in found:
            key = pairs["gate_up"]["A"].key
            raise AdapterFormatError(f"{key}: {layer} has gate and up of their own too")
        a, b = found["gate_up"]
        halves = (b[:, 0::2], b[:, 1::2]) if spec.interleaved else b.chunk(2, dim=1)
        found["gate"], found["up"] = (a, halves[0]), (a, halves[1])
    gate_up_a, gate_up_b = _side_by_side([found.get(part) for part in (("gate", "up") if spec.is_gated else ("up",))])
    down_a, down_b = found.get("down", (None, None))
    return ExpertsLoRA(gate_up_a, _whole(gate_up_b, spec), _whole(down_a, spec), down_b)


def _pair(
    halves: Mapping[str, Half], features: tuple[int, int], spec: ExpertsSpec, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """``A [E or 1, r, in]`` and ``B [E or 1, out, r]`` of one projection, the scaling in B."""
    a, b = both_halves(halves)
    experts = {1, spec.num_experts}
    fits = a.tensor.dim() == b.tensor.dim() == 3 and {a.tensor.shape[0], b.tensor.shape[0]} <= experts
    fits = fits and (a.tensor.shape[2], b.tensor.shape[1]) == features and a.tensor.shape[1] == b.tensor.shape[2]
    if not fits:
        raise AdapterFormatError(
            f"{a.key}: shapes {list(a.tensor.shape)} and {list(b.tensor.shape)} ({b.key}) fit no projection with "
            f"{features[0]} input and {features[1]} output features of {spec.num_experts} experts, or of 1 for all"
        )
    return a.tensor, b.tensor * scaling_of(a.key, a.tensor.shape[1], config)


def _side_by_side(parts: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor | None, Tensor | None]:
    """A's and B's rows one part after the other, padded to the largest rank; a missing part contributes nothing."""
    there = [part for part in parts if part is not None]
    if not there:
        return None, None
    rank, (example_a, example_b) = max(a.shape[1] for a, _ in there), there[0]
    none = (example_a.new_zeros(1, rank, example_a.shape[2]), example_b.new_zeros(1, example_b.shape[1], rank))
    pairs = [none if part is None else part for part in parts]
    rows_a = [torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[1])) for a, _ in pairs]
    rows_b = [torch.nn.functional.pad(b, (0, rank - b.shape[2])) for _, b in pairs]
    return _concatenated(rows_a), _concatenated(rows_b)


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Parts of ``E`` or 1 experts along their rows; 1 only where all are."""
    experts = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(experts, -1, -1) for part in parts], dim=1)


def _whole(matrices: Tensor | None, spec: ExpertsSpec) -> Tensor | None:
    """An inner side, which the ops have for each expert."""
    return matrices if matrices is None else matrices.expand(spec.num_experts, -1, -1)
