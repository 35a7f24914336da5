"""CUDA C++ compiled at its first use by the compiler that comes with torch and kept where Triton keeps its own."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.cache import get_cache_manager

from torch_lora_moe.driver import check, cuda, make_context_current

# Of cuda.h: an attribute of a function.
_MOST_DYNAMIC_SHARED_MEMORY = 8


@functools.cache
def nvrtc() -> Any:
    """The compiler as a library, None where there is none."""
    found = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"))
    if torch.version.cuda is not None:
        found = [path for path in found if path.name.endswith("." + torch.version.cuda.split(".")[0])]
    if found:
        # the compiler looks for these where the system has its libraries only
        for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        return ctypes.CDLL(str(found[-1]))
    if torch.version.cuda is None:
        return None
    try:
        return ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None


@functools.cache
def version() -> tuple[int, int]:
    """The compiler's, (0, 0) where there is none."""
    if nvrtc() is None:
        return 0, 0
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc(), nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_cuda(source: str, architecture: str) -> bytes:
    """Machine code of CUDA C++ for GPUs of an ``architecture`` such as ``sm_90a``.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    arguments = (source.encode(), b"torch_lora_moe.cu", 0, None, None)
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), *arguments))
    try:
        options = [f"--gpu-architecture={architecture}", "--std=c++17"]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), encoded):
            _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(library, library.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"CUDA source does not compile:\n{log.value.decode()}")
        _check(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(library, library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check(library: Any, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC failed: {library.nvrtcGetErrorString(result).decode()}")


def _kept_code(source: str, architecture: str) -> bytes:
    """As `compile_cuda`, from Triton's cache folder where it is there."""
    what = f"{source}\n{architecture} {version()} {triton.__version__}"
    cache, name = get_cache_manager(hashlib.sha256(what.encode()).hexdigest()), "torch_lora_moe.cubin"
    path = cache.get_file(name)
    if path is not None:
        return Path(path).read_bytes()
    code = compile_cuda(source, architecture)
    cache.put(code, name, binary=True)
    return code


class CudaKernel:
    """A kernel that is loaded on the current device; ``function``: its handle."""

    def __init__(self, source: str, name: str, architecture: str, shared_memory: int) -> None:
        """Compiles and loads.

        Args:
            source: CUDA C++ with the kernel as ``extern "C"``.
            name: of the kernel.
            architecture: as for `compile_cuda`.
            shared_memory: bytes of a program.

        Raises:
            RuntimeError: it does not compile, or the driver does not take it.
        """
        driver, module, function = cuda(), ctypes.c_void_p(), ctypes.c_void_p()
        code = _kept_code(source, architecture)
        make_context_current(driver)
        check(driver, "cuModuleLoadData", driver.cuModuleLoadData(ctypes.byref(module), code))
        result = driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        check(driver, "cuModuleGetFunction", result)
        result = driver.cuFuncSetAttribute(function, _MOST_DYNAMIC_SHARED_MEMORY, shared_memory)
        check(driver, "cuFuncSetAttribute", result)
        assert function.value is not None
        self.function, self.shared_memory = function.value, shared_memory


@functools.cache
def cuda_kernel(source: str, name: str, architecture: str, shared_memory: int, device: int) -> CudaKernel:
    """`CudaKernel` on a device, which is the current one; loaded once."""
    return CudaKernel(source, name, architecture, shared_memory)
