"""The walk of the one_pass order: chunks of tokens, loss and gradient while the logits are there.

A chunk of the student's logits [c, V] is computed once, reduced to SparseLogits, and overwritten
with the loss's gradient: one forward and two backward matrix products, no recomputation. The
objective is any callable; PyTorch differentiates it on the chunk's small tensors. With
support="full" the teacher's chunk lies beside the student's, see full_support.py.

Ranks of a vocabulary-parallel head walk the same chunks, each with its own rows of the head, and
FlatLogits merges their results.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import select_backend
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, RowGradient, RowState, accumulator_dtype
from opd_kernels.derivatives import differentiable_once, refuse_other_sources
from opd_kernels.linear import products
from opd_kernels.linear.operators import FlatLogits
from opd_kernels.linear.pages import empty_chunk
from opd_kernels.linear.plan import one_pass_rows
from opd_kernels.loss.full_support import ChunkPair
from opd_kernels.loss.gradients import GradientSums
from opd_kernels.loss.objective import loss_on_support, reverse_kl_options, weighted_sum
from opd_kernels.loss.options import TokenBatch
from opd_kernels.loss.supports import align_teacher, select_support, source_of
from opd_kernels.sparse_logits import SparseLogits, canonical_ids, concatenate_rows, map_rows

Needs = tuple[bool, bool, bool]  # whether hidden, weight and bias need a gradient


@dataclass(frozen=True)
class WalkResult:
    """What a walk returns, without gradient.

    Attributes:
        per_token: [N] the loss of each token.
        student, teacher: both models on S.
        gradients: sums over all tokens; None if none was needed.
        dropped: [N] the student's probability in the entries that a gradient filter left out.
    """

    per_token: Tensor
    student: SparseLogits
    teacher: SparseLogits
    gradients: GradientSums | None
    dropped: Tensor | None


class OnePassLoss(torch.autograd.Function):
    """sum_n weights_n * loss_n, and the WalkResult; forward computes the gradient too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: TokenBatch
    ) -> tuple[Tensor, WalkResult]:
        upstream = batch.weights
        if upstream is None:
            upstream = hidden.new_ones(len(hidden), dtype=accumulator_dtype(hidden, weight))
        result = walk(batch, upstream, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias)  # for differentiable_once
        ctx.gradients = result.gradients
        return weighted_sum(result.per_token, batch.weights), replace(result, gradients=None)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, _: None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return differentiable_once(OnePassLoss.backward, ctx, dtotal, _)
        if ctx.gradients is None:
            raise RuntimeError(
                "distillation_loss: the one_pass gradient was used up by an earlier backward; "
                "call backward once, or use method='recompute'"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(dtotal), None)


class RecomputedFullLoss(torch.autograd.Function):
    """The loss per token [N] over the whole vocabulary, and the WalkResult.

    Backward walks the token chunks again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: TokenBatch
    ) -> tuple[Tensor, WalkResult]:
        result, teacher = walk(batch, None, (False, False, False)), batch.teacher
        assert isinstance(teacher, FlatLogits)
        # An inference tensor cannot be saved, nor changed in place outside of inference mode.
        operands = (teacher.hidden, teacher.head.weight, teacher.head.bias)
        saved = [t for t in operands if t is not None and not t.is_inference()]
        ctx.save_for_backward(hidden, weight, bias, *saved)
        ctx.batch = replace(batch, student=batch.student.detach())
        return result.per_token, result

    @staticmethod
    def backward(ctx: Any, dper_token: Tensor, _: None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return differentiable_once(RecomputedFullLoss.backward, ctx, dper_token, _)
        _ = ctx.saved_tensors  # raises if an operand was modified in place since
        result = walk(ctx.batch, dper_token.contiguous(), ctx.needs_input_grad[:3])
        assert result.gradients is not None
        return (*result.gradients.scaled(None), None)


def one_pass_loss(batch: TokenBatch) -> tuple[Tensor, WalkResult]:
    """sum_n weights_n * loss_n, differentiable, and what the walk returns."""
    student = batch.student
    if not student.requires_grad:
        with torch.no_grad():
            result = walk(batch, None, (False, False, False))
        return weighted_sum(result.per_token, batch.weights), result
    return OnePassLoss.apply(student.hidden, student.head.weight, student.head.bias, batch)


def recomputed_full_loss(batch: TokenBatch) -> tuple[Tensor, WalkResult]:
    """The loss per token [N] over whole rows, differentiable, and what the walk returns."""
    student = batch.student
    return RecomputedFullLoss.apply(student.hidden, student.head.weight, student.head.bias, batch)


def walk(batch: TokenBatch, upstream: Tensor | None, needs: Needs) -> WalkResult:
    """The loss of each token and, given dL/dper_token [N] upstream, the gradients."""
    walker = _TokenWalk(batch, upstream, needs)
    losses, students, teachers = zip(*map(walker.chunk, walker.blocks()), strict=True)
    dropped = torch.cat(walker.dropped) if walker.dropped else None
    return WalkResult(
        torch.cat(losses),
        concatenate_rows(students),
        concatenate_rows(teachers),
        walker.sums,
        dropped,
    )


@dataclass(frozen=True)
class _ChunkSource:
    """A chunk of raw products as a source of SparseLogits; `student` has the rows of the chunk."""

    chunk: Chunk
    student: FlatLogits
    epilogues: Epilogues
    entropy: bool

    def local(self, wanted: int | Tensor) -> SparseLogits:
        """The top-K, or the logits at given ids, of this rank's rows of the head."""
        raw, vocab_size = self.chunk.raw, self.chunk.head.vocab_size
        if isinstance(wanted, Tensor):
            ids = canonical_ids(self.student.local_ids(wanted), vocab_size)
            state = RowState.for_ids(ids, self.entropy, like=raw)
        else:
            k = min(wanted, vocab_size)
            state = RowState.for_topk(raw.shape[0], k, self.entropy, like=raw)
        self.epilogues.update(self.chunk, state)
        state.close()
        entropy = state.entropy() if self.entropy else None
        return self.student.sparse(state.values, state.ids, state.tail(), entropy)

    def reduce(self, wanted: int | Tensor) -> SparseLogits:
        """See supports.Source."""
        return self.student.merged(self.local(wanted), wanted)


class _TokenWalk:
    """The buffers and sums of one walk."""

    def __init__(self, batch: TokenBatch, upstream: Tensor | None, needs: Needs) -> None:
        self.batch, self.upstream, self.sums = batch, upstream, None
        student, options, head = batch.student, batch.options, batch.student.head
        device, operand = student.hidden.device, products.operand_dtype(student.hidden, head.weight)
        dtype = accumulator_dtype(student.hidden, head.weight)
        self.hidden = student.hidden.to(operand)  # [N, D]
        self.epilogues = select_backend(options.backend, device)
        self.dropped: list[Tensor] = []  # by chunk, with a gradient filter
        tokens, bytes_per_logit = self.hidden.shape[0], dtype.itemsize
        if operand != dtype:
            bytes_per_logit += operand.itemsize
        rows = one_pass_rows(
            tokens, student.planned_columns, bytes_per_logit, device, options.chunk_bytes
        )
        shape = (rows, head.vocab_size, self.hidden)
        self.logits = self.dlogits = empty_chunk(*shape, dtype)
        if upstream is not None:
            if operand != dtype:
                self.dlogits = empty_chunk(*shape, operand)
            self.sums = GradientSums.zeros(student, needs, chunks=-(-tokens // max(1, rows)))
            # The objective's gradient multiplies upstream by an unknown factor, so we leave a
            # factor of 2^16 of headroom before float16 overflows.
            scale = products.float16_loss_scale(operand, head, 0, upstream)
            if scale is not None:
                self.sums.loss_scale, self.upstream = scale, upstream / scale
        if options.full:
            assert isinstance(batch.teacher, FlatLogits)  # refusals.py refuses a server here
            self.teacher = batch.teacher
            weight = self.teacher.head.weight
            dtype = accumulator_dtype(self.teacher.hidden, weight)
            self.teacher_logits = empty_chunk(*shape, dtype)

    def blocks(self) -> list[slice]:
        """The tokens of each chunk; one empty chunk where there are no tokens."""
        tokens, rows = self.hidden.shape[0], self.logits.shape[0]
        starts = range(0, tokens, rows) if tokens else [0]
        return [slice(first, min(first + rows, tokens)) for first in starts]

    def chunk(self, rows: slice) -> tuple[Tensor, SparseLogits, SparseLogits]:
        """Loss and both models on S of some tokens, whose gradient is added to the sums."""
        student, options = self.batch.student[rows], self.batch.options
        head, raw = student.head, self.logits[: rows.stop - rows.start]
        products.project(self.hidden[rows], head.weight[: head.vocab_size], raw)
        source = _ChunkSource(Chunk(raw, head), student, self.epilogues, options.entropy)
        return (self._full if options.full else self._on_support)(rows, source)

    def _on_support(
        self, rows: slice, source: _ChunkSource
    ) -> tuple[Tensor, SparseLogits, SparseLogits]:
        batch, options = self.batch, self.batch.options
        support = batch.support if isinstance(batch.support, str) else batch.support[rows]
        teacher = source_of(_rows_of(batch.teacher, rows), options)
        upstream = None if self.upstream is None else self.upstream[rows]
        wanted, answer = select_support(source, teacher, support, options.k)
        local = source.local(wanted)
        if upstream is not None:
            local.values.requires_grad_()
            local.lse_outside.requires_grad_()
        with torch.set_grad_enabled(upstream is not None):
            s = source.student.merged(local, wanted)
            s, t = align_teacher(s, answer, teacher, support, options)
            frozen = None if upstream is None else upstream == 0
            per_token = loss_on_support(options.objective, s, t, self.epilogues, frozen)
        if upstream is not None:
            leaves = (local.values, local.lse_outside)
            if reverse_kl_options(options.objective) is None:
                refuse_other_sources(per_token, *leaves)
            dvalues, dtail = torch.autograd.grad(per_token, leaves, upstream, allow_unused=True)
            if dvalues is None:
                dvalues = torch.zeros_like(local.values)
            self._backpropagate(rows, source.chunk, local, s, dvalues, dtail)
        return per_token.detach(), s.detach(), t

    @torch.no_grad()
    def _backpropagate(
        self,
        rows: slice,
        chunk: Chunk,
        local: SparseLogits,
        student: SparseLogits,
        dvalues: Tensor,
        dtail: Tensor | None,
    ) -> None:
        """Add the gradient of a chunk through values and tail; may overwrite the chunk."""
        assert self.sums is not None
        hidden, head, tail = self.hidden[rows], chunk.head, local.lse_outside
        least = self.batch.options.gradient_filter
        if dtail is None:
            self.sums.add_sparse(rows, hidden, head, local, dvalues, self.epilogues)
            kept = torch.ones_like(tail)  # the gradient off S is 0
        elif least is None:
            out = self._gradient_chunk(chunk.raw)
            self.epilogues.gradient(chunk, RowGradient(local.ids, dvalues, tail, dtail), out)
            self.sums.add_dense(rows, out, hidden, head)
        else:
            gradient = RowGradient(local.ids, dvalues, tail, dtail)
            entries, kept = self.epilogues.filtered_gradient(
                chunk, gradient, student.lse + math.log(least)
            )
            self.sums.add_entries(rows, entries, hidden, head)
        if least is not None:
            dropped = (tail - student.lse).exp() * (1.0 - kept).clamp_min(0.0)
            shard = self.batch.student.shard
            self.dropped.append(dropped if shard is None else shard.sum(dropped))

    def _gradient_chunk(self, raw: Tensor) -> Tensor:
        """Where a chunk's gradient is written: over the chunk itself if the dtypes agree."""
        return raw if self.dlogits is self.logits else self.dlogits[: raw.shape[0]]

    def _full(self, rows: slice, source: _ChunkSource) -> tuple[Tensor, SparseLogits, SparseLogits]:
        options, student, teacher = self.batch.options, source.chunk, self.teacher[rows]
        head, raw = teacher.head, self.teacher_logits[: rows.stop - rows.start]
        operand = teacher.hidden.to(products.operand_dtype(teacher.hidden, head.weight))
        products.project(operand, head.weight[: head.vocab_size], raw)
        chunk = Chunk(raw, head)
        s = source.reduce(options.k)
        t = _ChunkSource(chunk, teacher, self.epilogues, options.entropy).reduce(s.ids)
        upstream = None if self.upstream is None else self.upstream[rows]
        pair, out = ChunkPair(student, chunk, (s, t)), self._gradient_chunk(student.raw)
        if self.batch.student.shard is None:
            per_token = pair.losses(options.objective, upstream, out, self.epilogues)
        else:
            shard = self.batch.student.shard
            per_token = pair.shard_losses(options.objective, upstream, out, shard)
        if self.sums is not None:
            self.sums.add_dense(rows, out, self.hidden[rows], student.head)
        return per_token, s, t


def _rows_of(logits: FlatLogits | SparseLogits, rows: slice) -> FlatLogits | SparseLogits:
    if isinstance(logits, SparseLogits):
        return map_rows(logits, lambda tensor: tensor[rows])
    return logits[rows]
