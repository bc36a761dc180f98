"""What Triton's kernels become on GPUs that are not here: a launch is recorded, and compiled.

A launch is recorded from the package's own call, on meta tensors, so what is compiled is what a
user's GPU would get: the same configuration, flags and specialisation.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """Limits of one multiprocessor, from the CUDA programming guide's table of capabilities."""

    capability: int
    shared_bytes: int  # most that one block may have
    shared_bytes_in_all: int
    warps: int
    tensor_instruction: str
    registers: int = 65_536

    def resident_warps(self, code: "MachineCode") -> int:
        """Warps that registers and shared memory let a multiprocessor hold at a time."""
        of_registers = self.registers // (-(-code.registers // 8) * 8 * 32 * code.warps)
        # The driver keeps 1 KiB of every block's shared memory.
        of_shared = self.shared_bytes_in_all // (code.shared_bytes + 1024)
        return min(self.warps, min(of_registers, of_shared) * code.warps)


TARGETS = {
    "sm_80": Target(80, 163 * 1024, 164 * 1024, 64, "HMMA"),
    "sm_90": Target(90, 227 * 1024, 228 * 1024, 64, "HGMMA"),
    "sm_100": Target(100, 227 * 1024, 228 * 1024, 64, "UTCHMMA"),
    "sm_120": Target(120, 99 * 1024, 100 * 1024, 48, "HMMA"),
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]  # num_warps and the like

    @classmethod
    def of(cls, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Launch":
        names = set(kernel.arg_names)
        options = {name: value for name, value in kwargs.items() if name not in names}
        named = {name: value for name, value in kwargs.items() if name in names}
        arguments = dict(signature(kernel.fn).bind(*args, **named).arguments)
        return cls(kernel, arguments, options)

    def source(self) -> ASTSource:
        """The kernel with Triton's specialisation: 1 is a constant, multiples of 16 are known."""
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], Any] = {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                types[parameter.name] = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, Tensor):
                types[parameter.name] = "*" + _TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif parameter.annotation_type or isinstance(value, float):
                types[parameter.name] = parameter.annotation_type or "fp32"
            else:
                types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, types, constants, attributes)


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The launches that a call makes; the kernels are not run."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch.of(kernel, args, kwargs))

    with patch.object(JITFunction, "run", record):
        call()
    return launches


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a launch for one target."""

    registers: int  # of a thread
    spilled_bytes: int  # local memory of a thread
    shared_bytes: int  # of a block
    warps: int  # of a block
    instructions: dict[str, int]  # how often each opcode stands in the code

    def count(self, opcode: str) -> int:
        """Instructions of that name, whatever its suffixes."""
        return self.instructions.get(opcode, 0)

    @property
    def total(self) -> int:
        """Instructions in all."""
        return sum(self.instructions.values())


def compile_for(launch: Launch, target: Target) -> MachineCode:
    """Compile a launch for a GPU that need not be here."""
    options = {"num_warps": 4} | launch.options
    compiled = triton.compile(
        launch.source(), target=GPUTarget("cuda", target.capability, 32), options=options
    )
    return _read(compiled, options["num_warps"])


def _read(compiled: CompiledKernel, warps: int) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    opcodes = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", listing, re.M
    )
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        registers=resources["REG"],
        spilled_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        warps=warps,
        instructions={name: opcodes.count(name) for name in sorted(set(opcodes))},
    )


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
