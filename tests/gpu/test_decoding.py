"""A Transformers model that decodes from the CUDA graphs of ``mode="reduce-overhead"`` while adapters come and go."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import torch
from models import qwen3_moe, with_peft
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_container
from transformers import CompileConfig

from torch_lora_moe.adapters import AdapterPool
from torch_lora_moe.integrations.transformers import enable, expert_layers, use_adapters

NEW_TOKENS = 12


def test_generate_from_cuda_graphs(tmp_path: Path) -> None:
    """Five adapters take turns in three slots, one more is loaded and unloaded all the while; tokens as without."""
    model = qwen3_moe()
    adapters = {name: {"r": 4 + i, "lora_alpha": 8} for i, name in enumerate("abcdef")}
    with_peft(model, adapters, tmp_path)
    model.cuda()
    pool = AdapterPool(expert_layers(model), max_loras=3, max_lora_rank=12, device="cuda")
    for name in "abcde":
        pool.add(name, tmp_path / name)
    enable(model, pool)
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    batches = [["a", None, "b", "a"], ["b", "c", "c", None], ["d", "e", None, None], ["a", "e", "e", "a"], [None] * 4]

    def generate(names: list[str | None], **how: object) -> Tensor:
        with use_adapters(model, names):
            return model.generate(input_ids=ids, attention_mask=mask, **options, **how)

    expected = [generate(names, disable_compile=True) for names in batches]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(expected))

    done = threading.Event()
    loads: list[int] = []

    def load() -> None:
        while not done.is_set():
            loads.append(pool.load("f", tmp_path / "f"))
            pool.unload("f")

    torch._dynamo.reset()
    counters.clear()
    graphs = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(mode="reduce-overhead", fullgraph=True),
    }
    loader = threading.Thread(target=load)
    loader.start()
    try:
        for names, tokens in [*zip(batches, expected, strict=True)] * 2:
            assert torch.equal(generate(names, **graphs), tokens)
    finally:
        done.set()
        loader.join()
    assert len(loads) > 2
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert get_container(torch.cuda.current_device()).tree_manager is not None, "no CUDA graph was recorded"
