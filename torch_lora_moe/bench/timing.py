"""How times are taken: medians of CUDA-graph replays or of calls, host time per call, and where it was."""

from __future__ import annotations

import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch


def graph_time(calls: Sequence[Callable[[], object]], replays: int = 30) -> float:
    """Microseconds of one call: the median replay of a graph that holds all ``calls``, by their number.

    Give it several calls with inputs of their own, so that one call does not find its data in the cache of the last.
    """
    return graph_times({"": calls}, replays)[""]


def graph_times(ways: Mapping[str, Sequence[Callable[[], object]]], replays: int = 30) -> dict[str, float]:
    """As `graph_time`, of several ways that take turns in a random order: each finds the GPU as warm as the others do.

    A way that always followed the same one would inherit the clock that that one's power left it. In its turn a way
    goes twice and is timed the second time: what the way before it left in the cache is gone then.
    """
    graphs = {name: _captured(calls) for name, calls in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn, names in enumerate(_turns(graphs, 3 + replays)):
        for name in names:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graphs[name].replay()
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end) * 1e3)
    return {name: float(statistics.median(times[name])) / len(calls) for name, calls in ways.items()}


def _turns(names: Iterable[str], turns: int) -> list[list[str]]:
    """All names in each turn, in an order that is random, but the same from run to run."""
    generator, names = random.Random(0), sorted(names)
    return [generator.sample(names, len(names)) for _ in range(turns)]


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def call_time(calls: Sequence[Callable[[], object]], seconds: float = 0.5) -> float:
    """Microseconds of one call on the CPU: the median over ``seconds`` for each of ``calls``, of three at least."""
    medians = []
    for call in calls:
        call()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return statistics.mean(medians) * 1e6


def host_time(call: Callable[[], object], repeats: int = 200, batches: int = 5) -> float:
    """Microseconds that the host spends in one eager call, the GPU kept from falling behind.

    The median of the quietest of ``batches``: whatever else a machine does can only add time.
    """
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    medians = []
    for _ in range(batches):
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if i % 20 == 19:
                torch.cuda.synchronize()
        medians.append(statistics.median(times))
    return min(medians) * 1e6


def environment() -> dict[str, str]:
    """What a result must say about where it was measured."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    if not torch.cuda.is_available():
        cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
        return {"cpu": cpu, "torch": torch.__version__, "date": date}
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date,
    }
