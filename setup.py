"""Metadata lives in pyproject.toml; this builds the C++ library of csrc_stubs/, and only if asked to.

    LORA_MOE_BUILD_STUBS=1 pip install --no-build-isolation .

builds against the torch of the environment, hence no isolation. The library loads under every torch from 2.11 on.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The oldest torch whose stable ABI the library uses; csrc_stubs/CMakeLists.txt says the same.
TARGET = "0x020b000000000000ULL"


class BuildStubs(build_ext):
    """Builds a plain shared library: no Python module, nothing of Python linked."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library inside the package."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compiles with the headers of the torch that is installed."""
        from torch.utils import cpp_extension

        ext.include_dirs = cpp_extension.include_paths()
        ext.library_dirs = cpp_extension.library_paths()
        super().build_extension(ext)


options: dict[str, object] = {}
if os.environ.get("LORA_MOE_BUILD_STUBS") == "1":
    stubs = Extension(
        "torch_lora_moe.liblora_moe_stubs",
        sorted(str(path) for path in Path("csrc_stubs").glob("*.cpp")),
        define_macros=[("TORCH_TARGET_VERSION", TARGET)],
        extra_compile_args=["-std=c++17", "-O3", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi"],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"],
        language="c++",
    )
    options = {"ext_modules": [stubs], "cmdclass": {"build_ext": BuildStubs}}

setup(**options)
