"""Shared fixtures: poisoned memory for every test, and the table of variants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# the tests choose the kernels themselves, whatever was built into the package
os.environ["LORA_MOE_STUBS"] = "0"

import interpreting
import stubs

from torch_lora_moe.testing import Case

VARIANTS = {
    "gated_silu": Case(),
    "gated_gelu": Case(activation="gelu"),
    "gated_gelu_tanh": Case(activation="gelu_tanh"),
    "gated_relu2": Case(activation="relu2"),
    "swigluoai": Case(activation="swigluoai", bias=True, seed=1),
    "plain_silu": Case(is_gated=False),
    "plain_relu2": Case(is_gated=False, activation="relu2"),
    "interleaved": Case(interleaved=True),
    "gpt_oss": Case(activation="swigluoai", interleaved=True, transposed=True, bias=True),
    "bias": Case(bias=True),
    "transposed": Case(transposed=True),
    "shared_outer": Case(shared_outer=True),
    "shared_outer_plain": Case(shared_outer=True, is_gated=False),
    "only_gate_up": Case(adapted=("gate_up",)),
    "only_down": Case(adapted=("down",)),
    "no_lora": Case(adapted=()),
    "one_disabled": Case(enabled=(True, False, True)),
    "all_disabled": Case(enabled=(False, False, False), enabled_dtype=torch.int32),
    "one_adapter_owns_all": Case(mapping=(1,) * 17, odd_ids=False),
    "no_token_adapted": Case(mapping=(-1,) * 17),
    "int32_ids_int64_mapping": Case(ids_dtype=torch.int32, mapping_dtype=torch.int64),
    "bf16_router_weights": Case(weights_dtype=torch.bfloat16),
    "scaling_factor": Case(routed_scaling_factor=2.5),
    "bf16": Case(dtype=torch.bfloat16, weights_dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16, bias=True),
    "bf16_plain": Case(dtype=torch.bfloat16, is_gated=False, shared_outer=True),
    "no_tokens": Case(num_tokens=0),
    "one_token": Case(num_tokens=1),
    "three_tokens_top1": Case(num_tokens=3, top_k=1),
    "one_expert": Case(num_experts=1, top_k=1),
    "one_slot": Case(max_loras=1),
    **{f"rank_{rank}": Case(rank=rank, seed=rank) for rank in (1, 4, 12, 16, 64, 128)},
    # large enough for a product per group instead of gathered weights
    "large": Case(num_tokens=48, hidden_size=130, intermediate_size=72, bias=True, interleaved=True),
    "large_bf16": Case(num_tokens=48, hidden_size=130, intermediate_size=72, dtype=torch.bfloat16),
    "large_shared_outer": Case(num_tokens=48, hidden_size=130, intermediate_size=72, rank=64, shared_outer=True),
}

# what the ops of LoRA alone do not see
UNSEEN = {"activation": "silu", "bias": False, "interleaved": False, "transposed": False, "seed": 0}
UNSEEN |= {"routed_scaling_factor": 1.0}
# the first of those that are the same to them
LORA_VARIANTS = {replace(case, **UNSEEN): name for name, case in reversed(VARIANTS.items())}


def pytest_collection_finish(session: pytest.Session) -> None:
    """The interpreter's tests start first and are waited for last, if others run beside them."""
    slow = [item for item in session.items if item.path.name == "test_interpreter.py"]
    if slow and len(session.items) > len(slow) and not session.config.option.collectonly:
        session.items[:] = [item for item in session.items if item not in slow] + slow
        interpreting.start()


def pytest_sessionfinish() -> None:
    interpreting.stop()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=LORA_VARIANTS, ids=LORA_VARIANTS.get)
def lora_variant(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """The same numbers every run; torch.empty returns NaN in deterministic mode, so what nothing wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ library."""
    return stubs.build(tmp_path_factory.mktemp("stubs"))
