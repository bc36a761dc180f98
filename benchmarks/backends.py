"""The epilogues of the backends for GPUs side by side, each on a chunk at the size of a real head.

Which of them `backend="auto"` takes is to rest on this table. Rounds alternate over the backends,
and medians are shown; GB/s counts what has to be read and written once.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import launches
from opd_kernels import available_backends
from opd_kernels.backends import reaches, select_backend

CANDIDATES = ("triton", "cuda", "torch")


@dataclass(frozen=True)
class Epilogue:
    """A call to time, and how many bytes of each logit it has to move."""

    build: Callable[..., launches.Call]
    bytes_a_logit: int


EPILOGUES = {
    "select K=20": Epilogue(partial(launches.update, 20, True, True), 4),
    "select K=20, all options": Epilogue(partial(launches.update, 20, True, False), 4),
    "select K=128": Epilogue(partial(launches.update, 128, True, True), 4),
    "gather K=20": Epilogue(partial(launches.update, 20, False, True), 4),
    "gradient K=20, bf16": Epilogue(partial(launches.gradient, 20, True), 6),
    "gradient K=20, all options, bf16": Epilogue(partial(launches.gradient, 20, False), 6),
    "reverse KL of whole rows, bf16": Epilogue(partial(launches.divergence, 1.0, True), 10),
    "JSD of whole rows, all options, bf16": Epilogue(partial(launches.divergence, 0.5, False), 10),
}


@dataclass(frozen=True)
class Timing:
    """Medians of one epilogue, in seconds, by backend."""

    epilogue: str
    seconds: dict[str, float]

    @property
    def gigabytes(self) -> float:
        """What has to be moved at least."""
        return EPILOGUES[self.epilogue].bytes_a_logit * launches.TOKENS * launches.VOCAB / 1e9


def seconds(call: launches.Call) -> float:
    """Of one call on the GPU, whose own clock tells it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    device: str, rounds: int, time_of: Callable[[launches.Call], float] = seconds
) -> list[Timing]:
    """Every epilogue on every backend that reaches the device, after a first call that compiles."""
    place = torch.device(device)
    names = [n for n in CANDIDATES if n in available_backends() and reaches(n, place)]
    timings = []
    for name, epilogue in tqdm(EPILOGUES.items(), desc="epilogues"):
        options: dict[str, Any] = {"device": device}
        calls = {n: epilogue.build(**options, epilogues=select_backend(n, place)) for n in names}
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {n: [] for n in names}
        for _ in range(rounds):
            for backend, call in calls.items():
                times[backend].append(time_of(call))
        medians = {backend: statistics.median(each) for backend, each in times.items()}
        timings.append(Timing(name, medians))
    return timings


def section(timings: list[Timing]) -> str:
    """Markdown: milliseconds and GB/s, and each backend's time as a ratio to the first one's."""
    names = list(timings[0].seconds)
    heads = [f"{name} ms (GB/s)" for name in names] + [f"{n} / {names[0]}" for n in names[1:]]
    lines = [
        f"**Epilogues on a chunk of {launches.TOKENS:,} x {launches.VOCAB:,} in float32**",
        "",
        f"| epilogue | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for timing in timings:
        cells = [f"{1e3 * t:.3g} ({timing.gigabytes / t:.0f})" for t in timing.seconds.values()]
        first = timing.seconds[names[0]]
        cells += [f"{timing.seconds[name] / first:.2f}" for name in names[1:]]
        lines.append(f"| {timing.epilogue} | {' | '.join(cells)} |")
    return "\n".join(lines)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("backends", help="the epilogues of each backend, on this GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        sys.exit("backends: it measures on a GPU, and PyTorch sees none")
    print(section(measure("cuda", arguments.rounds)))
