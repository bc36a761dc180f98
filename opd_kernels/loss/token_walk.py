"""The one-pass order: chunks of tokens, loss and gradient while a chunk's logits are there.

A chunk of the student's logits [c, V] is computed once, reduced to SparseLogits, and overwritten
with the loss's gradient: one forward and two backward matrix products, no recomputation. The
objective is any callable; PyTorch differentiates it on the chunk's small tensors. With
support="full" the teacher's chunk lies beside the student's, see full_support.py.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import Epilogues, select_backend
from opd_kernels.backends.head import Head, accumulator_dtype
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.linear import float16, products
from opd_kernels.linear.plan import chunk_buffer, one_pass_rows
from opd_kernels.loss.chunk import LogitsChunk
from opd_kernels.loss.full_support import full_losses, shard_losses
from opd_kernels.loss.gradients import Gradients
from opd_kernels.loss.objective import Objective
from opd_kernels.loss.support_loss import support_loss
from opd_kernels.loss.supports import Recomputed, Served, align
from opd_kernels.parallel import VocabShard
from opd_kernels.sparse_logits import SparseLogits


@dataclass(frozen=True)
class LossOptions:
    """What distillation_loss was asked for, checked; and the student's shard and V."""

    k: int
    support: str | Tensor  # ids are [N, K]
    objective: Objective
    missing: str
    entropy: bool
    chunk_bytes: int | None
    backend: str
    gradient_filter: float | None
    vocab_size: int
    shard: VocabShard | None = None

    @property
    def columns(self) -> int:
        """What chunks are planned by: V, or the most rows that a rank of the shard has."""
        return self.vocab_size if self.shard is None else self.shard.largest


@dataclass(frozen=True)
class WalkResult:
    """The loss [N] and both models on S, detached; and the gradients, if any were needed.

    dropped [N] is the student's probability in the entries that a gradient filter left out.
    """

    per_token: Tensor
    student: SparseLogits
    teacher: SparseLogits
    gradients: Gradients | None
    dropped: Tensor | None


def walk(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    upstream: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> WalkResult:
    """The loss of each token of student [N, D] and, given dL/dper_token [N], the gradients."""
    walker = _Walker.plan(student, teacher, options, upstream, needs)
    pieces = [walker.chunk(rows) for rows in walker.rows_of()]
    losses, students, teachers = zip(*pieces, strict=True)
    return WalkResult(
        torch.cat(losses),
        _concatenate(students),
        _concatenate(teachers),
        walker.gradients,
        torch.cat(walker.dropped) if walker.dropped else None,
    )


def _concatenate(pieces: tuple[SparseLogits, ...]) -> SparseLogits:
    first = pieces[0]

    def joined(name: str) -> Any:
        tensors = [getattr(piece, name) for piece in pieces]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("values", "ids", "tail", "entropy")
    return replace(first, **{name: joined(name) for name in names})


@dataclass
class _Walker:
    student: LazyLogits
    teacher: LazyLogits | SparseLogits
    options: LossOptions
    upstream: Tensor | None
    gradients: Gradients | None
    hidden: Tensor  # [N, D] in the operand dtype of products.py
    head: Head
    epilogues: Epilogues
    buffer: Tensor  # [c, V] logits
    gradient_buffer: Tensor  # [c, V] of the operand dtype; the same one, if it is of that dtype
    teacher_buffer: Tensor | None  # [c, V] for support="full"
    dropped: list[Tensor] = field(default_factory=list)  # a gradient filter's, by chunk

    @classmethod
    def plan(
        cls,
        student: LazyLogits,
        teacher: LazyLogits | SparseLogits,
        options: LossOptions,
        upstream: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> "_Walker":
        head = student.head
        hidden = student.hidden.to(products.operand_dtype(student.hidden, student.weight))
        dtype = accumulator_dtype(student.hidden, student.weight)
        full = options.support == "full" if isinstance(options.support, str) else False
        rows = one_pass_rows(
            hidden.shape[0],
            options.columns,
            sum(dtype.itemsize for dtype in {dtype, hidden.dtype}),
            hidden.device,
            options.chunk_bytes,
        )
        buffer = gradient_buffer = chunk_buffer(rows, head.vocab_size, hidden, dtype)
        if hidden.dtype != dtype and upstream is not None:
            gradient_buffer = chunk_buffer(rows, head.vocab_size, hidden, hidden.dtype)
        gradients = None
        if upstream is not None:
            gradients = Gradients.zeros(student, needs, chunks=-(-hidden.shape[0] // max(1, rows)))
            # The objective's slopes are not known yet: they have 2^16 of room.
            gradients.unit = float16.unit_of(hidden.dtype, head, 0, upstream)
            if gradients.unit is not None:
                upstream = upstream / gradients.unit
        teacher_buffer = None
        if full:
            assert isinstance(teacher, LazyLogits)  # distillation_loss refuses a server here
            teacher_dtype = accumulator_dtype(teacher.hidden, teacher.weight)
            teacher_buffer = chunk_buffer(rows, head.vocab_size, hidden, teacher_dtype)
        return cls(
            student,
            teacher,
            options,
            upstream,
            gradients,
            hidden,
            head,
            select_backend(options.backend, hidden.device),
            buffer,
            gradient_buffer,
            teacher_buffer,
        )

    def rows_of(self) -> list[slice]:
        tokens, rows = self.hidden.shape[0], self.buffer.shape[0]
        starts = range(0, tokens, rows) if tokens else [0]
        return [slice(first, min(first + rows, tokens)) for first in starts]

    def chunk(self, rows: slice) -> tuple[Tensor, SparseLogits, SparseLogits]:
        count = rows.stop - rows.start
        raw = self.buffer[:count]
        products.project(self.hidden[rows], self.head.rows(0, self.head.vocab_size), raw)
        logits = self._logits(raw, self.head)
        if self.teacher_buffer is not None:
            return self._full_chunk(rows, logits)
        return self._support_chunk(rows, logits)

    def _logits(self, raw: Tensor, head: Head) -> LogitsChunk:
        options = self.options
        return LogitsChunk(
            raw, head, self.epilogues, options.entropy, options.vocab_size, options.shard
        )

    def _support_chunk(
        self, rows: slice, logits: LogitsChunk
    ) -> tuple[Tensor, SparseLogits, SparseLogits]:
        options = self.options
        support = options.support if isinstance(options.support, str) else options.support[rows]
        with torch.set_grad_enabled(self.upstream is not None):
            s, t = align(logits, self._teacher_rows(rows), support, options.k, options.missing)
            t, frozen = t.detach(), None if self.upstream is None else self.upstream[rows] == 0
            per_token = support_loss(s, t, options.objective, self.epilogues, frozen)
        if self.gradients is not None:
            assert self.upstream is not None
            assert logits.leaf is not None
            leaf = logits.leaf
            dvalues, dtail = torch.autograd.grad(
                per_token, (leaf.values, leaf.lse_outside), self.upstream[rows], allow_unused=True
            )
            if dvalues is None:
                dvalues = torch.zeros_like(leaf.values)
            self._backpropagate(
                self.gradients, rows, logits.raw, leaf.detach(), s.detach(), dvalues, dtail
            )
        return per_token.detach(), s.detach(), t

    def _backpropagate(
        self,
        gradients: Gradients,
        rows: slice,
        raw: Tensor,
        leaf: SparseLogits,
        student: SparseLogits,
        dvalues: Tensor,
        dtail: Tensor | None,
    ) -> None:
        """Add the gradient of a chunk through values and tail; may overwrite the chunk."""
        hidden, head, tail = self.hidden[rows], self.head, leaf.lse_outside
        eps = self.options.gradient_filter
        if dtail is None:
            gradients.add_sparse(rows, hidden, head, leaf, dvalues, self.epilogues)
            kept = torch.ones_like(tail)  # the gradient off S is 0
        elif eps is None:
            out = self._gradient_chunk(raw)
            self.epilogues.gradient(raw, 0, head, leaf.ids, dvalues, tail, dtail, out)
            gradients.add_dense(rows, out, hidden, head)
        else:
            threshold = student.lse + math.log(eps)
            entries, kept = self.epilogues.filtered_gradient(
                raw, head, leaf.ids, dvalues, tail, dtail, threshold
            )
            gradients.add_entries(rows, entries, hidden, head)
        if eps is not None:
            dropped = (leaf.lse_outside - student.lse).exp() * (1.0 - kept).clamp_min(0.0)
            shard = self.options.shard
            self.dropped.append(dropped if shard is None else shard.sum(dropped))

    def _gradient_chunk(self, raw: Tensor) -> Tensor:
        """Where the gradient of a chunk of logits goes: the chunk itself, if that has the dtype."""
        same = self.gradient_buffer.dtype == raw.dtype
        return raw if same else self.gradient_buffer[: raw.shape[0]]

    def _teacher_rows(self, rows: slice) -> Recomputed | Served:
        if isinstance(self.teacher, SparseLogits):
            return Served(self.teacher.map(lambda tensor: tensor[rows]))
        options = self.options
        return Recomputed(
            self.teacher[rows].detach(), options.entropy, options.chunk_bytes, options.backend
        )

    def _full_chunk(
        self, rows: slice, logits: LogitsChunk
    ) -> tuple[Tensor, SparseLogits, SparseLogits]:
        assert isinstance(self.teacher, LazyLogits)
        assert self.teacher_buffer is not None
        teacher = self.teacher[rows].detach().local(self.options.shard)
        teacher_head = teacher.head
        teacher_raw = self.teacher_buffer[: rows.stop - rows.start]
        products.project(
            teacher.hidden.to(products.operand_dtype(teacher.hidden, teacher.weight)),
            teacher_head.rows(0, teacher_head.vocab_size),
            teacher_raw,
        )
        teacher_logits = self._logits(teacher_raw, teacher_head)
        s = logits.topk(self.options.k).detach()
        t = teacher_logits.gather(s.ids).detach()
        upstream = None if self.upstream is None else self.upstream[rows]
        out = self._gradient_chunk(logits.raw)
        pair = (logits, teacher_logits, self.options.objective, upstream, out)
        shard = self.options.shard
        per_token = full_losses(*pair) if shard is None else shard_losses(*pair, s.lse, t.lse)
        if self.gradients is not None:
            self.gradients.add_dense(rows, out, self.hidden[rows], self.head)
        return per_token, s, t
