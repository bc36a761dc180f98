"""Functions that a recipe names, file.py:function or module:function, and others' exceptions."""

import importlib
import runpy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size

from trainer.stopping import RunStoppedError


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


def load_function(key: str, reference: str, named: Iterable[str]) -> Callable[..., Any]:
    """The function that a recipe's key refers to.

    Args:
        key: the recipe's, for the message.
        reference: file.py:function or module:function.
        named: what the key could be instead.

    Raises:
        ValueError: there is no such function.
    """
    source, _, name = reference.partition(":")
    expected = f"{key}: expected {', '.join(named)}, file.py:function or module:function"
    try:
        with explained(f"{expected}, got {reference!r}"):
            if source.endswith(".py"):
                functions = runpy.run_path(source)
            else:
                functions = vars(importlib.import_module(source))
    except ModuleNotFoundError as error:
        raise ValueError(f"{expected}, got {reference!r}; {error}") from None
    if not callable(functions.get(name)):
        raise ValueError(f"{expected}, got {reference!r}, which has no such function")
    return functions[name]
