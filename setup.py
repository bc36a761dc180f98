"""Build the compiled backends. All other metadata of the package is in pyproject.toml.

Environment variables:
    OPD_BUILD: which backends to build. auto (default) builds the C++ backend if there is a
        compiler, and the CUDA backend if there is nvcc and PyTorch is a CUDA build. cpu requires
        the C++ backend and leaves out CUDA, cuda requires both, none builds nothing.
    OPD_CUDA_ARCHITECTURES: compute capabilities for the CUDA backend, such as "90" or "80 90".
    OPD_SANITIZE: 1 builds the C++ backend with the address and undefined-behaviour sanitizers.
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

sys.path.insert(0, str(Path(__file__).parent))  # build front ends leave it out

from csrc.cuda import nvcc

SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("bindings", "epilogue", "divergence", "products")]
WARNINGS = ["-g0", "-Wall", "-Wextra"]
# Suppress warnings from PyTorch's headers: -isystem takes precedence over -I for the same folder.
WARNINGS += [flag for path in include_paths() for flag in ("-isystem", path)]
CUDA_EXTENSION = "opd_kernels._cuda"
# Compiler flags for the instruction sets of torch.backends.cpu.get_cpu_capability().
FLAGS = {
    # GCC 12 warns of uninitialised variables in its own intrinsics (GCC bug 105593).
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
    """Return this machine's instruction set and, on x86, AVX2 for other machines."""
    local = torch.backends.cpu.get_cpu_capability()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sorted({local if local in FLAGS else "DEFAULT"} | ({"AVX2"} if is_x86 else set()))


def cpu_extension(capability: str) -> CppExtension:
    """Return the C++ backend for one instruction set."""
    flags = ["-O3", *WARNINGS, *FLAGS[capability]]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    if sys.platform == "linux":
        # Compile for OpenMP without linking it: PyTorch has loaded a runtime with these symbols. A
        # second runtime would have its own threads, which would spin against those of the first.
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
    """Return the reason why the CUDA backend cannot be built, or None. It needs no GPU."""
    if compiler is None:
        return f"no nvcc was found; {nvcc.REMEDY}"
    done = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    if release is None:
        return f"{compiler} --version prints no release: {done.stdout!r}"
    version = TorchVersion(release[1])
    if version < (12, 8):
        return f"{compiler} is of CUDA {version}, and compute capabilities 100 and 120 need 12.8"
    torch_cuda = torch.version.cuda
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) < int(version.split(".")[0]):
        return (
            f"{compiler} is of CUDA {version} and PyTorch of {torch_cuda}: a driver for PyTorch "
            f"may be too old for {version}; set CUDA_HOME to a toolkit {torch_cuda} or older"
        )
    return None


def cuda_extension(compiler: str) -> CppExtension:
    """Return the CUDA backend without its kernels, which Build compiles."""
    return CppExtension(
        CUDA_EXTENSION,
        ["csrc/cuda/bindings.cpp"],
        extra_compile_args=[
            "-O2",
            *WARNINGS,
            f"-DOPD_LEAST_CAPABILITY={min(nvcc.architectures())}",
        ],
        # Linked statically, so that the package needs no other CUDA runtime than PyTorch's.
        extra_link_args=[f"-L{folder}" for folder in nvcc.library_folders(compiler)]
        + ["-lcudart_static", "-ldl", "-lpthread", "-lrt"],
    )


class Build(BuildExtension):
    """Compile the CUDA kernels with nvcc, then everything else."""

    def build_extensions(self) -> None:
        # setuptools skips an extension that is newer than its sources, though it may be built for
        # another torch. ninja compiles only the objects whose sources or headers have changed.
        self.force = True
        for extension in self.extensions:
            if extension.name == CUDA_EXTENSION:
                compiler = nvcc.find_nvcc()
                assert compiler is not None
                objects = nvcc.compile_objects(compiler, Path(self.build_temp).absolute() / "cuda")
                extension.extra_objects = [str(path) for path in objects]
        super().build_extensions()


def extensions() -> list[CppExtension]:
    """Return the extensions for OPD_BUILD. A compiler that is found but broken fails the build."""
    option = os.environ.get("OPD_BUILD", "auto")
    if option not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"OPD_BUILD: expected auto, cpu, cuda or none, got {option!r}")
    if option == "none":
        return []
    compiler = os.environ.get("CXX", "c++")
    if option == "auto" and "CXX" not in os.environ and not shutil.which(compiler):
        print(
            "opd_kernels: no C++ compiler was found, so the C++ backend is not built; the package "
            "works with backend='torch', which is slower on a CPU. To build it, install g++ or "
            "clang++ and install this package again.",
            file=sys.stderr,
        )
        return []
    result = [cpu_extension(capability) for capability in capabilities()]
    if option == "cuda" or (option == "auto" and torch.version.cuda is not None):
        cuda_compiler = nvcc.find_nvcc()
        reason = why_no_cuda(cuda_compiler)
        if reason is None:
            result.append(cuda_extension(cuda_compiler))
        elif option == "cuda":
            sys.exit(f"OPD_BUILD=cuda: {reason}")
        else:
            print(f"opd_kernels: the CUDA backend is not built: {reason}", file=sys.stderr)
    return result


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
