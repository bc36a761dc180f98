"""Runs of the trainer in separate processes, with injected faults."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import torch

from opd_trainer.__main__ import main
from opd_trainer.models.rollout import Sampler

SECONDS = 120  # limit per run
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
_CONTEXT = multiprocessing.get_context("forkserver")


class Run:
    """A process that calls fault() and then runs `python -m opd_trainer` with arguments."""

    def __init__(self, output, arguments, fault=None):
        self.output = output
        self.process = _CONTEXT.Process(target=_run, args=(arguments, output, fault))
        self.process.start()

    def wait(self):
        """Return the exit status, which is negative if a signal ended the process."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"a run takes longer than {SECONDS} s:\n{self.printed()}")
        return self.process.exitcode

    def wait_for(self, path):
        """Wait until a path exists."""
        end = time.monotonic() + SECONDS
        while not path.exists():
            assert self.process.is_alive(), self.printed()
            assert time.monotonic() < end, self.printed()
            time.sleep(0.005)

    def kill(self):
        """Kill the process by SIGKILL; return its exit status."""
        self.process.kill()
        return self.wait()

    def printed(self):
        """Return the output so far."""
        return self.output.read_text() if self.output.exists() else ""


def _run(arguments, output, fault):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    at_end = fault() if fault is not None else None
    main(arguments)
    if at_end is not None:
        at_end()


def kill_at_file_event(folder, number):
    """Kill the process by SIGKILL just before its given number of file events in a folder."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: print(f"file events: {seen}")


def limit_file_size(size):
    """Fail writes beyond a size of any file, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def exhaust_memory(calls):
    """Run out of memory in the rollout of the given number."""
    generate = Sampler._generate
    left = calls

    def generate_or_fail(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            torch.empty(1 << 50)
        return generate(*arguments)

    Sampler._generate = generate_or_fail


def make_clock_jump(seed):
    """Move the wall clock back or forth by up to a day each time it is read."""
    generator, clock = random.Random(seed), time.time
    time.time = lambda: clock() + generator.uniform(-86_400, 86_400)
