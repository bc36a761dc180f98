"""Providers measured side by side: each in its own process, rounds alternate over them."""

import statistics
import sys
import tempfile
from collections.abc import Iterable
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
            for name, worker in list(workers.items()):
                try:
                    times[name].append(worker.seconds())
                except RuntimeError as error:
                    tqdm.write(str(error), file=sys.stderr)
                    del workers[name]
    return {
        name: Figures([f for f, _ in times[name]], [b for _, b in times[name]], peaks[name])
        for name in workers
    }
