"""Runs of the trainer in processes of their own, to which something happens."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import torch

from trainer.__main__ import main
from trainer.models.rollout import Sampler

SECONDS = 120  # for a run
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
_CONTEXT = multiprocessing.get_context("forkserver")


class Run:
    """python -m trainer with these arguments; in its process, fault() comes first."""

    def __init__(self, output, arguments, fault=None):
        self.output = output
        self.process = _CONTEXT.Process(target=_run, args=(arguments, output, fault))
        self.process.start()

    def wait(self):
        """Its exit status, which is negative where a signal has ended it."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"a run takes longer than {SECONDS} s:\n{self.told()}")
        return self.process.exitcode

    def wait_for(self, path):
        """Until the path is there."""
        end = time.monotonic() + SECONDS
        while not path.exists():
            assert self.process.is_alive(), self.told()
            assert time.monotonic() < end, self.told()
            time.sleep(0.005)

    def kill(self):
        """SIGKILL, if it has not ended."""
        self.process.kill()
        return self.wait()

    def told(self):
        """What it has printed."""
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
    """SIGKILL before the process opens, makes, renames or removes something there so many times."""
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
    """Every file ends there, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def exhaust_memory(calls):
    """In the rollout of that number."""
    generate = Sampler._generate
    left = calls

    def ask_for_too_much(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            torch.empty(1 << 50)
        return generate(*arguments)

    Sampler._generate = ask_for_too_much


def make_clock_jump(seed):
    """The wall clock goes back and forth by up to a day at every look."""
    generator, clock = random.Random(seed), time.time
    time.time = lambda: clock() + generator.uniform(-86_400, 86_400)
