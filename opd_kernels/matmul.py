"""The three matrix products of a head, added up in float32 (float64) whatever the operands hold.

A GPU multiplies two 16-bit operands as they are and returns float32. Elsewhere, and where dtypes
are mixed, 16-bit operands are upcast one slice of the weight at a time: that is exact, and without
native 16-bit matrix instructions it is also the fast way. A CPU multiplies float32 weights in
slices too, which it does up to a quarter faster than all at once (docs/log.md).
"""

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from opd_kernels import pages
from opd_kernels.head import accumulator_dtype

# Bytes of a slice of the weight for each thread: what is fastest on a CPU to project, and to
# multiply gradients with.
_PROJECT_BYTES, _GRADIENT_BYTES = 1 << 20, 4 << 20
# Room for upcast slices on a CPU. Memory that is written anew soon after it was read has to be
# fetched back from the other cores' caches first, which takes longer than to write what left them.
UPCAST_BYTES = 16 << 20
_GPU_BYTES = 256 << 20  # of what is upcast, or multiplied apart, at a time on a GPU
_ALIGNMENT = 64  # rows: a chunk's columns then start where a vector does

# PyTorch before 2.10 refuses to add 16-bit products to a float32 sum (pytorch/pytorch#167931).
_ADDS_IN_PLACE = TorchVersion(torch.__version__) >= "2.10"


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What hidden states and gradients of logits are to be held in for the products."""
    is_16_bit = hidden.dtype in (torch.bfloat16, torch.float16)
    if is_16_bit and hidden.dtype == weight.dtype and _multiplies_16_bit(hidden.device):
        return hidden.dtype
    return accumulator_dtype(hidden, weight)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write hidden [n, D] @ weight [v, D].T into out [n, v]; hidden is of the operand dtype."""
    if hidden.dtype != out.dtype:
        return _product(hidden, weight.t(), out)
    for rows, weight_rows in _slices(weight, out.dtype, _PROJECT_BYTES):
        torch.mm(hidden, weight_rows.t(), out=out[:, rows])
    return out


def add_hidden_gradient_(dhidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """dhidden [n, D] += dlogits [n, v] @ weight [v, D]; dlogits is of the operand dtype."""
    if dlogits.dtype != dhidden.dtype:
        _add_product_(dhidden, dlogits, weight)
        return
    # An upcast slice is written first, so it pays to keep it nearer.
    most = _GRADIENT_BYTES if weight.dtype == dlogits.dtype else _PROJECT_BYTES
    for rows, weight_rows in _slices(weight, dlogits.dtype, most):
        dhidden.addmm_(dlogits[:, rows], weight_rows)


def add_weight_gradient_(dweight: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """dweight [v, D] += dlogits [n, v].T @ hidden [n, D], both of the operand dtype; `first`
    overwrites instead.
    """
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.t(), hidden, beta=0 if first else 1)
    elif first:
        _product(dlogits.t(), hidden, dweight)
    else:
        _add_product_(dweight, dlogits.t(), hidden)


def _multiplies_16_bit(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b of two 16-bit matrices into out of float32."""
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b of two 16-bit matrices, total of float32."""
    if _ADDS_IN_PLACE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    rows = max(1, _GPU_BYTES // (total.shape[1] * total.element_size()))
    for part, a_rows in zip(total.split(rows), a.split(rows), strict=True):
        part.add_(torch.mm(a_rows, b, out_dtype=total.dtype))


def _slices(
    weight: Tensor, dtype: torch.dtype, bytes_a_thread: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in dtype, a slice at a time: views, or copies that later ones replace."""
    if weight.dtype == dtype and weight.device.type != "cpu":
        yield slice(0, weight.shape[0]), weight
        return
    on_cpu = weight.device.type == "cpu"
    most = bytes_a_thread * torch.get_num_threads() if on_cpu else _GPU_BYTES
    most //= weight.shape[1] * dtype.itemsize
    most = min(weight.shape[0], max(_ALIGNMENT, most // _ALIGNMENT * _ALIGNMENT))
    starts = range(0, weight.shape[0], most)
    buffers = None
    if weight.dtype != dtype:
        slice_bytes = most * weight.shape[1] * dtype.itemsize
        slots = min(len(starts), max(1, UPCAST_BYTES // slice_bytes)) if on_cpu else 1
        buffers = cycle(pages.empty((slots, most, weight.shape[1]), weight, dtype))
    for first in starts:
        rows = slice(first, min(first + most, weight.shape[0]))
        part = weight[rows]
        yield rows, part if buffers is None else next(buffers)[: part.shape[0]].copy_(part)
