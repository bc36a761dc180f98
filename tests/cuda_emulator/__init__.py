"""The CUDA kernels, compiled by g++ against headers that stand in for CUDA's, run on the CPU."""

import fcntl
import hashlib
import importlib.util
import os
import re
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

Edit = Callable[[str, str], str]  # maps the name and the text of a source to its new text


def is_available() -> bool:
    """Whether the C++ compiler is installed."""
    return shutil.which(COMPILER) is not None


def build(sanitize: bool = False, edit: Edit | None = None) -> Path:
    """Build the extension from the sources, as they are or edited, and return its path.

    Objects and libraries are kept in build/cuda_emulator by a hash of their inputs.
    """
    headers = {p.name: p.read_text() for p in sorted((CSRC / "cuda").glob("*.*h*"))}
    kernels = {p.name: p.read_text() for p in sorted((CSRC / "cuda").glob("*.cu"))}
    flags = [*FLAGS, *(SANITIZED if sanitize else [])]
    if edit is not None:
        headers, kernels = (
            {name: edit(name, text) for name, text in texts.items()} for texts in (headers, kernels)
        )
        flags += ["-Wno-unused", "-O0"]  # an edited extension runs once, so compile it fast
    kernels["emulator.cpp"] = (HERE / "emulator.cpp").read_text()
    headers |= {p.name: p.read_text() for p in sorted(HERE.glob("*.h"))}
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(_object, name, text, headers, flags) for name, text in kernels.items()]
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
    """Load a library that `build` made; a process can load one only."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def emulated() -> CudaEpilogues:
    """Return the backend. Rows of 100 columns count as long, so small problems have both kinds."""
    # A sanitized library loads only where `make sanitize` has loaded the sanitizer's runtime first.
    library = build(sanitize=os.environ.get("OPD_SANITIZE") == "1")
    return CudaEpilogues(load(library), long_row=100)


def _bindings() -> Path:
    """Compile the bindings, without edits: PyTorch's headers take most of the compile time."""
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
    """Compile a source beside the headers that it includes."""
    headers = _included(text, headers)
    folder = BUILDS / _hash(name, text, *headers, *headers.values(), *flags)
    output = folder / f"{Path(name).stem}.o"
    with _lock(folder):
        if output.exists():
            return output
        for file, content in {**headers, name: text}.items():
            (folder / file).write_text(content)
        return _compile(folder / name, output, ["-I", str(folder), *flags])


def _included(text: str, headers: dict[str, str]) -> dict[str, str]:
    """Return the headers that a source includes, directly or through others.

    An edit of one header then recompiles the sources that include it, and no others.
    """
    found: dict[str, str] = {}
    texts = [text]
    while texts:
        for name in re.findall(r'^#include [<"](.+)[>"]', texts.pop(), re.MULTILINE):
            if name in headers and name not in found:
                found[name] = headers[name]
                texts.append(headers[name])
    return {name: found[name] for name in sorted(found)}


def _compile(source: Path, output: Path, flags: list[str]) -> Path:
    partial = output.with_suffix(".partial")
    _run(*flags, "-x", "c++", "-c", source, "-o", partial)
    return partial.rename(output)


def _run(*arguments: object) -> None:
    command = [COMPILER, *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


@cache
def _compiler_version() -> str:
    return subprocess.check_output([COMPILER, "--version"], text=True)


def _hash(*texts: str) -> str:
    inputs = "\0".join((COMPILER, _compiler_version(), *texts))
    return hashlib.sha256(inputs.encode()).hexdigest()[:16]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one of several test processes build a folder while the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
