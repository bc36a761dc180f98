"""Epilogues: what a backend does to a chunk of logits. Its methods are the definition, in PyTorch.

A backend subclasses Epilogues and overrides the methods that it computes faster; `super()` is the
fallback for what its kernels do not cover. The methods walk a chunk in blocks of rows, so that
their temporaries are small and stay in the cache.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from opd_kernels.backends.records import Chunk, Head, Operands, RowGradient, RowState
from opd_kernels.backends.sparse_rows import SparseRows

_BLOCK_ELEMENTS = 1 << 19


class FusedEpilogues(Protocol):
    """Epilogues with the matrix product inside: the chunk of logits never reaches memory."""

    def update(self, operands: Operands, state: RowState) -> None:
        """Fill a state of given ids from contiguous hidden states [N, D]."""
        ...

    def support(self, ids: Tensor, operands: Operands) -> Any:
        """Prepare the ids [n, K] of some rows for `gradient`."""
        ...

    def gradient(
        self, operands: Operands, first_id: int, support: Any, gradient: RowGradient, out: Tensor
    ) -> None:
        """Write Epilogues.gradient of hidden [n, D] @ weight.T to out [n, v], without the chunk.

        The columns of out begin at first_id, a multiple of 16.
        """
        ...


class Epilogues:
    """The row-wise work on a chunk of raw products [n, v], on any device and in float64 too."""

    # What the kernels of a subclass take; None for everything.
    dtypes: tuple[torch.dtype, ...] | None = None  # of chunks
    max_selected: int | None = None  # K up to which `update` selects
    max_given: int | None = None  # K at given ids

    def covers(self, chunk: Chunk, k: int, selects: bool = False) -> bool:
        """Whether the backend's kernels take a chunk and K slots; else a method calls super()."""
        most = self.max_selected if selects else self.max_given
        has_kernel = self.dtypes is None or chunk.raw.dtype in self.dtypes
        return has_kernel and (most is None or k <= most)

    def update(self, chunk: Chunk, state: RowState) -> None:
        """Add the logits of a chunk to the state of its rows. The chunk is only read."""
        for rows in row_blocks(chunk.raw):
            block = chunk[rows]
            logits = block.head.logits(block.scores())
            if state.selects:
                _update_topk(logits, chunk.first_id, state.rows(rows))
            else:
                _update_given(logits, chunk.first_id, state.rows(rows))

    def gradient(self, chunk: Chunk, gradient: RowGradient, out: Tensor) -> None:
        """Write the gradient of the loss with respect to the raw products to out [n, v].

        out may be the chunk's own tensor, or of a 16-bit dtype. The chunk may be overwritten.
        """
        for rows in row_blocks(chunk.raw):
            block, part = chunk[rows], gradient.rows(rows)
            scores = block.scores()
            logits = block.head.logits(scores)
            tail = part.tail[:, None]
            # A row whose tail is -inf has no mass off S; exp(-inf - -inf) would be NaN there.
            shift = tail.masked_fill(tail == -torch.inf, torch.inf)
            dlogits = _with_spare_column((logits - shift).exp().mul_(part.dtail[:, None]))
            columns = _columns(part.ids, chunk.first_id, logits.shape[1])
            dlogits.scatter_(1, columns, part.dvalues)
            torch.mul(dlogits[:, :-1], block.head.derivative(scores), out=out[rows])

    def filtered_gradient(
        self, chunk: Chunk, gradient: RowGradient, threshold: Tensor
    ) -> tuple[SparseRows, Tensor]:
        """The gradient of whole rows [n, V] without its small entries.

        An entry off S is left out if its logit is below threshold [n].

        Returns:
            The entries that are kept, and their share [n] of the tail's softmax.
        """
        ids = gradient.ids
        pieces = [(ids.new_empty(0), ids.new_empty(0), chunk.raw.new_empty(0))]
        shares = [chunk.raw.new_empty(0)]
        for rows in row_blocks(chunk.raw):
            block, part = chunk[rows], gradient.rows(rows)
            scores = block.scores()
            logits = _with_spare_column(block.head.logits(scores))
            columns = _columns(part.ids, 0, chunk.raw.shape[1])
            logits.scatter_(1, columns, -torch.inf)
            # A threshold of NaN keeps every entry, so that a row of NaN stays NaN.
            kept = ~(logits < threshold[rows, None]) & (logits != -torch.inf)
            softmax = (logits - part.tail[:, None]).exp().masked_fill(~kept, 0.0)
            shares.append(softmax.sum(1))
            dlogits = (softmax * part.dtail[:, None]).scatter_(1, columns, part.dvalues)
            kept.scatter_(1, columns, True)
            row, column = kept[:, :-1].nonzero(as_tuple=True)
            derivative = block.head.derivative(scores)
            if isinstance(derivative, Tensor):
                derivative = derivative[row, column]
            pieces.append((row + rows.start, column, dlogits[row, column] * derivative))
        row_ids, column_ids, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return SparseRows(row_ids, column_ids, values), torch.cat(shares)

    def divergence(
        self, chunk: Chunk, teacher: Chunk, beta: float, upstream: Tensor | None, out: Tensor
    ) -> Tensor:
        """The generalised JSD [n] of whole rows [n, V]; beta = 0 is forward and 1 reverse KL.

        Given upstream [n], write upstream * dloss/draw to out [n, V], which may be the chunk's own
        tensor, or of a 16-bit dtype. dloss/dz is p - q for the forward KL and p (w - sum p w) for
        the others, with w = log p - log q, or (1 - beta) log(p / M).
        """
        losses = [chunk.raw.new_empty(0)]
        for rows in row_blocks(chunk.raw):
            block, teacher_block = chunk[rows], teacher[rows]
            scores = block.scores()
            log_p = block.head.logits(scores).log_softmax(1)
            log_q = teacher_block.head.logits(teacher_block.scores()).log_softmax(1)
            loss, mean, w = pair_sums(log_p, log_q, beta)
            losses.append(loss)
            if upstream is None:
                continue
            dlogits = pair_gradient(log_p, log_q, beta, w, mean) * upstream[rows, None]
            torch.mul(dlogits, block.head.derivative(scores), out=out[rows])
            # A row without weight gets 0, also where 0 * NaN would be NaN.
            out[rows].masked_fill_((upstream[rows] == 0)[:, None], 0.0)
        return torch.cat(losses)

    def sparse_backward(
        self,
        ids: Tensor,
        coefficients: Tensor,
        hidden: Tensor,
        weight: Tensor,
        dhidden: Tensor | None,
        dweight: Tensor | None,
    ) -> None:
        """Add G @ weight [V, D] to dhidden [n, D] and G.T @ hidden [n, D] to dweight [V, D].

        G [n, V] has coefficients [n, K] at ids [n, K], -1 in an empty slot, and is 0 elsewhere. The
        sums have the dtype of the coefficients.
        """
        entries = SparseRows.of_support(ids, coefficients)
        if dhidden is not None:
            entries.add_to_hidden_(dhidden, weight)
        if dweight is not None:
            entries.add_to_weight_(dweight, hidden)

    def reverse_kl(
        self,
        values: Tensor,
        tail: Tensor,
        teacher_values: Tensor,
        teacher_tail: Tensor,
        *,
        stop_gradient: bool,
        bucket: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """divergences.reverse_kl [n] on S with tail="bucket" or "drop", and its gradient.

        With c = log p - log q and m = sum p c, the gradient is p (c - m) on S. Off S it is
        p_tail (c_tail - m), where c_tail is 0 unless the tail is a bucket. Without stop-gradient
        and bucket, c becomes c + 1. The loss is m, with stop-gradient and without bucket
        m + sum (q - p).

        Returns:
            The loss [n], and its gradient with respect to values [n, K] and tail [n].
        """
        log_p, log_q = _log_probs(values, tail), _log_probs(teacher_values, teacher_tail)
        p = log_p.exp()
        nothing = (p == 0) & ~log_q.isnan()  # no mass, no cost; but NaN of the teacher stays NaN
        c = (log_p - log_q).masked_fill_(nothing, 0.0)
        if not bucket:
            c[:, -1] = 0.0
        loss = mean = (p * c).sum(1)
        if not bucket and stop_gradient:
            loss = loss + (log_q.exp() - p)[:, :-1].sum(1)
        elif not bucket:
            c[:, :-1] += 1.0
            mean = loss + p[:, :-1].sum(1)
        gradient = (p * (c - mean[:, None])).masked_fill_(nothing, 0.0).to(values.dtype)
        return loss, gradient[:, :-1], gradient[:, -1]

    def fused(self, operand: torch.dtype, head: Head, k: int) -> FusedEpilogues | None:
        """The epilogues with the product inside, if the backend has them and they are faster.

        Args:
            operand: dtype of the products, see linear/products.py.
            head: the head of the products.
            k: number of slots in S.
        """
        return None


def pair_sums(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the columns of log_p and log_q [n, v] that Epilogues.divergence is made of.

    Returns:
        The loss [n], sum p w [n], and w [n, v].
    """
    if beta in (0.0, 1.0):
        w = log_p - log_q
        mean = _expectation(log_p.exp(), w)
        return mean if beta == 1.0 else -_expectation(log_q.exp(), w), mean, w
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    w = (1.0 - beta) * (log_p - log_m)
    mean = _expectation(log_p.exp(), w)
    return mean + beta * _expectation(log_q.exp(), log_q - log_m), mean, w


def pair_gradient(log_p: Tensor, log_q: Tensor, beta: float, w: Tensor, mean: Tensor) -> Tensor:
    """The gradient [n, v] of Epilogues.divergence, given sum p w [n] over the whole vocabulary."""
    p = log_p.exp()
    if beta == 0.0:
        return p - log_q.exp()
    return (p * (w - mean[:, None])).masked_fill_(p == 0, 0.0)


def row_blocks(raw: Tensor) -> Iterator[slice]:
    """Blocks of rows of a chunk [n, v] whose temporaries are small."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, raw.shape[1]))
    for first in range(0, raw.shape[0], rows):
        yield slice(first, min(first + rows, raw.shape[0]))


def _log_probs(values: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities [n, K + 1] of values [n, K] and tail [n], relative to the row's largest.

    log_softmax sums 1,025 terms less exactly: the loss had more than twice the rms error.
    """
    z = torch.cat([values, tail[:, None]], dim=1)
    peak = z.amax(1, keepdim=True)
    z -= peak.masked_fill_(peak == -torch.inf, 0.0)
    return z - z.logsumexp(1, keepdim=True)


def _expectation(weight: Tensor, term: Tensor) -> Tensor:
    return (weight * term.masked_fill(weight == 0, 0.0)).sum(1)


def _columns(ids: Tensor, first_id: int, columns: int) -> Tensor:
    """The chunk's column of each id [n, K]; ids outside it get the spare column behind it."""
    column = ids - first_id
    return column.masked_fill((column < 0) | (column >= columns), columns)


def _with_spare_column(block: Tensor) -> Tensor:
    """A copy [n, v + 1] of a block [n, v]; scatters that miss the chunk land in the last column."""
    return torch.nn.functional.pad(block, (0, 1), value=-torch.inf)


def _update_given(logits: Tensor, first_id: int, state: RowState) -> None:
    columns = _columns(state.ids, first_id, logits.shape[1])
    padded = _with_spare_column(logits)
    # The spare column is -inf, so a slot that an earlier chunk has filled keeps its value.
    state.values.copy_(torch.maximum(state.values, padded.gather(1, columns)))
    _absorb(padded.scatter_(1, columns, -torch.inf), state)


def _update_topk(logits: Tensor, first_id: int, state: RowState) -> None:
    k = state.values.shape[1]
    values, columns = _topk_lower_id_first(logits, min(k, logits.shape[1]))
    _absorb(logits.scatter_(1, columns, -torch.inf), state)
    # Earlier chunks hold lower ids and come first, so the stable sort gives ties to the lower id. A
    # logit of -inf never takes an empty slot: it has no mass, so it is not in S.
    candidates = torch.cat([state.values, values], dim=1)
    candidate_ids = torch.cat([state.ids, columns + first_id], dim=1)
    candidates, order = candidates.sort(dim=1, descending=True, stable=True)
    state.values.copy_(candidates[:, :k])
    state.ids.copy_(candidate_ids.gather(1, order[:, :k]))
    _absorb(candidates[:, k:].clone(), state)


def _topk_lower_id_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row; unlike torch.topk, ties go to the lower id."""
    values, columns = logits.topk(k, dim=1)
    columns = columns.sort(dim=1).values
    values, order = logits.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    threshold = values[:, -1:]
    ties_left_out = (logits == threshold).sum(1) > (values == threshold).sum(1)
    ties_left_out &= threshold[:, 0] != -torch.inf
    if ties_left_out.any():
        in_order = logits[ties_left_out].sort(dim=1, descending=True, stable=True)
        columns[ties_left_out] = in_order.indices[:, :k]
    return values, columns


def _absorb(block: Tensor, state: RowState) -> None:
    """Add a block [n, v] of logits outside S to the tail; the block is overwritten."""
    if block.shape[1] == 0:
        return
    peak = torch.maximum(state.max, block.amax(1))
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    gap = state.max - shift
    decay = gap.exp()
    block.sub_(shift[:, None])
    if state.moment is not None:
        weights = block.exp()
        moment = weights.mul(block.masked_fill_(weights == 0, 0.0)).sum(1)
        carried = state.moment + state.sum * gap.masked_fill(decay == 0, 0.0)
        state.moment.copy_(moment + decay * carried)
    else:
        weights = block.exp_()
    state.sum.mul_(decay).add_(weights.sum(1))
    state.max.copy_(peak)
