"""Builds the compiled backends; everything else about the package is in pyproject.toml.

OPD_BUILD=auto (default) builds what this machine has compilers for, and the CUDA backend where
PyTorch is a CUDA build; cpu insists on the C++ backend and leaves CUDA out, cuda insists on both,
none builds nothing. OPD_CUDA_ARCHITECTURES="90" limits CUDA to some GPUs. OPD_SANITIZE=1 adds the
address and undefined-behaviour sanitizers to the C++ backend.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.torch_version import TorchVersion
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

sys.path.insert(0, str(Path(__file__).parent))  # which a build front end leaves out

from csrc.cuda import nvcc

SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("bindings", "epilogue", "divergence", "products")]
WARNINGS = ["-g0", "-Wall", "-Wextra"]
# Torch's headers are not ours to be warned of: a directory that is also -isystem loses its -I.
WARNINGS += [flag for path in include_paths() for flag in ("-isystem", path)]
CUDA_EXTENSION = "opd_kernels._cuda"
# at::vec's instruction sets, as torch.backends.cpu.get_cpu_capability() names them.
FLAGS = {
    # GCC 12 takes its own intrinsics for uses of uninitialised variables (its bug 105593).
    "AVX512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "DEFAULT": [],
}


def capabilities() -> list[str]:
    """This machine's instruction set and, for others like it, AVX2."""
    own = torch.backends.cpu.get_cpu_capability()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sorted({own if own in FLAGS else "DEFAULT"} | ({"AVX2"} if is_x86 else set()))


def cpu_extension(capability: str) -> CppExtension:
    """The C++ backend for one instruction set."""
    flags = ["-O3", *WARNINGS, *FLAGS[capability]]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
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


def why_no_cuda(compiler: str | None) -> str | None:
    """What is in the way of building the CUDA backend; None if nothing is. No GPU is needed."""
    if compiler is None:
        return f"no nvcc was found; {nvcc.REMEDY}"
    said = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", said.stdout)
    if release is None:
        return f"{compiler} --version does not say its release: {said.stdout!r}"
    version = TorchVersion(release[1])
    if version < (12, 8):
        return f"{compiler} is of CUDA {version}, and compute capabilities 100 and 120 need 12.8"
    of_torch = torch.version.cuda
    if of_torch is not None and int(of_torch.split(".")[0]) < int(version.split(".")[0]):
        return (
            f"{compiler} is of CUDA {version} and PyTorch of {of_torch}: a driver that is enough "
            f"for PyTorch need not be for {version}; set CUDA_HOME to a toolkit {of_torch} or older"
        )
    return None


def cuda_extension(compiler: str) -> CppExtension:
    """The CUDA backend; Build compiles its kernels."""
    return CppExtension(
        CUDA_EXTENSION,
        ["csrc/cuda/bindings.cpp"],
        extra_compile_args=[
            "-O2",
            *WARNINGS,
            f"-DOPD_LEAST_CAPABILITY={min(nvcc.architectures())}",
        ],
        # Static, so that the package asks for no CUDA runtime beside the one that PyTorch brings.
        extra_link_args=[f"-L{folder}" for folder in nvcc.library_folders(compiler)]
        + ["-lcudart_static", "-ldl", "-lpthread", "-lrt"],
    )


class Build(BuildExtension):
    """Compiles the kernels with nvcc, where they are wanted, before the rest."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            if extension.name == CUDA_EXTENSION:
                compiler = nvcc.find_nvcc()
                assert compiler is not None
                objects = nvcc.compile_objects(compiler, Path(self.build_temp).absolute() / "cuda")
                extension.extra_objects = [str(path) for path in objects]
        super().build_extensions()


def extensions() -> list[CppExtension]:
    """What OPD_BUILD asks for; a compiler that is there but broken fails the build."""
    wanted = os.environ.get("OPD_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"OPD_BUILD: expected auto, cpu, cuda or none, got {wanted!r}")
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
    built = [cpu_extension(capability) for capability in capabilities()]
    if wanted == "cuda" or (wanted == "auto" and torch.version.cuda is not None):
        cuda_compiler = nvcc.find_nvcc()
        reason = why_no_cuda(cuda_compiler)
        if reason is None:
            built.append(cuda_extension(cuda_compiler))
        elif wanted == "cuda":
            sys.exit(f"OPD_BUILD=cuda: {reason}")
        else:
            print(f"opd_kernels: the CUDA backend is not built: {reason}", file=sys.stderr)
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
