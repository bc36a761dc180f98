"""Time and peak memory of every provider on the heads of real models, side by side.

Each provider has its own process, all on the same inputs; rounds alternate over them and the median
is shown, as seconds and as a ratio to the bare matrix products.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import sweeps
from benchmarks.problems import HEADS, Problem
from benchmarks.providers import DISTILLATION, LABELS, PROVIDERS
from benchmarks.worker import Worker

MIB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """One provider on one problem; times are one entry a round, in seconds."""

    forward: list[float]
    backward: list[float]
    peak_extra_bytes: int

    def rounds(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    def median(self) -> float:
        return statistics.median(self.rounds())

    def ratio(self, base: "Figures") -> float:
        """The median over the rounds of this provider's time to another's in the same round."""
        return statistics.median(a / b for a, b in zip(self.rounds(), base.rounds(), strict=True))


def measure(problem: Problem, providers: Iterable[str], rounds: int) -> dict[str, Figures]:
    """Alternating rounds over the providers; one that cannot run is left out, with its reason."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "inputs.pt"
        torch.save(problem.tensors(), path)
        workers, peaks = {}, {}
        for name in tqdm(list(providers), desc="memory", leave=False):
            worker = stack.enter_context(Worker(name, problem, path))
            try:
                worker.seconds()  # the first pass compiles, allocates and faults pages in
                peaks[name] = worker.peak_extra_bytes()
                workers[name] = worker
            except RuntimeError as error:
                tqdm.write(str(error), file=sys.stderr)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        for _ in tqdm(range(rounds), desc="rounds", leave=False):
            for name, worker in workers.items():
                times[name].append(worker.seconds())
    return {
        name: Figures([f for f, _ in pairs], [b for _, b in pairs], peaks[name])
        for name, pairs in times.items()
    }


def table(figures: dict[str, Figures]) -> str:
    """Markdown; ratios are to the first provider."""
    base = next(iter(figures.values()))
    names = ["provider", "forward s", "backward s", "total s", "ratio", "peak extra MiB"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, f in figures.items():
        cells = [name, "", "", "", ""]  # without a round there is memory alone
        if f.forward:
            times = (statistics.median(f.forward), statistics.median(f.backward), f.median())
            cells = [name, *(f"{x:.2f}" for x in times), f"{f.ratio(base):.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{f.peak_extra_bytes / MIB:.0f}'])} |")
    return "\n".join(lines)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compare", help="time and peak memory against peers")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--sweeps", nargs="*", choices=sweeps.SWEEPS, default=list(sweeps.SWEEPS))
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print Markdown tables; write them, the figures as JSON, and the plots of the sweeps."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    machine = f"{threads} CPU threads, {capability}, PyTorch {torch.__version__}"
    report, records = (
        [f"Measured on {machine}; median of {arguments.rounds} alternating rounds."],
        [],
    )
    for head in arguments.heads:
        problem = Problem(arguments.tokens, *HEADS[head], arguments.k, arguments.dtype)
        for family in (DISTILLATION, LABELS):
            providers = [name for name in arguments.providers if name in family]
            figures = measure(problem, providers, arguments.rounds)
            if not figures:
                continue
            title = f"{head}: N = {problem.tokens}, D = {problem.dim}, V = {problem.vocab}"
            report.append(f"**{title}, K = {problem.k}, {problem.dtype}**\n\n{table(figures)}")
            print(report[-1] + "\n", flush=True)
            records += [
                {"head": head, "provider": name, **asdict(problem), **asdict(f)}
                for name, f in figures.items()
            ]
    if arguments.heads:
        (arguments.output / "compare.md").write_text("\n\n".join(report) + "\n")
        (arguments.output / "compare.json").write_text(json.dumps(records, indent=2))
    for axis in arguments.sweeps:
        print(sweeps.run(axis, arguments.output, measure), flush=True)
