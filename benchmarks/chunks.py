"""Time of a forward and backward pass by the size of the logits chunk, for both orders.

The constants in opd_kernels/linear/plan.py come from this table. Rounds alternate over the
settings. The table shows medians, and their ratios to the first row.
"""

import argparse
import statistics
import time

from tqdm import tqdm

from benchmarks.markdown import markdown_table
from benchmarks.measurement import MIB
from benchmarks.problems import Inputs, Problem
from opd_kernels import distillation_loss
from opd_kernels.linear.plan import one_pass_rows, recompute_sizes


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("chunks", help="time by the size of the logits chunk, both orders")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-pass", type=int, nargs="+", default=[148, 74, 37, 19], help="MiB")
    parser.add_argument("--recompute", type=int, nargs="+", default=[8, 16, 32, 64], help="MiB")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table of the two orders at several chunk sizes."""
    inputs = Inputs.make(Problem(arguments.tokens, arguments.dim, arguments.vocab))
    student, teacher = inputs.student, inputs.teacher
    settings = [("one_pass", mib) for mib in arguments.one_pass]
    settings += [("recompute", mib) for mib in arguments.recompute]
    times: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    for method, mib in tqdm(settings * arguments.rounds):
        start = time.perf_counter()
        distillation_loss(student, teacher, method=method, chunk_bytes=mib * MIB).loss.backward()
        times[method, mib].append(time.perf_counter() - start)
        inputs.clear()
    print(f"N = {arguments.tokens}, D = {arguments.dim}, V = {arguments.vocab}, float32, K = 20\n")
    base, rows = statistics.median(times[settings[0]]), []
    for (method, mib), seconds in times.items():
        shape = (arguments.tokens, arguments.vocab, 4, student.hidden.device, mib * MIB)
        if method == "one_pass":
            chunk = f"{one_pass_rows(*shape)} rows"
        else:
            chunk = f"{recompute_sizes(*shape)[1]} columns"
        median = statistics.median(seconds)
        rows.append((method, f"{mib} MiB, {chunk}", f"{median:.1f}", f"{median / base:.2f}"))
    print(markdown_table(("order", "chunk", "seconds", "ratio"), rows))
