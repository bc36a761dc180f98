"""The chunked driver in the recompute order: vocabulary chunks outside, blocks of tokens inside.

Both functions hold one [n, v] chunk of logits at a time. The weight is read chunk by chunk, each
row block of dweight is written once, and dhidden accumulates in the accumulator's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels import matmul
from opd_kernels.backends import Epilogues, RowState
from opd_kernels.chunking import recompute_sizes
from opd_kernels.head import Head


@dataclass(frozen=True)
class _Chunks:
    """The walk over [N, V] and the one buffer that every chunk of it reuses."""

    hidden: Tensor  # [N, D] in the accumulator's dtype
    head: Head
    rows: int
    columns: int
    buffer: Tensor

    @classmethod
    def plan(cls, hidden: Tensor, head: Head, chunk_bytes: int | None) -> "_Chunks":
        rows, columns = recompute_sizes(
            hidden.shape[0], head.vocab_size, hidden.element_size(), hidden.device, chunk_bytes
        )
        return cls(hidden, head, rows, columns, hidden.new_empty(rows * columns))

    def columns_of(self) -> list[tuple[int, int]]:
        starts = range(0, self.head.vocab_size, self.columns)
        return [(first, min(first + self.columns, self.head.vocab_size)) for first in starts]

    def rows_of(self) -> list[slice]:
        tokens = self.hidden.shape[0]
        return [slice(f, min(f + self.rows, tokens)) for f in range(0, tokens, self.rows)]

    def logits(self, rows: slice, weight: Tensor) -> Tensor:
        shape = (rows.stop - rows.start, weight.shape[0])
        out = self.buffer[: shape[0] * shape[1]].view(shape)
        return matmul.project(self.hidden[rows], weight, out)


def reduce_logits(
    hidden: Tensor, head: Head, state: RowState, epilogues: Epilogues, chunk_bytes: int | None
) -> None:
    """One pass over the vocabulary: bring every logit of hidden [N, D] into the state."""
    if hidden.shape[0] == 0:
        return
    chunks = _Chunks.plan(hidden, head, chunk_bytes)
    for first, last in chunks.columns_of():
        weight = head.rows(first, last)
        for rows in chunks.rows_of():
            epilogues.update(chunks.logits(rows, weight), first, head, state.rows(rows))


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

    dhidden [N, D] is zeroed and in the accumulator's dtype; dweight [V_padded, D] and dbias
    [V_padded] are zeroed and of any floating dtype: a row block is accumulated apart and rounded
    once.
    """
    if hidden.shape[0] == 0:
        return
    chunks = _Chunks.plan(hidden, head, chunk_bytes)
    for first, last in chunks.columns_of():
        weight = head.rows(first, last)
        dweight_rows = dbias_rows = None
        if dweight is not None:
            dweight_rows = _accumulator(dweight[first:last], hidden.dtype)
        if dbias is not None:
            dbias_rows = _accumulator(dbias[first:last], hidden.dtype)
        for rows in chunks.rows_of():
            dlogits = chunks.logits(rows, weight)
            epilogues.gradient_(
                dlogits, first, head, ids[rows], dvalues[rows], tail[rows], dtail[rows]
            )
            if dhidden is not None:
                matmul.add_hidden_gradient_(dhidden[rows], dlogits, weight)
            if dweight_rows is not None:
                first_block = rows.start == 0
                matmul.add_weight_gradient_(dweight_rows, dlogits, hidden[rows], first_block)
            if dbias_rows is not None:
                dbias_rows.add_(dlogits.sum(0))
        if dweight is not None and dweight_rows is not None:
            dweight[first:last].copy_(dweight_rows)
        if dbias is not None and dbias_rows is not None:
            dbias[first:last].copy_(dbias_rows)


def _accumulator(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows if rows.dtype == dtype else torch.zeros_like(rows, dtype=dtype)
