"""The epilogues in C++ (csrc/cpu), vectorised and threaded, for float32 and float64 chunks."""

import torch
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.extensions import cpu_extension as extension
from opd_kernels.backends.records import Chunk, RowGradient, RowState
from opd_kernels.backends.sparse_rows import SparseRows


class CpuEpilogues(Epilogues):
    """Epilogues that the C++ extension computes."""

    dtypes = (torch.float32, torch.float64)

    def update(self, chunk: Chunk, state: RowState) -> None:
        if not self.covers(chunk, state.values.shape[1], state.selects):
            return super().update(chunk, state)
        head = chunk.head_operands(chunk.raw.dtype)
        extension.update(
            chunk.raw, chunk.first_id, *head, state.values, state.ids, state.selects,
            state.max, state.sum, state.moment,
        )  # fmt: skip

    def gradient(self, chunk: Chunk, gradient: RowGradient, out: Tensor) -> None:
        if not self.covers(chunk, gradient.ids.shape[1]):
            return super().gradient(chunk, gradient, out)
        head = chunk.head_operands(chunk.raw.dtype)
        extension.gradient_(chunk.raw, chunk.first_id, *head, *gradient.contiguous())
        if out is not chunk.raw:
            out.copy_(chunk.raw)

    def filtered_gradient(
        self, chunk: Chunk, gradient: RowGradient, threshold: Tensor
    ) -> tuple[SparseRows, Tensor]:
        if not self.covers(chunk, gradient.ids.shape[1]):
            return super().filtered_gradient(chunk, gradient, threshold)
        rows = (*gradient.contiguous(), threshold.contiguous())
        head = chunk.head_operands(chunk.raw.dtype)
        *entries, kept = extension.filtered_gradient(chunk.raw, *head, *rows)
        return SparseRows(*entries), kept

    def divergence(
        self, chunk: Chunk, teacher: Chunk, beta: float, upstream: Tensor | None, out: Tensor
    ) -> Tensor:
        if not (self.covers(chunk, 0) and self.covers(teacher, 0)):
            return super().divergence(chunk, teacher, beta, upstream, out)
        loss = chunk.raw.new_empty(chunk.raw.shape[0])
        upstream = None if upstream is None else upstream.contiguous()
        heads = [c.head_operands(c.raw.dtype) for c in (chunk, teacher)]
        extension.divergence_(chunk.raw, *heads[0], teacher.raw, *heads[1], beta, upstream, loss)
        if upstream is not None and out is not chunk.raw:
            out.copy_(chunk.raw)
        return loss
