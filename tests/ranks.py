"""Processes of one gloo group, for tests of what happens across ranks."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(worker, folder, *arguments, ranks=2):
    """Run worker(rank, folder, *arguments) in so many processes, one thread each."""
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (worker, str(folder), arguments, ranks, meeting)
        mp.start_processes(_enter, arguments, ranks, start_method="forkserver")


def _enter(rank, worker, folder, arguments, ranks, meeting):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",  # accelerate wants them, nobody listens
    }  # fmt: skip
    torch.set_num_threads(1)
    init_method = f"file://{meeting}/ranks"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=ranks)
    worker(rank, folder, *arguments)
    dist.barrier()
    # The reducer of DistributedDataParallel, when it is collected, ends the group's thread while it
    # holds the GIL that this thread may be waiting for: a deadlock, once in many runs.
    os._exit(0)
