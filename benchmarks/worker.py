"""A provider in a process of its own: no allocator keeps what another provider took.

The parent sends a command a line and gets a JSON object back; a worker that is not asked sleeps, so
that rounds can alternate over many of them on the same inputs.
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
    """The parent's end. A provider that fails raises RuntimeError with the end of its errors."""

    MODULE = "benchmarks.worker"  # a provider, a dataclass as JSON and a path are its arguments

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
        """The first pass, which compiles, allocates and faults pages in."""
        self.seconds()

    def peak_extra_bytes(self) -> int:
        """Peak resident memory of a pass beyond inputs, dhidden and dweight, and code of libraries
        that the pass loads; after a first pass.
        """
        return int(self._ask("memory")["bytes"])

    def seconds(self) -> tuple[float, float]:
        """Wall-clock of a forward and of a backward pass."""
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
    if inputs.problem.device == "cuda":  # fills the allocator, which gives all back between rounds
        provider(inputs).backward()
        inputs.clear()
    start = _now(inputs)
    loss = provider(inputs)
    middle = _now(inputs)
    loss.backward()
    end = _now(inputs)
    return {"forward": middle - start, "backward": end - middle}


def _now(inputs: Inputs) -> float:
    """The time at which all that was launched is done."""
    if inputs.problem.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(provider: Provider, inputs: Inputs) -> dict[str, int]:
    """On a GPU the allocator's high-water mark, else the kernel's of the resident set (Linux); both
    reset just before the pass.
    """
    if inputs.problem.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider(inputs).backward()
        return {"bytes": max(0, torch.cuda.max_memory_allocated() - before - _returned(inputs))}
    before, code = reset_peak(), status("RssFile")
    provider(inputs).backward()
    code = max(0, status("RssFile") - code)  # of libraries, which came in meanwhile
    # A gradient of few rows is not in memory as a whole, although all of it is subtracted.
    return {"bytes": max(0, status("VmHWM") - code - before - _returned(inputs))}


def _returned(inputs: Inputs) -> int:
    """Bytes of the gradients that a pass returns."""
    leaves = (inputs.student.hidden, inputs.student.weight)
    return sum(x.grad.numel() * x.grad.element_size() for x in leaves if x.grad is not None)


def reset_peak() -> int:
    """Give back what is free and start the high-water mark anew; the resident bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
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
    # Libraries load their code and buffers.
    provider(Inputs.make(replace(problem, tokens=8, vocab=1024, k=min(problem.k, 64)))).backward()
    if problem.device == "cuda":
        torch.compiler.reset()  # compiled for other shapes, which would make these dynamic
    inputs = Inputs.load(problem, arguments.inputs)
    commands = {"memory": _memory, "time": _time}
    for line in sys.stdin:
        answer = commands[line.strip()](provider, inputs)
        inputs.clear()
        if problem.device == "cuda":  # for the other providers, which wait in their processes
            torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
