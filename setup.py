"""Builds the compiled backends; everything else about the package is in pyproject.toml.

OPD_BUILD=auto (default) builds what this machine has compilers for, cpu insists on the C++ backend,
none builds nothing. OPD_SANITIZE=1 adds the address and undefined-behaviour sanitizers.
"""

import os
import platform
import shutil
import sys

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

SOURCES = ["csrc/bindings.cpp", "csrc/cpu/epilogue.cpp", "csrc/cpu/divergence.cpp"]
# at::vec's instruction sets, as torch.backends.cpu.get_cpu_capability() names them.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
    "DEFAULT": [],
}


def capabilities() -> list[str]:
    """This machine's instruction set and, for others like it, AVX2."""
    own = torch.backends.cpu.get_cpu_capability()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sorted({own if own in FLAGS else "DEFAULT"} | ({"AVX2"} if is_x86 else set()))


def cpu_extension(capability: str) -> CppExtension:
    """The C++ backend for one instruction set."""
    flags = ["-O3", "-g0", "-Wall", "-Wextra", *FLAGS[capability]]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    # Torch's headers are not ours to be warned of: a directory that is also -isystem loses its -I.
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    if sys.platform == "linux":
        # Compiled for OpenMP but not linked with it: the symbols come from the runtime that torch
        # loaded. A second runtime would have a second pool of threads, spinning against the first.
        flags.append("-fopenmp")
    sanitizers = []
    if os.environ.get("OPD_SANITIZE") == "1":
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
        flags += [*sanitizers, "-Werror", "-fno-omit-frame-pointer"]
    return CppExtension(
        f"opd_kernels._cpu_{capability.lower()}",
        SOURCES,
        extra_compile_args=flags,
        extra_link_args=sanitizers,
    )


def extensions() -> list[CppExtension]:
    """What OPD_BUILD asks for; a compiler that is there but broken fails the build."""
    wanted = os.environ.get("OPD_BUILD", "auto")
    if wanted not in ("auto", "cpu", "none"):
        sys.exit(f"OPD_BUILD: expected auto, cpu or none, got {wanted!r}")
    if wanted == "none":
        return []
    compiler = os.environ.get("CXX", "c++")
    if wanted == "auto" and "CXX" not in os.environ and not shutil.which(compiler):
        print(
            "opd_kernels: no C++ compiler was found, so the C++ backend is not built; the package "
            "works with backend='torch', which is slower on a CPU. Install g++ or clang++ and "
            "install again to have it.",
            file=sys.stderr,
        )
        return []
    return [cpu_extension(capability) for capability in capabilities()]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
