"""Expert products of large batches on GPUs of compute capability 9.0: from a product to a launch of `kernels/hopper`.

Triton has no product whose width follows the pairs that are there, so these kernels are CUDA C++: an expert's pairs
are cut into tiles of up to 144 and each is multiplied as wide as it is, where tiles of a power of two leave a tenth of
their rows empty. What `takes` refuses goes to the kernels in Triton.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from torch_lora_moe.checks import ACTIVATIONS, FusedArguments
from torch_lora_moe.config import power_of_two, shared_memory
from torch_lora_moe.descriptors import TensorMaps, shaped_maps
from torch_lora_moe.driver import Parameter, WrittenLaunch, cuda
from torch_lora_moe.nvrtc import CudaKernel, cuda_kernel, version

ARCHITECTURE, OLDEST_COMPILER = "sm_90a", (12, 9)
# As in tiles.cuh: stages, summed columns of one, weight rows of a copy, and most pairs of a tile.
STAGES, DEPTH, TALL, MOST = 4, 64, 128, 144
THREADS = 384
# Names of element types in the kernel's constants.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# How the copy engine swizzles rows of so many bytes, as cuda.h numbers it.
_SWIZZLES = {32: 1, 64: 2, 128: 3}


@functools.cache
def available(device: torch.device) -> bool:
    """Whether a device can run these kernels, and the driver and the compiler they need are there.

    Compilers before `OLDEST_COMPILER` let no product of these kernels run beside another.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return cuda() is not None and version() >= OLDEST_COMPILER


@dataclass(frozen=True)
class Product:
    """One of the two products of a layer: what its kernel is compiled for.

    ``x``: its input, tokens or (``is_down``) sorted pairs; ``b``: LoRA B, None without LoRA.
    """

    call: FusedArguments
    x: Tensor
    w: Tensor
    b: Tensor | None
    bias: Tensor | None
    is_down: bool
    early: bool

    @property
    def rank(self) -> int:
        """Of LoRA, 0 without."""
        return 0 if self.b is None else self.b.shape[3]

    @property
    def is_gated(self) -> bool:
        """Whether gate and up are multiplied side by side."""
        return self.call.is_gated and not self.is_down

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.w.shape[1] // self.slices

    @property
    def slices(self) -> int:
        """Parts of the weight's rows that make one result."""
        return 2 if self.is_gated else 1


def takes(product: Product) -> bool:
    """Whether the kernel takes a product: 16-bit elements, and what its copies need of sizes, strides and addresses."""
    x, w, b = product.x, product.w, product.b
    if x.dtype not in (torch.bfloat16, torch.float16) or w.stride(2) != 1:
        return False
    # a weight as a tensor map can have it: no row or expert inside another
    if w.stride(1) < w.shape[2] or (w.shape[0] > 1 and w.stride(0) < w.shape[1] * w.stride(1)):
        return False
    # copies are of 16 bytes, and a tile takes two steps or more to look the next one up
    sizes = [w.shape[2], product.columns, x.stride(0), w.stride(0), w.stride(1), product.rank]
    if any(size % 8 for size in sizes) or w.shape[2] <= DEPTH:
        return False
    if any(tensor.data_ptr() % 16 for tensor in (x, w, b) if tensor is not None):
        return False
    return shared_bytes(w.shape[0]) <= shared_memory(x.device)


def shared_bytes(num_experts: int) -> int:
    """Shared memory of a program, as tiles.cuh lays it out."""
    stages = STAGES * (2 * TALL + MOST) * DEPTH * 2
    turned, kept_tiles = 2 * 2 * 32 * 128, 4 * MOST * (4 + 4)
    return stages + turned + kept_tiles + STAGES * (32 + 2 * 8) + 2 * (num_experts + 1) * 4


def stage_ranks(rank: int, slices: int) -> int:
    """Ranks that one stage of LoRA takes."""
    return max(16, min(64 // slices, power_of_two(rank)))


def constants(product: Product) -> dict[str, int | str]:
    """What the kernel is compiled for, by the names it has there."""
    call, (num_experts, _, inner) = product.call, product.w.shape
    rank = product.rank
    values: dict[str, int | str] = {name.upper(): number for number, name in enumerate(ACTIVATIONS)}
    return values | {
        "ACTIVATION": call.activation.upper(),
        "IS_BF16": int(product.x.dtype == torch.bfloat16),
        "ELEMENT": '"bf16"' if product.x.dtype == torch.bfloat16 else '"f16"',
        "IN": inner,
        "OUT": product.columns,
        "STRIDE_X": product.x.stride(0),
        "TOP_K": call.topk_ids.shape[1],
        "NUM_EXPERTS": num_experts,
        "SHARED_BYTES": shared_bytes(num_experts),
        "IS_GATED": int(product.is_gated),
        "IS_DOWN": int(product.is_down),
        "INTERLEAVED": int(call.interleaved and product.is_gated),
        "HAS_BIAS": int(product.bias is not None),
        "BIAS_KIND": 0 if product.bias is None else KINDS[product.bias.dtype],
        "WEIGHTS_KIND": KINDS[call.topk_weights.dtype],
        "RANK": rank,
        "RANKS": stage_ranks(rank, product.slices),
        "SHARED": int(product.b is not None and product.b.shape[1] < num_experts),
        "EARLY": int(product.early),
    }


def _multiply(width: int) -> str:
    """The product of 64 rows with ``width`` others, whose sums the instruction names one by one."""
    sums = width // 2
    named = ", ".join(f"%{number}" for number in range(sums))
    operands = ", ".join(f'"+f"(sums[{number}])' for number in range(sums))
    return f"""template <>
__device__ __forceinline__ void multiply<{width}>(float (&sums)[{MOST // 2}], u64 left, u64 right, bool add) {{
  asm volatile(
      "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{sums + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{width}k16.f32." ELEMENT "." ELEMENT
      " {{{named}}}, %{sums}, %{sums + 1}, add, 1, 1, 0, 0;\\n}}\\n"
      : {operands} : "l"(left), "l"(right), "r"((int)add));
}}
"""


def sources() -> tuple[str, str]:
    """What of the kernel stands before `_multiply` and what behind it."""
    folder = resources.files("torch_lora_moe") / "kernels" / "hopper"
    before, tiles, product = ((folder / name).read_text() for name in ("primitives.cuh", "tiles.cuh", "product.cu"))
    return before, tiles + product


def source(values: dict[str, int | str]) -> str:
    """CUDA C++ of a kernel with these `constants`."""
    before, behind = sources()
    defined = [f"#define {name} {value}" for name, value in values.items()]
    declared = "template <int WIDTH>\n__device__ __forceinline__ void multiply(float (&)[MOST_SUMS], u64, u64, bool);"
    declared = declared.replace("MOST_SUMS", str(MOST // 2))
    return "\n".join([*defined, before, declared, *map(_multiply, range(8, MOST + 1, 8)), behind])


class ProductPlan:
    """The launch of a product, as `plans.Plan` is one of a Triton kernel.

    Its tensors: input, weight, result, rank vectors, B, bias, router weights, schedule; its sizes: pairs, and alpha and
    limit of the activation.
    """

    # those that the copy engine or 16-byte copies read or write
    aligned = 5

    def __init__(self, product: Product, most_tiles: int) -> None:
        """Compiles the kernel; ``most_tiles``: expert tiles that a batch can have at most."""
        device, values = product.x.device, constants(product)
        index = device.index if device.index is not None else torch.cuda.current_device()
        how = ("expert_product", ARCHITECTURE, shared_bytes(product.w.shape[0]), index)
        self.compiled: CudaKernel = cuda_kernel(source(values), *how)
        blocks = -(-product.columns // (TALL if product.is_gated else 2 * TALL))
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.grid = (min(multiprocessors, most_tiles * blocks), 1, 1)
        self.maps = tensor_maps(cuda().cuTensorMapEncodeTiled, product)

    def written(
        self, tensors: Sequence[Tensor], places: Sequence[int], sizes: tuple[float, ...]
    ) -> WrittenLaunch | None:
        """The launch through the driver; ``places``: where the addresses of the tensors will stand."""
        x, w, out, shrunk, b, *rest = places
        num_pairs, alpha, limit = sizes
        maps = zip(self.maps, (w, b, x), strict=True)
        numbers = [struct.pack("i", int(num_pairs)), struct.pack("f", alpha), struct.pack("f", limit)]
        parameters: list[Parameter] = [*maps, x, out, shrunk, *rest, *numbers]
        how = (self.compiled.function, self.grid, THREADS, self.compiled.shared_memory, True)
        return WrittenLaunch(cuda(), *how, parameters, self.compiled)

    def __call__(self, tensors: tuple[Tensor, ...], *sizes: float) -> None:
        """Launches on the current stream."""
        addresses = (ctypes.c_uint64 * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        first = ctypes.addressof(addresses)
        launch = self.written(tensors, [first + 8 * number for number in range(len(tensors))], sizes)
        assert launch is not None
        launch(torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice()))


def tensor_maps(encode: Callable[..., int], product: Product) -> tuple[TensorMaps, TensorMaps, TensorMaps]:
    """Those of the weight, of B and of the input; what a kernel does not read has some."""
    w, x, b, slices, rows = product.w, product.x, product.b, product.slices, product.columns
    # slices of rows that follow each other, or row by row
    apart = (w.stride(1), slices * w.stride(1)) if product.call.interleaved else (rows * w.stride(1), w.stride(1))
    # one expert alone may have any stride
    expert = w.stride(0) if w.shape[0] > 1 else w.shape[1] * w.stride(1)
    wide = _SWIZZLES[2 * DEPTH]
    shape = (w.shape[0], slices, rows, w.shape[2])
    of_w = shaped_maps(encode, w.dtype, shape, (expert, *apart, 1), wide, (1, 1, TALL, DEPTH))
    of_b = of_x = of_w
    if b is not None:
        rank, ranks = product.rank, stage_ranks(product.rank, slices)
        shape, strides = (b.shape[0] * b.shape[1], slices, rows, rank), (slices * rows * rank, rows * rank, rank, 1)
        of_b = shaped_maps(encode, w.dtype, shape, strides, _SWIZZLES[2 * ranks], (1, 1, TALL, ranks))
    if product.is_down:
        of_x = shaped_maps(encode, x.dtype, tuple(x.shape), (x.stride(0), 1), wide, (MOST, DEPTH))
    return of_w, of_b, of_x
