"""A fixed number of adapter slots in static tensors, filled by name.

The tensors of a pool never move, so a compiled graph or a captured CUDA graph that reads them stays valid while
adapters are loaded and unloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torch_lora_moe.adapters.layout import Adapter, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.adapters.peft import read_adapter
from torch_lora_moe.api import MoELoRA


class AdapterPool:
    """``max_loras`` adapter slots for every MoE layer of one model.

    Args:
        layers: the MoE layers by module name, see ``integrations.transformers.expert_layers``.
        max_loras: slots ``L``.
        max_lora_rank: padded rank ``R``; adapters of a smaller rank are zero-padded.
        dtype: dtype of the stored matrices, that of the model's hidden states.
        device: where they live.

    Raises:
        ValueError: no layers, or a size below 1.
    """

    def __init__(
        self,
        layers: Mapping[str, ExpertsSpec],
        *,
        max_loras: int,
        max_lora_rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not layers:
            raise ValueError("layers: got none, expected the MoE layers of a model")
        for name, value in (("max_loras", max_loras), ("max_lora_rank", max_lora_rank)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.layers = dict(layers)
        self.max_loras, self.max_lora_rank = max_loras, max_lora_rank
        self.adapter_enabled = torch.zeros(max_loras, dtype=torch.bool, device=device)
        # of a tensor, so that it names the GPU where the argument only says cuda
        self.dtype, self.device = dtype, self.adapter_enabled.device
        self._weights = {name: self._empty_slots(spec) for name, spec in self.layers.items()}
        self._slots: dict[str, int] = {}

    def _empty_slots(self, spec: ExpertsSpec) -> MoELoRA:
        slots, experts, rank = self.max_loras, spec.num_experts, self.max_lora_rank
        shapes = (
            (slots, experts, spec.num_slices * rank, spec.hidden_size),
            (slots, experts, spec.gate_up_size, rank),
            (slots, experts, rank, spec.intermediate_size),
            (slots, experts, spec.hidden_size, rank),
        )
        a13, b13, a2, b2 = (torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes)
        return MoELoRA(a13, b13, a2, b2, self.adapter_enabled)

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes that all slots of all layers take."""
        parts = (part for lora in self._weights.values() for part in lora[:4] if part is not None)
        return sum(part.numel() * part.element_size() for part in parts)

    def lora(self, layer: str) -> MoELoRA:
        """The stacked matrices of one MoE layer, always the same tensors.

        Raises:
            KeyError: the pool has no such layer.
        """
        return self._weights[layer]

    def slot(self, name: str) -> int:
        """The slot of a loaded adapter.

        Raises:
            KeyError: no adapter of that name is loaded.
        """
        if name not in self._slots:
            raise KeyError(f"no adapter named {name!r} is loaded, there are {self.names}")
        return self._slots[name]

    def load(self, name: str, source: str | Path | Adapter) -> int:
        """Loads an adapter into a free slot; a failure leaves the pool as it was.

        Args:
            name: the name it is served under.
            source: folder of a PEFT adapter, or one already read.

        Returns:
            its slot.

        Raises:
            ValueError: the name is taken, no slot is free, the rank is above the pool's, or the checkpoint is refused.
            FileNotFoundError: the folder is no PEFT adapter.
        """
        if name in self._slots:
            raise ValueError(f"name: {name!r} is loaded already")
        free = next((slot for slot in range(self.max_loras) if slot not in self._slots.values()), None)
        if free is None:
            raise ValueError(f"name: no slot is free for {name!r}, all {self.max_loras} are taken by {self.names}")
        adapter = source if isinstance(source, Adapter) else read_adapter(source, self.layers)
        if adapter.rank > self.max_lora_rank:
            raise ValueError(f"source: rank {adapter.rank} of {name!r} is above max_lora_rank {self.max_lora_rank}")
        for layer, slots in self._weights.items():
            self._fill(slots, free, adapter.layers.get(layer, ExpertsLoRA()), self.layers[layer])
        self.adapter_enabled[free] = True
        self._slots[name] = free
        return free

    def unload(self, name: str) -> None:
        """Frees the slot of an adapter; tokens still mapped to it run without one.

        Raises:
            KeyError: no adapter of that name is loaded.
        """
        self.adapter_enabled[self.slot(name)] = False
        del self._slots[name]

    def token_lora_mapping(self, names: Sequence[str | None]) -> Tensor:
        """The slot of each name, ``[len(names)]`` int32 on the pool's device; -1 for None.

        Raises:
            KeyError: an adapter is not loaded.
        """
        slots = [-1 if name is None else self.slot(name) for name in names]
        return torch.tensor(slots, dtype=torch.int32, device=self.device)

    def _fill(self, slots: MoELoRA, slot: int, lora: ExpertsLoRA, spec: ExpertsSpec) -> None:
        """Writes one adapter's matrices into a slot, each half of A at its own offset, the rest zero."""
        halves = {"gate_up_a": spec.num_slices, "down_a": 1}
        for name, stacked in zip(ExpertsLoRA._fields, slots[:4], strict=True):
            assert stacked is not None
            target, source = stacked[slot], getattr(lora, name)
            target.zero_()
            if source is None:
                continue
            if name in halves:
                view = target.unflatten(1, (halves[name], self.max_lora_rank))
                source = source.unflatten(1, (halves[name], -1))
                view[:, :, : source.shape[2]] = source.to(self.dtype)
            else:
                target[..., : source.shape[-1]] = source.to(self.dtype)
