"""The three matrix products of a head, added up in float32 (float64) whatever the operands hold.

A GPU multiplies two 16-bit operands as they are and returns float32. Elsewhere, and where dtypes
are mixed, 16-bit operands are upcast one slice of the weight at a time: that is exact, and without
native 16-bit matrix instructions it is also the fast way. On an x86 CPU the C++ extension gives
every thread slices of its own (csrc/cpu/products.cpp), faster in float32 too (docs/log.md).
"""

import platform
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from opd_kernels.backends.cpu_extension import extension
from opd_kernels.backends.head import accumulator_dtype

# Of a slice of the weight, for each thread of a CPU: enough to pay for packing the other operand.
SLICE_ROWS = 256
# Elsewhere PyTorch may hand a product on to a library with threads of its own, such as Arm's.
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
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
    if _extension_takes(hidden, weight, out):
        extension.project(hidden, weight, out, SLICE_ROWS)
        return out
    for rows, weight_rows in _slices(weight, out.dtype):
        torch.mm(hidden, weight_rows.t(), out=out[:, rows])
    return out


def add_hidden_gradient_(dhidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """dhidden [n, D] += dlogits [n, v] @ weight [v, D]; dlogits is of the operand dtype."""
    if dlogits.dtype != dhidden.dtype:
        _add_product_(dhidden, dlogits, weight)
    elif _extension_takes(dhidden, weight, dlogits):
        extension.add_hidden_gradient_(dhidden, dlogits, weight, SLICE_ROWS)
    else:
        for rows, weight_rows in _slices(weight, dlogits.dtype):
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


def _extension_takes(hidden: Tensor, weight: Tensor, logits: Tensor) -> bool:
    """Whether the C++ extension is built and multiplies these, where it pays."""
    is_narrow = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (
        extension is not None
        and _IS_X86
        and (is_narrow or weight.dtype == logits.dtype)
        and all(_has_plain_rows(matrix) for matrix in (hidden, weight, logits))
    )


def _has_plain_rows(matrix: Tensor) -> bool:
    """Whether the numbers are in a CPU's memory as they are, row after row."""
    stride, step = matrix.stride()
    is_plain = type(matrix) in (Tensor, torch.nn.Parameter) and matrix.device.type == "cpu"
    is_plain = is_plain and not matrix.is_neg() and not matrix._is_zerotensor()
    return is_plain and step == 1 and stride >= matrix.shape[1]


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in dtype, a slice at a time: views, or copies that the next replaces."""
    vocab, dim = weight.shape
    if weight.device.type == "cpu":
        most = SLICE_ROWS * torch.get_num_threads()
    elif weight.dtype == dtype:
        most = vocab
    else:
        most = max(_ALIGNMENT, _GPU_BYTES // (dim * dtype.itemsize) // _ALIGNMENT * _ALIGNMENT)
    most = max(1, min(vocab, most))
    buffer = None if weight.dtype == dtype else weight.new_empty((most, dim), dtype=dtype)
    for first in range(0, vocab, most):
        rows = slice(first, min(first + most, vocab))
        part = weight[rows]
        yield rows, part if buffer is None else buffer[: part.shape[0]].copy_(part)
