"""The layer's kernels compile for GPUs that this machine does not have, and fit into their shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from compiling import parameter_bytes, source  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from torch_lora_moe import driver, launch, layer, plans, routing, schedules, token_layer  # noqa: E402
from torch_lora_moe.checks import FusedArguments  # noqa: E402
from torch_lora_moe.config import LaunchConfig  # noqa: E402

# compute capability: bytes of shared memory that one program may have
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


class Compiler:
    """Stands for `Plan.__call__`: compiles instead of launching."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.shared: dict[str, int] = {}
        self.ptx: dict[str, str] = {}
        self.parameters: dict[str, list[str]] = {}
        # bytes of each parameter of the last kernel, and kernels that `driver` would leave to Triton
        self.declared: list[int] = []
        self.left: list[str] = []
        # the arguments whose values are compiled in: whether a launch waits for the one before or starts beside it
        self.fixed: tuple[str, ...] = ()

    def __call__(self, plan: plans.Plan, tensors: tuple[Tensor, ...], sizes: tuple[float, ...]) -> None:
        names = plan.kernel.arg_names
        names_of = ("num_warps", "num_stages", "maxnreg")
        options = {name: plan.options[name] for name in names_of if name in plan.options} | {"enable_fp_fusion": True}
        compiled = triton.compile(source(plan, tensors, sizes, self.fixed), target=self.target, options=options)
        name = plan.kernel.__name__
        if dict(zip(names[len(tensors) + len(sizes) :], plan.constants, strict=True)).get("SPLIT"):
            waits = dict(zip(names[len(tensors) :], sizes, strict=False)).get("waits_from", -1) >= 0
            name += " split waiting" if waits and self.fixed else " split"
        self.shared[name] = max(self.shared.get(name, 0), compiled.metadata.shared)
        self.ptx[name] = compiled.asm["ptx"]
        self.declared = parameter_bytes(self.ptx[name])
        places = [8 * i for i in range(len(tensors))]
        given = [name for name in names[len(tensors) : len(tensors) + len(sizes)] if name not in self.fixed]
        numbers = tuple(size for size, name in zip(sizes, names[len(tensors) :], strict=False) if name in given)
        if driver.written_launch(compiled, plan.grid, tensors, places, numbers, plan.matrices) is None:
            self.left.append(name)
        # a descriptor is followed by its sizes and its strides
        widths = [1 + 2 * len(plan.matrices.get(i, ())) for i in range(len(tensors))]
        self.parameters[name] = [names[i] for i, width in enumerate(widths) for _ in range(width)] + given

    # what `driver` looks for in the CUDA driver
    cuTensorMapEncodeTiled = cuLaunchKernelEx = None

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        """Bytes of a parameter of the last kernel; 1: there is none."""
        if index.value >= len(self.declared):
            return 1
        size._obj.value = self.declared[index.value]
        return 0

    def reads(self, kernel: str, parameter: str) -> list[int]:
        """Where in a kernel's code it reads what a pointer of its parameters points into."""
        lines = self.ptx[kernel].splitlines()
        # registers that hold addresses made from the parameter
        made = {f"{kernel.split()[0]}_param_{self.parameters[kernel].index(parameter)}"}

        def uses(line: str) -> bool:
            return any(word in made for word in re.findall(r"%rd?\d+|\w+_param_\d+", line))

        before = 0
        while before < len(made):
            before = len(made)
            for line in lines:
                target = re.match(r"\s*(?:@!?%p\d+ )?[\w.]+\s+(%rd?\d+), (.*);", line)
                if target and "ld.global" not in line and uses(target[2]):
                    made.add(target[1])
        return [i for i, line in enumerate(lines) if re.search(r"ld\.global|cp\.async\.", line) and uses(line)]

    def first_read(self, kernel: str, parameter: str) -> int:
        """The first of them."""
        return self.reads(kernel, parameter)[0]

    def waits_before(self, kernel: str, line: int) -> bool:
        """Whether a kernel waits for the one before it in the branch of a line of its code, ahead of that line."""
        starts = [i for i, other in enumerate(self.ptx[kernel].splitlines()[:line]) if other.startswith("$L__BB")]
        return any(max(starts, default=0) < wait < line for wait in self.waits(kernel))

    def waits(self, kernel: str) -> list[int]:
        """Where in a kernel's code it waits for the kernel before."""
        return [i for i, line in enumerate(self.ptx[kernel].splitlines()) if "griddepcontrol.wait" in line]

    def first_product(self, kernel: str) -> int:
        """Where in a kernel's code it first multiplies matrices."""
        return next(i for i, line in enumerate(self.ptx[kernel].splitlines()) if re.search(r"\bw?g?mma\.", line))

    def first_wait(self, kernel: str) -> int:
        """Where in a kernel's code it first waits for the kernel before; behind its first product if it is split."""
        after = self.first_product(kernel) if "_tiles split waiting" in kernel else 0
        return next(i for i in self.waits(kernel) if i > after)


def assembled(ptx: str, folder: Path) -> str:
    """What the assembler says about a kernel for compute capability 9.0."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


@pytest.fixture
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    capability = request.param
    compiler = Compiler(capability)
    # gigabytes that nothing reads
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(plans.Plan, "__call__", lambda plan, tensors, *sizes: compiler(plan, tensors, sizes))
    for module in (launch, layer, schedules, token_layer):
        monkeypatch.setattr(module, "overlaps", lambda device: capability >= 90)
    monkeypatch.setattr(layer, "shared_memory", lambda device: SHARED_MEMORY[capability])
    monkeypatch.setattr(driver, "cuda", lambda: compiler)
    layer._PLANS.clear()
    yield compiler
    layer._PLANS.clear()


QWEN3 = (2048, 768, 128, 8)
GPT_OSS = (2880, 2880, 32, 4)
FEW_EXPERTS = (1024, 1024, 8, 2)


def arguments(num_tokens: int, rank: int, sizes: tuple[int, int, int, int] = QWEN3) -> FusedArguments:
    """A layer (of Qwen3-30B-A3B) with a schedule and 8 slots, in memory that nothing reads."""
    (hidden, inner, experts, top_k), slots = sizes, 8

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype)

    ids = empty(num_tokens, top_k, dtype=torch.int32)
    lora: tuple[Any, ...] = (None,) * 4
    if rank:
        shapes = ((2 * rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank))
        lora = tuple(empty(slots, experts, *shape) for shape in shapes)
    return FusedArguments(
        empty(num_tokens, hidden),
        empty(experts, 2 * inner, hidden),
        empty(experts, hidden, inner),
        empty(num_tokens, top_k, dtype=torch.float32),
        ids,
        ids.new_empty(routing.schedule_shape(ids.numel())),
        *lora,
        empty(num_tokens, dtype=torch.int32) if rank else None,
    )


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(
    ("num_tokens", "rank"),
    [(1, 0), (1, 16), (8, 4), (8, 64), (128, 16), (256, 16), (512, 16), (512, 64)]
    + [(4096, rank) for rank in (0, 4, 16, 64, 128)],
)
def test_hopper(compiler: Compiler, num_tokens: int, rank: int, tmp_path: Path) -> None:
    call = arguments(num_tokens, rank)
    compiler.fixed = ("waits_from",)
    layer._plan(call)(call)
    kernels = {"gate_up_pairs", "down_tokens"} if num_tokens == 1 else {"gate_up_tiles", "down_tiles"}
    products = [name for name in compiler.shared if name.split()[0] in kernels]
    assert {name.split()[0] for name in products} == kernels
    assert all((" split" in name) == (num_tokens > 1) for name in products)
    assert max(compiler.shared.values()) <= SHARED_MEMORY[90]
    if num_tokens > 1:
        # weights through the copy engine
        assert all("cp.async.bulk.tensor" in compiler.ptx[name] for name in products)
    if num_tokens >= 512:
        # tall tiles in Hopper's own matrix instructions, which run beside others
        for name in products:
            assert "wgmma.mma_async" in compiler.ptx[name]
            notes = assembled(compiler.ptx[name], tmp_path)
            assert "registers" in notes
            assert "serialized" not in notes
            # nor do steps of LoRA take so many registers that others go to memory
            assert rank != 16 or "0 bytes spill stores" in notes
    assert all("griddepcontrol.wait" in ptx for ptx in compiler.ptx.values())
    # launches through the driver write the parameters that they have
    assert not compiler.left


# what the kernel before may still be making when a kernel starts
UNFINISHED = {
    "route_ranked": {"topk_ids"},
    "order_tokens": {"mapping"},
    "count_experts": {"topk_ids", "token_order"},
    "scatter_pairs": {"ordered_experts", "histograms"},
    "cut_runs": {"schedule"},
    "shrink_pairs": {"x"},
    "shrink_streams": {"x"},
    "shrink_runs": {"x", "schedule"},
    "gate_up_sums": {"x"},
    "gate_up_pairs": {"sums", "shrunk"},
    "down_tokens": {"h"},
    "sum_pairs": {"pairs"},
}
TILES = {"gate_up_tiles": {"schedule"}, "down_tiles": {"h_matrix"}}
TILES_WITH_LORA = {"gate_up_tiles": {"shrunk"}, "down_tiles": {"shrunk"}}


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(
    ("num_tokens", "rank"),
    [(tokens, rank) for tokens in (1, 4096) for rank in (0, 16, 64, 128)]
    + [(tokens, rank) for tokens in (8, 128, 512) for rank in (0, 16, 64)]
    + [(256, 16)],
)
def test_nothing_unfinished_is_read(compiler: Compiler, num_tokens: int, rank: int) -> None:
    """A compiler that loads ahead must not load ahead of the wait."""
    call = arguments(num_tokens, rank)
    compiler.fixed = ("waits_from",)
    layer._plan(call)(call)
    schedules._ROUTE_PLANS.clear()
    schedules.route(call.topk_ids, call.token_lora_mapping, None, 128, 8 if rank else 0)
    schedules._ROUTE_PLANS.clear()
    unfinished = UNFINISHED | (TILES_WITH_LORA if rank else TILES)
    if num_tokens == 1 and not rank:
        del unfinished["gate_up_pairs"]
    if not rank:
        # nothing orders the tokens
        unfinished["count_experts"] = {"topk_ids"}
    # one wait, and all of the input that it takes is complete from the start
    complete = {"shrink_runs split"}
    assert all(len(compiler.waits(name)) == 1 for name in complete & set(compiler.ptx))
    checked = [name for name in compiler.ptx if name.split()[0] in unfinished and name not in complete]
    assert len(checked) >= (1 if num_tokens == 1 else 3)
    for name in checked:
        # complete, if not all of it, when a launch starts that waits so late
        there = {"schedule", "h_matrix"} if name.endswith("waiting") else set()
        for parameter in unfinished[name.split()[0]] - there:
            assert compiler.first_read(name, parameter) > compiler.first_wait(name), (name, parameter)
            # in both of its branches
            branches = name == "gate_up_pairs" and rank
            assert not branches or all(compiler.waits_before(name, i) for i in compiler.reads(name, parameter))
        # nor does it let the next kernel start on what the launch before it has yet to make
        ptx = compiler.ptx[name]
        assert "waiting" not in name or ptx.index("launch_dependents") > ptx.index("griddepcontrol.wait")
    if rank:
        # what these read early is there from the start, of the first also B of columns whose sums are made
        assert num_tokens > 1 or compiler.first_read("gate_up_pairs", "b") < compiler.first_wait("gate_up_pairs")
        early = {"gate_up_pairs": "w", "gate_up_tiles": "schedule", "down_tiles": "schedule"}
        early = {name: early[name.split()[0]] for name in compiler.ptx if name.split()[0] in early}
        # two launches of each, but pair by pair one of down
        assert len(early) == (1 if num_tokens == 1 else 3 if num_tokens == 8 else 4)
        assert all(compiler.first_read(*pair) < compiler.waits(pair[0])[-1] for pair in early.items())


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(("num_tokens", "kernel", "made"), [(1, "down_tokens", "h"), (4, "shrink_pairs", "x")])
def test_a_of_few_pairs_is_on_its_way_before_their_input_is_there(
    compiler: Compiler, num_tokens: int, kernel: str, made: str
) -> None:
    """Of down's rank vectors: pair by pair made beside their product, in tiles by a kernel before it."""
    call = arguments(num_tokens, 16, (4096, 1792, 8, 2))
    layer._plan(call)(call)
    assert compiler.first_read(kernel, "a") < compiler.first_wait(kernel) < compiler.first_read(kernel, made)
    if kernel == "shrink_pairs":
        # the product behind it reads the same input when it starts
        ptx = compiler.ptx[kernel]
        assert ptx.index("launch_dependents") > ptx.index("griddepcontrol.wait")


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(
    ("rank", "sizes"), [(64, QWEN3), (128, QWEN3), (16, (4096, 14336, 8, 2)), (64, (4096, 1792, 8, 2)), (32, GPT_OSS)]
)
def test_programs_of_one_token_are_on_the_gpu_at_once(
    compiler: Compiler, rank: int, sizes: tuple[int, int, int, int], tmp_path: Path
) -> None:
    call = arguments(1, rank, sizes)
    plan = layer._plan(call)
    plan(call)
    notes = assembled(compiler.ptx["down_tokens"], tmp_path)
    registers = int(re.findall(r"Used (\d+) registers", notes)[0])
    at_once = 65536 // (32 * plan.down.options["num_warps"] * (-(-registers // 8) * 8))
    assert plan.down.grid[0] <= 132 * at_once
    # the bound costs no more than two addresses
    assert sum(map(int, re.findall(r"(\d+) bytes spill stores", notes))) <= 16


BARRIER, PRODUCT = r"bar(?:rier)?\.(?:warp\.)?sync.*", r"fma\.rn\.f32|mul\.f32"


# elements that a program of so many warps takes at once, of gate and of up
@pytest.mark.parametrize("compiler", [80, 90], indirect=True)
@pytest.mark.parametrize(
    ("hidden", "rank", "elements", "warps"),
    [(2880, 0, 4096, 1), (2880, 16, 4096, 1), (4096, 0, 2 * 2048, 4), (6144, 0, 2048, 1), (6144, 16, 2 * 1024, 1)],
)
def test_weights_of_a_turn_are_on_their_way_at_once(
    compiler: Compiler, hidden: int, rank: int, elements: int, warps: int
) -> None:
    """One token, rows in one turn or several: a compiler that spares registers would wait between its loads."""
    call = arguments(1, rank, (hidden, 1024, 16, 2))
    layer._plan(call)(call)
    ptx = compiler.ptx["gate_up_pairs"]
    turns = re.split(BARRIER, ptx[ptx.index("ld.global.L1::evict_first") :])
    # 32 threads load 16 bytes each at once
    loads = re.findall(r"ld\.global\.L1::evict_first[\w.:]*\.v4\.b32", re.split(PRODUCT, turns[0])[0])
    assert len(loads) == 2 * elements * 2 // (32 * warps * 16)


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(("hidden", "rank", "first"), [(5120, 16, True), (6144, 64, True), (4096, 64, False)])
def test_b_of_products_in_turns_is_on_its_way_first(compiler: Compiler, hidden: int, rank: int, first: bool) -> None:
    """Behind the turns it would come when all else is there; a product in one turn has loads enough before it."""
    call = arguments(1, rank, (hidden, 1792, 16, 2))
    layer._plan(call)(call)
    lines = compiler.ptx["gate_up_pairs"].splitlines()
    weights = next(i for i, line in enumerate(lines) if "evict_first" in line)
    # behind what completes the sums of the launch before
    reads = [i for i in compiler.reads("gate_up_pairs", "b") if i > compiler.first_wait("gate_up_pairs")]
    assert (reads[0] < weights) is first


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(
    ("rank", "sizes"), [(16, QWEN3), (64, QWEN3), (128, QWEN3), (32, GPT_OSS), (16, (1536, 512, 40, 8))]
)
def test_gate_up_of_one_token_fills_the_gpu_first(
    compiler: Compiler, rank: int, sizes: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """As many programs as it holds; with shared memory the second launch was slower."""
    call = arguments(1, rank, sizes)
    plan = layer._plan(call)
    plan(call)
    registers = int(re.findall(r"Used (\d+) registers", assembled(compiler.ptx["gate_up_sums"], tmp_path))[0])
    at_once = 132 * min(32, 65536 // (32 * plan.sums.options["num_warps"] * (-(-registers // 8) * 8)))
    programs = plan.sums.grid[0] * plan.sums.grid[1]
    assert programs <= at_once
    assert programs > 0.8 * at_once or plan.first > 0.6 * plan.inner
    assert compiler.shared["gate_up_sums"] == compiler.shared["gate_up_pairs"] == 0


@pytest.mark.parametrize("compiler", [80, 90], indirect=True)
@pytest.mark.parametrize("rank", [0, 16])
def test_weights_of_later_turns_are_on_their_way_at_once(compiler: Compiler, rank: int) -> None:
    """As above, of a down product behind what it fetches early."""
    call = arguments(1, rank, (1024, 6400, 16, 2))
    layer._plan(call)(call)
    # two steps of four rows of 512 columns: 64 threads load 16 bytes each at once
    most = 2 * 4 * 512 * 2 // (64 * 16)
    turns = re.split(BARRIER, compiler.ptx["down_tokens"])
    # loads that no product stands behind, up to the next barrier
    ends = [re.split(PRODUCT, turn)[-1] for turn in turns]
    loads = [len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", end)) for end in ends]
    # for each of the token's two pairs
    assert sum(count >= most for count in loads[:-1]) == 2


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(("num_tokens", "rank"), [(1, 16), (512, 16), (4096, 16), (4096, 64)])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_expand_waits_for_its_shrink(compiler: Compiler, num_tokens: int, rank: int, num_stages: int) -> None:
    call = arguments(num_tokens, rank)
    num_pairs, slices = call.topk_ids.numel(), 2
    sorts = routing.lora_sorts(num_pairs, call.w13.shape[0] * 8)
    config = LaunchConfig(16, 128, min(64, rank), 2, num_stages) if sorts else None
    output = call.hidden_states.new_empty(*call.topk_ids.shape, call.w13.shape[1])
    tensors = (output, call.hidden_states, call.gate_up_a, call.gate_up_b, call.topk_ids, call.token_lora_mapping)
    optional = (None, call.schedule, None)
    plan = launch.AddPlan(*tensors, *optional, slices, expand_config=config)  # type: ignore[arg-type]
    plan(*tensors, *optional)  # type: ignore[arg-type]
    name = "expand_runs" if sorts else "expand_pairs"
    assert compiler.first_read(name, "shrunk") > compiler.first_wait(name)
    if sorts:
        assert compiler.first_read(name, "b") < compiler.first_wait(name)


@pytest.mark.parametrize("compiler", [80, 90], indirect=True)
@pytest.mark.parametrize(("num_tokens", "rank"), [(64, 16), (256, 128)])
def test_planes(compiler: Compiler, num_tokens: int, rank: int) -> None:
    """Few virtual experts: the shrinks leave planes to products whose steps of LoRA are on their way two at once."""
    call = arguments(num_tokens, rank, FEW_EXPERTS)
    plan = layer._plan(call)
    plan(call)
    assert plan.gate_up_shrink.planes > 1
    assert max(compiler.shared.values()) <= SHARED_MEMORY[compiler.target.arch]


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize(("num_tokens", "rank", "parts"), [(2**20, 0, 1), (2**18, 64, 4)])
@pytest.mark.usefixtures("compiler")
def test_no_grid_is_too_tall(num_tokens: int, rank: int, parts: int) -> None:
    """A grid's second dimension ends at 65535; nothing is allocated here."""
    x, ids = torch.empty(num_tokens, 64, device="meta"), torch.empty(num_tokens, 8, dtype=torch.int32, device="meta")
    weights = (x.new_empty(8, 128, 64), x.new_empty(8, 64, 64), x.new_empty(ids.shape))
    lora: tuple[Any, ...] = (None,) * 4
    if rank:
        # as many slots as an expert has rows
        shapes = ((2 * rank, 64), (128, rank), (rank, 64), (64, rank))
        lora = tuple(x.new_empty(2**18, 8, *shape) for shape in shapes)
    plan = layer._plan(FusedArguments(x, *weights, ids, None, *lora, ids[:, 0] if rank else None))
    assert plan.tiles * parts >= 2**16
    assert all(max(launch.grid[1:]) < 2**16 for launch in (*(part.plan for part in plan.gate_up + plan.down), plan.sum))
    assert all(part.plan.grid[1] == 1 for part in plan.down)
    assert sum(part.plan.grid[0] for part in plan.down) % (plan.tiles * parts) == 0


@pytest.mark.parametrize("compiler", [80, 89, 90], indirect=True)
def test_few_long_runs(compiler: Compiler) -> None:
    """Shrinks with much on its way in each of their few programs."""
    call = arguments(2048, 64, FEW_EXPERTS)
    layer._plan(call)(call)
    assert max(compiler.shared.values()) <= SHARED_MEMORY[compiler.target.arch]


@pytest.mark.parametrize(
    ("compiler", "num_tokens", "rank"),
    [
        *[(80, *size) for size in ((1, 16), (8, 128), (128, 16), (512, 128), (4096, 16), (4096, 128))],
        # the same code, in less shared memory
        *[(89, 512, 128), (89, 4096, 128)],
    ],
    indirect=["compiler"],
)
def test_older(compiler: Compiler, num_tokens: int, rank: int) -> None:
    call = arguments(num_tokens, rank)
    layer._plan(call)(call)
    assert max(compiler.shared.values()) <= SHARED_MEMORY[compiler.target.arch]
    assert not any("griddepcontrol" in ptx or "wgmma" in ptx for ptx in compiler.ptx.values())
    assert not compiler.left
