"""update and gradient: kernels that process a row of a logits chunk block by block.

`update_kernel` removes the entries of S from a block before the rest is added to the online
logsumexp, so that a tail far below the largest logits keeps its precision. A block holds few such
entries, so they are found one at a time. The loop costs one comparison per column and entry;
sorting the block would cost a hundred per column.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.elementwise import derivatives_of, logits_of, scores_of
from opd_kernels.backends.triton.online_sum import absorb

_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _worst(values, ids):
    """Value and id of the smallest of the K best logits; of equal ones, the one with the highest
    id.
    """
    value = tl.min(values)
    return value, tl.max(tl.where(values == value, ids, -_NO_ID))


@triton.jit
def _ranks(values, ids, live):
    """Number of live slots that are better than each slot [K]: its place in descending order."""
    other, other_id = values[:, None], ids[:, None]
    better = (other > values[None, :]) | ((other == values[None, :]) & (other_id < ids[None, :]))
    return tl.sum((better & live[:, None]).to(tl.int32), axis=0)


@triton.jit
def _next_id(ids, lowest):
    """The smallest id that is at least `lowest`."""
    return tl.min(tl.where(ids >= lowest, ids, _NO_ID))


@triton.jit
def update_kernel(
    chunk,  # [n, v]
    stride,
    columns,  # v
    first_id,
    bias,  # [v]
    inner: tl.float64,
    outer: tl.float64,
    values,  # [n, k]
    ids,  # [n, k] int64
    k,
    maxima,  # [n]
    sums,  # [n]
    moments,  # [n]
    SELECTS: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    K: tl.constexpr,  # k, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = values.dtype.element_ty
    inner, outer = tl.full((), inner, dtype), tl.full((), outer, dtype)
    raw = chunk + row * stride
    slots = tl.arange(0, K)
    live_slots = slots < k
    place = row * k + slots
    support_ids = tl.load(ids + place, mask=live_slots, other=-1).to(tl.int32)
    # Give every empty slot a different negative id, so that ids identify slots.
    support_ids = tl.where(support_ids < 0, -1 - slots, support_ids)
    if SELECTS:
        # Slots from k to K pad to a power of two. With +inf they are never the worst.
        best = tl.load(values + place, mask=live_slots, other=float("inf"))
        worst, worst_id = _worst(best, support_ids)
    else:
        support_columns = support_ids - first_id
        here = (
            live_slots & (support_ids >= 0) & (support_columns >= 0) & (support_columns < columns)
        )
        gathered = scores_of(raw, bias, support_columns, here, HAS_BIAS, dtype)
        tl.store(values + place, logits_of(gathered, inner, outer, CAPPED), mask=here)
        next_id = _next_id(support_ids, tl.maximum(first_id, 0))
    peak = tl.load(maxima + row)
    total = tl.load(sums + row)
    moment = tl.zeros((), dtype)
    if HAS_MOMENT:
        moment = tl.load(moments + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        z = logits_of(scores_of(raw, bias, column, live, HAS_BIAS, dtype), inner, outer, CAPPED)
        z = tl.where(live, z, float("-inf"))
        if SELECTS:
            # Swap the block's largest logit with the worst of the K best. The evicted one is then
            # added to the tail with the rest of the block.
            block_peak = tl.max(z)
            while block_peak > worst:
                chosen = tl.min(tl.where(z == block_peak, column, columns))
                z = tl.where(column == chosen, worst, z)
                evicted = support_ids == worst_id
                best = tl.where(evicted, block_peak, best)
                support_ids = tl.where(evicted, first_id + chosen, support_ids)
                worst, worst_id = _worst(best, support_ids)
                block_peak = tl.max(z)
        else:
            while next_id < first_id + start + BLOCK:
                z = tl.where(column == next_id - first_id, float("-inf"), z)
                next_id = _next_id(support_ids, next_id + 1)
            block_peak = tl.max(z)
        peak, total, moment = absorb(z, block_peak, peak, total, moment, HAS_MOMENT, 0)
    if SELECTS:
        sorted_place = row * k + _ranks(best, support_ids, live_slots)
        tl.store(values + sorted_place, best, mask=live_slots)
        stored_ids = tl.where(support_ids < 0, -1, support_ids)
        tl.store(ids + sorted_place, stored_ids.to(tl.int64), mask=live_slots)
    tl.store(maxima + row, peak)
    tl.store(sums + row, total)
    if HAS_MOMENT:
        tl.store(moments + row, moment)


@triton.jit
def gradient_kernel(
    chunk,  # [n, v]
    stride,
    columns,  # v
    first_id,
    bias,  # [v]
    inner: tl.float64,
    outer: tl.float64,
    ids,  # [n, k] int64
    dvalues,  # [n, k]
    k,
    tails,  # [n]
    dtails,  # [n]
    out,  # [n, v], may be the chunk
    out_stride,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    K: tl.constexpr,  # k, rounded up to a power of two
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,  # columns of one program, a multiple of BLOCK
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SPAN
    dtype = dvalues.dtype.element_ty
    inner, outer = tl.full((), inner, dtype), tl.full((), outer, dtype)
    raw = chunk + row * stride
    slots = tl.arange(0, K)
    place = row * k + slots
    support_ids = tl.load(ids + place, mask=slots < k, other=-1).to(tl.int32)
    support_gradients = tl.load(dvalues + place, mask=slots < k, other=0.0)
    next_id = _next_id(support_ids, first_id + first)
    tail = tl.load(tails + row)
    dtail = tl.load(dtails + row)
    # A row with tail -inf has no mass off S. Subtracting +inf gives exp(-inf) = 0 there, while
    # -inf - -inf would be NaN.
    shift = tl.where(tail == float("-inf"), float("inf"), tail)
    for start in range(first, tl.minimum(first + SPAN, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        scores = scores_of(raw, bias, column, live, HAS_BIAS, dtype)
        dlogits = tl.exp(logits_of(scores, inner, outer, CAPPED) - shift) * dtail
        while next_id < first_id + start + BLOCK:
            dvalue = tl.sum(tl.where(support_ids == next_id, support_gradients, 0.0))
            dlogits = tl.where(column == next_id - first_id, dvalue, dlogits)
            next_id = _next_id(support_ids, next_id + 1)
        dscores = dlogits * derivatives_of(scores, inner, outer, CAPPED)
        tl.store(out + row * out_stride + column, dscores.to(out.dtype.element_ty), mask=live)
