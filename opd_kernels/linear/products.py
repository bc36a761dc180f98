"""The three matrix products of a head, added up in float32 (float64) whatever the operands hold.

A GPU multiplies two 16-bit operands as they are and returns float32. Elsewhere, and where dtypes
are mixed, 16-bit operands are upcast one slice of the weight at a time. That is exact, and it is
also the fast way without native 16-bit matrix instructions. On an x86 CPU the C++ extension gives
every thread its own slices (csrc/cpu/products.cpp), which is faster in float32 too (docs/log.md).
"""

import platform
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from opd_kernels.backends.extensions import cpu_extension as extension
from opd_kernels.backends.records import Head

# Rows of the weight in a CPU thread's slice: enough to pay for packing the other operand.
SLICE_ROWS = 256
# Elsewhere PyTorch may call a library that has threads of its own, such as Arm's.
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_GPU_BYTES = 256 << 20  # of upcast weight, or of a separate product, at a time on a GPU
_PAIRS_OF_16_BITS = [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)]
_ALIGNMENT = 64  # rows of a slice are a multiple of this, so that its columns start aligned

# PyTorch before 2.10 refuses to add 16-bit products to a float32 sum (pytorch/pytorch#167931).
_ADDS_IN_PLACE = TorchVersion(torch.__version__) >= "2.10"


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which the products take hidden states and gradients of logits."""
    dtypes = (hidden.dtype, weight.dtype)
    is_16_bit = dtypes in _PAIRS_OF_16_BITS
    if is_16_bit and _multiplies_16_bit(hidden.device):
        return hidden.dtype
    return torch.float64 if torch.float64 in dtypes else torch.float32


def float16_loss_scale(
    dtype: torch.dtype, head: Head, largest_exponent: int, *gradients: Tensor
) -> Tensor | None:
    """A power of two to divide gradients by, so that float16 holds them; None for other dtypes.

    A chunk of gradients with respect to raw products has the operands' dtype. In float16 the
    gradient of a mean over many tokens would flush to 0 there, and that of a scaled loss would
    overflow. After the division the largest entry is at most 2^largest_exponent.

    Args:
        dtype: dtype of the chunk of gradients.
        head: the gradients are multiplied by at most its slope.
        largest_exponent: the room that is left below float16's largest exponent, 15.
        gradients: gradients with respect to final logits.
    """
    if dtype != torch.float16:
        return None
    largest = torch.stack([g.abs().amax() if g.numel() else g.new_zeros(()) for g in gradients])
    largest = largest.amax() * head.max_slope
    exponent = torch.frexp(largest).exponent - largest_exponent
    usable = largest.isfinite() & (largest > 0)
    return torch.exp2(torch.where(usable, exponent, 0).to(gradients[0].dtype))


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write hidden [n, D] @ weight [v, D].T into out [n, v]; hidden has the operand dtype."""
    if hidden.dtype != out.dtype:
        return _product(hidden, weight.t(), out)
    if _extension_takes(hidden, weight, out):
        extension.project(hidden, weight, out, SLICE_ROWS)
        return out
    for rows, weight_rows in _slices(weight, out.dtype):
        torch.mm(hidden, weight_rows.t(), out=out[:, rows])
    return out


def add_hidden_gradient_(dhidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """dhidden [n, D] += dlogits [n, v] @ weight [v, D]; dlogits has the operand dtype."""
    if dlogits.dtype != dhidden.dtype:
        _add_product_(dhidden, dlogits, weight)
    elif dlogits.shape[0] == 1 and weight.dtype == dlogits.dtype:
        # MKL divides the sum of a single row among threads. Slices that are added one after the
        # other had 1.4 (2 threads) to 2.6 times (8 threads) its rms error.
        dhidden.addmm_(dlogits, weight)
    elif _extension_takes(dhidden, weight, dlogits):
        extension.add_hidden_gradient_(dhidden, dlogits, weight, SLICE_ROWS)
    else:
        for rows, weight_rows in _slices(weight, dlogits.dtype):
            dhidden.addmm_(dlogits[:, rows], weight_rows)


def add_weight_gradient_(
    dweight: Tensor, dlogits: Tensor, hidden: Tensor, *, overwrite: bool
) -> None:
    """dweight [v, D] += dlogits [n, v].T @ hidden [n, D], or = with overwrite.

    dlogits and hidden have the operand dtype.
    """
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.t(), hidden, beta=0 if overwrite else 1)
    elif overwrite:
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
    """Whether the C++ extension is built, multiplies these matrices, and is faster."""
    if extension is None or not _IS_X86:
        return False
    if weight.dtype == torch.float64 != logits.dtype:
        return False
    for matrix in (hidden, weight, logits):  # ordinary tensors in a CPU's memory
        stride, step = matrix.stride()
        if type(matrix) not in (Tensor, torch.nn.Parameter) or matrix.device.type != "cpu":
            return False
        if matrix.is_neg() or matrix._is_zerotensor():
            return False
        if step != 1 or stride < matrix.shape[1]:
            return False
    return True


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the weight's rows in dtype: views, or copies that the next slice overwrites."""
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
