"""divergence: KL or JSD of whole rows of student and teacher logits, and its gradient.

One program per row. The first pass over the row computes both logsumexps and, for a KL, the loss. A
JSD needs a second pass for its sums. The last pass writes the gradient, which may overwrite the
student's logits.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.elementwise import derivatives_of, logits_of, scores_of
from opd_kernels.backends.triton.online_sum import carry, origin

FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _log_probs(
    raw, bias, inner, outer, peak, log_total, column, live,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scores and log-probabilities of some columns. Subtracting the logsumexp as one rounded number
    peak + log_total would lose more precision than subtracting its two parts in turn.
    """
    scores = scores_of(raw, bias, column, live, HAS_BIAS, DTYPE)
    return scores, logits_of(scores, inner, outer, CAPPED) - peak - log_total


@triton.jit
def _log_mixture(p, q, beta, dtype: tl.constexpr):
    """log((1 - beta) p + beta q), finite even if both have underflowed."""
    tiny = 2.2250738585072014e-308 if dtype == tl.float64 else 1.1754943508222875e-38
    return tl.log(tl.maximum((1.0 - beta) * p + beta * q, tiny))


@triton.jit
def _zero_where(condition, value):
    """The value, or 0 where the condition holds: 0 times infinity would be NaN."""
    return tl.where(condition, 0.0, value)


@triton.jit
def divergence_kernel(
    chunk,  # [n, V]
    stride,
    bias,  # [V]
    inner: tl.float64,
    outer: tl.float64,
    teacher_chunk,  # [n, V]
    teacher_stride,
    teacher_bias,  # [V]
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    columns,  # V
    beta: tl.float64,
    upstream,  # [n]
    losses,  # [n]
    out,  # [n, V], may be the chunk
    out_stride,
    KIND: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = losses.dtype.element_ty
    beta = tl.full((), beta, dtype)
    inner, outer = tl.full((), inner, dtype), tl.full((), outer, dtype)
    teacher_inner = tl.full((), teacher_inner, dtype)
    teacher_outer = tl.full((), teacher_outer, dtype)
    raw = chunk + row * stride
    teacher_raw = teacher_chunk + row * teacher_stride

    # Accumulate the sum of exp(z) (z - y), with z and y relative to the largest logit so far. z and
    # y are the logits of student and teacher; for a forward KL they are swapped.
    peak = tl.full((), float("-inf"), dtype)
    total = tl.zeros((), dtype)
    other_peak = tl.full((), float("-inf"), dtype)
    other_total = tl.zeros((), dtype)
    expected = tl.zeros((), dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        scores = scores_of(raw, bias, column, live, HAS_BIAS, dtype)
        z = tl.where(live, logits_of(scores, inner, outer, CAPPED), float("-inf"))
        scores = scores_of(teacher_raw, teacher_bias, column, live, TEACHER_HAS_BIAS, dtype)
        y = logits_of(scores, teacher_inner, teacher_outer, TEACHER_CAPPED)
        y = tl.where(live, y, float("-inf"))
        if KIND == FORWARD:
            z, y = y, z
        new_peak = tl.maximum(peak, tl.max(z))
        new_other_peak = tl.maximum(other_peak, tl.max(y))
        shift, other_shift = origin(new_peak), origin(new_other_peak)
        z -= shift
        y -= other_shift
        total, expected = carry(total, expected, peak - shift)
        other_gap = other_peak - other_shift
        expected -= _zero_where(total == 0.0, total * other_gap)
        weights = tl.exp(z)
        total += tl.sum(weights)
        expected += tl.sum(_zero_where(weights == 0.0, weights * (z - y)))
        other_total = other_total * tl.exp(other_gap) + tl.sum(tl.exp(y))
        peak, other_peak = new_peak, new_other_peak
    log_total, other_log_total = tl.log(total), tl.log(other_total)
    loss = expected / total - (log_total - other_log_total)
    if KIND == FORWARD:
        peak, log_total, other_peak, other_log_total = other_peak, other_log_total, peak, log_total

    # The gradient is p (w - sum p w). For the reverse KL w = log p - log q, so sum p w is the loss.
    mean = loss
    if KIND == JSD:
        mean = tl.zeros((), dtype)
        from_teacher = tl.zeros((), dtype)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            live = column < columns
            _, log_p = _log_probs(
                raw, bias, inner, outer, peak, log_total, column, live, HAS_BIAS, CAPPED, dtype
            )
            _, log_q = _log_probs(
                teacher_raw, teacher_bias, teacher_inner, teacher_outer, other_peak,
                other_log_total, column, live, TEACHER_HAS_BIAS, TEACHER_CAPPED, dtype,
            )  # fmt: skip
            p = _zero_where(live == 0, tl.exp(log_p))
            q = _zero_where(live == 0, tl.exp(log_q))
            log_m = _log_mixture(p, q, beta, dtype)
            mean += tl.sum(_zero_where(p == 0.0, p * (1.0 - beta) * (log_p - log_m)))
            from_teacher += tl.sum(_zero_where(q == 0.0, q * beta * (log_q - log_m)))
        loss = mean + from_teacher
    tl.store(losses + row, loss)

    if HAS_GRADIENT:
        scale = tl.load(upstream + row)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            live = column < columns
            scores, log_p = _log_probs(
                raw, bias, inner, outer, peak, log_total, column, live, HAS_BIAS, CAPPED, dtype
            )
            _, log_q = _log_probs(
                teacher_raw, teacher_bias, teacher_inner, teacher_outer, other_peak,
                other_log_total, column, live, TEACHER_HAS_BIAS, TEACHER_CAPPED, dtype,
            )  # fmt: skip
            p, q = tl.exp(log_p), tl.exp(log_q)
            if KIND == FORWARD:
                dlogits = p - q
            else:
                w = log_p - log_q
                if KIND == JSD:
                    w = (1.0 - beta) * (log_p - _log_mixture(p, q, beta, dtype))
                dlogits = _zero_where(p == 0.0, p * (w - mean))
            dlogits = _zero_where(scale == 0.0, dlogits * scale)
            dscores = dlogits * derivatives_of(scores, inner, outer, CAPPED)
            tl.store(out + row * out_stride + column, dscores.to(out.dtype.element_ty), mask=live)
