"""Decoding from one CUDA graph by hand, without Transformers, while requests and their adapters come and go.

A model in the shape of Qwen3-MoE with random weights decodes a batch of fixed size. Everything that changes from step
to step stands in tensors that never move: tokens, positions, the KV cache, each row's adapter slot, and the pool's
matrices. So one graph serves all: a request that arrives takes a row and an adapter, the one before is simply gone.

    python examples/graph_decode.py                  # small; without a GPU the same step runs without a graph
    python examples/graph_decode.py --qwen3 --batch 32 --slots 17 --adapters 24    # 8 layers of the real sizes
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from torch_lora_moe import AdapterPool, fused_experts
from torch_lora_moe.adapters import Adapter, ExpertsLoRA, ExpertsSpec
from torch_lora_moe.bench.timing import environment

RANK, PROMPT, WANTED = 16, 4, 12


@dataclass(frozen=True)
class Sizes:
    """A Qwen3-MoE model; the defaults are tiny."""

    layers: int = 2
    hidden: int = 128
    intermediate: int = 64
    experts: int = 16
    top_k: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 512
    positions: int = PROMPT + WANTED


QWEN3_30B = Sizes(8, 2048, 768, 128, 8, 32, 4, 128, 151936)


@dataclass
class Request:
    """What a user wants: an adapter, or None, and a prompt; and the tokens there are so far."""

    adapter: str | None
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)


class Layer(nn.Module):
    """Attention over a cache of fixed size, then experts with an adapter per row."""

    def __init__(self, sizes: Sizes, batch: int) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.o = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(s.hidden) for _ in range(2))
        self.router = nn.Linear(s.hidden, s.experts, bias=False)
        self.w13 = nn.Parameter(torch.randn(s.experts, 2 * s.intermediate, s.hidden) * s.hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(s.experts, s.hidden, s.intermediate) * s.intermediate**-0.5)
        self.register_buffer("cache", torch.zeros(2, batch, s.kv_heads, s.positions, s.head_dim))

    def forward(self, x: Tensor, position: Tensor, mapping: Tensor, pool: AdapterPool, name: str) -> Tensor:
        """One token of each row, ``[batch, hidden]`` in and out."""
        x = x + self.attention(self.norms[0](x), position)
        y = self.norms[1](x)
        weights, ids = torch.softmax(self.router(y).float(), -1).topk(self.sizes.top_k)
        return x + fused_experts(y, self.w13, self.w2, weights, ids, pool.lora(name), mapping)

    def attention(self, x: Tensor, position: Tensor) -> Tensor:
        """Attention of each row to what the cache has of it."""
        s, batch = self.sizes, x.shape[0]
        heads = self.qkv(x).view(batch, -1, s.head_dim)
        q, k, v = heads.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        rows = torch.arange(batch, device=x.device)
        self.cache[0, rows, :, position], self.cache[1, rows, :, position] = k, v
        seen = torch.arange(s.positions, device=x.device) <= position[:, None]
        out = F.scaled_dot_product_attention(
            q[:, :, None], self.cache[0], self.cache[1], attn_mask=seen[:, None, None], enable_gqa=True
        )
        return self.o(out.reshape(batch, -1))


class Decoder(nn.Module):
    """The model and the state of its batch: `step` reads and writes nothing but tensors that stay where they are."""

    def __init__(self, sizes: Sizes, batch: int, pool: AdapterPool) -> None:
        super().__init__()
        self.pool = pool
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, batch) for _ in range(sizes.layers))
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        for name in ("tokens", "position"):
            self.register_buffer(name, torch.zeros(batch, dtype=torch.int64))
        self.register_buffer("mapping", torch.full((batch,), -1, dtype=torch.int32))

    @torch.no_grad()
    def step(self) -> None:
        """One token for each row of the batch."""
        x = self.embedding(self.tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.position, self.mapping, self.pool, str(i))
        self.tokens.copy_(self.head(x).argmax(-1))
        self.position.add_(1)


class Server:
    """Rows of the batch and the requests in them; ``run_step`` is the step, or the replay of its graph."""

    def __init__(self, model: Decoder, run_step: Callable[[], None]) -> None:
        self.model, self.run_step = model, run_step
        self.rows: list[Request | None] = [None] * model.tokens.shape[0]
        self.seconds: list[float] = []
        self.loads = 0

    def serve(self, requests: list[Request]) -> None:
        """Until every request has its tokens."""
        waiting = list(requests)
        with tqdm(total=len(requests), unit="request", disable=len(requests) == 1) as bar:
            while waiting or any(self.rows):
                self._arrive(waiting)
                self._step()
                bar.update(self._leave())

    def _arrive(self, waiting: list[Request]) -> None:
        """Gives free rows to requests whose adapters find slots beside those of the running ones."""
        pool = self.model.pool
        for row, running in enumerate(self.rows):
            if running is not None or not waiting:
                continue
            names = {other.adapter for other in [*self.rows, waiting[0]] if other is not None} - {None}
            if len(names) > pool.max_loras:
                return
            request = self.rows[row] = waiting.pop(0)
            before = set(pool.names)
            with pool.using([None if r is None else r.adapter for r in self.rows]) as mapping:
                self.model.mapping.copy_(mapping)
            self.loads += len(set(pool.names) - before)
            self.model.position[row] = 0
            self.model.tokens[row] = request.prompt[0]

    def _step(self) -> None:
        start = time.perf_counter()
        self.run_step()
        made = self.model.tokens.tolist()
        self.seconds.append(time.perf_counter() - start)
        for row, request in enumerate(self.rows):
            if request is None:
                self.model.position[row] = 0
                continue
            at = int(self.model.position[row])
            if at < len(request.prompt):
                self.model.tokens[row] = request.prompt[at]
            else:
                request.tokens.append(made[row])

    def _leave(self) -> int:
        done = [row for row, request in enumerate(self.rows) if request and len(request.tokens) == WANTED]
        for row in done:
            self.rows[row] = None
        return len(done)


def random_adapter(layers: dict[str, ExpertsSpec], seed: int) -> Adapter:
    """An adapter on all experts of all layers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def layer(s: ExpertsSpec) -> ExpertsLoRA:
        e, h, i = s.num_experts, s.hidden_size, s.intermediate_size
        return ExpertsLoRA(normal(e, 2 * RANK, h), normal(e, 2 * i, RANK), normal(e, RANK, i), normal(e, h, RANK))

    return Adapter({name: layer(spec) for name, spec in layers.items()})


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``step``, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    """Serves requests over more adapters than slots, and checks each against the request alone in the batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwen3", action="store_true", help="eight layers of the sizes of Qwen3-30B-A3B, in bf16")
    for name, default in (("batch", 8), ("slots", 4), ("adapters", 10), ("requests", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON file for the times of a step")
    options = parser.parse_args()
    if options.slots < 2:
        parser.error("--slots: expected at least 2, one of which is loaded while the others decode")
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, sizes = (torch.bfloat16, QWEN3_30B) if options.qwen3 else (torch.float32, Sizes())

    spec = ExpertsSpec(sizes.experts, sizes.hidden, sizes.intermediate)
    layers = {str(i): spec for i in range(sizes.layers)}
    pool = AdapterPool(layers, max_loras=options.slots, max_lora_rank=RANK, dtype=dtype, device=device)
    names = [f"tenant-{i:02d}" for i in range(options.adapters)]
    for i, name in enumerate(tqdm(names, desc="adapters", unit="adapter")):
        pool.add(name, random_adapter(layers, i))
    with torch.device(device):
        model = Decoder(sizes, options.batch, pool).to(dtype).eval()
    model.step()
    step = captured(model.step) if device == "cuda" else model.step

    generator = random.Random(options.seed)
    prompts = [[generator.randrange(sizes.vocabulary) for _ in range(PROMPT)] for _ in range(options.requests)]
    requests = [Request(generator.choice([*names, None]), prompt) for prompt in prompts]
    server = Server(model, step)
    server.serve(requests)
    report(server, requests)
    check(model, step, requests[:6])
    rows = report_steps(model, step, [name for name in names if name in pool.names], random_adapter(layers, 1000))
    if options.out is not None:
        settings = {"batch": options.batch, "slots": options.slots, "layers": sizes.layers, "rank": RANK}
        options.out.write_text(json.dumps({**environment(), **settings, "milliseconds": rows}, indent=1) + "\n")


def report(server: Server, requests: list[Request]) -> None:
    """Prints what was served and how long a step took."""
    tokens, median = sum(len(request.tokens) for request in requests), statistics.median(server.seconds)
    print("\nrequests  tokens  steps  adapters loaded  median step, ms  longest, ms")
    print(
        f"{len(requests):8d}  {tokens:6d}  {len(server.seconds):5d}  {server.loads:15d}  {median * 1e3:15.2f}  "
        f"{max(server.seconds) * 1e3:11.2f}"
    )


def report_steps(model: Decoder, step: Callable[[], None], names: list[str], another: Adapter) -> dict[str, Any]:
    """Prints how long a step takes with adapters, without, and while one more adapter is loaded again and again.

    Returns:
        the median and the longest time of each, and the median time of a load, in milliseconds.
    """
    pool, rows = model.pool, model.mapping.shape[0]
    free = names.pop()
    pool.unload(free)

    def steps(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            model.position.zero_()
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            seconds.append((time.perf_counter() - start) * 1e3)
        return seconds

    model.mapping.fill_(-1)
    without = steps(50)
    model.mapping.copy_(pool.token_lora_mapping([names[row % len(names)] for row in range(rows)]))
    adapted = steps(50)
    done = threading.Event()
    loads: list[float] = []

    def load() -> None:
        while not done.is_set():
            start = time.perf_counter()
            pool.load(free, another)
            synchronize()
            loads.append((time.perf_counter() - start) * 1e3)
            pool.unload(free)

    loader = threading.Thread(target=load)
    loader.start()
    beside = steps(50)
    done.set()
    loader.join()
    print(f"\na step of {rows} rows, ms             median  longest")
    times = {"without adapters": without, f"{len(names)} adapters": adapted, "while loading": beside}
    result: dict[str, Any] = {}
    for name, values in times.items():
        result[name] = {"median": round(statistics.median(values), 3), "longest": round(max(values), 3)}
        print(f"{name:32s}{statistics.median(values):7.2f}  {max(values):7.2f}")
    result["load"] = {"median": round(statistics.median(loads), 1), "loads": len(loads)}
    print(f"{len(loads)} loads meanwhile, {statistics.median(loads):.1f} ms each")
    return result


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check(model: Decoder, step: Callable[[], None], requests: list[Request]) -> None:
    """Exits with an error if a request gets other tokens when it is alone in the batch."""
    for request in requests:
        alone = Request(request.adapter, request.prompt)
        Server(model, step).serve([alone])
        if alone.tokens != request.tokens:
            raise SystemExit(f"{request.adapter}: {request.tokens} in the batch, {alone.tokens} alone")
    print(f"{len(requests)} requests alone in the batch: the same tokens")


if __name__ == "__main__":
    main()
