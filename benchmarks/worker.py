"""A provider in its own process, so that providers do not share an allocator.

The parent sends one command per line and receives one JSON object. A worker sleeps between
commands, so rounds can alternate over many workers on the same inputs.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.problems import Inputs, Problem
from benchmarks.providers import PROVIDERS, Provider


class Worker:
    """The parent's side of a worker process.

    Methods raise RuntimeError with the end of the process's stderr if the provider fails.
    """

    MODULE = "benchmarks.worker"  # its arguments: a provider, a dataclass as JSON, and a path

    def __init__(self, provider: str, problem: Any, path: Path) -> None:
        self.provider = provider
        arguments = [provider, json.dumps(asdict(problem)), str(path)]
        self._command = [sys.executable, "-m", self.MODULE, *arguments]

    def __enter__(self) -> "Worker":
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def warm_up(self) -> None:
        """Run the first pass, which compiles, allocates and takes page faults."""
        self.seconds()

    def peak_extra_bytes(self) -> int:
        """Return the peak memory of a pass; call it after `warm_up`.

        Inputs, dhidden, dweight and code of libraries that the pass loads do not count.
        """
        return int(self._ask("memory")["bytes"])

    def seconds(self) -> tuple[float, float]:
        """Return the wall-clock seconds of a forward and of a backward pass."""
        answer = self._ask("time")
        return answer["forward"], answer["backward"]

    def _ask(self, command: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._errors.seek(0)
            reason = self._errors.read()[-2000:]
            raise RuntimeError(f"{self.provider} failed on {command}:\n{reason}") from None


def _time(provider: Provider, inputs: Inputs) -> dict[str, float]:
    if inputs.problem.device == "cuda":  # refills the allocator's cache, emptied after each command
        provider(inputs).backward()
        inputs.clear()
    start = _now(inputs)
    loss = provider(inputs)
    middle = _now(inputs)
    loss.backward()
    end = _now(inputs)
    return {"forward": middle - start, "backward": end - middle}


def _now(inputs: Inputs) -> float:
    """Wait for the kernels that were launched, and return the time."""
    if inputs.problem.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(provider: Provider, inputs: Inputs) -> dict[str, int]:
    """Return the peak memory of a pass beyond what was held before and what it returns.

    The peak is the allocator's on a GPU, and that of the resident set on a CPU (Linux only).
    """
    if inputs.problem.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider(inputs).backward()
        return {"bytes": max(0, torch.cuda.max_memory_allocated() - before - _returned(inputs))}
    before, code = reset_peak(), status("RssFile")
    provider(inputs).backward()
    code = max(0, status("RssFile") - code)  # of libraries that the pass loaded
    # The result could be negative: a dweight with few non-zero rows is not fully resident, but its
    # full size is subtracted.
    return {"bytes": max(0, status("VmHWM") - code - before - _returned(inputs))}


def _returned(inputs: Inputs) -> int:
    """Return the bytes of dhidden and dweight."""
    leaves = (inputs.student.hidden, inputs.student.weight)
    return sum(x.grad.numel() * x.grad.element_size() for x in leaves if x.grad is not None)


def reset_peak() -> int:
    """Return free memory to the system, reset the peak, and return the resident bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("problem", type=json.loads)
    parser.add_argument("inputs", type=Path)
    arguments = parser.parse_args()
    provider, problem = PROVIDERS[arguments.provider], Problem(**arguments.problem)
    torch.manual_seed(0)
    # A small pass makes libraries load their code and buffers before anything is measured.
    provider(Inputs.make(replace(problem, tokens=8, vocab=1024, k=min(problem.k, 64)))).backward()
    if problem.device == "cuda":
        torch.compiler.reset()  # else the next shapes would be compiled as dynamic ones
    inputs = Inputs.load(problem, arguments.inputs)
    commands = {"memory": _memory, "time": _time}
    for line in sys.stdin:
        answer = commands[line.strip()](provider, inputs)
        inputs.clear()
        if problem.device == "cuda":  # leaves the memory to the other processes
            torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
