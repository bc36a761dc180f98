"""Machine code of kernels for GPUs that are not here, and what limits how many run at a time."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

# The wheel of Triton ships the tools that read machine code.
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)", re.M
)


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
    "sm_86": Target(86, 99 * 1024, 100 * 1024, 48, "HMMA"),
    "sm_89": Target(89, 99 * 1024, 100 * 1024, 48, "HMMA"),
    "sm_90": Target(90, 227 * 1024, 228 * 1024, 64, "HGMMA"),
    "sm_100": Target(100, 227 * 1024, 228 * 1024, 64, "UTCHMMA"),
    "sm_120": Target(120, 99 * 1024, 100 * 1024, 48, "HMMA"),
}


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a launch for one target."""

    registers: int  # of a thread
    spilled_bytes: int  # local memory of a thread
    shared_bytes: int  # of a block
    warps: int  # of a block
    instructions: dict[str, int]  # how often each stands in the code, by name and suffixes

    def count(self, opcode: str, suffix: str = "") -> int:
        """Instructions of that name, with a suffix if one is given: "128" for sixteen bytes."""
        count = 0
        for name, times in self.instructions.items():
            own, *suffixes = name.split(".")
            if own == opcode and (not suffix or suffix in suffixes):
                count += times
        return count

    @property
    def total(self) -> int:
        """Instructions in all."""
        return sum(self.instructions.values())


def instructions_of(cubin: str) -> dict[str, dict[str, int]]:
    """How often each instruction stands in each function of a file of machine code."""
    sections = re.split(r"^\.text\.(\S+):$", run_tool("nvdisasm", "-c", cubin), flags=re.M)
    names, bodies = sections[1::2], sections[2::2]
    return {
        name: dict(sorted(Counter(_INSTRUCTION.findall(body)).items()))
        for name, body in zip(names, bodies, strict=True)
    }


def run_tool(tool: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
