"""A fixed number of adapter slots in static tensors, filled by name; more adapters than slots take turns.

The tensors of a pool never move, so a compiled graph or a captured CUDA graph that reads them stays valid while
adapters come and go. A slot is enabled only when all of it is written; on a GPU that happens beside the batches, see
``transfer``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torch_lora_moe.adapters.layout import Adapter, DenseLoRA, DenseSpec, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.adapters.peft import read_adapter
from torch_lora_moe.adapters.transfer import SlotTransfers
from torch_lora_moe.api import MoELoRA


class AdapterPool:
    """``max_loras`` adapter slots for every MoE layer of one model; all methods may be called from any thread.

    A full pool makes room by itself: the adapter that was used least recently goes, unless it is pinned or in use.

    Args:
        layers: the MoE layers by module name, see ``integrations.transformers.expert_layers``.
        max_loras: slots ``L``.
        max_lora_rank: padded rank ``R``; adapters of a smaller rank are zero-padded.
        dense: linear layers outside the experts that adapters may have matrices for, likewise, see ``dense_layers``
            there; an adapter with matrices for any other layer is refused.
        shared_outer: each slot holds one A of gate and up, and one B of down, for all experts of a layer; adapters that
            have them for each expert are refused. Without it, adapters that share them are copied for each expert.
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
        dense: Mapping[str, DenseSpec] | None = None,
        shared_outer: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not layers:
            raise ValueError("layers: got none, expected the MoE layers of a model")
        for name, value in (("max_loras", max_loras), ("max_lora_rank", max_lora_rank)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.layers, self.dense = dict(layers), dict(dense or {})
        self.max_loras, self.max_lora_rank, self.shared_outer = max_loras, max_lora_rank, shared_outer
        self.adapter_enabled = torch.zeros(max_loras, dtype=torch.bool, device=device)
        # of a tensor, so that it names the GPU where the argument only says cuda
        self.dtype, self.device = dtype, self.adapter_enabled.device
        self._weights = {name: self._empty_slots(spec) for name, spec in self.layers.items()}
        self._dense = {name: self._empty_pair(spec) for name, spec in self.dense.items()}
        self._transfers = SlotTransfers(self.device, max_loras)
        self._sources: dict[str, str | Path | Adapter] = {}
        # the least recently used first
        self._slots: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._users: Counter[str] = Counter()
        self._lock = threading.RLock()

    def _empty_slots(self, spec: ExpertsSpec) -> MoELoRA:
        slots, experts, rank = self.max_loras, spec.num_experts, self.max_lora_rank
        outer = 1 if self.shared_outer else experts
        shapes = (
            (slots, outer, spec.num_slices * rank, spec.hidden_size),
            (slots, experts, spec.gate_up_size, rank),
            (slots, experts, rank, spec.intermediate_size),
            (slots, outer, spec.hidden_size, rank),
        )
        a13, b13, a2, b2 = (torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes)
        return MoELoRA(a13, b13, a2, b2, self.adapter_enabled)

    def _empty_pair(self, spec: DenseSpec) -> DenseLoRA:
        shapes = (
            (self.max_loras, 1, self.max_lora_rank, spec.in_features),
            (self.max_loras, 1, spec.out_features, self.max_lora_rank),
        )
        return DenseLoRA(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes))

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, the least recently used first."""
        with self._lock:
            return list(self._slots)

    @property
    def known(self) -> list[str]:
        """Names of all adapters that a batch may ask for, loaded or not."""
        with self._lock:
            return list(self._sources)

    @property
    def adapter_nbytes(self) -> int:
        """Bytes that one slot of all layers takes, whatever the rank of its adapter."""
        return self.nbytes // self.max_loras

    @property
    def nbytes(self) -> int:
        """Bytes that all slots of all layers take."""
        parts = [part for lora in self._weights.values() for part in lora[:4] if part is not None]
        parts += [part for pair in self._dense.values() for part in pair]
        return sum(part.numel() * part.element_size() for part in parts)

    def lora(self, layer: str) -> MoELoRA:
        """The stacked matrices of one MoE layer, always the same tensors.

        Raises:
            KeyError: the pool has no such layer.
        """
        return self._weights[layer]

    def dense_lora(self, layer: str) -> DenseLoRA:
        """The stacked matrices of one linear layer, ``[L, 1, R, in]`` and ``[L, 1, out, R]``, always the same tensors.

        Raises:
            KeyError: the pool has no such layer.
        """
        return self._dense[layer]

    def slot(self, name: str) -> int:
        """The slot of a loaded adapter, which the current stream may use from here on.

        Raises:
            KeyError: no adapter of that name is loaded.
        """
        with self._lock:
            if name not in self._slots:
                raise KeyError(f"no adapter named {name!r} is loaded, there are {self.names}")
            self._transfers.wait(self._slots[name])
            return self._slots[name]

    def add(self, name: str, source: str | Path | Adapter) -> None:
        """Makes an adapter known without loading it; the first batch that asks for it does.

        Args:
            name: the name it is served under.
            source: folder of a PEFT adapter, or one already read.

        Raises:
            ValueError: the name is taken.
        """
        with self._lock:
            if name in self._sources:
                raise ValueError(f"name: {name!r} is taken already")
            self._sources[name] = source

    def load(self, name: str, source: str | Path | Adapter, *, pin: bool = False) -> int:
        """Loads an adapter into a slot now; a failure leaves the pool as it was.

        Args:
            name: the name it is served under.
            source: folder of a PEFT adapter, or one already read.
            pin: keep it loaded until `unpin` or `unload`.

        Returns:
            its slot.

        Raises:
            ValueError: the name is taken, no slot can be freed, the rank is above the pool's, or the checkpoint is
                refused.
            FileNotFoundError: the folder is no PEFT adapter.
        """
        if name in self.known:
            raise ValueError(f"name: {name!r} is taken already")
        adapter = self._read(name, source)
        with self._lock:
            self._make_room([name], keep=())
            self.add(name, source)
            if pin:
                self._pinned.add(name)
            return self._install(name, adapter)

    def load_many(
        self, sources: Mapping[str, str | Path | Adapter], *, pin: bool = False, progress: bool = False
    ) -> None:
        """Loads adapters into slots now, all of them or, on a failure, none.

        Args:
            sources: by the name each is served under, the folder of a PEFT adapter, or one already read.
            pin: keep them loaded until `unpin` or `unload`.
            progress: show a progress bar over the files (needs tqdm).

        Raises:
            ValueError, FileNotFoundError: as for `load`, for any of them; the pool is then as it was.
        """
        self._refuse_taken(sources)
        adapters = {name: self._read(name, source) for name, source in _with_bar(sources, progress)}
        with self._lock:
            # another thread may have come first while the files were read
            self._refuse_taken(sources)
            self._make_room(list(sources), keep=())
            for name, adapter in adapters.items():
                self.add(name, sources[name])
                if pin:
                    self._pinned.add(name)
                self._install(name, adapter)

    def unload(self, name: str) -> None:
        """Forgets an adapter and frees its slot; tokens still mapped to it run without one.

        Raises:
            KeyError: no adapter of that name is known.
            ValueError: a running batch uses it.
        """
        with self._lock:
            self._source(name)
            if self._users[name]:
                raise ValueError(f"name: {name!r} is in use by a running batch")
            if name in self._slots:
                self._evict(name)
            self._pinned.discard(name)
            del self._sources[name]

    def pin(self, name: str) -> None:
        """Keeps a loaded adapter in its slot until `unpin`.

        Raises:
            KeyError: no adapter of that name is loaded.
        """
        with self._lock:
            self.slot(name)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter go again when room is needed."""
        with self._lock:
            self._pinned.discard(name)

    def token_lora_mapping(self, names: Sequence[str | None]) -> Tensor:
        """The slot of each name, ``[len(names)]`` int32 on the pool's device; -1 for None.

        Raises:
            KeyError: an adapter is not loaded.
        """
        with self._lock:
            slots = [-1 if name is None else self.slot(name) for name in names]
        return torch.tensor(slots, dtype=torch.int32, device=self.device)

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[Tensor]:
        """Loads what a batch needs and keeps it loaded inside; gives what `token_lora_mapping` gives.

        Args:
            names: one adapter name, or None, for each request.

        Raises:
            KeyError: an adapter is not known.
            ValueError: the batch needs more adapters than there are slots that can be freed, or one cannot be read;
                nothing was evicted then.
            FileNotFoundError: the folder of one is gone.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        self._acquire(wanted)
        try:
            yield self.token_lora_mapping(names)
        finally:
            with self._lock:
                self._users.subtract(wanted)
                self._transfers.release([self._slots[name] for name in wanted])

    def _acquire(self, wanted: list[str]) -> None:
        """Loads the wanted adapters and counts them as used."""
        with self._lock:
            missing = {name: self._source(name) for name in wanted if name not in self._slots}
        # files are read while other batches go on
        adapters = {name: self._read(name, source) for name, source in missing.items()}
        with self._lock:
            for name in wanted:
                self._source(name)
            gone = [name for name in wanted if name not in self._slots]
            self._make_room(gone, keep=wanted)
            for name in gone:
                self._install(name, adapters[name] if name in adapters else self._read(name, self._source(name)))
            for name in wanted:
                self._slots[name] = self._slots.pop(name)
            self._users.update(wanted)

    def _source(self, name: str) -> str | Path | Adapter:
        if name not in self._sources:
            raise KeyError(f"no adapter named {name!r} is known, there are {self.known}")
        return self._sources[name]

    def _read(self, name: str, source: str | Path | Adapter) -> Adapter:
        adapter = source if isinstance(source, Adapter) else read_adapter(source, self.layers, self.dense)
        if adapter.rank > self.max_lora_rank:
            raise ValueError(f"source: rank {adapter.rank} of {name!r} is above max_lora_rank {self.max_lora_rank}")
        for layer, lora in adapter.layers.items():
            outer = [part.shape[0] for part in (lora.gate_up_a, lora.down_b) if part is not None]
            if self.shared_outer and any(experts > 1 for experts in outer) and self.layers[layer].num_experts > 1:
                raise ValueError(
                    f"source: {name!r} has matrices of its own for each expert of {layer} where the pool's adapters "
                    "share one (shared_outer)"
                )
        return adapter

    def _refuse_taken(self, names: Iterable[str]) -> None:
        taken = [name for name in names if name in self.known]
        if taken:
            raise ValueError(f"sources: {', '.join(map(repr, taken))} taken already")

    def _make_room(self, names: Sequence[str], keep: Iterable[str]) -> None:
        """Evicts as many adapters as ``names`` need slots, none of them if they cannot all have one."""
        free = self.max_loras - len(self._slots)
        held = self._pinned | set(keep) | {name for name, users in self._users.items() if users}
        evictable = [name for name in self._slots if name not in held]
        if len(names) > free + len(evictable):
            raise ValueError(
                f"name: no slot is free for {', '.join(map(repr, names))}: all {self.max_loras} are pinned, in use or "
                f"wanted by the same batch ({self.names})"
            )
        for name in evictable[: max(len(names) - free, 0)]:
            self._evict(name)

    def _evict(self, name: str) -> None:
        slot = self._slots.pop(name)
        # on the current stream, between its batches, and never before the slot's own writing enables it
        self._transfers.wait(slot)
        self.adapter_enabled[slot] = False

    def _install(self, name: str, adapter: Adapter) -> int:
        """Writes an adapter into a free slot, and enables the slot last."""
        slot = next(slot for slot in range(self.max_loras) if slot not in self._slots.values())
        with self._transfers.writing(slot):
            for layer, slots in self._weights.items():
                self._fill(slots, slot, adapter.layers.get(layer, ExpertsLoRA()), self.layers[layer])
            for layer, pair in self._dense.items():
                lora = adapter.dense.get(layer)
                for target, source, dim in (
                    (pair.a[slot, 0], lora and lora.a, 0),
                    (pair.b[slot, 0], lora and lora.b, 1),
                ):
                    target.zero_()
                    if source is not None:
                        self._transfers.copy(target.narrow(dim, 0, source.shape[dim]), source)
            self.adapter_enabled[slot] = True
        self._slots[name] = slot
        return slot

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
                self._transfers.copy(view[:, :, : source.shape[2]], source)
            else:
                self._transfers.copy(target[..., : source.shape[-1]], source)


def _with_bar(
    sources: Mapping[str, str | Path | Adapter], progress: bool
) -> Iterable[tuple[str, str | Path | Adapter]]:
    """The items, behind a progress bar if one is wanted."""
    if not progress:
        return sources.items()
    from tqdm import tqdm

    bar: Iterable[tuple[str, str | Path | Adapter]] = tqdm(sources.items(), desc="adapters", unit="adapter")
    return bar
