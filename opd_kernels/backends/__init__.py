"""Choice of a backend: the object that supplies the epilogues on a chunk of logits."""

import importlib
import importlib.util
import os
import warnings
from functools import cache

# The submodule cuda takes its name in this namespace, so torch's is imported under other names.
from torch import device as device_type
from torch.cuda import is_available as has_gpu

from opd_kernels.backends import cpu, cuda, extensions
from opd_kernels.backends.epilogues import Epilogues

__all__ = ["available_backends", "resolve_backend", "select_backend"]

# What "auto" prefers among the installed backends. No report of `make gpu` has shown "cuda" to be
# faster than "triton" yet.
_FASTEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


@cache
def _backends() -> dict[str, Epilogues]:
    backends: dict[str, Epilogues] = {"torch": Epilogues()}
    if cpu.extension is not None:
        backends["cpu"] = cpu.CpuEpilogues()
    if importlib.util.find_spec("triton") is not None and (has_gpu() or _interprets()):
        try:
            backends["triton"] = importlib.import_module(f"{__name__}.triton").TritonEpilogues()
        except ImportError as error:
            extensions.problems["triton"] = f"it cannot be imported ({error}); install triton>=3.4"
    extension = cuda.load_extension()
    if extension is not None and has_gpu():
        backends["cuda"] = cuda.CudaEpilogues(extension)
    return backends


def _interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def available_backends() -> list[str]:
    """The names that `backend=` and OPD_BACKEND accept on this machine, besides "auto".

    "triton" and "cuda" are among them where there is a GPU; "triton" also with TRITON_INTERPRET=1.
    """
    return sorted(_backends())


def resolve_backend(name: str, device: device_type) -> str:
    """Return the name that "auto" stands for: OPD_BACKEND, else the fastest one for the device."""
    if name == "auto":
        name = os.environ.get("OPD_BACKEND", "auto")
    if name != "auto":
        return name
    for candidate in _FASTEST.get(device.type, ()):
        if candidate in _backends() and reaches(candidate, device):
            return candidate
        _warn_of(candidate)
    return "torch"


def select_backend(name: str, device: device_type) -> Epilogues:
    """Return the backend of that name for a device; "auto" as in resolve_backend.

    Raises:
        TypeError: the device is not a torch.device.
        ValueError: no backend of that name is installed, or it does not reach the device.
    """
    if not isinstance(device, device_type):
        raise TypeError(
            f"device: expected a torch.device, got {device!r}; pass the device of a tensor"
        )
    if name == "auto":
        name = resolve_backend(name, device)
    backends = _backends()
    is_known = isinstance(name, str) and name in backends
    if isinstance(name, str) and not is_known and name in extensions.problems:
        raise ValueError(f"backend: {name!r} cannot be used: {extensions.problems[name]}")
    if is_known and not reaches(name, device):
        raise ValueError(
            f"backend: {name!r} does not reach tensors on {device}; 'torch' works on any device"
        )
    if not is_known:
        raise ValueError(
            f"backend: expected 'auto' or one of {available_backends()}, got {name!r} for tensors "
            f"on {device}; choose an installed backend, or unset OPD_BACKEND"
        )
    return backends[name]


@cache
def _warn_of(name: str) -> None:
    """Warn once if "auto" passes over a backend whose extension is there but cannot be used."""
    reason = extensions.problems.get(name)
    if reason is not None:
        warnings.warn(
            f"backend: 'auto' does not take {name!r}, and goes on more slowly: {reason}",
            stacklevel=2,
        )


def reaches(name: str, device: device_type) -> bool:
    """Whether a backend of that name works on the device's tensors."""
    on_cpu = device.type == "cpu"
    if name == "triton":
        return _interprets() if on_cpu else device.type == "cuda" and not _interprets()
    if name == "cuda":
        return cuda.runs_on(device)
    return name != "cpu" or on_cpu
