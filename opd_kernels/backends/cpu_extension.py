"""The C++ extension (csrc/cpu): epilogues for a backend, and products of a head's weight."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

# From the best instruction set to the most common one.
_CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")


def _load() -> ModuleType | None:
    """The extension built for this CPU's instruction set or a lesser one; None if none is built.

    An extension that is there but cannot be loaded raises: a broken build is not a missing one.
    """
    own = torch.backends.cpu.get_cpu_capability()
    usable = _CAPABILITIES[_CAPABILITIES.index(own) :] if own in _CAPABILITIES else ("DEFAULT",)
    for capability in usable:
        name = f"opd_kernels._cpu_{capability.lower()}"
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    return None


extension: Any = _load()
