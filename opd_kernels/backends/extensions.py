"""The compiled extensions of csrc/, where they are built and fit this Python, CPU and torch.

An extension that is there but cannot be used is left out, and `problems` says why. Whoever asks for
its backend gets this text as an error: a broken build is not a missing one.
"""

import importlib
import importlib.util
import re
import struct
from pathlib import Path
from typing import Any

import torch

# From the best instruction set to the most common one.
_CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")
_PACKAGE = Path(__file__).parents[1]
_BUILT_FOR = re.compile(rb"opd_kernels is built for torch (\d[\w.+]*)")  # from csrc/checks.h

# Why a backend cannot be used though its files are there, and the remedy, by the backend's name.
problems: dict[str, str] = {}


def load(backend: str, name: str) -> Any:
    """The extension module of that name in this package; None if it is not built or not usable."""
    spec = importlib.util.find_spec(f"opd_kernels.{name}")
    if spec is None or spec.origin is None:
        _leave_out(backend, f"{name}.*", "is built for another version of Python")
        return None
    content = Path(spec.origin).read_bytes()
    match = _BUILT_FOR.search(content)
    built_for = match[1].decode() if match else None
    reason = f"is built for torch {built_for or 'of an unknown version'}"
    reason += f", and torch {torch.__version__} is installed"
    if not _is_whole(content):
        reason = "is incomplete"
    elif built_for is None or _fits(built_for):
        try:
            return importlib.import_module(f"opd_kernels.{name}")
        except ImportError as error:
            reason += f" ({error})"
    _leave_out(backend, Path(spec.origin).name, reason)
    return None


def _load_cpu() -> Any:
    """The C++ extension for this CPU's instruction set, else for the best lesser one."""
    best = torch.backends.cpu.get_cpu_capability()
    usable = _CAPABILITIES[_CAPABILITIES.index(best) :] if best in _CAPABILITIES else ("DEFAULT",)
    for capability in usable:
        module = load("cpu", f"_cpu_{capability.lower()}")
        if module is not None:
            return module
    _leave_out("cpu", "_cpu_*", f"is built for a CPU with other instructions than {best}")
    return None


def _leave_out(backend: str, pattern: str, reason: str) -> None:
    """Keep the first reason for which a file of a backend cannot be used, if there is a file."""
    files = sorted(p.name for p in _PACKAGE.glob(pattern) if p.suffix in (".so", ".pyd"))
    remedy = "pip install --no-build-isolation --no-deps --force-reinstall . in the checkout"
    if (_PACKAGE.parent / "setup.py").exists():
        remedy = f"pip install --no-build-isolation --no-deps --editable {_PACKAGE.parent}"
    if files:
        problems.setdefault(backend, f"{files[0]} {reason}; to build it again: {remedy}")


def _fits(version: str) -> bool:
    """Whether the installed torch has the C++ interface of a version.

    It changes with minor versions, also where all symbols are found.
    """
    return version.split(".")[:2] == torch.__version__.split(".")[:2]


def _is_whole(content: bytes) -> bool:
    """Whether a library is not cut off: the system ends a process that runs one that is.

    The last part of a 64-bit ELF file is its table of sections. Other files are left to the system.
    """
    if len(content) < 64 or not content.startswith(b"\x7fELF\x02\x01"):
        return True
    (start,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    return bool(len(content) >= start + size * count)


# The C++ extension (csrc/cpu): epilogues, and products of a head's weight. None if there is none.
cpu_extension: Any = _load_cpu()
