"""What a run cannot go on from, said in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size


class RunStoppedError(RuntimeError):
    """A run cannot go on from its last step; the message says why and what to do."""


@contextmanager
def limits_memory(keys: str) -> Iterator[None]:
    """Name the recipe's keys that make less of what does not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise RunStoppedError(f"{keys}: it does not fit into memory; lower it. {error}") from error
