"""Measure providers side by side: each runs in its own process, and rounds alternate over them."""

import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.markdown import markdown_table
from benchmarks.problems import Problem
from benchmarks.worker import Worker

MIB = 1 << 20


@dataclass(frozen=True)
class Measurement:
    """Times in seconds, one entry per round, and peak memory of one provider on one problem."""

    forward: list[float]
    backward: list[float]
    peak_extra_bytes: int

    def totals(self) -> list[float]:
        """Return the time of forward and backward pass together, one entry per round."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    def median(self) -> float:
        """Return the median of the totals."""
        return statistics.median(self.totals())

    def ratio(self, base: "Measurement") -> float:
        """Return the median over the rounds of this time divided by base's in the same round."""
        return statistics.median(a / b for a, b in zip(self.totals(), base.totals(), strict=True))


def measure(problem: Problem, providers: Iterable[str], rounds: int) -> dict[str, Measurement]:
    """Measure several providers on one problem, see `alternate`."""
    return measure_pairs({name: (name, problem) for name in providers}, rounds)


def measure_pairs(pairs: Mapping[str, tuple[str, Problem]], rounds: int) -> dict[str, Measurement]:
    """Measure named pairs of a provider and a problem; returns the measurements by name."""
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[Problem, Path] = {}
        for _, problem in pairs.values():
            if problem not in paths:
                paths[problem] = Path(folder) / f"inputs-{len(paths)}.pt"
                torch.save(problem.tensors(), paths[problem])
        workers = {
            name: Worker(provider, problem, paths[problem])
            for name, (provider, problem) in pairs.items()
        }
        return alternate(workers, rounds)


def alternate(workers: Mapping[str, Worker], rounds: int) -> dict[str, Measurement]:
    """Alternate rounds over the workers.

    A worker that fails is left out, and the reason is printed.
    """
    with ExitStack() as stack:
        running, peaks = {}, {}
        for name, worker in tqdm(workers.items(), desc="memory", leave=False):
            stack.enter_context(worker)
            try:
                worker.warm_up()
                peaks[name] = worker.peak_extra_bytes()
                running[name] = worker
            except RuntimeError as error:
                tqdm.write(str(error), file=sys.stderr)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
        for _ in tqdm(range(rounds), desc="rounds", leave=False):
            for name, worker in list(running.items()):
                try:
                    times[name].append(worker.seconds())
                except RuntimeError as error:
                    tqdm.write(str(error), file=sys.stderr)
                    del running[name]
    return {
        name: Measurement([f for f, _ in times[name]], [b for _, b in times[name]], peaks[name])
        for name in running
    }


def table(
    measured: dict[str, Measurement], parts: tuple[str, str] = ("forward s", "backward s")
) -> str:
    """Return a Markdown table of the medians over the rounds.

    Ratios are to the first provider: those of time in the same round, those of memory at the peak.
    """
    base = next(iter(measured.values()))
    rows = []
    for name, m in measured.items():
        cells = [name, "", "", "", ""]  # with 0 rounds only memory is measured
        if m.forward:
            times = (statistics.median(m.forward), statistics.median(m.backward), m.median())
            cells = [name, *(f"{x:.3g}" for x in times), f"{m.ratio(base):.3f}"]
        memory = m.peak_extra_bytes / max(1, base.peak_extra_bytes)
        rows.append([*cells, f"{m.peak_extra_bytes / MIB:.0f}", f"{memory:.3f}"])
    header = ("provider", *parts, "total s", "time ratio", "peak extra MiB", "memory ratio")
    return markdown_table(header, rows)


def machine(device: str) -> str:
    """Return a description of the machine that measures."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, PyTorch {torch.__version__}"


def require_gpu(command: str) -> None:
    """Exit with a message if PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        sys.exit(
            f"{command}: it measures on a GPU, and PyTorch sees none; install a CUDA build of "
            "torch, 2.8 or newer, and its Triton"
        )
