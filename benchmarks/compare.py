"""Time and peak memory of every provider on the heads of real models, side by side.

The tables show the median over the rounds, in seconds and as a ratio to the matrix products alone.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import sweeps
from benchmarks.measurement import machine, measure_pairs, table
from benchmarks.problems import HEADS, Problem
from benchmarks.providers import DISTILLATION, LABELS, PROVIDERS

DTYPES = ("float32", "bfloat16", "float16")


def section(
    head: str, problems: Sequence[Problem], providers: Sequence[str], rounds: int
) -> tuple[str, list[dict[str, Any]]]:
    """Measure providers on one head, in the same rounds.

    Args:
        problems: problems that differ only in their dtype.

    Returns:
        A table with a title, and the records; both are empty if no provider can run.
    """
    pairs = {
        name if len(problems) == 1 else f"{name}, {problem.dtype}": (name, problem)
        for problem in problems
        for name in providers
    }
    measured = measure_pairs(pairs, rounds)
    if not measured:
        return "", []
    problem, dtypes = problems[0], ", ".join(problem.dtype for problem in problems)
    title = f"{head}: N = {problem.tokens}, D = {problem.dim}, V = {problem.vocab}"
    text = f"**{title}, K = {problem.k}, {dtypes}**\n\n{table(measured)}"
    records = []
    for row, measurement in measured.items():
        name, problem = pairs[row]
        records.append({"head": head, "provider": name, **asdict(problem), **asdict(measurement)})
    return text, records


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compare", help="time and peak memory of the losses and of peers")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--sweeps", nargs="*", choices=sweeps.SWEEPS, default=list(sweeps.SWEEPS))
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print Markdown tables; write them, the records as JSON, and the plots of the sweeps."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = [
        f"Measured on {machine(arguments.device)}; median of {arguments.rounds} alternating rounds."
    ]
    records = []
    for head in arguments.heads:
        size = (arguments.tokens, *HEADS[head], arguments.k)
        problems = [Problem(*size, dtype, arguments.device) for dtype in arguments.dtypes]
        for family in (DISTILLATION, LABELS):
            providers = [name for name in arguments.providers if name in family]
            text, found = section(head, problems, providers, arguments.rounds)
            if found:
                report.append(text)
                records += found
                print(text + "\n", flush=True)
    if arguments.heads:
        (arguments.output / "compare.md").write_text("\n\n".join(report) + "\n")
        (arguments.output / "compare.json").write_text(json.dumps(records, indent=2))
    for axis in arguments.sweeps:
        print(sweeps.run(axis, arguments.output), flush=True)
