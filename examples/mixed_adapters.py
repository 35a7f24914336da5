"""One batch, many adapters: a Qwen3-MoE model with a PEFT adapter per request, checked against PEFT.

Builds a small Qwen3-MoE model with random weights, makes adapters with PEFT and saves them, loads eight of them into an
`AdapterPool`, and generates for one mixed batch: eager and compiled. PEFT has to run one adapter after the other.

Then serves requests that arrive and leave, over twenty adapters through a pool of six slots, which swaps them.

    python examples/mixed_adapters.py          # uses the GPU if there is one
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from torch_lora_moe.adapters import AdapterPool
from torch_lora_moe.integrations.transformers import enable, expert_layers, use_adapters

ADAPTERS = {
    "support": {"r": 4, "lora_alpha": 8},
    "legal": {"r": 8, "lora_alpha": 16},
    "medical": {"r": 12, "lora_alpha": 12},
    "code": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "german": {"r": 8, "lora_alpha": 8},
    "french": {"r": 8, "lora_alpha": 32},
    "polite": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "terse": {"r": 16, "lora_alpha": 16},
}
REQUESTS = [*ADAPTERS, None, "legal", "code", None, "support", "french", "legal", "terse"]

# the second part: adapters, slots for them, and how many requests run at once and for how many tokens between arrivals
TENANTS = {f"tenant-{i:02d}": {"r": (4, 8, 16)[i % 3], "lora_alpha": 16} for i in range(20)}
SLOTS, AT_ONCE, TOKENS_A_ROUND = 6, 8, 4


def main() -> None:
    """Runs the example and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiles = device == "cuda" or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiles:
        print("no C++ compiler found: the compiled run is left out")

    with tempfile.TemporaryDirectory() as folder, tqdm(total=6 if compiles else 5, unit="step") as progress:

        def step(text: str) -> None:
            progress.set_description(text)
            progress.refresh()

        step("building a Qwen3-MoE model and its PEFT adapters")
        model = build_model().to(device)
        peft_model = make_adapters(copy.deepcopy(model), ADAPTERS, Path(folder))
        server = copy.deepcopy(model)
        make_adapters(copy.deepcopy(model), TENANTS, Path(folder))
        prompts = torch.randint(0, model.config.vocab_size, (len(REQUESTS), options.prompt_tokens), device=device)
        progress.update()

        step("loading the adapters into a pool")
        pool = AdapterPool(expert_layers(model), max_loras=len(ADAPTERS), max_lora_rank=16, device=device)
        for name in ADAPTERS:
            pool.load(name, Path(folder) / name)
        enable(model, pool)
        progress.update()

        step("PEFT, one adapter after the other")
        expected, peft_seconds = timed(lambda: generate_with_peft(peft_model, prompts, options.new_tokens))
        progress.update()

        runs: dict[str, tuple[Tensor, float]] = {}
        step("one mixed batch")
        runs["eager"] = timed(lambda: generate_mixed(model, prompts, options.new_tokens))
        progress.update()
        if compiles:
            step("one mixed batch, compiled (the first run compiles)")
            model.forward = torch.compile(model.forward, fullgraph=True)
            runs["compiled"] = timed(lambda: generate_mixed(model, prompts, options.new_tokens))
            progress.update()
        plain = generate(model, prompts, 1)

        step("requests that arrive and leave, twenty adapters in six slots")
        served = serve(server, Path(folder), options.seed, device)
        progress.update()
    report(expected, peft_seconds, runs, (expected[:, 0] - plain[:, 0]).abs().amax(-1), options.new_tokens)
    report_served(*served)


def build_model() -> PreTrainedModel:
    """A Qwen3-MoE model of four layers with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=512,
    )
    return Qwen3MoeForCausalLM(config).eval()


def make_adapters(model: PreTrainedModel, adapters: dict[str, dict[str, Any]], folder: Path) -> PeftModel:
    """Adapters on the experts, with random weights, saved under ``folder`` as PEFT saves them."""
    peft_model: PeftModel | None = None
    for name, sizes in adapters.items():
        config = LoraConfig(
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            task_type="CAUSAL_LM",
            **sizes,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT notes that no module is targeted, only parameters
            if peft_model is None:
                peft_model = get_peft_model(model, config, adapter_name=name)
            else:
                peft_model.add_adapter(name, config)
    assert peft_model is not None
    for key, parameter in peft_model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    peft_model.save_pretrained(str(folder), selected_adapters=list(adapters))
    return peft_model.eval()


def generate(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """Greedy generation; the logits of every step, ``[requests, new_tokens, vocabulary]``."""
    result = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(result.logits, dim=1)


def generate_mixed(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """All requests in one batch, each with its own adapter."""
    with use_adapters(model, REQUESTS):
        return generate(model, prompts, new_tokens)


def generate_with_peft(model: PeftModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """The same requests through PEFT, which needs one batch for each adapter."""
    logits: list[Tensor | None] = [None] * len(REQUESTS)
    for name in dict.fromkeys(REQUESTS):
        rows = [row for row, request in enumerate(REQUESTS) if request == name]
        if name is None:
            with model.disable_adapter():
                part = generate(model, prompts[rows], new_tokens)
        else:
            model.set_adapter(name)
            part = generate(model, prompts[rows], new_tokens)
        for row, row_logits in zip(rows, part, strict=True):
            logits[row] = row_logits
    return torch.stack([row for row in logits if row is not None])


@dataclass
class Request:
    """One user's request: an adapter, a prompt, how many tokens are wanted, and the tokens there are so far."""

    adapter: str | None
    prompt: list[int]
    wanted: int
    tokens: list[int] = field(default_factory=list)


def serve(model: PreTrainedModel, folder: Path, seed: int, device: str) -> tuple[list[Request], int, int, float, int]:
    """Requests, rounds, adapters loaded, seconds and wrong tokens of a small server with more adapters than slots."""
    pool = AdapterPool(expert_layers(model), max_loras=SLOTS, max_lora_rank=16, device=device)
    for name in TENANTS:
        pool.add(name, folder / name)
    enable(model, pool)
    requests = arriving(random.Random(seed), model.config.vocab_size, 40)
    waiting, running, rounds, loaded = list(requests), [], 0, 0
    start = time.perf_counter()
    while waiting or running:
        # three more users a round; a request waits while its adapter finds no slot beside those of the running ones
        for request in waiting[:3]:
            names = {other.adapter for other in [*running, request]} - {None}
            if len(running) < AT_ONCE and len(names) <= SLOTS:
                waiting.remove(request)
                running.append(request)
        before = set(pool.names)
        next_tokens(model, running, device)
        rounds, loaded = rounds + 1, loaded + len(set(pool.names) - before)
        running = [request for request in running if len(request.tokens) < request.wanted]
    synchronize()
    seconds = time.perf_counter() - start
    return requests, rounds, loaded, seconds, sum(wrong_tokens(model, request, device) for request in requests)


def arriving(generator: random.Random, vocabulary: int, count: int) -> list[Request]:
    """Random requests of random tenants; some want the plain model."""

    def request() -> Request:
        prompt = [generator.randrange(vocabulary) for _ in range(generator.randint(4, 24))]
        return Request(generator.choice([*TENANTS, None]), prompt, generator.randint(4, 16))

    return [request() for _ in range(count)]


def next_tokens(model: PreTrainedModel, batch: list[Request], device: str) -> None:
    """A few more tokens for each request of a batch, padded on the left, each with its adapter."""
    texts = [request.prompt + request.tokens for request in batch]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts], device=device)
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)
    with use_adapters(model, [request.adapter for request in batch]):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS_A_ROUND, do_sample=False, pad_token_id=0
        )
    for request, row in zip(batch, out[:, longest:].tolist(), strict=True):
        request.tokens = (request.tokens + row)[: request.wanted]


def wrong_tokens(model: PreTrainedModel, request: Request, device: str) -> int:
    """How many tokens differ from those of the request alone."""
    alone = Request(request.adapter, request.prompt, request.wanted)
    while len(alone.tokens) < alone.wanted:
        next_tokens(model, [alone], device)
    return sum(a != b for a, b in zip(alone.tokens, request.tokens, strict=True))


def report_served(requests: list[Request], rounds: int, loaded: int, seconds: float, wrong: int) -> None:
    """Prints the table of the server; exits with an error if a request got other tokens than it gets alone."""
    tokens = sum(len(request.tokens) for request in requests)
    used = len({request.adapter for request in requests} - {None})
    print(f"\n{len(requests)} requests over {used} adapters in {SLOTS} slots, {AT_ONCE} at once")
    print("rounds  tokens  tokens/s  adapters loaded  of them swapped in for another")
    print(f"{rounds:6d}  {tokens:6d}  {tokens / seconds:8.0f}  {loaded:15d}  {loaded - SLOTS:30d}")
    if wrong:
        raise SystemExit(f"{wrong} of {tokens} tokens are not those of the request alone")


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of ``run`` and the seconds of its second call."""
    run()
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return result, time.perf_counter() - start


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(
    expected: Tensor, peft_seconds: float, runs: dict[str, tuple[Tensor, float]], effects: Tensor, new_tokens: int
) -> None:
    """Prints a row per request and the times; exits with an error if a result is not PEFT's at rounding level."""
    names = list(runs)
    headings = "  ".join(f"max |logits - PEFT| {name}" for name in names)
    print(f"\nrequest  adapter   new tokens  adapter's effect  {headings}")
    for row, adapter in enumerate(REQUESTS):
        cells = []
        for name in names:
            difference = (runs[name][0][row] - expected[row]).abs().max().item()
            cells.append(f"{difference:.1e}".rjust(len(f"max |logits - PEFT| {name}")))
        effect = f"{effects[row].item():16.1e}"
        print(f"{row:7d}  {adapter or '-':8s}  {new_tokens:10d}  {effect}  " + "  ".join(cells))

    print(f"\n{len(expected)} requests, {new_tokens} tokens each; logits up to {expected.abs().max():.2f}")
    print(f"  PEFT, one adapter after the other  {peft_seconds:7.3f} s")
    for name, (_, seconds) in runs.items():
        print(f"  one mixed batch, {name:18s}{seconds:7.3f} s   {peft_seconds / seconds:5.1f} times faster")

    limit = 1e-5 * expected.abs().max().item() if expected.device.type == "cpu" else 1e-4 * expected.abs().max().item()
    for name, (logits, _) in runs.items():
        worst = (logits - expected).abs().max().item()
        if not worst <= limit:
            raise SystemExit(f"{name}: differs from PEFT by {worst:.1e}, more than rounding ({limit:.1e})")


if __name__ == "__main__":
    main()
