"""Providers measured side by side: each in its own process, rounds alternate over them."""

import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.problems import Problem
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
    """The providers on one problem, see `alternate`."""
    return measure_pairs({name: (name, problem) for name in providers}, rounds)


def measure_pairs(pairs: Mapping[str, tuple[str, Problem]], rounds: int) -> dict[str, Figures]:
    """Providers, each on a problem of its own; by the names of the pairs."""
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


def alternate(workers: Mapping[str, Worker], rounds: int) -> dict[str, Figures]:
    """Alternating rounds over the workers; one that cannot run is left out, with its reason."""
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
        name: Figures([f for f, _ in times[name]], [b for _, b in times[name]], peaks[name])
        for name in running
    }


def table(figures: dict[str, Figures], parts: tuple[str, str] = ("forward s", "backward s")) -> str:
    """Markdown: medians over the rounds; ratios are to the first provider, in the same round."""
    base = next(iter(figures.values()))
    names = ["provider", *parts, "total s", "ratio", "peak extra MiB", "ratio"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, f in figures.items():
        cells = [name, "", "", "", ""]  # without a round there is memory alone
        if f.forward:
            times = (statistics.median(f.forward), statistics.median(f.backward), f.median())
            cells = [name, *(f"{x:.3g}" for x in times), f"{f.ratio(base):.3f}"]
        cells += [f"{f.peak_extra_bytes / MIB:.0f}"]
        cells += [f"{f.peak_extra_bytes / max(1, base.peak_extra_bytes):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """What times and memory are of, in words."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, PyTorch {torch.__version__}"
