"""Compile Triton kernels for GPUs that need not be present.

Launches are recorded from the package's own calls on meta tensors. So the compiled code is that of
a user's GPU, with the same configuration, flags and specialisation.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

from benchmarks import machine_code
from benchmarks.build_cache import cached
from benchmarks.machine_code import MachineCode, Target, instructions_of, run_tool

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, ...

    @classmethod
    def record(cls, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Launch":
        """Sort the arguments of a launch into those of the kernel and compiler options."""
        names = set(kernel.arg_names)
        options = {name: value for name, value in kwargs.items() if name not in names}
        named = {name: value for name, value in kwargs.items() if name in names}
        arguments = dict(signature(kernel.fn).bind(*args, **named).arguments)
        return cls(kernel, arguments, options)

    def source(self) -> ASTSource:
        """Return the kernel specialised as Triton does: on ints of 1 and on multiples of 16."""
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
    """Return the launches of a call without running the kernels."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch.record(kernel, args, kwargs))

    with patch.object(JITFunction, "run", record):
        call()
    return launches


def compile_for(launch: Launch, target: Target) -> MachineCode:
    """Compile a launch for a target."""
    options = {"num_warps": 4} | launch.options
    compiled = triton.compile(
        launch.source(), target=GPUTarget("cuda", target.capability, 32), options=options
    )
    return _read(compiled, options["num_warps"])


def _read(compiled: CompiledKernel, warps: int) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        inputs = (Path(file.name), Path(machine_code.__file__), triton.__version__)
        (instructions,) = cached(inputs, partial(instructions_of, file.name)).values()
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        registers=resources["REG"],
        spilled_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        warps=warps,
        instructions=instructions,
    )
