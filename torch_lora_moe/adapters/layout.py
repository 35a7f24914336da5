"""What an adapter is once it is read, independent of the file format it came from and of the pool it goes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class AdapterFormatError(ValueError):
    """A checkpoint that cannot be served as it is; the message names the file or key and the reason."""


@dataclass(frozen=True)
class ExpertsSpec:
    """Sizes of one MoE layer of the base model.

    Attributes:
        num_experts: experts ``E``.
        hidden_size: ``H``.
        intermediate_size: ``I`` of one expert.
        is_gated: the layer has a gate and an up projection.
        interleaved: the base weight alternates gate and up columns (gpt-oss), and so do adapters trained on it.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool = True
    interleaved: bool = False

    @property
    def num_slices(self) -> int:
        """2 when gated, else 1."""
        return 2 if self.is_gated else 1

    @property
    def gate_up_size(self) -> int:
        """Output features of the first projection."""
        return self.num_slices * self.intermediate_size


@dataclass(frozen=True)
class DenseSpec:
    """Sizes of one linear layer outside the experts (attention, a shared expert): input and output features."""

    in_features: int
    out_features: int


class DenseLoRA(NamedTuple):
    """One adapter's matrices for one linear layer: ``a`` ``[r, in]``, ``b`` ``[out, r]`` with the scaling folded in."""

    a: Tensor
    b: Tensor


class ExpertsLoRA(NamedTuple):
    """One adapter's matrices for one MoE layer at the adapter's own rank ``r``, scaling folded into B.

    ``gate_up_a`` ``[E or 1, G * r, H]``, ``gate_up_b`` ``[E, G * I, r]`` (gate rows first), ``down_a`` ``[E, r, I]``,
    ``down_b`` ``[E or 1, H, r]``; a projection that the adapter leaves alone is None.
    """

    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None

    @property
    def rank(self) -> int:
        """The larger rank of the two projections."""
        return max(0 if b is None else b.shape[-1] for b in (self.gate_up_b, self.down_b))


@dataclass(frozen=True)
class Adapter:
    """A whole adapter: its matrices by the name of the MoE layer, or of the linear layer, in the base model."""

    layers: dict[str, ExpertsLoRA]
    dense: dict[str, DenseLoRA] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        ranks = [layer.rank for layer in self.layers.values()] + [pair.a.shape[0] for pair in self.dense.values()]
        return max(ranks, default=0)
