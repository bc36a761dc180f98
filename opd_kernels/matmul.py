"""The three matrix products of a head, in the accumulator's dtype whatever the operands hold.

16-bit operands are upcast one slice of the weight at a time. That is exact, and without native
16-bit matrix instructions it is also the fast way (docs/log.md).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_UPCAST_BYTES = 2 << 20  # stays in the cache


def _upcast_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    most = max(1, _UPCAST_BYTES // (weight.shape[1] * dtype.itemsize))
    buffer = weight.new_empty((min(most, weight.shape[0]), weight.shape[1]), dtype=dtype)
    for first in range(0, weight.shape[0], most):
        rows = slice(first, min(first + most, weight.shape[0]))
        yield rows, buffer[: rows.stop - first].copy_(weight[rows])


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write hidden [n, D] @ weight [v, D].T into out [n, v]; hidden and out share a dtype."""
    for rows, weight_rows in _upcast_slices(weight, out.dtype):
        torch.mm(hidden, weight_rows.t(), out=out[:, rows])
    return out


def add_hidden_gradient_(dhidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """dhidden [n, D] += dlogits [n, v] @ weight [v, D]."""
    for rows, weight_rows in _upcast_slices(weight, dlogits.dtype):
        dhidden.addmm_(dlogits[:, rows], weight_rows)


def add_weight_gradient_(dweight: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """dweight [v, D] += dlogits [n, v].T @ hidden [n, D]; `first` overwrites instead."""
    dweight.addmm_(dlogits.t(), hidden, beta=0 if first else 1)
