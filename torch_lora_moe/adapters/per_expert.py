"""PEFT checkpoints with a LoRA pair for each expert's own linear layers: adapters trained on Transformers 4 models.

On disk ``<path>.experts.<e>.<projection>.lora_{A,B}.weight``: ``A`` is ``[r, in]``, ``B`` is ``[out, r]``. Projections
are ``gate_proj``, ``up_proj`` and ``down_proj``, or Mixtral's ``w1``, ``w3`` and ``w2``. Any subset may be there; a
missing one contributes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_lora_moe.adapters.layout import AdapterFormatError, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.adapters.scaling import rank_and_scaling

KEY = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>[^.]+)\.lora_(?P<side>[AB])\.weight")
PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
# What older versions called the module that holds the experts.
OLD_PARENTS = ("block_sparse_moe", "feed_forward")


class Place(NamedTuple):
    """Where a key belongs: the MoE layer, the expert, the projection as the checkpoint names it, and the side."""

    layer: str
    expert: int
    projection: str
    side: str


class Half(NamedTuple):
    """One matrix and the key it was stored under."""

    key: str
    tensor: Tensor


def parse(key: str, name: str, layers: Mapping[str, ExpertsSpec]) -> Place | None:
    """The place of ``key``, whose name without PEFT's prefix is ``name``; None if it is of no single expert.

    Raises:
        AdapterFormatError: it is of an expert or a projection that the model has not.
    """
    match = KEY.fullmatch(name)
    if match is None:
        return None
    layer = layer_of(key, match["experts"], layers)
    spec, expert, projection = layers[layer], int(match["expert"]), PROJECTIONS.get(match["projection"])
    if expert >= spec.num_experts:
        raise AdapterFormatError(f"{key}: expert {expert}, but {layer} has {spec.num_experts}")
    if projection is None or (projection == "gate" and not spec.is_gated):
        raise AdapterFormatError(f"{key}: the experts of {layer} have no {match['projection']}")
    return Place(layer, expert, match["projection"], match["side"])


def layer_of(key: str, experts: str, layers: Mapping[str, ExpertsSpec]) -> str:
    """The model's name for the module that ``key`` calls ``experts``.

    Raises:
        AdapterFormatError: the model has no such layer.
    """
    names = [experts, *(experts.replace(f".{parent}.experts", ".mlp.experts") for parent in OLD_PARENTS)]
    for name in names:
        if name in layers:
            return name
    raise AdapterFormatError(f"{key}: {experts} is no MoE layer of the model")


def experts_lora(
    layer: str, pairs: Mapping[tuple[int, str], Mapping[str, Half]], spec: ExpertsSpec, config: Mapping[str, Any]
) -> ExpertsLoRA:
    """The stacked matrices of one layer from its pairs by (expert, projection name), the scaling in B.

    Ranks may differ from pair to pair; all are padded to the largest.

    Raises:
        AdapterFormatError: half a pair, or shapes that do not fit the model or the configuration.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {"gate": {}, "up": {}, "down": {}}
    for (expert, name), halves in pairs.items():
        projection = PROJECTIONS[name]
        found[projection][expert] = linear_pair(halves, sizes[projection], config)
    parts = ["gate", "up"] if spec.is_gated else ["up"]
    return ExpertsLoRA(*_stack([found[part] for part in parts], spec), *_stack([found["down"]], spec))


def linear_pair(
    halves: Mapping[str, Half], features: tuple[int, int], config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]`` of one linear layer with the given input and output features, the scaling in B.

    Raises:
        AdapterFormatError: half a pair, or shapes that do not fit the model or the configuration.
    """
    a, b = both_halves(halves)
    fits = a.tensor.dim() == b.tensor.dim() == 2 and a.tensor.shape[0] == b.tensor.shape[1]
    if not fits or (a.tensor.shape[1], b.tensor.shape[0]) != features:
        raise AdapterFormatError(
            f"{a.key}: shapes {list(a.tensor.shape)} and {list(b.tensor.shape)} ({b.key}) fit no projection with "
            f"{features[0]} input and {features[1]} output features"
        )
    return a.tensor, b.tensor * scaling_of(a.key, a.tensor.shape[0], config)


def both_halves(halves: Mapping[str, Half]) -> tuple[Half, Half]:
    """A and B.

    Raises:
        AdapterFormatError: one of them is missing.
    """
    for side in "AB":
        if side not in halves:
            raise AdapterFormatError(f"{next(iter(halves.values())).key}: its other half, lora_{side}, is missing")
    return halves["A"], halves["B"]


def scaling_of(key: str, stored_rank: int, config: Mapping[str, Any]) -> float:
    """What B is multiplied with, for the pair whose A is stored under ``key``.

    Raises:
        AdapterFormatError: the configuration says another rank.
    """
    # patterns are written for the name that the trained model had
    trained = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    rank, scaling = rank_and_scaling(config, trained, stored_rank)
    if rank != stored_rank:
        raise AdapterFormatError(f"{key}: rank {stored_rank}, but adapter_config.json says {rank}")
    return scaling


def _stack(parts: list[dict[int, tuple[Tensor, Tensor]]], spec: ExpertsSpec) -> tuple[Tensor | None, Tensor | None]:
    """A and B of one projection of all experts; part ``i`` owns the i-th half of A's rows and of B's."""
    pairs = [pair for part in parts for pair in part.values()]
    if not pairs:
        return None, None
    rank, width, in_features = max(a.shape[0] for a, _ in pairs), pairs[0][1].shape[0], pairs[0][0].shape[1]
    stacked_a = torch.zeros(spec.num_experts, len(parts), rank, in_features)
    stacked_b = torch.zeros(spec.num_experts, len(parts), width, rank)
    for i, part in enumerate(parts):
        for expert, (a, b) in part.items():
            stacked_a[expert, i, : a.shape[0]] = a
            stacked_b[expert, i, :, : a.shape[0]] = b
    return stacked_a.flatten(1, 2), stacked_b.flatten(1, 2)
