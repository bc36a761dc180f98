"""Errors that end a run, and the conversion of other libraries' exceptions into them."""

from collections.abc import Iterator
from contextlib import contextmanager


class RunStoppedError(RuntimeError):
    """The run cannot continue after its last step; the message says why and what to do."""


class SavingError(RunStoppedError):
    """A checkpoint or the student could not be written."""


class TeacherError(RunStoppedError):
    """A teacher gave no answer, or an invalid one."""


@contextmanager
def name_memory_keys(keys: str) -> Iterator[None]:
    """Convert an out-of-memory error to RunStoppedError that names the keys to lower."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise RunStoppedError(f"{keys}: out of memory; lower them. {error}") from error


@contextmanager
def convert_errors(expected: str, to: type[Exception] = ValueError) -> Iterator[None]:
    """Convert any exception of code outside this project to one that says what was expected.

    RunStoppedError, out-of-memory errors and missing packages pass unchanged: their messages
    already say what to do.
    """
    try:
        yield
    except Exception as cause:
        is_clear = isinstance(cause, (RunStoppedError, ModuleNotFoundError, MemoryError))
        if is_clear or _is_out_of_memory(cause):
            raise
        kind = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
        raise to(f"{expected}; {kind}{cause}") from cause


def _is_out_of_memory(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size  # its import takes seconds

    return should_reduce_batch_size(error)
