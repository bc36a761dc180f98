"""The epilogues in C++ (csrc/cpu), vectorised and threaded, for float32 and float64 chunks."""

from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.extensions import cpu_extension as extension
from opd_kernels.backends.records import Chunk, RowGradient, RowState
from opd_kernels.backends.sparse_rows import SparseRows

# The extension selects with a heap for each row. Above this K the heap is no longer cheap beside
# the row's logits.
_MAX_K = 1024


class CpuEpilogues(Epilogues):
    """Epilogues that the C++ extension computes."""

    def update(self, chunk: Chunk, state: RowState) -> None:
        if state.selects and state.values.shape[1] > _MAX_K:
            return super().update(chunk, state)
        extension.update(
            chunk.raw, chunk.first_id, *_head(chunk), state.values, state.ids, state.selects,
            state.max, state.sum, state.moment,
        )  # fmt: skip

    def gradient(self, chunk: Chunk, gradient: RowGradient, out: Tensor) -> None:
        extension.gradient_(chunk.raw, chunk.first_id, *_head(chunk), *gradient.contiguous())
        if out is not chunk.raw:
            out.copy_(chunk.raw)

    def filtered_gradient(
        self, chunk: Chunk, gradient: RowGradient, threshold: Tensor
    ) -> tuple[SparseRows, Tensor]:
        rows = (*gradient.contiguous(), threshold.contiguous())
        *entries, kept = extension.filtered_gradient(chunk.raw, *_head(chunk), *rows)
        return SparseRows(*entries), kept

    def divergence(
        self, chunk: Chunk, teacher: Chunk, beta: float, upstream: Tensor | None, out: Tensor
    ) -> Tensor:
        loss = chunk.raw.new_empty(chunk.raw.shape[0])
        upstream = None if upstream is None else upstream.contiguous()
        extension.divergence_(
            chunk.raw, *_head(chunk), teacher.raw, *_head(teacher), beta, upstream, loss
        )
        if upstream is not None and out is not chunk.raw:
            out.copy_(chunk.raw)
        return loss


def _head(chunk: Chunk) -> tuple[Tensor | None, bool, float, float]:
    return chunk.head_operands(chunk.raw.dtype)
