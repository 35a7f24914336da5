"""Transformers models with an adapter per request: equal to PEFT running each adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import TARGETS, gpt_oss, mixtral, qwen3_moe, with_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from torch_lora_moe.adapters import AdapterPool, DenseSpec
from torch_lora_moe.integrations.transformers import dense_layers, enable, expert_layers, use_adapters

ADAPTERS = {"a": {"r": 4, "lora_alpha": 8}, "b": {"r": 6, "lora_alpha": 6, "use_rslora": True}}
NAMES = ["a", None, "b", "a"]


def prepared(build: Callable[[], PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, PeftModel, AdapterPool]:
    model = build()
    peft_model = with_peft(model, ADAPTERS, folder)
    pool = AdapterPool(expert_layers(model), max_loras=3, max_lora_rank=8)
    for name in ADAPTERS:
        pool.load(name, folder / name)
    enable(model, pool)
    return model, peft_model, pool


def alone(peft_model: PeftModel, name: str | None, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of one request through PEFT."""
    with torch.no_grad():
        if name is None:
            with peft_model.disable_adapter():
                return peft_model(input_ids=ids, attention_mask=mask).logits
        peft_model.set_adapter(name)
        return peft_model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("build", [qwen3_moe, mixtral, gpt_oss])
def test_mixed_batch_is_peft_one_by_one(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model, peft_model, _ = prepared(build, tmp_path)
    ids, mask = torch.randint(1, 64, (4, 11)), torch.ones(4, 11, dtype=torch.int64)
    with torch.no_grad(), use_adapters(model, NAMES):
        logits = model(input_ids=ids, attention_mask=mask).logits
    plain = alone(peft_model, None, ids, mask)
    for row, name in enumerate(NAMES):
        expected = alone(peft_model, name, ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)
        assert ((expected - plain[row]).abs().max() > 0.01) == (name is not None)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_left_padding_and_beams(beams: int, tmp_path: Path) -> None:
    model, peft_model, _ = prepared(qwen3_moe, tmp_path)
    ids, mask = torch.randint(1, 64, (4, 9)), torch.ones(4, 9, dtype=torch.int64)
    ids[2, :4], mask[2, :4] = 0, 0
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "disable_compile": True,
    }
    with use_adapters(model, NAMES):
        tokens = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, name in enumerate(NAMES):
        inputs = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        if name is None:
            with peft_model.disable_adapter():
                expected = peft_model.generate(**inputs, **options)
        else:
            peft_model.set_adapter(name)
            expected = peft_model.generate(**inputs, **options)
        assert torch.equal(tokens[row], expected[0])


@pytest.mark.parametrize(
    "how",
    [{"do_sample": True, "num_return_sequences": 2}, {"do_sample": False, "cache_implementation": "static"}],
    ids=["sampling", "static_cache"],
)
def test_generate_draws_from_the_logits_of_its_adapter(how: dict[str, object], tmp_path: Path) -> None:
    """Each step's logits are PEFT's for the tokens that came out, several sequences a request included."""
    model, peft_model, _ = prepared(qwen3_moe, tmp_path)
    ids, new = torch.randint(1, 64, (4, 6)), 5
    options = {"min_new_tokens": new, "max_new_tokens": new, "disable_compile": True, **how}
    torch.manual_seed(0)
    with use_adapters(model, NAMES):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    copies = len(out.sequences) // len(NAMES)
    logits = torch.stack(out.logits, 1)
    for row, name in enumerate(NAMES):
        mine = slice(row * copies, (row + 1) * copies)
        sequences = out.sequences[mine]
        expected = alone(peft_model, name, sequences, torch.ones_like(sequences))[:, -new - 1 : -1]
        torch.testing.assert_close(logits[mine], expected, rtol=1e-4, atol=1e-4)
    assert copies == 1 or len(out.sequences.unique(dim=0)) > len(NAMES), "two samples of a request differ"


DENSE = {
    "a": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 6, "target_modules": ["o_proj"], "use_rslora": True},
    "dense_only": {"r": 8, "target_modules": ["q_proj"], "target_parameters": [], "rank_pattern": {"layers.1.*": 3}},
}


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_the_same_adapters(compiled: bool, tmp_path: Path) -> None:
    model = qwen3_moe()
    peft_model = with_peft(model, DENSE, tmp_path)
    dense = dense_layers(model, ["q_proj", "v_proj", "self_attn.o_proj"])
    pool = AdapterPool(expert_layers(model), dense=dense, max_loras=3, max_lora_rank=8)
    for name in DENSE:
        pool.add(name, tmp_path / name)
    for _ in range(2):  # a second time changes nothing
        enable(model, pool)
    names = ["a", None, "b", "dense_only"]
    ids, mask = torch.randint(1, 64, (4, 7)), torch.ones(4, 7, dtype=torch.int64)
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    with torch.no_grad(), use_adapters(model, names):
        logits = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits
    plain = alone(peft_model, None, ids, mask)
    for row, name in enumerate(names):
        expected = alone(peft_model, name, ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)
        assert ((expected - plain[row]).abs().max() > 0.01) == (name is not None)
    with pytest.raises(ValueError, match="no linear layer of Qwen3MoeForCausalLM is named 'p_proj'"):
        dense_layers(model, ["p_proj"])
    assert pool.nbytes == pool.adapter_nbytes * 3


@pytest.mark.parametrize("compiled", [False, True])
def test_router_of_the_same_adapter(compiled: bool, tmp_path: Path) -> None:
    """The adapter's router picks other experts for its own request only, as PEFT's does."""
    model = qwen3_moe()
    options = {"r": 3, "target_parameters": [*TARGETS, "mlp.gate.weight"]}
    peft_model = with_peft(model, {"default": options}, tmp_path)
    pool = AdapterPool(expert_layers(model), dense=dense_layers(model, ["mlp.gate"]), max_loras=1, max_lora_rank=4)
    pool.load("a", tmp_path)
    enable(model, pool)
    ids, mask = torch.randint(1, 64, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    with torch.no_grad(), use_adapters(model, ["a", None]):
        out = forward(input_ids=ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(out.logits[:1], alone(peft_model, "default", ids[:1], mask[:1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[1:], alone(peft_model, None, ids[1:], mask[1:]), rtol=1e-4, atol=1e-4)
    pool.unload("a")
    pool.load("a", _without_router(tmp_path))
    with torch.no_grad(), use_adapters(model, ["a", None]):
        other = forward(input_ids=ids, attention_mask=mask, use_cache=False)
    assert (other.logits[0] - out.logits[0]).abs().max() > 0.01, "the router matters"
    torch.testing.assert_close(other.logits[1], out.logits[1])


def _without_router(folder: Path) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: t for key, t in tensors.items() if ".gate." not in key}, folder / "adapter_model.safetensors")
    return folder


def test_more_adapters_than_slots(tmp_path: Path) -> None:
    """Batch after batch finds its adapters in a pool that holds one at a time."""
    model = qwen3_moe()
    peft_model = with_peft(model, ADAPTERS, tmp_path)
    pool = AdapterPool(expert_layers(model), max_loras=1, max_lora_rank=8)
    for name in ADAPTERS:
        pool.add(name, tmp_path / name)
    enable(model, pool)
    ids, mask = torch.randint(1, 64, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    for name in ("a", "b", "a"):
        with torch.no_grad(), use_adapters(model, [name, None, name]):
            logits = model(input_ids=ids, attention_mask=mask).logits
        expected = alone(peft_model, name, ids, mask)
        torch.testing.assert_close(logits[0::2], expected[0::2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1:2], alone(peft_model, None, ids, mask)[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no slot is free"), use_adapters(model, ["a", "b", None]):
        pass


def test_compiled_model_equals_eager_and_sees_swaps(tmp_path: Path) -> None:
    """Full graph; adapters come, go and change places without compiling again."""
    model, peft_model, pool = prepared(qwen3_moe, tmp_path)
    ids, mask = torch.randint(1, 64, (4, 8)), torch.ones(4, 8, dtype=torch.int64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in (NAMES, ["b", "b", None, "a"], [None] * 4):
        with torch.no_grad(), use_adapters(model, names):
            logits = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, name in enumerate(names):
            expected = alone(peft_model, name, ids[row : row + 1], mask[row : row + 1])
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    pool.unload("a")
    pool.load("again", tmp_path / "a")
    with torch.no_grad(), use_adapters(model, ["again"] * 4):
        logits = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, alone(peft_model, "a", ids, mask), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_contexts_nest_and_end(tmp_path: Path) -> None:
    model, _, _ = prepared(qwen3_moe, tmp_path)
    slots = model.lora_moe_requests
    with use_adapters(model, ["a", "b"]):
        with use_adapters(model, ["b", None]):
            assert slots.slots.tolist() == [1, -1]
        assert slots.slots.tolist() == [0, 1]
        with pytest.raises(RuntimeError), use_adapters(model, [None]):
            raise RuntimeError
        assert slots.slots.tolist() == [0, 1]
    assert slots.slots.tolist() == [-1]


class TestRefused:
    """What cannot be served says why."""

    def test_dense_model(self) -> None:
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        )
        with pytest.raises(ValueError, match="LlamaForCausalLM has no experts that Transformers dispatches"):
            expert_layers(model)

    def test_unknown_activation(self) -> None:
        model = qwen3_moe()
        model.model.layers[1].mlp.experts.act_fn = nn.Tanh()
        with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts \(Qwen3MoeExperts\) has an activation"):
            expert_layers(model)

    def test_post_expert_norm(self) -> None:
        model = qwen3_moe()
        model.model.layers[0].mlp.experts.has_post_expert_norm = True
        with pytest.raises(ValueError, match="has a norm after its experts"):
            expert_layers(model)

    def test_pool_of_another_model(self) -> None:
        pool = AdapterPool(expert_layers(mixtral()), max_loras=1, max_lora_rank=4)
        with pytest.raises(ValueError, match="pool: its layers are not those of the model"):
            enable(qwen3_moe(), pool)

    def test_pool_with_dense_layers_of_another_model(self) -> None:
        model = qwen3_moe()
        pool = AdapterPool(
            expert_layers(model), dense={"model.q_proj": DenseSpec(32, 32)}, max_loras=1, max_lora_rank=4
        )
        with pytest.raises(ValueError, match=r"pool: its dense layer model\.q_proj is no such linear layer"):
            enable(model, pool)
        assert not hasattr(model, "lora_moe_pool")

    def test_pool_of_another_dtype(self) -> None:
        model = qwen3_moe()
        pool = AdapterPool(expert_layers(model), max_loras=1, max_lora_rank=4, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"pool: got torch.bfloat16 on cpu, expected torch.float32 on cpu"):
            enable(model, pool)

    def test_model_without_enable(self) -> None:
        with pytest.raises(ValueError, match="model: not enabled"), use_adapters(qwen3_moe(), ["a"]):
            pass

    def test_requests_that_do_not_divide_the_batch(self, tmp_path: Path) -> None:
        model, _, _ = prepared(qwen3_moe, tmp_path)
        with pytest.raises(ValueError, match="names: got 4 requests for 9 tokens"), use_adapters(model, NAMES):
            model(input_ids=torch.ones(3, 3, dtype=torch.int64))
