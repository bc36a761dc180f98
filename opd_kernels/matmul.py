"""The three matrix products of a head, added up in float32 (float64) whatever the operands hold.

A GPU multiplies two 16-bit operands as they are and returns float32. Elsewhere, and where dtypes
are mixed, 16-bit operands are upcast one slice of the weight at a time: that is exact, and without
native 16-bit matrix instructions it is also the fast way (docs/log.md).
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from opd_kernels.head import accumulator_dtype

_UPCAST_BYTES = 2 << 20  # stays in the cache


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
    for rows, weight_rows in _upcast_slices(weight, out.dtype):
        torch.mm(hidden, weight_rows.t(), out=out[:, rows])
    return out


def add_hidden_gradient_(dhidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """dhidden [n, D] += dlogits [n, v] @ weight [v, D]; dlogits is of the operand dtype."""
    if dlogits.dtype != dhidden.dtype:
        _add_product_(dhidden, dlogits, weight)
        return
    for rows, weight_rows in _upcast_slices(weight, dlogits.dtype):
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


def float16_unit(dtype: torch.dtype, *gradients: Tensor) -> Tensor | None:
    """The power of two to divide a loss's gradients by before they become a float16 chunk: those of
    a mean over many tokens would flush to 0 there, and a scaled loss's overflow. None for others.
    """
    if dtype != torch.float16:
        return None
    largest = torch.stack([g.abs().amax() if g.numel() else g.new_zeros(()) for g in gradients])
    # 2^10 leaves room above for a softcap's and a temperature's derivative, 2^-24 below is dropped.
    exponent = torch.frexp(largest.amax()).exponent - 10
    usable = largest.amax().isfinite() & (largest.amax() > 0)
    return torch.exp2(torch.where(usable, exponent, 0).to(gradients[0].dtype))


def _multiplies_16_bit(device: torch.device) -> bool:
    return device.type == "cuda"


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b of two 16-bit matrices into out of float32."""
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b of two 16-bit matrices, total of float32."""
    if _adds_in_place(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


@cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether addmm takes a float32 sum of 16-bit products; PyTorch before 2.10 refuses or errs."""
    a = torch.eye(16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(total, 1 + torch.eye(16, device=device))


def _upcast_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    most = max(1, _UPCAST_BYTES // (weight.shape[1] * dtype.itemsize))
    buffer = weight.new_empty((min(most, weight.shape[0]), weight.shape[1]), dtype=dtype)
    for first in range(0, weight.shape[0], most):
        rows = slice(first, min(first + most, weight.shape[0]))
        yield rows, buffer[: rows.stop - first].copy_(weight[rows])
