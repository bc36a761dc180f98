"""Choice of a backend: the module that supplies the epilogues on a chunk of logits."""

import importlib
import importlib.util
import os
from functools import cache
from typing import Any, Protocol, cast

# The submodules torch and cuda take these names in this namespace, so the libraries' are not used.
from torch import Tensor, dtype
from torch import device as device_type
from torch.cuda import is_available as has_gpu

from opd_kernels.backends import cpu, cuda
from opd_kernels.backends import torch as torch_backend
from opd_kernels.backends.head import Head
from opd_kernels.backends.sparse_rows import SparseRows
from opd_kernels.backends.state import RowState

__all__ = ["Epilogues", "FusedEpilogues", "RowState", "available_backends", "select_backend"]


class FusedEpilogues(Protocol):
    """Epilogues with the matrix product inside: no chunk of logits in memory."""

    def update(self, hidden: Tensor, head: Head, state: RowState) -> None:
        """Fill a state of given ids from hidden [N, D]."""
        ...

    def support(self, ids: Tensor, hidden: Tensor, head: Head) -> Any:
        """ids [n, K] of some rows, as `gradient` wants them."""
        ...

    def gradient(
        self,
        hidden: Tensor,
        first_id: int,
        head: Head,
        support: Any,
        dvalues: Tensor,
        tail: Tensor,
        dtail: Tensor,
        out: Tensor,
    ) -> None:
        """Epilogues.gradient after the product, for the columns of out [n, v]."""
        ...


class Epilogues(Protocol):
    """What a backend implements; backends/torch.py is the definition."""

    def update(self, chunk: Tensor, first_id: int, head: Head, state: RowState) -> None: ...

    def gradient(
        self,
        chunk: Tensor,
        first_id: int,
        head: Head,
        ids: Tensor,
        dvalues: Tensor,
        tail: Tensor,
        dtail: Tensor,
        out: Tensor,
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

    def divergence(
        self,
        chunk: Tensor,
        head: Head,
        teacher_chunk: Tensor,
        teacher_head: Head,
        beta: float,
        upstream: Tensor | None,
        out: Tensor,
    ) -> Tensor: ...

    def sparse_backward(
        self,
        ids: Tensor,
        coefficients: Tensor,
        hidden: Tensor,
        weight: Tensor,
        dhidden: Tensor | None,
        dweight: Tensor | None,
    ) -> None: ...

    def reverse_kl(
        self,
        values: Tensor,
        tail: Tensor,
        teacher_values: Tensor,
        teacher_tail: Tensor,
        stop_gradient: bool,
        bucket: bool,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """divergences.reverse_kl [n] on S, with tail="bucket" or "drop", and its gradient wrt
        values [n, K] and tail [n]; None where autograd is to do it.
        """
        ...

    def fused(self, operand: dtype, head: Head, k: int) -> FusedEpilogues | None:
        """The fused epilogues for products of the operand dtype (linear/products.py) and K slots,
        where the backend has them and they are the faster way. Their hidden states are contiguous.
        """
        ...


# What "auto" takes of what is installed. No report of `make gpu` has shown "cuda" to be faster than
# "triton" yet.
_FASTEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


@cache
def _backends() -> dict[str, Epilogues]:
    backends: dict[str, Any] = {"torch": torch_backend}
    if cpu.extension is not None:
        backends["cpu"] = cpu
    if importlib.util.find_spec("triton") is not None and (has_gpu() or _interprets()):
        backends["triton"] = importlib.import_module("opd_kernels.backends.triton")
    extension = cuda.load_extension()
    if extension is not None and has_gpu():
        backends["cuda"] = cuda.CudaEpilogues(extension)
    return cast(dict[str, Epilogues], backends)


def _interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def available_backends() -> list[str]:
    """The names that `backend=` and OPD_BACKEND accept on this machine, besides "auto".

    "triton" and "cuda" are among them where there is a GPU; "triton" also with TRITON_INTERPRET=1.
    """
    return sorted(_backends())


def select_backend(name: str, device: device_type) -> Epilogues:
    """The backend of that name; "auto" takes OPD_BACKEND where it is set, else the best for the
    device.

    Raises:
        TypeError: the device is none.
        ValueError: no backend of that name is installed.
    """
    if not isinstance(device, device_type):
        raise TypeError(
            f"device: expected a torch.device, got {device!r}; pass the device of a tensor"
        )
    if name == "auto":
        name = os.environ.get("OPD_BACKEND", "auto")
    backends = _backends()
    if name == "auto":
        names = (n for n in _FASTEST.get(device.type, ()) if n in backends and reaches(n, device))
        name = next(names, "torch")
    is_known = isinstance(name, str) and name in backends
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


def reaches(name: str, device: device_type) -> bool:
    """Whether a backend of that name works on the device's tensors."""
    on_cpu = device.type == "cpu"
    if name == "triton":
        return _interprets() if on_cpu else device.type == "cuda" and not _interprets()
    if name == "cuda":
        return cuda.runs_on(device)
    return name != "cpu" or on_cpu
