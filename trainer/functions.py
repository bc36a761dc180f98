"""Functions that a recipe names: file.py:function or module:function."""

import importlib
import runpy
from collections.abc import Callable, Iterable
from typing import Any


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
    if source.endswith(".py"):
        functions = runpy.run_path(source)
    else:
        try:
            functions = vars(importlib.import_module(source))
        except ModuleNotFoundError as error:
            raise ValueError(f"{key}: {error} in {reference!r}") from None
    if name not in functions:
        raise ValueError(
            f"{key}: expected {', '.join(named)}, file.py:function or module:function, got "
            f"{reference!r}, which has no such function"
        )
    return functions[name]
