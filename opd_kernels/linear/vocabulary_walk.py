"""The chunked driver in the recompute order: vocabulary chunks outside, blocks of tokens inside.

Both functions hold one [n, v] chunk of logits, or of their gradient, at a time. The weight is read
chunk by chunk, each row block of dweight is written once, and dhidden accumulates in float32
(float64). Where a backend has the matrix product inside its kernels, logits are never in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.backends import Epilogues, FusedEpilogues, RowState
from opd_kernels.backends.head import Head
from opd_kernels.linear import float16, pages, products
from opd_kernels.linear.plan import recompute_sizes


@dataclass(frozen=True)
class _Chunks:
    """The walk over [N, V]."""

    hidden: Tensor  # [N, D] in the operand dtype
    head: Head
    rows: int
    columns: int

    @classmethod
    def plan(
        cls, hidden: Tensor, head: Head, dtypes: set[torch.dtype], chunk_bytes: int | None
    ) -> "_Chunks":
        """For a chunk of each of the dtypes."""
        bytes_a_logit = sum(dtype.itemsize for dtype in dtypes)
        extent = (hidden.shape[0], head.vocab_size)
        sizes = recompute_sizes(*extent, bytes_a_logit, hidden.device, chunk_bytes)
        return cls(hidden, head, *sizes)

    def columns_of(self) -> list[tuple[int, int]]:
        starts = range(0, self.head.vocab_size, self.columns)
        return [(first, min(first + self.columns, self.head.vocab_size)) for first in starts]

    def rows_of(self) -> list[slice]:
        tokens = self.hidden.shape[0]
        return [slice(f, min(f + self.rows, tokens)) for f in range(0, tokens, self.rows)]

    def buffer(self, dtype: torch.dtype) -> Callable[[slice, Tensor], Tensor]:
        """One buffer that every chunk reuses: a function to its view for some rows and weights."""
        memory = pages.empty((self.rows * self.columns,), self.hidden, dtype)

        def view(rows: slice, weight: Tensor) -> Tensor:
            shape = (rows.stop - rows.start, weight.shape[0])
            return memory[: shape[0] * shape[1]].view(shape)

        return view


def reduce_logits(
    hidden: Tensor, head: Head, state: RowState, epilogues: Epilogues, chunk_bytes: int | None
) -> None:
    """One pass over the vocabulary: bring every logit of hidden [N, D] into the state. hidden is of
    the operand dtype of products.py.
    """
    if hidden.shape[0] == 0:
        return
    fused = epilogues.fused(hidden.dtype, head, state.ids.shape[1])
    if fused is not None and not state.selects:
        fused.update(hidden.contiguous(), head, state)
        state.close()
        return
    dtype = state.values.dtype
    chunks = _Chunks.plan(hidden, head, {dtype}, chunk_bytes)
    buffer = chunks.buffer(dtype)
    for first, last in chunks.columns_of():
        weight = head.rows(first, last)
        for rows in chunks.rows_of():
            logits = products.project(hidden[rows], weight, buffer(rows, weight))
            epilogues.update(logits, first, head, state.rows(rows))
    state.close()


def backpropagate(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    dvalues: Tensor,
    tail: Tensor,
    dtail: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    epilogues: Epilogues,
    chunk_bytes: int | None,
) -> None:
    """Recompute every chunk of logits and add its gradient to dhidden, dweight and dbias.

    hidden is of the operand dtype of products.py. dhidden [N, D] is zeroed and in the dtype of
    dvalues; dweight [V_padded, D] and dbias [V_padded] are zeroed and of any floating dtype: a row
    block is accumulated apart and rounded once.
    """
    if hidden.shape[0] == 0:
        return
    unit = float16.unit_of(hidden.dtype, head, 14, dvalues, dtail)
    if unit is not None:
        dvalues, dtail = dvalues / unit, dtail / unit
    fused = epilogues.fused(hidden.dtype, head, ids.shape[1])
    if fused is not None:
        hidden = hidden.contiguous()
    dtypes = {hidden.dtype} if fused is not None else {hidden.dtype, dvalues.dtype}
    chunks = _Chunks.plan(hidden, head, dtypes, chunk_bytes)
    on_rows = (ids, dvalues, tail, dtail)
    if fused is not None:
        gradient = _recomputed_inside(chunks, *on_rows, fused)
    else:
        gradient = _recomputed(chunks, *on_rows, epilogues)
    for first, last in chunks.columns_of():
        weight = head.rows(first, last)
        dweight_rows = dbias_rows = None
        if dweight is not None:
            # The first block of rows overwrites it.
            dweight_rows = _in_dtype(dweight[first:last], dvalues.dtype, _empty_like)
        if dbias is not None:
            dbias_rows = _in_dtype(dbias[first:last], dvalues.dtype, torch.zeros_like)
        for block, rows in enumerate(chunks.rows_of()):
            dlogits = gradient(block, first, weight)
            if dhidden is not None:
                products.add_hidden_gradient_(dhidden[rows], dlogits, weight)
            if dweight_rows is not None:
                products.add_weight_gradient_(dweight_rows, dlogits, hidden[rows], block == 0)
            if dbias_rows is not None:
                dbias_rows.add_(dlogits.sum(0, dtype=dbias_rows.dtype))
        _write(dweight, dweight_rows, first, unit)
        _write(dbias, dbias_rows, first, unit)
    if dhidden is not None and unit is not None:
        dhidden.mul_(unit)


# The gradient [n, v] of a block of rows at some rows of the weight, the first of them the given id;
# in the operand dtype.
_Gradient = Callable[[int, int, Tensor], Tensor]


def _recomputed(
    chunks: _Chunks, ids: Tensor, dvalues: Tensor, tail: Tensor, dtail: Tensor, epilogues: Epilogues
) -> _Gradient:
    hidden, blocks = chunks.hidden, chunks.rows_of()
    logits = gradients = chunks.buffer(dvalues.dtype)
    if hidden.dtype != dvalues.dtype:
        gradients = chunks.buffer(hidden.dtype)

    def gradient(block: int, first: int, weight: Tensor) -> Tensor:
        rows = blocks[block]
        chunk = products.project(hidden[rows], weight, logits(rows, weight))
        out = chunk if logits is gradients else gradients(rows, weight)
        on_rows = (ids[rows], dvalues[rows], tail[rows], dtail[rows])
        epilogues.gradient(chunk, first, chunks.head, *on_rows, out)
        return out

    return gradient


def _recomputed_inside(
    chunks: _Chunks,
    ids: Tensor,
    dvalues: Tensor,
    tail: Tensor,
    dtail: Tensor,
    fused: FusedEpilogues,
) -> _Gradient:
    hidden, blocks = chunks.hidden, chunks.rows_of()
    gradients = chunks.buffer(hidden.dtype)
    supports = [fused.support(ids[rows], hidden, chunks.head) for rows in blocks]

    def gradient(block: int, first: int, weight: Tensor) -> Tensor:
        rows = blocks[block]
        out = gradients(rows, weight)
        on_rows = (supports[block], dvalues[rows], tail[rows], dtail[rows])
        fused.gradient(hidden[rows], first, chunks.head, *on_rows, out)
        return out

    return gradient


def _in_dtype(rows: Tensor, dtype: torch.dtype, make: Callable[..., Tensor]) -> Tensor:
    """The rows themselves, or a tensor like them to round into them later."""
    return rows if rows.dtype == dtype else make(rows, dtype=dtype)


def _empty_like(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return pages.empty(rows.shape, rows, dtype)


def _write(gradient: Tensor | None, rows: Tensor | None, first: int, unit: Tensor | None) -> None:
    """Round a row block's sum into the gradient, of which it may be a view."""
    if gradient is None or rows is None:
        return
    if unit is not None:
        rows.mul_(unit)
    gradient[first : first + rows.shape[0]].copy_(rows)
