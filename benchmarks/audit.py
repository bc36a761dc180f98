"""What the Triton kernels compile to, without a GPU: registers, spills, instructions.

Every launch is recorded from the package's own epilogues at the shape of a real head, with each
shipped configuration, plain and with every option.
"""

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.machine_code import TARGETS, MachineCode, compile_for, launches_of
from opd_kernels.backends import RowState, triton
from opd_kernels.backends.triton import configs, linear
from opd_kernels.head import Head

TOKENS, VOCAB = 2_048, 151_936


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one target."""

    case: str
    kernel: str
    target: str
    code: MachineCode
    resident_warps: int


def _chunk(every_option: bool, dtype: torch.dtype) -> tuple[torch.Tensor, Head]:
    chunk = torch.empty(TOKENS, VOCAB, dtype=dtype, device="meta")
    bias = torch.empty(VOCAB, dtype=torch.bfloat16, device="meta") if every_option else None
    softcap = 30.0 if every_option else None
    return chunk, Head(chunk[:1].T, bias, softcap, 1.0, 1.0, VOCAB)


def _update(k: int, selects: bool, every_option: bool, dtype: torch.dtype = torch.float32) -> None:
    chunk, head = _chunk(every_option, dtype)
    like = torch.empty(0, dtype=torch.float32, device="meta")
    state = RowState.for_topk(TOKENS, k, every_option, like)
    if not selects:
        state = RowState.for_ids(state.ids, every_option, like)
    triton.update(chunk, 0, head, state)


def _gradient(k: int, every_option: bool, dtype: torch.dtype = torch.float32) -> None:
    chunk, head = _chunk(every_option, dtype)
    values = torch.empty(TOKENS, k, dtype=torch.float32, device="meta")
    ids = torch.empty(TOKENS, k, dtype=torch.int64, device="meta")
    out = torch.empty_like(chunk, dtype=torch.bfloat16)
    triton.gradient(chunk, 0, head, ids, values, values[:, 0], values[:, 0], out)


def _loss(k: int, stop_gradient: bool) -> None:
    values = torch.empty(TOKENS, k, dtype=torch.float32, device="meta")
    rows = torch.empty(TOKENS, dtype=torch.float32, device="meta")
    triton.reverse_kl(values, rows, values, rows, rows, stop_gradient, not stop_gradient)


def _divergence(beta: float, every_option: bool) -> None:
    chunk, head = _chunk(every_option, torch.float32)
    upstream = torch.empty(TOKENS, dtype=torch.float32, device="meta")
    out = torch.empty_like(chunk, dtype=torch.bfloat16)
    triton.divergence(chunk, head, chunk, head, beta, upstream, out)


def _linear(k: int, backward: bool, every_option: bool, dim: int = 1024) -> None:
    hidden = torch.empty(TOKENS, dim, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(VOCAB, dim, dtype=torch.bfloat16, device="meta")
    _, head = _chunk(every_option, torch.float32)
    head = replace(head, weight=weight)
    ids = torch.empty(TOKENS, k, dtype=torch.int64, device="meta")
    rows = torch.empty(TOKENS, k, dtype=torch.float32, device="meta")
    if backward:
        out = torch.empty(TOKENS, 16_384, dtype=torch.bfloat16, device="meta")
        support = linear.support(ids, hidden)
        linear.gradient(hidden, 0, head, support, rows, rows[:, 0], rows[:, 0], out)
    else:
        linear.update(hidden, head, RowState.for_ids(ids, every_option, like=rows))


CASES: dict[str, Callable[[], None]] = {
    "matmul + gather K=1": partial(_linear, 1, False, False),
    "matmul + gather K=20, all options": partial(_linear, 20, False, True),
    "matmul + gradient K=20": partial(_linear, 20, True, False),
    "matmul + gradient K=20, all options": partial(_linear, 20, True, True),
    "select K=1": partial(_update, 1, True, False),
    "select K=20": partial(_update, 20, True, False),
    "select K=20, all options": partial(_update, 20, True, True),
    "select K=20, bf16 chunk": partial(_update, 20, True, False, torch.bfloat16),
    "select K=128, all options": partial(_update, 128, True, True),
    "gather K=1": partial(_update, 1, False, False),
    "gather K=20": partial(_update, 20, False, False),
    "gather K=20, all options": partial(_update, 20, False, True),
    "gather K=1024, all options": partial(_update, 1024, False, True),
    "gradient K=1": partial(_gradient, 1, False),
    "gradient K=20": partial(_gradient, 20, False),
    "gradient K=20, all options": partial(_gradient, 20, True),
    "gradient K=20, bf16 chunk": partial(_gradient, 20, False, torch.bfloat16),
    "gradient K=1024, all options": partial(_gradient, 1024, True),
    "loss on S, K=20": partial(_loss, 20, True),
    "loss on S, K=1024, bucket": partial(_loss, 1024, False),
    "forward KL, all options": partial(_divergence, 0.0, True),
    "reverse KL": partial(_divergence, 1.0, False),
    "JSD, all options": partial(_divergence, 0.5, True),
}


def audit(case: str, target: str) -> list[Row]:
    """Compile what one case launches for one target."""
    rows = []
    with patch.object(configs, "capability", lambda device: TARGETS[target].capability):
        launches = launches_of(CASES[case])
    for launch in launches:
        code = compile_for(launch, TARGETS[target])
        warps = TARGETS[target].resident_warps(code)
        rows.append(Row(case, launch.kernel.fn.__name__, target, code, warps))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    columns = ["case", "target", "registers", "spilled bytes", "shared bytes", "resident warps"]
    columns += ["instructions", "loads", "stores", "exp", "tensor"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        code = row.code
        tensor = code.count(TARGETS[row.target].tensor_instruction)
        counts = [code.total, code.count("LDG"), code.count("STG"), code.count("MUFU"), tensor]
        resources = [code.registers, code.spilled_bytes, code.shared_bytes, row.resident_warps]
        cells = [row.case, row.target, *map(str, resources + counts)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("audit", help="what the Triton kernels compile to, without a GPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/audit"))
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table; write it, and the figures as JSON."""
    if configs.INTERPRETED:
        sys.exit("audit: TRITON_INTERPRET is set, so that kernels are not compiled; unset it")
    work = [(case, target) for case in arguments.cases for target in arguments.targets]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = tqdm(pool.map(audit, *zip(*work, strict=True)), total=len(work), desc="compiling")
        rows = [row for result in results for row in result]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "audit.md").write_text(table(rows) + "\n")
    (arguments.output / "audit.json").write_text(json.dumps([asdict(r) for r in rows], indent=2))
    print(table(rows))
