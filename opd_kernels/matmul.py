"""The three matrix products of a head, in the accumulator's dtype whatever the operands hold.

16-bit operands are upcast one slice of the weight at a time. That is exact, and without native
16-bit matrix instructions it is also the fast way (docs/log.md).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS_PER_UPCAST = 8192


def _upcast_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    for first in range(0, weight.shape[0], _ROWS_PER_UPCAST):
        rows = slice(first, min(first + _ROWS_PER_UPCAST, weight.shape[0]))
        yield rows, weight[rows].to(dtype)


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
