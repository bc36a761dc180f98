"""The walk of the recompute order: vocabulary chunks outside, blocks of tokens inside.

Both functions hold one [n, v] chunk of logits, or of their gradient, at a time. The weight is read
chunk by chunk, each row block of dweight is written once, and dhidden accumulates in float32
(float64). Where a backend has the matrix product inside its kernels, logits are never in memory.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues, FusedEpilogues
from opd_kernels.backends.records import Chunk, Operands, RowGradient, RowState
from opd_kernels.linear import pages, products
from opd_kernels.linear.plan import recompute_sizes

# dhidden [N, D], dweight [V_padded, D] and dbias [V_padded]; None for one that is not needed.
HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def reduce_logits(
    operands: Operands, state: RowState, epilogues: Epilogues, chunk_bytes: int | None
) -> None:
    """Add every logit to the state, in one pass over the vocabulary.

    The hidden states have the operand dtype of products.py.
    """
    hidden, head = operands.hidden, operands.head
    if hidden.shape[0] == 0:
        return
    fused = epilogues.fused(hidden.dtype, head, state.ids.shape[1])
    if fused is not None and not state.selects:
        fused.update(replace(operands, hidden=hidden.contiguous()), state)
    else:
        dtype, extent = state.values.dtype, (hidden.shape[0], head.vocab_size)
        chunks = _chunks(*extent, dtype.itemsize, hidden.device, chunk_bytes)
        buffer = pages.empty((chunks.logits,), hidden, dtype)
        for columns in chunks.columns:
            weight = head.weight[columns]
            for rows in chunks.rows:
                block = operands[rows]
                raw = products.project(block.hidden, weight, _view(buffer, rows, columns))
                epilogues.update(Chunk(raw, block.head, columns.start), state.rows(rows))
    state.close()


def backpropagate(
    operands: Operands,
    gradient: RowGradient,
    sums: HeadGradients,
    epilogues: Epilogues,
    chunk_bytes: int | None,
) -> None:
    """Recompute every chunk of logits and add its gradient to the sums.

    Args:
        operands: with hidden states in the operand dtype of products.py.
        gradient: of the loss with respect to the final logits of all rows.
        sums: zeroed tensors. dhidden has the dtype of the gradient; dweight and dbias have any
            floating dtype, since a block of their rows is accumulated apart and rounded once.
        epilogues: the backend.
        chunk_bytes: the most memory for a chunk of logits; None for the device's default.
    """
    hidden, head, dtype = operands.hidden, operands.head, gradient.dvalues.dtype
    if hidden.shape[0] == 0:
        return
    scale = products.float16_loss_scale(hidden.dtype, head, 14, gradient.dvalues, gradient.dtail)
    if scale is not None:
        dvalues, dtail = gradient.dvalues / scale, gradient.dtail / scale
        gradient = replace(gradient, dvalues=dvalues, dtail=dtail)
    fused = epilogues.fused(hidden.dtype, head, gradient.ids.shape[1])
    bytes_per_logit = hidden.dtype.itemsize  # of the chunk of gradients
    if fused is not None:
        operands = replace(operands, hidden=hidden.contiguous())
    elif dtype != hidden.dtype:
        bytes_per_logit += dtype.itemsize  # of the chunk of logits beside it
    extent = (hidden.shape[0], head.vocab_size)
    chunks = _chunks(*extent, bytes_per_logit, hidden.device, chunk_bytes)
    recomputed: _Recomputed | _RecomputedInside
    if fused is None:
        recomputed = _Recomputed(operands, chunks, gradient, epilogues)
    else:
        recomputed = _RecomputedInside(operands, chunks, gradient, fused)
    dhidden, dweight, dbias = sums
    for columns in chunks.columns:
        weight = head.weight[columns]
        # The first block of rows overwrites both, so they may be uninitialised.
        dweight_rows = _rows_in_dtype(dweight, columns, dtype)
        dbias_rows = _rows_in_dtype(dbias, columns, dtype)
        for block, rows in enumerate(chunks.rows):
            dlogits = recomputed.gradient(block, rows, columns)
            if dhidden is not None:
                products.add_hidden_gradient_(dhidden[rows], dlogits, weight)
            if dweight_rows is not None:
                products.add_weight_gradient_(
                    dweight_rows, dlogits, operands.hidden[rows], overwrite=block == 0
                )
            if dbias_rows is not None:
                total = dlogits.sum(0, dtype=dtype)
                dbias_rows.copy_(total) if block == 0 else dbias_rows.add_(total)
        _round_into(dweight, dweight_rows, columns, scale)
        _round_into(dbias, dbias_rows, columns, scale)
    if dhidden is not None and scale is not None:
        dhidden.mul_(scale)


class _Recomputed:
    """Gradients of chunks of logits, by a matrix product and an epilogue."""

    def __init__(
        self, operands: Operands, chunks: "_Chunks", gradient: RowGradient, epilogues: Epilogues
    ) -> None:
        self.operands, self.row_gradient, self.epilogues = operands, gradient, epilogues
        hidden, dtype, size = operands.hidden, gradient.dvalues.dtype, (chunks.logits,)
        self.logits = self.dlogits = pages.empty(size, hidden, dtype)
        if hidden.dtype != dtype:
            self.dlogits = pages.empty(size, hidden, hidden.dtype)

    def gradient(self, block: int, rows: slice, columns: slice) -> Tensor:
        """The gradient [n, v] of a chunk in the operand dtype; the next call overwrites it."""
        part = self.operands[rows]
        out = raw = _view(self.logits, rows, columns)
        products.project(part.hidden, part.head.weight[columns], raw)
        if self.dlogits is not self.logits:
            out = _view(self.dlogits, rows, columns)
        chunk = Chunk(raw, part.head, columns.start)
        self.epilogues.gradient(chunk, self.row_gradient.rows(rows), out)
        return out


class _RecomputedInside:
    """Gradients of chunks of logits, by kernels with the matrix product inside."""

    def __init__(
        self, operands: Operands, chunks: "_Chunks", gradient: RowGradient, fused: FusedEpilogues
    ) -> None:
        self.operands, self.row_gradient, self.fused = operands, gradient, fused
        self.dlogits = pages.empty((chunks.logits,), operands.hidden, operands.hidden.dtype)
        self.supports = [fused.support(gradient.ids[rows], operands[rows]) for rows in chunks.rows]

    def gradient(self, block: int, rows: slice, columns: slice) -> Tensor:
        """As _Recomputed.gradient."""
        out, part = _view(self.dlogits, rows, columns), self.row_gradient.rows(rows)
        support = self.supports[block]
        self.fused.gradient(self.operands[rows], columns.start, support, part, out)
        return out


@dataclass(frozen=True)
class _Chunks:
    """How [N, V] logits are divided into chunks [n, v]."""

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    logits: int  # of the largest chunk


@lru_cache(maxsize=256)
def _chunks(
    tokens: int, vocab: int, bytes_per_logit: int, device: torch.device, chunk_bytes: int | None
) -> _Chunks:
    n, v = recompute_sizes(tokens, vocab, bytes_per_logit, device, chunk_bytes)
    rows, columns = (
        tuple(slice(first, min(first + size, total)) for first in range(0, total, size))
        for total, size in ((tokens, n), (vocab, v))
    )
    return _Chunks(rows, columns, n * v)


def _view(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    """The front of a buffer as a chunk [n, v]."""
    n, v = rows.stop - rows.start, columns.stop - columns.start
    return buffer[: n * v].view(n, v)


def _rows_in_dtype(total: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor | None:
    """Rows of a gradient, or an uninitialised tensor in dtype that is rounded into them later."""
    if total is None:
        return None
    part = total[rows]
    return part if part.dtype == dtype else pages.empty(part.shape, part, dtype)


def _round_into(
    total: Tensor | None, part: Tensor | None, rows: slice, scale: Tensor | None
) -> None:
    """Undo the loss scale of some rows and round them into the gradient, if they are not in it."""
    if total is None or part is None:
        return
    if scale is not None:
        part.mul_(scale)
    total[rows].copy_(part)
