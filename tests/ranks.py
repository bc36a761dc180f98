"""Run a test in the processes of one gloo group."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(worker, folder, *arguments, ranks=2):
    """Run worker(rank, folder, *arguments) in every one of `ranks` processes, with one thread."""
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (worker, str(folder), arguments, ranks, meeting)
        mp.start_processes(_enter, arguments, ranks, start_method="forkserver")


def _enter(rank, worker, folder, arguments, ranks, meeting):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",  # unused, but accelerate asks
    }  # fmt: skip
    torch.set_num_threads(1)
    init_method = f"file://{meeting}/ranks"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=ranks)
    worker(rank, folder, *arguments)
    dist.barrier()
    # Skip the interpreter's shutdown, which deadlocks once in many runs: DistributedDataParallel's
    # reducer ends the group's thread while it holds the GIL, which this thread may be waiting for.
    os._exit(0)
