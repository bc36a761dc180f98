"""The compiled extensions of csrc/, where they are built.

An extension that is there but cannot be loaded raises: a broken build is not a missing one.
"""

import importlib
import importlib.util
from typing import Any

import torch

# From the best instruction set to the most common one.
_CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")


def load(name: str) -> Any:
    """The extension module of that name in this package, or None if it is not built."""
    name = f"opd_kernels.{name}"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)


def _load_cpu() -> Any:
    """The C++ extension for this CPU's instruction set, else for the best lesser one."""
    best = torch.backends.cpu.get_cpu_capability()
    usable = _CAPABILITIES[_CAPABILITIES.index(best) :] if best in _CAPABILITIES else ("DEFAULT",)
    modules = (load(f"_cpu_{capability.lower()}") for capability in usable)
    return next((module for module in modules if module is not None), None)


# The C++ extension (csrc/cpu): epilogues, and products of a head's weight. None if it is not built.
cpu_extension: Any = _load_cpu()
