"""Reads adapters that PEFT saved: ``adapter_config.json`` and ``adapter_model.safetensors``; never unpickles.

Formats: a LoRA pair for each expert's linear layers (see ``per_expert``), matrices stacked over the experts or shared
by them (see ``stacked``), and LoRA on fused expert parameters (``target_parameters`` on ``gate_up_proj`` / ``up_proj``
and ``down_proj``, PEFT's ``ParamWrapper``). Everything else in a checkpoint is refused with the name of the key.

Fused parameters on disk, for a module ``<path>`` with ``E`` experts and rank ``r``:

- both projections targeted: ``<path>.base_layer.lora_{A,B}.weight`` is gate_up, ``<path>.lora_{A,B}.weight`` is down;
- one targeted: always ``<path>.lora_{A,B}.weight``, told apart by ``target_parameters``;
- ``A`` is ``[E * r, in]``, expert-major; ``B`` is ``[out, r * E]``, rank-major;
- older versions store some models swapped: there ``A`` has the output features and ``B`` the input features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_lora_moe.adapters import per_expert, stacked
from torch_lora_moe.adapters.layout import (
    Adapter,
    AdapterFormatError,
    DenseLoRA,
    DenseSpec,
    ExpertsLoRA,
    ExpertsSpec,
)
from torch_lora_moe.adapters.scaling import rank_and_scaling

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
GATE_UP_NAMES = ("gate_up_proj", "up_proj")
# The first version that stores fused experts as (in, out) for models with [E, out, in] weights.
UNSWAPPED_SINCE = (0, 19, 1)


def read_adapter(
    path: str | Path, layers: Mapping[str, ExpertsSpec], dense: Mapping[str, DenseSpec] | None = None
) -> Adapter:
    """Reads a PEFT adapter from the folder ``path``, memory-mapped.

    Args:
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        layers: the MoE layers of the base model by module name.
        dense: its linear layers that adapters may have matrices for, likewise; others are refused.

    Returns:
        the adapter in fp32, at its own rank, with the scaling ``alpha / r`` (``alpha / sqrt(r)`` with rslora) in B.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFormatError: the adapter is no plain LoRA, or a tensor does not belong to, or does not fit, the model.
    """
    folder = Path(path)
    config = _read_config(folder)
    return _from_tensors(config, _read_tensors(folder), layers, dense or {})


def adopt_adapter(
    model: PeftModel, name: str, layers: Mapping[str, ExpertsSpec], dense: Mapping[str, DenseSpec] | None = None
) -> Adapter:
    """An adapter of a live ``PeftModel``, as if it had been saved and read.

    Args:
        model: the model that PEFT wrapped.
        name: the adapter's name there.
        layers: the MoE layers of the base model by module name.
        dense: its linear layers that adapters may have matrices for, likewise; others are refused.

    Returns:
        a copy of the adapter, as `read_adapter` returns it.

    Raises:
        KeyError: the model has no adapter of that name.
        AdapterFormatError: as for `read_adapter`.
    """
    import peft

    if name not in model.peft_config:
        raise KeyError(f"no adapter named {name!r} in the PeftModel, there are {list(model.peft_config)}")
    config = {"peft_version": peft.__version__, **model.peft_config[name].to_dict()}
    _check_config(config, f"adapter {name!r}")
    tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
    copies = {key: tensor.detach().float().cpu() for key, tensor in tensors.items()}
    return _from_tensors(config, copies, layers, dense or {})


def _from_tensors(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    layers: Mapping[str, ExpertsSpec],
    dense: Mapping[str, DenseSpec],
) -> Adapter:
    sides: dict[tuple[str, bool], dict[str, tuple[str, Tensor]]] = {}
    experts: dict[str, dict[tuple[int, str], dict[str, per_expert.Half]]] = {}
    wholes: dict[str, dict[str, dict[str, per_expert.Half]]] = {}
    linear: dict[str, dict[str, per_expert.Half]] = {}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFormatError(f"{key}: holds non-finite values")
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        if match is not None and match["module"] in dense:
            linear.setdefault(match["module"], {})[match["side"]] = per_expert.Half(key, tensor)
            continue
        place = per_expert.parse(key, key.removeprefix(PREFIX), layers)
        if place is not None:
            pair = experts.setdefault(place.layer, {}).setdefault((place.expert, place.projection), {})
            pair[place.side] = per_expert.Half(key, tensor)
            continue
        whole = stacked.parse(key, key.removeprefix(PREFIX), layers)
        if whole is not None:
            halves = wholes.setdefault(whole.layer, {}).setdefault(whole.projection, {})
            if whole.side in halves:
                raise AdapterFormatError(f"{key}: {halves[whole.side].key} is the same matrix by another name")
            halves[whole.side] = per_expert.Half(key, tensor)
            continue
        module, inner, side = _parse_key(key, layers)
        sides.setdefault((module, inner), {})[side] = (key, tensor)

    found = {layer: per_expert.experts_lora(layer, pairs, layers[layer], config) for layer, pairs in experts.items()}
    for layer, by_projection in wholes.items():
        if layer in found:
            key = next(iter(next(iter(by_projection.values())).values())).key
            raise AdapterFormatError(f"{key}: {layer} has matrices of single experts too")
        found[layer] = stacked.experts_lora(layer, by_projection, layers[layer], config)
    for module in dict.fromkeys(module for module, _ in sides):
        pairs = {inner: sides[module, inner] for inner in (True, False) if (module, inner) in sides}
        if module in found:
            key = next(iter(sides[module, next(iter(pairs))].values()))[0]
            kind = "single experts" if module in experts else "stacked experts"
            raise AdapterFormatError(f"{key}: {module} has matrices of {kind} too")
        found[module] = _experts_lora(module, pairs, layers[module], config)
    pairs_of = {name: (dense[name].in_features, dense[name].out_features) for name in linear}
    return Adapter(
        found, {name: DenseLoRA(*per_expert.linear_pair(linear[name], size, config)) for name, size in pairs_of.items()}
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {folder} is no PEFT adapter")
    config: dict[str, Any] = json.loads(file.read_text())
    _check_config(config, str(file))
    return config


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuses everything but plain LoRA matrices."""
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{where}: peft_type is {config.get('peft_type')!r}, only LORA is served")
    for option, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(option, plain) not in (plain, None, []):
            raise AdapterFormatError(
                f"{where}: {option}={config[option]!r} is not served, only plain LoRA matrices are"
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is a pickle and is never read: save again with safe_serialization" if pickled else ""
        raise FileNotFoundError(f"{file} not found{why}")
    with safe_open(file, framework="pt") as handle:
        return {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118 (no mapping)


def _parse_key(key: str, layers: Mapping[str, ExpertsSpec]) -> tuple[str, bool, str]:
    """Module name in the base model, whether it is the inner wrapper, and ``A`` or ``B``."""
    match = KEY.fullmatch(key)
    if match is None:
        raise AdapterFormatError(f"{key}: is no LoRA matrix")
    module = match["module"].removeprefix(PREFIX)
    inner = module.endswith(".base_layer")
    module = module.removesuffix(".base_layer")
    if module not in layers:
        raise AdapterFormatError(f"{key}: {module} is no MoE layer of the model and no linear layer served")
    return module, inner, match["side"]


def _experts_lora(
    module: str, pairs: dict[bool, dict[str, tuple[str, Tensor]]], spec: ExpertsSpec, config: dict[str, Any]
) -> ExpertsLoRA:
    """The matrices of one layer from its wrappers; key True is the inner wrapper (gate_up where both are there)."""
    targets: list[str] = sorted(config.get("target_parameters") or [])
    gate_up_name = next((n for n in GATE_UP_NAMES if any(_targets(t, f"{module}.{n}") for t in targets)), None)
    down = any(_targets(target, f"{module}.down_proj") for target in targets)
    if len(pairs) == 2:
        named = [(gate_up_name or GATE_UP_NAMES[0], pairs[True]), ("down_proj", pairs[False])]
    elif False in pairs and (gate_up_name is not None) != down:
        named = [("down_proj" if down else str(gate_up_name), pairs[False])]
    else:
        key = next(iter(next(iter(pairs.values())).values()))[0]
        raise AdapterFormatError(f"{key}: target_parameters {targets} do not say which projection of {module} it is")

    sizes = {False: (spec.intermediate_size, spec.hidden_size), True: (spec.hidden_size, spec.gate_up_size)}
    matrices: dict[bool, tuple[Tensor, Tensor]] = {}
    swapped: bool | None = None
    # down is never square where gate_up is, so it settles the orientation of both
    for name, pair in reversed(named):
        features = sizes[name != "down_proj"]
        if swapped is None or features[0] != features[1]:
            swapped = _is_swapped(pair, features, spec, config)
        matrices[name != "down_proj"] = _matrices(f"{module}.{name}", pair, features, spec, config, swapped)

    gate_up_a, gate_up_b = matrices.get(True, (None, None))
    if gate_up_a is not None and gate_up_b is not None:
        # PEFT shares one A between gate and up; here each half owns its rows
        gate_up_a = gate_up_a.repeat(1, spec.num_slices, 1)
        if spec.interleaved:
            gate_up_b = torch.cat([gate_up_b[:, 0::2], gate_up_b[:, 1::2]], dim=1)
    return ExpertsLoRA(gate_up_a, gate_up_b, *matrices.get(False, (None, None)))


def _targets(target: str, parameter: str) -> bool:
    return parameter == target or parameter.endswith(f".{target}")


def _is_swapped(
    pair: dict[str, tuple[str, Tensor]], features: tuple[int, int], spec: ExpertsSpec, config: dict[str, Any]
) -> bool:
    """Whether A holds the output features, by shape; a square projection goes by the version that wrote it."""
    for side in "AB":
        if side not in pair:
            key = next(iter(pair.values()))[0]
            raise AdapterFormatError(f"{key}: its other half, lora_{side}, is missing")
    (key_a, a), (key_b, b) = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % spec.num_experts:
        raise AdapterFormatError(
            f"{key_a}: shapes {list(a.shape)} and {list(b.shape)} ({key_b}) are no LoRA of {spec.num_experts} experts"
        )
    plain = (a.shape[1], b.shape[0]) == features
    swapped = (a.shape[1], b.shape[0]) == features[::-1]
    if not plain and not swapped:
        raise AdapterFormatError(
            f"{key_a}: shapes {list(a.shape)} and {list(b.shape)} ({key_b}) fit no projection with "
            f"{features[0]} input and {features[1]} output features of {spec.num_experts} experts"
        )
    if plain and swapped:
        version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
        if version is None:
            raise AdapterFormatError(f"{key_a}: a square projection, and adapter_config.json has no peft_version")
        return tuple(map(int, version.groups())) < UNSWAPPED_SINCE
    return swapped


def _matrices(
    parameter: str,
    pair: dict[str, tuple[str, Tensor]],
    features: tuple[int, int],
    spec: ExpertsSpec,
    config: dict[str, Any],
    swapped: bool,
) -> tuple[Tensor, Tensor]:
    """``A [E, r, in]`` and ``B [E, out, r]`` with the scaling in B."""
    _is_swapped(pair, features, spec, config)
    a, b, experts = pair["A"][1], pair["B"][1], spec.num_experts
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    if swapped:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    rank = a.shape[1]
    expected, scaling = rank_and_scaling(config, parameter, rank)
    if expected != rank:
        raise AdapterFormatError(f"{pair['A'][0]}: rank {rank}, but adapter_config.json says {expected}")
    return a.contiguous(), (b * scaling).contiguous()
