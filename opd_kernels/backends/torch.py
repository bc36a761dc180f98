"""The epilogues in plain PyTorch: the definition that every other backend is tested against.

A chunk holds raw products hidden @ weight.T, [n, v]. `update` only reads it, so that the one-pass
order can call `gradient` on the same chunk afterwards. Both walk in blocks of rows, which bounds
their temporaries and keeps them in cache.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from opd_kernels.backends.head import Head
from opd_kernels.backends.sparse_rows import SparseRows
from opd_kernels.backends.state import RowState

_BLOCK_ELEMENTS = 1 << 19


def update(chunk: Tensor, first_id: int, head: Head, state: RowState) -> None:
    """Take the logits of columns [first_id, first_id + v) into the state of their rows."""
    for rows in row_blocks(chunk):
        logits = head.logits(head.scores(chunk[rows], first_id))
        if state.selects:
            _update_topk(logits, first_id, state.rows(rows))
        else:
            _update_given(logits, first_id, state.rows(rows))


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
    """Write the loss's gradient wrt a raw chunk [n, v] to out [n, v], which may be the chunk itself
    or of a 16-bit dtype; the chunk is used up.

    dL/dz is dvalues [n, K] on S and dtail [n] * exp(z - tail [n]) off S; dL/draw follows by the
    chain rule.
    """
    for rows in row_blocks(chunk):
        scores = head.scores(chunk[rows], first_id)
        logits = head.logits(scores)
        tail_rows = tail[rows, None]
        # A row whose tail is -inf has no mass off S, and -inf - -inf would be NaN.
        shift = tail_rows.masked_fill(tail_rows == -torch.inf, torch.inf)
        dlogits = _with_spare_column((logits - shift).exp().mul_(dtail[rows, None]))
        dlogits.scatter_(1, _columns(ids[rows], first_id, logits.shape[1]), dvalues[rows])
        torch.mul(dlogits[:, :-1], head.derivative(scores), out=out[rows])


def filtered_gradient(
    chunk: Tensor,
    head: Head,
    ids: Tensor,
    dvalues: Tensor,
    tail: Tensor,
    dtail: Tensor,
    threshold: Tensor,
) -> tuple[SparseRows, Tensor]:
    """What gradient writes to whole rows [n, V], without the entries off S whose logit is below
    threshold [n]; and the share [n] of the tail's softmax that is kept.
    """
    pieces = [(ids.new_empty(0), ids.new_empty(0), chunk.new_empty(0))]
    shares = [chunk.new_empty(0)]
    for rows in row_blocks(chunk):
        scores = head.scores(chunk[rows], 0)
        logits = _with_spare_column(head.logits(scores))
        columns = _columns(ids[rows], 0, chunk.shape[1])
        logits.scatter_(1, columns, -torch.inf)
        # A threshold of NaN keeps everything, so that a row of NaN stays one.
        kept = ~(logits < threshold[rows, None]) & (logits != -torch.inf)
        softmax = (logits - tail[rows, None]).exp().masked_fill(~kept, 0.0)
        shares.append(softmax.sum(1))
        dlogits = (softmax * dtail[rows, None]).scatter_(1, columns, dvalues[rows])
        kept.scatter_(1, columns, True)
        row, column = kept[:, :-1].nonzero(as_tuple=True)
        derivative = head.derivative(scores)
        if isinstance(derivative, Tensor):
            derivative = derivative[row, column]
        values = dlogits[row, column] * derivative
        pieces.append((row + rows.start, column, values))
    row_ids, columns, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return SparseRows(row_ids, columns, values), torch.cat(shares)


def divergence(
    chunk: Tensor,
    head: Head,
    teacher_chunk: Tensor,
    teacher_head: Head,
    beta: float,
    upstream: Tensor | None,
    out: Tensor,
) -> Tensor:
    """The generalised JSD [n] of whole rows [n, V]: beta = 0 is forward and beta = 1 reverse KL.

    Given upstream [n], it writes upstream * dloss/draw to out [n, V], which may be the student's
    chunk, used up, or of a 16-bit dtype. dloss/dz is p - q for the forward KL and p (w - sum p w)
    for the others, with w = log p - log q, or (1 - beta) log(p / M).
    """
    losses = [chunk.new_empty(0)]
    for rows in row_blocks(chunk):
        scores = head.scores(chunk[rows], 0)
        log_p = head.logits(scores).log_softmax(1)
        log_q = teacher_head.logits(teacher_head.scores(teacher_chunk[rows], 0)).log_softmax(1)
        loss, mean, w = pair_sums(log_p, log_q, beta)
        losses.append(loss)
        if upstream is None:
            continue
        dlogits = pair_gradient(log_p, log_q, beta, w, mean) * upstream[rows, None]
        torch.mul(dlogits, head.derivative(scores), out=out[rows])
        out[rows].masked_fill_((upstream[rows] == 0)[:, None], 0.0)  # not 0 * NaN
    return torch.cat(losses)


def pair_sums(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [n] of `divergence` and sum p w [n], over the columns of log_p and log_q [n, v]; and
    w [n, v].
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
    """The gradient [n, v] of `divergence` wrt the student's logits, given sum p w [n] of all V."""
    p = log_p.exp()
    if beta == 0.0:
        return p - log_q.exp()
    return (p * (w - mean[:, None])).masked_fill_(p == 0, 0.0)


def sparse_backward(
    ids: Tensor,
    coefficients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """dhidden [n, D] += G @ weight [V, D] and dweight [V, D] += G.T @ hidden [n, D], where G [n, V]
    has coefficients [n, K] at ids [n, K], -1 in an empty slot, and is 0 elsewhere. The sums are of
    the coefficients' dtype.
    """
    entries = SparseRows.of_support(ids, coefficients)
    if dhidden is not None:
        entries.add_to_hidden_(dhidden, weight)
    if dweight is not None:
        entries.add_to_weight_(dweight, hidden)


def reverse_kl(
    values: Tensor,
    tail: Tensor,
    teacher_values: Tensor,
    teacher_tail: Tensor,
    stop_gradient: bool,
    bucket: bool,
) -> None:
    """None: autograd is the definition."""


def fused(operand: torch.dtype, head: Head, k: int) -> None:
    """None: a product needs its logits in memory here."""


def _expectation(weight: Tensor, term: Tensor) -> Tensor:
    return (weight * term.masked_fill(weight == 0, 0.0)).sum(1)


def row_blocks(chunk: Tensor) -> Iterator[slice]:
    """Few enough rows at a time that an epilogue's temporaries are small."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, chunk.shape[1]))
    for first in range(0, chunk.shape[0], rows):
        yield slice(first, min(first + rows, chunk.shape[0]))


def _columns(ids: Tensor, first_id: int, columns: int) -> Tensor:
    """The chunk's column of each id [n, K]; ids outside it go to the spare column behind it."""
    column = ids - first_id
    return column.masked_fill((column < 0) | (column >= columns), columns)


def _with_spare_column(block: Tensor) -> Tensor:
    """A copy [n, v + 1] of a block [n, v]; scatters that miss the chunk land in the last column."""
    return torch.nn.functional.pad(block, (0, 1), value=-torch.inf)


def _update_given(logits: Tensor, first_id: int, state: RowState) -> None:
    columns = _columns(state.ids, first_id, logits.shape[1])
    padded = _with_spare_column(logits)
    # The spare column is -inf, and a slot that was filled by an earlier chunk misses this one.
    state.values.copy_(torch.maximum(state.values, padded.gather(1, columns)))
    _absorb(padded.scatter_(1, columns, -torch.inf), state)


def _update_topk(logits: Tensor, first_id: int, state: RowState) -> None:
    k = state.values.shape[1]
    values, columns = _topk_lower_id_first(logits, min(k, logits.shape[1]))
    _absorb(logits.scatter_(1, columns, -torch.inf), state)
    # Earlier chunks hold lower ids and come first, so the stable sort keeps ties by the lower id. A
    # -inf logit never displaces an empty slot: it has no mass, so it has no place in S.
    candidates = torch.cat([state.values, values], dim=1)
    candidate_ids = torch.cat([state.ids, columns + first_id], dim=1)
    candidates, order = candidates.sort(dim=1, descending=True, stable=True)
    state.values.copy_(candidates[:, :k])
    state.ids.copy_(candidate_ids.gather(1, order[:, :k]))
    _absorb(candidates[:, k:].clone(), state)


def _topk_lower_id_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk leaves open which of several equal logits it returns; here the lower ids."""
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
    """Take a block [n, v] of logits outside S into the tail; destroys the block."""
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
