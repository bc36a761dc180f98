"""The CUDA kernels compiled by g++ against a header that stands in for CUDA, and run on the CPU."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from opd_kernels.backends.cuda import CudaEpilogues

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILDS = HERE.parents[1] / "build" / "cuda_emulator"
NAME = "opd_cuda_emulated"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
SANITIZED = [
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    "-fsanitize-sections=opd_shared", "-fno-omit-frame-pointer",
]  # fmt: skip

Edit = Callable[[str, str], str]  # a source's name and text to its new text


def is_available() -> bool:
    """Whether there is a compiler for it."""
    return shutil.which(COMPILER) is not None


def build(sanitize: bool = False, edit: Edit | None = None) -> Path:
    """The extension, from the sources as they are or edited; built once for the same sources."""
    sources = {p.name: p.read_text() for p in sorted((CSRC / "cuda").glob("*.*h*"))}
    kernels = {p.name: p.read_text() for p in sorted((CSRC / "cuda").glob("*.cu"))}
    flags = [*FLAGS, *(SANITIZED if sanitize else [])]
    if edit is not None:
        sources, kernels = (
            {name: edit(name, text) for name, text in texts.items()} for texts in (sources, kernels)
        )
        flags += ["-Wno-unused", "-O0"]  # compiled more often than run
    kernels["emulator.cpp"] = (HERE / "emulator.cpp").read_text()
    sources |= {p.name: p.read_text() for p in sorted(HERE.glob("*.h"))}
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(_object, name, text, sources, flags) for name, text in kernels.items()]
        bindings = _bindings()
        objects = [*(task.result() for task in tasks), bindings]
    folder = BUILDS / _hash(*map(str, objects))
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _lock(folder):
        if not library.exists():
            torch_library = f"-L{Path(torch.__file__).parent / 'lib'}"
            libraries = [torch_library, "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
            partial = library.with_suffix(".partial")
            link = SANITIZED if sanitize else []
            _run("-shared", *link, *objects, *libraries, "-o", partial)
            partial.rename(library)
    return library


def load(library: Path) -> Any:
    """The module of a library that `build` made; one in a process."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def emulated() -> CudaEpilogues:
    """The backend. Rows of 100 columns are long ones, so that small problems have both kinds."""
    # `make sanitize` loads the sanitizer's runtime first; without it a watched library cannot be.
    library = build(sanitize=os.environ.get("OPD_SANITIZE") == "1")
    return CudaEpilogues(load(library), long_row=100)


def _bindings() -> Path:
    """Compiled apart: PyTorch's headers take most of the time, and edits leave it alone."""
    sources = [CSRC / "cuda/bindings.cpp", CSRC / "cuda/epilogue.h", CSRC / "checks.h"]
    python = sysconfig.get_paths()["include"]
    flags = [f for path in (*include_paths(), python) for f in ("-isystem", path)]
    flags += [*FLAGS, "-DOPD_DEVICE=at::kCPU", f"-DTORCH_EXTENSION_NAME={NAME}"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    folder = BUILDS / _hash(*flags, torch.__version__, *(p.read_text() for p in sources))
    with _lock(folder):
        output = folder / "bindings.o"
        return output if output.exists() else _compile(sources[0], output, flags)


def _object(name: str, text: str, headers: dict[str, str], flags: list[str]) -> Path:
    """A source compiled beside its headers; once for the same texts."""
    folder = BUILDS / _hash(name, text, *headers.values(), *flags)
    output = folder / f"{Path(name).stem}.o"
    with _lock(folder):
        if output.exists():
            return output
        for file, content in {**headers, name: text}.items():
            (folder / file).write_text(content)
        return _compile(folder / name, output, ["-I", str(folder), *flags])


def _compile(source: Path, output: Path, flags: list[str]) -> Path:
    partial = output.with_suffix(".partial")
    _run(*flags, "-x", "c++", "-c", source, "-o", partial)
    return partial.rename(output)


def _run(*arguments: object) -> None:
    command = [COMPILER, *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join((COMPILER, *texts)).encode()).hexdigest()[:16]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Only one of several test processes builds a folder; the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
