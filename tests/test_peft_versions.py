"""Adapters that older versions of PEFT saved, served as those versions computed them (``make_peft_adapters``)."""

from __future__ import annotations

import pytest
import torch
from make_peft_adapters import CASES, FIXTURES, TOKENS
from safetensors.torch import load_file

from torch_lora_moe.adapters import AdapterPool
from torch_lora_moe.integrations.transformers import enable, expert_layers, use_adapters

VERSIONS = ["0.18.1", "0.19.0", "0.19.1", "0.20.0"]


def test_fixtures_are_all_there() -> None:
    assert sorted(folder.name for folder in FIXTURES.iterdir()) == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_version_that_saved(case: str, version: str) -> None:
    folder = FIXTURES / version / case
    expected = load_file(folder / "logits.safetensors")["logits"]
    model = CASES[case][0]()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        plain = model(tokens).logits
        pool = AdapterPool(expert_layers(model), max_loras=2, max_lora_rank=4)
        pool.load("old", folder)
        enable(model, pool)
        with use_adapters(model, ["old"]):
            adapted = model(tokens).logits
        with use_adapters(model, [None]):
            torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
