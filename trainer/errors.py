"""What a run cannot go on from, said in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size


class RunStoppedError(RuntimeError):
    """A run cannot go on from its last step; the message says why and what to do."""


class SavingError(RunStoppedError):
    """A checkpoint or the student could not be written."""


class TeacherError(RunStoppedError):
    """A teacher cannot go on."""


@contextmanager
def limits_memory(keys: str) -> Iterator[None]:
    """Name the recipe's keys that make less of what does not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise RunStoppedError(f"{keys}: it does not fit into memory; lower it. {error}") from error


@contextmanager
def explained(expected: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Say what was expected, in an error of that type, whatever is raised by code that is not ours.

    What stops a run, also for want of memory, and a missing package have their own messages.
    """
    try:
        yield
    except (RunStoppedError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as cause:
        if isinstance(cause, RuntimeError) and should_reduce_batch_size(cause):
            raise
        kind = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
        raise error(f"{expected}; {kind}{cause}") from cause
