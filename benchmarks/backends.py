"""Time of each epilogue on every backend that runs on a GPU, on a chunk of a real head's size.

The choice of `backend="auto"` will follow from this table. Rounds alternate over the backends, and
the table shows medians. GB/s counts each byte that must be read or written once.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import launches
from benchmarks.markdown import markdown_table
from benchmarks.measurement import require_gpu
from opd_kernels import available_backends
from opd_kernels.backends import reaches, select_backend

CANDIDATES = ("triton", "cuda", "torch")


@dataclass(frozen=True)
class Epilogue:
    """A call to time, and the bytes that it must move per logit."""

    build: Callable[..., launches.Call]
    bytes_per_logit: int


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
    """Median seconds of one epilogue by backend."""

    epilogue: str
    seconds: dict[str, float]

    @property
    def gigabytes(self) -> float:
        """The least data to move, in gigabytes."""
        return EPILOGUES[self.epilogue].bytes_per_logit * launches.TOKENS * launches.VOCAB / 1e9


def seconds(call: launches.Call) -> float:
    """Return the time of one call by the GPU's clock."""
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
    """Time every epilogue on every backend for the device, after a first call that compiles."""
    target = torch.device(device)
    names = [n for n in CANDIDATES if n in available_backends() and reaches(n, target)]
    timings = []
    for name, epilogue in tqdm(EPILOGUES.items(), desc="epilogues"):
        options: dict[str, Any] = {"device": device}
        calls = {n: epilogue.build(**options, epilogues=select_backend(n, target)) for n in names}
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {n: [] for n in names}
        for _ in range(rounds):
            for backend, call in calls.items():
                times[backend].append(time_of(call))
        medians = {backend: statistics.median(rounds) for backend, rounds in times.items()}
        timings.append(Timing(name, medians))
    return timings


def section(timings: list[Timing]) -> str:
    """Return a table of milliseconds, GB/s, and the ratio to the first backend's time."""
    names = list(timings[0].seconds)
    header = ["epilogue", *(f"{name} ms (GB/s)" for name in names)]
    header += [f"{name} / {names[0]}" for name in names[1:]]
    rows = []
    for timing in timings:
        cells = [f"{1e3 * t:.3g} ({timing.gigabytes / t:.0f})" for t in timing.seconds.values()]
        first = timing.seconds[names[0]]
        cells += [f"{timing.seconds[name] / first:.2f}" for name in names[1:]]
        rows.append([timing.epilogue, *cells])
    title = f"**Epilogues on a chunk of {launches.TOKENS:,} x {launches.VOCAB:,} in float32**"
    return f"{title}\n\n{markdown_table(header, rows)}"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "backends", help="time of the epilogues of each backend, on this GPU"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    require_gpu("backends")
    print(section(measure("cuda", arguments.rounds)))
