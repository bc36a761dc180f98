"""The epilogues as Triton kernels, for chunks on a GPU; TRITON_INTERPRET=1 runs them on a CPU."""

from types import ModuleType

import torch
import triton
from torch import Tensor

from opd_kernels.backends import torch as definition
from opd_kernels.backends.devices import device_of
from opd_kernels.backends.head import Head, accumulator_dtype
from opd_kernels.backends.sparse_rows import SparseRows
from opd_kernels.backends.state import RowState
from opd_kernels.backends.triton import configs, linear
from opd_kernels.backends.triton.configs import Case, RowConfig
from opd_kernels.backends.triton.divergence import FORWARD, JSD, REVERSE, divergence_kernel
from opd_kernels.backends.triton.launch import flags, is_plain, operands
from opd_kernels.backends.triton.reverse_kl import reverse_kl_kernel
from opd_kernels.backends.triton.rows import gradient_kernel, update_kernel


def update(chunk: Tensor, first_id: int, head: Head, state: RowState) -> None:
    """As in backends/torch.py."""
    (rows, columns), k = chunk.shape, state.values.shape[1]
    if k > (configs.MAX_SELECTED if state.selects else configs.MAX_GIVEN):
        return definition.update(chunk, first_id, head, state)
    if rows == 0:
        return
    config = _config("update", k, head, chunk).fitted(columns, state.values.dtype)
    with device_of(chunk):
        update_kernel[(rows,)](
            chunk, chunk.stride(0), columns, first_id, *operands(head, first_id, columns, chunk),
            state.values, state.ids, k, state.max, state.sum,
            state.max if state.moment is None else state.moment,
            SELECTS=state.selects, HAS_MOMENT=state.moment is not None, **flags(head),
            K=triton.next_power_of_2(k), BLOCK=config.block, **config.options(),
        )  # fmt: skip


def gradient(
    chunk: Tensor,
    first_id: int,
    head: Head,
    ids: Tensor,
    dvalues: Tensor,
    tail: Tensor,
    dtail: Tensor,
    out: Tensor,
) -> None:
    """As in backends/torch.py."""
    (rows, columns), k = chunk.shape, ids.shape[1]
    if k > configs.MAX_GIVEN:
        return definition.gradient(chunk, first_id, head, ids, dvalues, tail, dtail, out)
    if rows == 0:
        return
    ids, dvalues, tail, dtail = (t.contiguous() for t in (ids, dvalues, tail, dtail))
    config = _config("gradient", k, head, chunk).fitted(columns, dvalues.dtype)
    span = config.block * configs.GRADIENT_BLOCKS
    with device_of(chunk):
        gradient_kernel[(rows, triton.cdiv(columns, span))](
            chunk, chunk.stride(0), columns, first_id, *operands(head, first_id, columns, chunk),
            ids, dvalues, k, tail, dtail, out, out.stride(0), **flags(head),
            K=triton.next_power_of_2(k), BLOCK=config.block, SPAN=span, **config.options(),
        )  # fmt: skip


# What is kept has a size that only the data tells, so this one synchronises in any case.
def filtered_gradient(
    chunk: Tensor,
    head: Head,
    ids: Tensor,
    dvalues: Tensor,
    tail: Tensor,
    dtail: Tensor,
    threshold: Tensor,
) -> tuple[SparseRows, Tensor]:
    """As in backends/torch.py."""
    return definition.filtered_gradient(chunk, head, ids, dvalues, tail, dtail, threshold)


sparse_backward = definition.sparse_backward


def divergence(
    chunk: Tensor,
    head: Head,
    teacher_chunk: Tensor,
    teacher_head: Head,
    beta: float,
    upstream: Tensor | None,
    out: Tensor,
) -> Tensor:
    """As in backends/torch.py."""
    rows, columns = chunk.shape
    dtype = accumulator_dtype(chunk)
    losses = chunk.new_empty(rows, dtype=dtype)
    if rows == 0:
        return losses
    config = _config("divergence", 0, head, chunk).fitted(columns, dtype)
    with device_of(chunk):
        divergence_kernel[(rows,)](
            chunk, chunk.stride(0), *operands(head, 0, columns, chunk),
            teacher_chunk, teacher_chunk.stride(0),
            *operands(teacher_head, 0, columns, teacher_chunk),
            columns, beta, losses if upstream is None else upstream.contiguous(), losses,
            out, out.stride(0),
            KIND={0.0: FORWARD, 1.0: REVERSE}.get(beta, JSD).value,
            HAS_GRADIENT=upstream is not None, **flags(head),
            TEACHER_HAS_BIAS=teacher_head.bias is not None,
            TEACHER_CAPPED=teacher_head.softcap is not None,
            BLOCK=config.block, **config.options(),
        )  # fmt: skip
    return losses


def reverse_kl(
    values: Tensor,
    tail: Tensor,
    teacher_values: Tensor,
    teacher_tail: Tensor,
    stop_gradient: bool,
    bucket: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As in backends/__init__.py."""
    rows, k = values.shape
    if rows == 0 or k > configs.MAX_GIVEN or values.dtype != teacher_values.dtype:
        return None
    tensors = (values, tail, teacher_values, teacher_tail)
    losses, dvalues, dtail = (torch.empty_like(t, memory_format=torch.contiguous_format)
                              for t in (tail, values, tail))  # fmt: skip
    slots = triton.next_power_of_2(k)
    config = configs.row_config(Case("reverse_kl", k, plain=True), values.device)
    block = max(1, config.block // slots)
    with device_of(values):
        reverse_kl_kernel[(triton.cdiv(rows, block),)](
            *(t.contiguous() for t in tensors), losses, dvalues, dtail, rows, k,
            STOP_GRADIENT=stop_gradient, BUCKET=bucket, ROWS=block, K=slots,
            **config.options(),
        )  # fmt: skip
    return losses, dvalues, dtail


def _config(kernel: str, k: int, head: Head, chunk: Tensor) -> RowConfig:
    return configs.row_config(Case(kernel, k, is_plain(head)), chunk.device)


def fused(operand: torch.dtype, head: Head, k: int) -> ModuleType | None:
    """The kernels of linear.py, for a product of few terms in 16 bits and few slots."""
    is_16_bit = operand.itemsize == 2 and operand == head.weight.dtype
    is_small = head.weight.shape[1] <= configs.MAX_FUSED_DIM and k <= configs.MAX_FUSED
    return linear if is_16_bit and is_small and head.weight.stride(1) == 1 else None
