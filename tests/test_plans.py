"""What stands for a weight in a launch: as Triton's own descriptor, in the installed version of Triton."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

descriptors = pytest.importorskip("triton.tools.tensor_descriptor")


def test_descriptor_is_tritons_own() -> None:
    from torch_lora_moe.plans import Address, descriptor

    weight = torch.zeros(3, 20, 64, dtype=torch.bfloat16)[:, :, :48]
    mine = descriptor(weight, weight, [16, 32])
    own = descriptors.TensorDescriptor(weight, [60, 48], [64, 1], [16, 32])
    assert {name: vars(mine)[name] for name in asdict(own)} == {**vars(own)}
    assert set(vars(mine)) == set(vars(own))
    assert descriptor(weight, Address(640), [16, 32]).base.data_ptr() == 640
