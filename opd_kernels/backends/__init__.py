"""Choice of a backend: the module that supplies the epilogues on a chunk of logits."""

import os
from typing import Protocol

# The submodule backends.torch takes the name `torch` in this namespace, so the library is not
# imported here.
from torch import Tensor
from torch import device as device_type

from opd_kernels.backends import cpu
from opd_kernels.backends import torch as torch_backend
from opd_kernels.backends.state import RowState
from opd_kernels.head import Head
from opd_kernels.sparse_rows import SparseRows

__all__ = ["Epilogues", "RowState", "available_backends", "select_backend"]


class Epilogues(Protocol):
    """What a backend implements; backends/torch.py is the definition."""

    def update(self, chunk: Tensor, first_id: int, head: Head, state: RowState) -> None: ...

    def gradient_(
        self,
        chunk: Tensor,
        first_id: int,
        head: Head,
        ids: Tensor,
        dvalues: Tensor,
        tail: Tensor,
        dtail: Tensor,
    ) -> None: ...

    def filtered_gradient(
        self,
        chunk: Tensor,
        head: Head,
        ids: Tensor,
        dvalues: Tensor,
        tail: Tensor,
        dtail: Tensor,
        threshold: Tensor,
    ) -> tuple[SparseRows, Tensor]: ...

    def divergence_(
        self,
        chunk: Tensor,
        head: Head,
        teacher_chunk: Tensor,
        teacher_head: Head,
        beta: float,
        upstream: Tensor | None,
    ) -> Tensor: ...


_BACKENDS: dict[str, Epilogues] = {"torch": torch_backend}
if cpu.extension is not None:
    _BACKENDS["cpu"] = cpu


def available_backends() -> list[str]:
    """The names that `backend=` and OPD_BACKEND accept on this installation, besides "auto"."""
    return sorted(_BACKENDS)


def select_backend(name: str, device: device_type) -> Epilogues:
    """The backend of that name; "auto" takes OPD_BACKEND where it is set, else the best for the
    device.

    Raises:
        ValueError: no backend of that name is installed.
    """
    if name == "auto":
        name = os.environ.get("OPD_BACKEND", "auto")
    if name == "auto":
        name = "cpu" if device.type == "cpu" and "cpu" in _BACKENDS else "torch"
    if name == "cpu" and name in _BACKENDS and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' works on CPU tensors, got tensors on {device}")
    if name not in _BACKENDS:
        raise ValueError(
            f"backend: expected 'auto' or one of {available_backends()}, got {name!r} for tensors "
            f"on {device}; choose an installed backend, or unset OPD_BACKEND"
        )
    return _BACKENDS[name]
