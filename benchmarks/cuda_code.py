"""Compile csrc/cuda with nvcc and read the resource usage and the machine code; needs no GPU."""

import os
import re
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine_code
from benchmarks.build_cache import cached, version
from benchmarks.machine_code import MachineCode, Target, instructions_of, run_tool
from csrc.cuda import nvcc

_USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?\n.*?Function properties for \S+\n"
    r"\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers(.*)"
)


def kernels_of(source: Path, target: Target) -> dict[str, MachineCode]:
    """Return the compiled kernels of a source, by name and template arguments.

    Raises:
        RuntimeError: nvcc was not found, fails, or prints a warning.
    """
    compiler = nvcc.find_nvcc()
    if compiler is None:
        raise RuntimeError(f"no nvcc was found; {nvcc.REMEDY}")
    headers = sorted(source.parent.glob("*.*h"))
    parsers = (Path(__file__), Path(machine_code.__file__), Path(nvcc.__file__))
    tools = (version(compiler), version(os.environ.get("CXX", "c++")))
    rows = cached(
        (source, *headers, *parsers, *tools, str(target)),
        lambda: {name: asdict(code) for name, code in _compile(compiler, source, target).items()},
    )
    return {name: MachineCode(**row) for name, row in rows.items()}


def _compile(compiler: str, source: Path, target: Target) -> dict[str, MachineCode]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        messages = nvcc.compile_cubin(compiler, source, target.capability, Path(file.name))
        if "warning" in messages:
            raise RuntimeError(messages)
        instructions = instructions_of(file.name)
        elf = run_tool("cuobjdump", "-elf", file.name)
    threads = _threads_of(elf)
    usage = {name: rest for name, *rest in _USAGE.findall(messages)}
    return {
        _readable(name): MachineCode(
            registers=int(registers),
            spilled_bytes=int(stores) + int(loads),
            shared_bytes=int((re.findall(r"(\d+) bytes smem", rest) or [0])[0]),
            warps=threads[name] // 32,
            instructions=instructions[name],
        )
        for name, (stores, loads, registers, rest) in usage.items()
    }


def _threads_of(elf: str) -> dict[str, int]:
    """Return the threads per block of each kernel, from its launch bounds."""
    threads = {}
    for section in elf.split("\n.nv.info.")[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(0x[0-9a-f]+)", section)
        if bound is not None:
            threads[section.split(maxsplit=1)[0]] = int(bound[1], 16)
    return threads


def _readable(mangled: str) -> str:
    """Demangle a name, for example to select_kernel<float, 8, 512>."""
    command = ["c++filt", mangled]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernel = re.search(r"(\w+_kernel<[^(]*?>)\(", name)
    if kernel is None:
        raise RuntimeError(f"expected a name like select_kernel<...>(...), got {name}")
    return kernel[1]
