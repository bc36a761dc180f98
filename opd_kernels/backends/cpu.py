"""The epilogues in C++ (csrc/cpu), vectorised and threaded, for float32 and float64 chunks."""

from torch import Tensor

from opd_kernels.backends import torch as definition
from opd_kernels.backends.cpu_extension import extension
from opd_kernels.backends.head import Head
from opd_kernels.backends.sparse_rows import SparseRows
from opd_kernels.backends.state import RowState

# Above this K a heap per row is no longer cheap beside the row's logits.
_MAX_K = 1024


def update(chunk: Tensor, first_id: int, head: Head, state: RowState) -> None:
    """As in backends/torch.py."""
    if state.selects and state.values.shape[1] > _MAX_K:
        return definition.update(chunk, first_id, head, state)
    extension.update(
        chunk, first_id, *_head(chunk, first_id, head), state.values, state.ids, state.selects,
        state.max, state.sum, state.moment,
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
    rows = (t.contiguous() for t in (ids, dvalues, tail, dtail))
    extension.gradient_(chunk, first_id, *_head(chunk, first_id, head), *rows)
    if out is not chunk:
        out.copy_(chunk)


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
    rows = (t.contiguous() for t in (ids, dvalues, tail, dtail, threshold))
    *entries, kept = extension.filtered_gradient(chunk, *_head(chunk, 0, head), *rows)
    return SparseRows(*entries), kept


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
    loss = chunk.new_empty(chunk.shape[0])
    upstream = None if upstream is None else upstream.contiguous()
    heads = _head(chunk, 0, head), _head(teacher_chunk, 0, teacher_head)
    extension.divergence_(chunk, *heads[0], teacher_chunk, *heads[1], beta, upstream, loss)
    if upstream is not None and out is not chunk:
        out.copy_(chunk)
    return loss


sparse_backward = definition.sparse_backward
reverse_kl = definition.reverse_kl
fused = definition.fused


def _head(chunk: Tensor, first_id: int, head: Head) -> tuple[Tensor | None, bool, float, float]:
    """Return bias [v] of the chunk's columns in its dtype, whether the head has a softcap, and the
    two factors of csrc/cpu/head.h.
    """
    bias = head.bias
    if bias is not None:
        bias = bias.detach()[first_id : first_id + chunk.shape[1]].to(chunk.dtype).contiguous()
    return bias, head.softcap is not None, *head.factors
