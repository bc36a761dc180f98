"""Registers, spills and instructions of the compiled Triton and CUDA kernels; needs no GPU.

For Triton, launches are recorded from the package's own epilogues at the shape of a real head, with
each shipped configuration, plain and with all options. For CUDA, every kernel of csrc/cuda is
compiled.
"""

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks import cuda_code, launches, triton_code
from benchmarks.machine_code import TARGETS, MachineCode
from benchmarks.markdown import markdown_table
from csrc.cuda import nvcc
from opd_kernels.backends.triton import configs


@dataclass(frozen=True)
class Row:
    """One kernel, compiled from one case for one target."""

    backend: str
    case: str
    kernel: str
    target: str
    code: MachineCode
    resident_warps: int


CASES: dict[str, Callable[[], launches.Call]] = {
    name: partial(build, device="meta")
    for name, build in {
        "matmul + gather K=1": partial(launches.linear_update, 1, True),
        "matmul + gather K=20, all options": partial(launches.linear_update, 20, False),
        "matmul + gradient K=20": partial(launches.linear_gradient, 20, True),
        "matmul + gradient K=20, all options": partial(launches.linear_gradient, 20, False),
        "select K=1": partial(launches.update, 1, True, True),
        "select K=20": partial(launches.update, 20, True, True),
        "select K=20, all options": partial(launches.update, 20, True, False),
        "select K=20, bf16 chunk": partial(launches.update, 20, True, True, dtype=torch.bfloat16),
        "select K=128, all options": partial(launches.update, 128, True, False),
        "gather K=1": partial(launches.update, 1, False, True),
        "gather K=20": partial(launches.update, 20, False, True),
        "gather K=20, all options": partial(launches.update, 20, False, False),
        "gather K=1024, all options": partial(launches.update, 1024, False, False),
        "gradient K=1": partial(launches.gradient, 1, True),
        "gradient K=20": partial(launches.gradient, 20, True),
        "gradient K=20, all options": partial(launches.gradient, 20, False),
        "gradient K=20, bf16 chunk": partial(launches.gradient, 20, True, dtype=torch.bfloat16),
        "gradient K=1024, all options": partial(launches.gradient, 1024, False),
        "loss on S, K=20": partial(launches.reverse_kl, 20, True),
        "loss on S, K=1024, bucket": partial(launches.reverse_kl, 1024, False),
        "forward KL, all options": partial(launches.divergence, 0.0, False),
        "reverse KL": partial(launches.divergence, 1.0, True),
        "JSD, all options": partial(launches.divergence, 0.5, False),
    }.items()
}


# The sources of csrc/cuda, by name.
SOURCES = {path.stem: path for path in nvcc.SOURCES}


def audit_triton(case: str, target: str) -> list[Row]:
    """Compile the kernels that one case launches, for one target."""
    rows = []
    call = CASES[case]()
    with patch.object(configs, "capability", lambda device: TARGETS[target].capability):
        recorded = triton_code.launches_of(call)
    for launch in recorded:
        code = triton_code.compile_for(launch, TARGETS[target])
        rows.append(_row("triton", case, launch.kernel.fn.__name__, target, code))
    return rows


def audit_cuda(source: str, target: str) -> list[Row]:
    """Compile one source for one target."""
    kernels = cuda_code.kernels_of(SOURCES[source], TARGETS[target])
    return [
        _row("cuda", signature, signature.partition("<")[0], target, code)
        for signature, code in kernels.items()
    ]


def _row(backend: str, case: str, kernel: str, target: str, code: MachineCode) -> Row:
    return Row(backend, case, kernel, target, code, TARGETS[target].resident_warps(code))


AUDITS = {"triton": audit_triton, "cuda": audit_cuda}


def audit(backend: str, subject: str, target: str) -> list[Row]:
    """Compile one case or source of a backend for one target."""
    return AUDITS[backend](subject, target)


def table(rows: list[Row]) -> str:
    """Return a Markdown table with one line per row."""
    header = (
        "backend", "case", "target", "registers", "spilled bytes", "shared bytes", "resident warps",
        "instructions", "loads", "16-byte loads", "stores", "16-byte stores", "exp", "tensor",
    )  # fmt: skip
    lines = []
    for row in rows:
        code = row.code
        tensor = code.count(TARGETS[row.target].tensor_instruction)
        counts = [code.total]
        for name in ("LDG", "STG"):
            counts += [code.count(name), code.count(name, "128")]
        counts += [code.count("MUFU"), tensor]
        resources = [code.registers, code.spilled_bytes, code.shared_bytes, row.resident_warps]
        lines.append([row.backend, row.case, row.target, *map(str, resources + counts)])
    return markdown_table(header, lines)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "audit", help="registers, spills and instructions of the kernels, without a GPU"
    )
    parser.add_argument("--backends", nargs="+", choices=AUDITS, default=list(AUDITS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="for Triton")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/audit"))
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table; write it, and its rows as JSON."""
    if configs.INTERPRETED:
        sys.exit("audit: TRITON_INTERPRET is set, so Triton compiles no kernels; unset it")
    subjects = {"triton": arguments.cases, "cuda": SOURCES}
    work = [
        (backend, subject, target)
        for backend in arguments.backends
        for subject in subjects[backend]
        for target in arguments.targets
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = tqdm(pool.map(audit, *zip(*work, strict=True)), total=len(work), desc="compiling")
        rows = [row for result in results for row in result]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "audit.md").write_text(table(rows) + "\n")
    (arguments.output / "audit.json").write_text(json.dumps([asdict(r) for r in rows], indent=2))
    print(table(rows))
