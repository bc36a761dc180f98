"""Machine code of kernels, compiled for GPUs that need not be present, and their occupancy."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

# The Triton wheel ships the tools that disassemble machine code.
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)", re.M
)


@dataclass(frozen=True)
class Target:
    """Limits of one multiprocessor, from the CUDA programming guide's table of capabilities."""

    capability: int
    shared_bytes: int  # limit of one block
    shared_bytes_total: int
    warps: int
    tensor_instruction: str
    registers: int = 65_536

    def resident_warps(self, code: "MachineCode") -> int:
        """Return the warps that fit on one multiprocessor, by registers and shared memory."""
        by_registers = self.registers // (-(-code.registers // 8) * 8 * 32 * code.warps)
        # The driver reserves 1 KiB of shared memory per block.
        by_shared = self.shared_bytes_total // (code.shared_bytes + 1024)
        return min(self.warps, min(by_registers, by_shared) * code.warps)


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
    """The compiled code of one launch for one target."""

    registers: int  # per thread
    spilled_bytes: int  # local memory per thread
    shared_bytes: int  # per block
    warps: int  # per block
    instructions: dict[str, int]  # occurrences in the code, by opcode with suffixes

    def count(self, opcode: str, suffix: str = "") -> int:
        """Count the instructions with an opcode and, if given, a suffix, such as "128" (bits)."""
        count = 0
        for name, times in self.instructions.items():
            base, *suffixes = name.split(".")
            if base == opcode and (not suffix or suffix in suffixes):
                count += times
        return count

    @property
    def total(self) -> int:
        """The number of instructions."""
        return sum(self.instructions.values())


def instructions_of(cubin: str) -> dict[str, dict[str, int]]:
    """Return the occurrences of each instruction, by function of a cubin file."""
    sections = re.split(r"^\.text\.(\S+):$", run_tool("nvdisasm", "-c", cubin), flags=re.M)
    names, bodies = sections[1::2], sections[2::2]
    return {
        name: dict(sorted(Counter(_INSTRUCTION.findall(body)).items()))
        for name, body in zip(names, bodies, strict=True)
    }


def run_tool(tool: str, *arguments: str) -> str:
    """Run a tool from the Triton wheel and return its output."""
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
