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
from opd_kernels.backends.records import Chunk, Head, RowGradient, RowState
from opd_kernels.linear import pages, products
from opd_kernels.linear.plan import recompute_sizes

# dhidden [N, D], dweight [V_padded, D] and dbias [V_padded]; None for one that is not needed.
HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def reduce_logits(
    hidden: Tensor, head: Head, state: RowState, epilogues: Epilogues, chunk_bytes: int | None
) -> None:
    """Add every logit of hidden [N, D] to the state, in one pass over the vocabulary.

    hidden has the operand dtype of products.py.
    """
    if hidden.shape[0] == 0:
        return
    fused = epilogues.fused(hidden.dtype, head, state.ids.shape[1])
    if fused is not None and not state.selects:
        fused.update(hidden.contiguous(), head, state)
    else:
        dtype = state.values.dtype
        walk = _VocabularyWalk.plan(hidden, head, dtype.itemsize, chunk_bytes)
        buffer = walk.buffer(dtype)
        for columns in walk.columns:
            weight = head.weight[columns]
            for rows in walk.rows:
                raw = products.project(hidden[rows], weight, _view(buffer, rows, columns))
                epilogues.update(Chunk(raw, head, columns.start), state.rows(rows))
    state.close()


def backpropagate(
    hidden: Tensor,
    head: Head,
    gradient: RowGradient,
    sums: HeadGradients,
    epilogues: Epilogues,
    chunk_bytes: int | None,
) -> None:
    """Recompute every chunk of logits and add its gradient to the sums.

    Args:
        hidden: [N, D] in the operand dtype of products.py.
        head: the head that `gradient` went through.
        gradient: of the loss with respect to the final logits of all rows.
        sums: zeroed tensors. dhidden has the dtype of the gradient; dweight and dbias have any
            floating dtype, since a block of their rows is accumulated apart and rounded once.
        epilogues: the backend.
        chunk_bytes: the most memory for a chunk of logits; None for the device's default.
    """
    if hidden.shape[0] == 0:
        return
    dtype = gradient.dvalues.dtype
    scale = products.float16_loss_scale(hidden.dtype, head, 14, gradient.dvalues, gradient.dtail)
    if scale is not None:
        dvalues, dtail = gradient.dvalues / scale, gradient.dtail / scale
        gradient = replace(gradient, dvalues=dvalues, dtail=dtail)
    fused = epilogues.fused(hidden.dtype, head, gradient.ids.shape[1])
    chunks: _Recomputed | _RecomputedInside
    bytes_per_logit = hidden.dtype.itemsize  # of the chunk of gradients
    if fused is None:
        if dtype != hidden.dtype:
            bytes_per_logit += dtype.itemsize  # of the chunk of logits beside it
        walk = _VocabularyWalk.plan(hidden, head, bytes_per_logit, chunk_bytes)
        chunks = _Recomputed(walk, gradient, epilogues)
    else:
        walk = _VocabularyWalk.plan(hidden.contiguous(), head, bytes_per_logit, chunk_bytes)
        chunks = _RecomputedInside(walk, gradient, fused)
    dhidden, dweight, dbias = sums
    for columns in walk.columns:
        weight = head.weight[columns]
        # The first block of rows overwrites dweight_rows, so they may be uninitialised.
        dweight_rows = _rows_in_dtype(dweight, columns, dtype)
        dbias_rows = _rows_in_dtype(dbias, columns, dtype)
        for block, rows in enumerate(walk.rows):
            dlogits = chunks.gradient(block, rows, columns)
            if dhidden is not None:
                products.add_hidden_gradient_(dhidden[rows], dlogits, weight)
            if dweight_rows is not None:
                products.add_weight_gradient_(
                    dweight_rows, dlogits, walk.hidden[rows], overwrite=block == 0
                )
            if dbias_rows is not None:
                total = dlogits.sum(0, dtype=dtype)
                dbias_rows.copy_(total) if block == 0 else dbias_rows.add_(total)
        _round_into(dweight, dweight_rows, columns, scale)
        _round_into(dbias, dbias_rows, columns, scale)
    if dhidden is not None and scale is not None:
        dhidden.mul_(scale)


@dataclass(frozen=True)
class _VocabularyWalk:
    """Chunks of [N, V] logits: their sizes, their buffers, and the order in which they come."""

    hidden: Tensor  # [N, D] in the operand dtype
    head: Head
    rows: tuple[slice, ...]  # of each chunk, the largest first
    columns: tuple[slice, ...]

    @classmethod
    def plan(
        cls, hidden: Tensor, head: Head, bytes_per_logit: int, chunk_bytes: int | None
    ) -> "_VocabularyWalk":
        """Choose the sizes of chunks that take bytes_per_logit for each logit."""
        extent = (hidden.shape[0], head.vocab_size)
        rows, columns = recompute_sizes(*extent, bytes_per_logit, hidden.device, chunk_bytes)
        return cls(hidden, head, _blocks(extent[0], rows), _blocks(extent[1], columns))

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Memory for the largest chunk, which every chunk reuses."""
        return pages.empty((self.rows[0].stop * self.columns[0].stop,), self.hidden, dtype)


class _Recomputed:
    """Gradients of chunks of logits, by a matrix product and an epilogue."""

    def __init__(self, walk: _VocabularyWalk, gradient: RowGradient, epilogues: Epilogues) -> None:
        self.walk, self.rows_gradient, self.epilogues = walk, gradient, epilogues
        logits_dtype, operand = gradient.dvalues.dtype, walk.hidden.dtype
        self.logits = self.gradients = walk.buffer(logits_dtype)
        if operand != logits_dtype:
            self.gradients = walk.buffer(operand)

    def gradient(self, block: int, rows: slice, columns: slice) -> Tensor:
        """The gradient [n, v] of a chunk in the operand dtype; the next call overwrites it."""
        head = self.walk.head
        weight, hidden = head.weight[columns], self.walk.hidden[rows]
        raw = products.project(hidden, weight, _view(self.logits, rows, columns))
        out = raw
        if self.gradients is not self.logits:
            out = _view(self.gradients, rows, columns)
        self.epilogues.gradient(Chunk(raw, head, columns.start), self.rows_gradient.rows(rows), out)
        return out


class _RecomputedInside:
    """Gradients of chunks of logits, by kernels with the matrix product inside."""

    def __init__(self, walk: _VocabularyWalk, gradient: RowGradient, fused: FusedEpilogues) -> None:
        self.walk, self.rows_gradient, self.fused = walk, gradient, fused
        self.gradients = walk.buffer(walk.hidden.dtype)
        self.supports = [
            fused.support(gradient.ids[rows], walk.hidden, walk.head) for rows in walk.rows
        ]

    def gradient(self, block: int, rows: slice, columns: slice) -> Tensor:
        """As _Recomputed.gradient."""
        out = _view(self.gradients, rows, columns)
        self.fused.gradient(
            self.walk.hidden[rows],
            self.walk.head,
            columns.start,
            self.supports[block],
            self.rows_gradient.rows(rows),
            out,
        )
        return out


@lru_cache(maxsize=256)
def _blocks(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(first, min(first + size, total)) for first in range(0, total, size))


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
