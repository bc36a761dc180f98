"""Count the bytes that a rank sends in collectives, assuming ring algorithms."""

from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Sums the bytes by name of the collective while it is active."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks, self.sent = ranks, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("c10d.").removesuffix(".default")
        others, share = self.ranks - 1, (self.ranks - 1) / self.ranks
        size = None
        if name == "allgather_":
            size = others * args[1][0].nbytes
        elif name == "_allgather_base_":
            size = others * args[1].nbytes
        elif name == "_reduce_scatter_base_":
            size = share * args[1].nbytes
        elif name == "allreduce_":
            size = 2 * share * args[0][0].nbytes
        elif str(function).startswith("c10d."):
            assert name in ("barrier", "monitored_barrier_"), f"{name} is not counted"
        if size is not None:
            self.sent[name] = self.sent.get(name, 0) + size
        return function(*args, **kwargs or {})
